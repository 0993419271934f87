"""What a follower sees of a topic: which rows, by a filter, and which of their columns.

A filter is checked against the columns that the topic's tables publish, and becomes a test of records. It has the
three-valued logic of SQL: what is compared with a NULL is unknown, and only what is true is sent. The same filter, in
the form of `View.condition`, is made into SQL by `rowcast.filter_condition`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

from pydantic_core import to_json

from daemon.core.change import Change, Kind, Outline, Seq
from daemon.core.column_types import OPERATORS, Column, Value
from daemon.core.errors import BadFilter, FilterTooLarge
from daemon.core.json_text import members
from daemon.core.patterns import ascii_lower, like

MAX_DEPTH: Final = 8  # of `and`, `or` and `not` within each other
MAX_TERMS: Final = 64  # comparisons, in all tables
MAX_IN: Final = 100  # values of an `in`
MAX_PATTERNS: Final = 16  # `like` and `ilike`, in all tables
MAX_PATTERN: Final = 100  # characters of each
MAX_MATCHED: Final = 65_536  # characters of a value that is compared with a pattern: as in rowcast.filter_condition
MAX_FILTER: Final = 65_536  # characters of all filters of a connection by default: they are kept in several forms
MAX_SHOWN: Final = 64  # characters of a client's name that an error repeats

Tables = Mapping[str, Mapping[str, Column]]
"""The published columns of the tables that a topic is made of."""

Verdict = bool | None
"""True, false or unknown."""


class Asked(NamedTuple):
    """The members `where` and `columns` of a subscribe, as the client sent them."""

    where: object
    columns: object


class Cells:
    """The values of one record, each read when it is first asked for: from its outline if that has it."""

    __slots__ = ("_found", "_outline", "_record", "_texts", "_values")

    def __init__(self, record: str, outline: Outline | None = None) -> None:
        self._record = record
        self._outline = None if outline is None else (Cells(outline.text), frozenset(outline.emptied))
        self._found: dict[str, object] | None = None
        self._texts: dict[str, str] | None = None
        self._values: dict[str, Value] = {}

    @property
    def texts(self) -> Mapping[str, str]:
        """The JSON text of each value."""
        if self._texts is None:
            self._texts = members(self._record)
        return self._texts

    def value(self, column: Column) -> Value:
        """The value of a column; None for NULL. Raises an error if it is not the column that it was."""
        name = column.name
        if self._outline is not None:
            short, emptied = self._outline
            if name not in emptied or column.type in (None, "json"):  # these are compared with NULL only
                return short.value(column)
        if name not in self._values:
            self._values[name] = self._read(column)
        return self._values[name]

    def texts_of(self, columns: frozenset[str]) -> Iterator[tuple[str, str]]:
        """The names of these columns and the JSON text of each, in the order of the record."""
        short = self._outline[0] if self._outline and columns.isdisjoint(self._outline[1]) else self
        texts = short.texts
        return ((name, text) for name, text in texts.items() if name in columns)

    def _read(self, column: Column) -> Value:
        if self._found is None:
            self._found = self._parsed()
        found = self._found[column.name]
        if found is None or column.type in (None, "json"):
            return found
        if isinstance(found, bool):
            found = str(found).lower()
        if not isinstance(found, str):
            raise TypeError(column.name)
        return column.parse(found)

    def _parsed(self) -> dict[str, Any]:
        """The record with its numbers as text."""
        try:
            found: dict[str, Any] = json.loads(self._record, parse_int=str, parse_float=str)
        except RecursionError:  # some value nests too deep, which nobody compares
            nested = ("{", "[")
            return {
                name: text if text.startswith(nested) else json.loads(text, parse_int=str, parse_float=str)
                for name, text in self.texts.items()
            }
        return found


Test = Callable[[Cells], Verdict]


class _Condition(NamedTuple):
    """A part of a filter: its form for the server, the test, and the columns that it compares."""

    node: dict[str, Any]
    test: Test
    columns: frozenset[str]


@dataclass(frozen=True, slots=True)
class _TableView:
    """What is seen of one table: the rows for which `test` is true, and these `columns`; all of them if None."""

    test: Test | None
    compared: frozenset[str]
    columns: frozenset[str] | None

    def of(self, change: Change, cells: Cells) -> Change | None:
        """The change of a row as this view shows it; None if it does not."""
        is_update = change.kind is Kind.UPDATE
        # Where no compared column has changed, the row is seen now if it was before. Nobody has to know old values.
        may_have_entered_or_left = not is_update or not change.changed or not self.compared.isdisjoint(change.changed)
        if self.test is not None and not _is_true(self.test, cells):
            if is_update and may_have_entered_or_left:
                return change._replace(kind=Kind.LEAVE, record=None, changed=())
            return None
        if self.columns is None:
            return change
        changed = tuple(column for column in change.changed if column in self.columns)
        if not changed and not may_have_entered_or_left:
            return None
        return change._replace(record=self._record(cells), changed=changed)

    def _record(self, cells: Cells) -> str:
        texts = cells.texts_of(self.columns or frozenset())
        shown = (f"{to_json(name).decode()}:{text}" for name, text in texts)
        return f"{{{','.join(shown)}}}"


def _is_true(test: Test, cells: Cells) -> bool:
    try:
        return test(cells) is True
    except (KeyError, TypeError, ValueError):
        return True  # the column was altered since: rather too much than too little


class View:
    """What a follower sees of a topic. Views that show the same are equal, and their followers share frames."""

    __slots__ = ("_hash", "_key", "_tables", "condition")

    def __init__(self, tables: Mapping[str, _TableView], condition: Mapping[str, object], key: str) -> None:
        self._tables = tables
        self.condition = json.dumps(condition)  # of each table, for the server
        self._key = key
        self._hash = hash(key)

    @classmethod
    def of_condition(cls, condition: str) -> Self:
        """One for the server only, from the `condition` of another. Raises ValueError if that is no object."""
        try:
            found = json.loads(condition)
        except RecursionError:
            raise ValueError("a condition nests too deep") from None
        if not isinstance(found, dict):
            raise ValueError("a condition must be an object")  # noqa: TRY004 - as for other texts
        return cls({}, found, condition)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, View) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    @property
    def size(self) -> int:
        """How much it is to keep, in characters."""
        return len(self._key)

    def of_run(self, run: Iterable[Change], cells: dict[Seq, Cells]) -> list[Change]:
        """What is seen of these changes. `cells` keeps what was read of them, for other views.

        A change without a record is seen by all: whether its row was is not known any more.
        """
        seen: list[Change] = []
        for change in run:
            table = self._tables.get(change.table)
            if table is None or change.record is None:
                seen.append(change)
                continue
            if change.seq not in cells:
                cells[change.seq] = Cells(change.record, change.outline)
            shown = table.of(change, cells[change.seq])
            if shown is not None:
                seen.append(shown)
        return seen

    def of_row(self, row: Change) -> Change:
        """A row that the server has selected by `condition`, with the columns that are seen."""
        table = self._tables.get(row.table)
        if table is None or table.columns is None or row.record is None:
            return row
        return row._replace(record=table._record(Cells(row.record)))


def view(asked: Asked, tables: Tables) -> View:
    """Check what a client wants to see of these tables. Raises BadFilter and FilterTooLarge."""
    parser = _Parser()
    conditions: dict[str, _Condition] = {}
    for name, node in _object(asked.where, "where").items() if asked.where is not None else ():
        member = f"where.{_shown(name)}"
        conditions[name] = parser.condition(node, member, _table(name, member, tables), 0)
    columns: dict[str, frozenset[str]] = {}
    for name, names in _object(asked.columns, "columns").items() if asked.columns is not None else ():
        member = f"columns.{_shown(name)}"
        columns[name] = _columns(names, member, _table(name, member, tables))
    nodes = {name: condition.node for name, condition in conditions.items()}
    key = json.dumps([nodes, {name: sorted(of_table) for name, of_table in columns.items()}], sort_keys=True)
    views: dict[str, _TableView] = {}
    for name in {**conditions, **columns}:
        condition = conditions.get(name)
        test, compared = (condition.test, condition.columns) if condition else (None, frozenset[str]())
        views[name] = _TableView(test, compared, columns.get(name))
    return View(views, nodes, key)


def _table(name: str, member: str, tables: Tables) -> Mapping[str, Column]:
    if name not in tables:
        raise BadFilter(member, "the topic has no such table")
    return tables[name]


def _columns(names: object, member: str, known: Mapping[str, Column]) -> frozenset[str]:
    if not isinstance(names, list) or not names:
        raise BadFilter(member, "must be an array of at least one column")
    for place, name in enumerate(names):
        if not isinstance(name, str) or name not in known:
            raise BadFilter(f"{member}[{place}]", "the table publishes no such column")
    return frozenset(names)


def _object(value: object, member: str) -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        raise BadFilter(member, "must be an object with at least one member")
    return value


def _shown(name: str) -> str:
    return name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."


class _Parser:
    """Reads the conditions of a filter, and counts what is limited."""

    def __init__(self) -> None:
        self._terms = 0
        self._patterns = 0

    def condition(self, node: object, member: str, columns: Mapping[str, Column], depth: int) -> _Condition:
        """An object whose members must all be true."""
        parts: list[_Condition] = []
        for name, inner in _object(node, member).items():
            place = f"{member}.{_shown(name)}"
            if name in ("and", "or", "not"):
                if depth == MAX_DEPTH:
                    raise FilterTooLarge(place, MAX_DEPTH, "levels of and, or and not")
                parts.append(self._nested(name, inner, place, columns, depth + 1))
            elif name in columns:
                for operator, value in _object(inner, place).items():
                    parts.append(self._term(columns[name], operator, value, f"{place}.{_shown(operator)}"))
            else:
                raise BadFilter(place, "the table publishes no such column")
        return _all(parts)

    def _nested(self, name: str, node: object, member: str, columns: Mapping[str, Column], depth: int) -> _Condition:
        if name == "not":
            return _not(self.condition(node, member, columns, depth))
        if not isinstance(node, list) or not node:
            raise BadFilter(member, "must be an array of at least one condition")
        parts = [self.condition(part, f"{member}[{place}]", columns, depth) for place, part in enumerate(node)]
        return _all(parts) if name == "and" else _any(parts)

    def _term(self, column: Column, operator: str, value: object, member: str) -> _Condition:
        self._terms += 1
        if self._terms > MAX_TERMS:
            raise FilterTooLarge(member, MAX_TERMS, "comparisons")
        if operator not in OPERATORS:
            raise BadFilter(member, "there is no such operator")
        if operator not in column.operators:
            raise BadFilter(member, f"the column's type has only {', '.join(sorted(column.operators))}")
        self._patterns += operator in ("like", "ilike")
        if self._patterns > MAX_PATTERNS:
            raise FilterTooLarge(member, MAX_PATTERNS, "patterns")
        checked, test = _TERMS.get(operator, _compared)(column, operator, value, member)
        node = {"column": column.name, "type": column.type, "op": operator, "value": checked}
        return _Condition(node, test, frozenset({column.name}))


def _one(column: Column, value: object, member: str) -> str:
    """The text of a value of this column."""
    try:
        return column.text(value)
    except ValueError as error:
        hint = "; is_null finds what is null" if value is None else ""
        raise BadFilter(member, f"must be {error}{hint}") from None


def _known(column: Column, test: Callable[[Value], Verdict]) -> Test:
    """The test of a value, unknown for NULL."""

    def of_cells(cells: Cells) -> Verdict:
        value = cells.value(column)
        return None if value is None else test(value)

    return of_cells


_COMPARISONS: Final[Mapping[str, Callable[[Value], Callable[[Value], bool]]]] = {
    "eq": lambda other: lambda value: value == other,
    "ne": lambda other: lambda value: value != other,
    "lt": lambda other: lambda value: value < other,
    "lte": lambda other: lambda value: value <= other,
    "gt": lambda other: lambda value: value > other,
    "gte": lambda other: lambda value: value >= other,
    "starts_with": lambda other: lambda value: value.startswith(other),
}


def _compared(column: Column, operator: str, value: object, member: str) -> tuple[object, Test]:
    text = _one(column, value, member)
    other = text if operator == "starts_with" else column.parse(text)
    return text, _known(column, _COMPARISONS[operator](other))


def _in(column: Column, _: str, value: object, member: str) -> tuple[object, Test]:
    if not isinstance(value, list) or not value:
        raise BadFilter(member, "must be an array of at least one value")
    if len(value) > MAX_IN:
        raise FilterTooLarge(member, MAX_IN, "values in one in")
    texts = [_one(column, each, f"{member}[{place}]") for place, each in enumerate(value)]
    others = frozenset(map(column.parse, texts))
    return sorted(set(texts)), _known(column, lambda value: value in others)


def _is_null(column: Column, _: str, value: object, member: str) -> tuple[object, Test]:
    if not isinstance(value, bool):
        raise BadFilter(member, "must be true or false")
    return value, lambda cells: (cells.value(column) is None) is value


def _like(column: Column, operator: str, value: object, member: str) -> tuple[object, Test]:
    text = _one(column, value, member)
    if len(text) > MAX_PATTERN:
        raise FilterTooLarge(member, MAX_PATTERN, "characters in a pattern")
    try:
        matches = like(ascii_lower(text) if operator == "ilike" else text)
    except ValueError as error:
        raise BadFilter(member, str(error)) from None
    is_like = matches if operator == "like" else lambda value: matches(ascii_lower(value))
    return text, _known(column, lambda value: is_like(value) if len(value) <= MAX_MATCHED else None)


_TERMS: Final[Mapping[str, Callable[[Column, str, object, str], tuple[object, Test]]]] = {
    "in": _in,
    "is_null": _is_null,
    "like": _like,
    "ilike": _like,
}


def _not(part: _Condition) -> _Condition:
    inner = part.test

    def test(cells: Cells) -> Verdict:
        found = inner(cells)
        return None if found is None else not found

    return _Condition({"not": part.node}, test, part.columns)


def _all(parts: Sequence[_Condition]) -> _Condition:
    return _joined("and", parts, decisive=False)


def _any(parts: Sequence[_Condition]) -> _Condition:
    return _joined("or", parts, decisive=True)


def _joined(name: str, parts: Sequence[_Condition], *, decisive: bool) -> _Condition:
    """Several conditions, in an order that does not depend on how they were written. A `decisive` one decides."""
    nodes = {json.dumps(part.node, sort_keys=True): part for part in parts}
    parts = [nodes[text] for text in sorted(nodes)]
    if len(parts) == 1:
        return parts[0]
    tests = [part.test for part in parts]

    def test(cells: Cells) -> Verdict:
        verdict: Verdict = not decisive
        for each in tests:
            found = each(cells)
            if found is decisive:
                return decisive
            if found is None:
                verdict = None
        return verdict

    return _Condition(
        {name: [part.node for part in parts]}, test, frozenset().union(*(part.columns for part in parts))
    )
