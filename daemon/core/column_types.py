"""The types of columns that filters can compare: their values, read as Postgres writes them, in Postgres' order.

A filter writes a value as it stands in a frame. So one parser per type reads both, and what it returns compares as
the values do in Postgres: text by its bytes (collation "C"), numbers exactly, times as instants. docs/protocol.md
lists the types; `rowcast.compared_columns` in triggers/rowcast.sql names them.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

Value = Any
"""What values of a column are compared as: each type has its own, and only equal types meet."""


class JsonNumber(str):
    """A number with a fraction or an exponent, with exactly the digits that the client wrote."""

    __slots__ = ()


_EQUALITY: Final = frozenset({"eq", "ne", "in", "is_null"})
_ORDER: Final = _EQUALITY | {"lt", "lte", "gt", "gte"}
_TEXT: Final = _ORDER | {"like", "ilike", "starts_with"}

OPERATORS: Final = _TEXT
"""All operators that there are."""


@dataclass(frozen=True, slots=True)
class ColumnType:
    """How values of a type are written and compared. `parse` raises ValueError for what the type cannot hold."""

    form: str
    operators: frozenset[str]
    parse: Callable[[str], Value]
    json: tuple[type, ...] = (str,)


@dataclass(frozen=True, slots=True)
class Column:
    """A published column. `type` is None if its values cannot be compared; `labels` are those of an enumeration."""

    name: str
    type: str | None
    labels: frozenset[str] = frozenset()

    @property
    def operators(self) -> frozenset[str]:
        """The operators that its type has."""
        found = TYPES.get(self.type or "")
        return found.operators if found is not None else frozenset({"is_null"})

    def text(self, value: object) -> str:
        """The text of a value that a filter names, as Postgres reads it. Raises ValueError: what it must be."""
        type_ = TYPES[self.type or ""]
        if not isinstance(value, type_.json) or (isinstance(value, bool) and bool not in type_.json):
            raise ValueError(type_.form)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if self.labels and text not in self.labels:
            raise ValueError(type_.form)
        try:
            self.parse(text)
        except ValueError:
            raise ValueError(type_.form) from None
        return text

    def parse(self, text: str) -> Value:
        """The value of this text. Raises ValueError. A label may be newer than this."""
        return TYPES[self.type or ""].parse(text)


def _integer(end: int) -> Callable[[str], int]:
    matches = re.compile("-?[0-9]{1,40}").fullmatch

    def parse(text: str) -> int:
        if not matches(text) or not -end <= (value := int(text)) < end:
            raise ValueError
        return value

    return parse


_NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,6})?")
_NAN: Final = (1, 0)  # Postgres: greater than every number, and equal to itself
_SPECIAL: Final = {"NaN": _NAN, "Infinity": (0, Decimal("Infinity")), "-Infinity": (0, Decimal("-Infinity"))}


def _numeric(text: str) -> Value:
    if text in _SPECIAL:
        return _SPECIAL[text]
    if not _NUMBER.fullmatch(text):
        raise ValueError
    value = Decimal(text)
    exponent = value.as_tuple().exponent
    if (value and value.adjusted() >= 131072) or not isinstance(exponent, int) or exponent < -16383:
        raise ValueError  # Postgres would refuse or round it
    return (0, value)


def _floating(code: str) -> Callable[[str], Value]:
    packing = struct.Struct(code)

    def parse(text: str) -> Value:
        if text in _SPECIAL:
            return _NAN if text == "NaN" else (0, float(text))
        if not _NUMBER.fullmatch(text):
            raise ValueError
        value = float(text)
        try:
            [rounded] = packing.unpack(packing.pack(value))
        except OverflowError:
            raise ValueError from None
        if abs(rounded) == float("inf") or (not rounded and re.search("[1-9]", text.lower().partition("e")[0])):
            raise ValueError  # too large, or too small
        return (0, rounded)

    return parse


def _text(text: str) -> str:
    if "\0" in text:
        raise ValueError
    return text


def _char(text: str) -> str:
    return _text(text).rstrip(" ")


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text]


_is_uuid: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch


def _uuid(text: str) -> str:
    if not _is_uuid(lower := text.lower()):
        raise ValueError
    return lower


_DAY: Final = r"(?P<year>[0-9]{4,7})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"
_CLOCK: Final = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,6}))?"
_OFFSET: Final = r"(?:Z|(?P<sign>[+-])(?P<hours>[0-9]{2}):(?P<minutes>[0-9]{2}))"
_DATE: Final = re.compile(rf"{_DAY}(?P<bc> BC)?")
_TIMESTAMP: Final = re.compile(rf"{_DAY}[T ]{_CLOCK}(?P<bc> BC)?")
_TIMESTAMPTZ: Final = re.compile(rf"{_DAY}[T ]{_CLOCK}{_OFFSET}(?P<bc> BC)?")
_MONTH_DAYS: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_INFINITE: Final = {"infinity": float("inf"), "-infinity": float("-inf")}


def _days(found: re.Match[str]) -> int:
    """The days from 1970-01-01 to this one, in the Gregorian calendar of all times. Raises ValueError."""
    year, month, day = int(found["year"]), int(found["month"]), int(found["day"])
    if year == 0:
        raise ValueError
    if found["bc"]:
        year = 1 - year
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if not 1 <= month <= 12 or not 1 <= day <= _MONTH_DAYS[month - 1] - (month == 2 and not is_leap):
        raise ValueError
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)  # years that begin in March
    return year * 365 + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 719469


_DAY_0: Final = -2440588  # 4714-11-24 BC, the first that Postgres holds
_MICROSECONDS: Final = 86_400_000_000


def _date(text: str) -> float:
    if text in _INFINITE:
        return _INFINITE[text]
    found = _DATE.fullmatch(text)
    if found is None or not _DAY_0 <= (days := _days(found)) < _DAY_0 + 2147483494:
        raise ValueError
    return days


def _instant(pattern: re.Pattern[str]) -> Callable[[str], float]:
    """Microseconds since 1970 of a timestamp, in UTC if the pattern has an offset."""
    last = (_days(_match(_DATE, "294277-01-01"))) * _MICROSECONDS

    def parse(text: str) -> float:
        if text in _INFINITE:
            return _INFINITE[text]
        found = _match(pattern, text)
        hour, minute, second = int(found["hour"]), int(found["minute"]), int(found["second"])
        if hour > 23 or minute > 59 or second > 59:
            raise ValueError
        seconds = hour * 3600 + minute * 60 + second
        if pattern is _TIMESTAMPTZ and found["sign"]:
            hours, minutes = int(found["hours"]), int(found["minutes"])
            if hours > 15 or minutes > 59:
                raise ValueError
            seconds -= int(found["sign"] + "1") * (hours * 3600 + minutes * 60)
        fraction = int((found["fraction"] or "").ljust(6, "0"))
        instant = _days(found) * _MICROSECONDS + seconds * 1_000_000 + fraction
        if not _DAY_0 * _MICROSECONDS <= instant < last:
            raise ValueError
        return instant

    return parse


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ValueError
    return found


_NUMBERS: Final = (int, JsonNumber, str)

TYPES: Final[Mapping[str, ColumnType]] = {
    "smallint": ColumnType("a whole number of 16 bits", _ORDER, _integer(2**15), (int, str)),
    "integer": ColumnType("a whole number of 32 bits", _ORDER, _integer(2**31), (int, str)),
    "bigint": ColumnType("a whole number of 64 bits", _ORDER, _integer(2**63), (int, str)),
    "numeric": ColumnType("a number, or a string with its digits", _ORDER, _numeric, _NUMBERS),
    "real": ColumnType("a number that a real can hold", _ORDER, _floating("<f"), _NUMBERS),
    "double precision": ColumnType("a number that a double can hold", _ORDER, _floating("<d"), _NUMBERS),
    "text": ColumnType("a string without U+0000", _TEXT, _text),
    "character": ColumnType("a string without U+0000", _TEXT, _char),
    "enum": ColumnType("a label of the type", _EQUALITY, _text),
    "json": ColumnType("", frozenset({"is_null"}), _text),
    "boolean": ColumnType("true or false", _EQUALITY, _boolean, (bool,)),
    "uuid": ColumnType("a UUID", _ORDER, _uuid),
    "date": ColumnType('a date like "2026-01-10"', _ORDER, _date),
    "timestamp": ColumnType('a time without an offset, like "2026-01-10T12:00:00"', _ORDER, _instant(_TIMESTAMP)),
    "timestamptz": ColumnType('a time with its offset, like "2026-01-10T12:00:00Z"', _ORDER, _instant(_TIMESTAMPTZ)),
}
"""By the name that Postgres has for the type. A domain has the type that it is over."""
