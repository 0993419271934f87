"""Packs: the row models and topics of each bundled schema.

Every module of this package is a pack and defines `PACK`; `bundled` finds them all.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import Enum
from functools import cache, cached_property
from hashlib import sha256
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from daemon.core.change import CONTENT, Change, Kind
from daemon.core.errors import OperatorFault
from daemon.core.jobs import BACKUP, Job
from daemon.core.json_text import emptied, quoted_numbers, replace_values
from daemon.core.row_pattern import row_pattern

ULID = "[0-7][0-9A-HJKMNP-TV-Z]{25}"
"""A ULID, as a part of a larger regular expression."""

NUMBER = "[1-9][0-9]{0,17}"
"""A `bigint` id, as a part of a larger regular expression; 18 digits always fit into a bigint."""

Ulid = Annotated[str, StringConstraints(pattern=rf"^{ULID}$")]
"""A ULID, as the checks of the tables require it."""

UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""A UUID as Postgres writes it, as a part of a larger regular expression."""

Uuid = Annotated[str, StringConstraints(pattern=rf"^{UUID}$")]
"""A UUID as Postgres writes it."""

SERIAL = "[1-9][0-9]{0,9}"
"""The id of a `serial` column in a topic, as a part of a larger regular expression."""

Serial = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
"""The id of a `serial` column: any integer, because an INSERT may choose it."""


LONG_RECORD: Final = 4000
"""Characters from which on a record is validated in less time than its text takes to be recognised."""

MANY_ARRAYS: Final = 5000
"""Arrays beyond which JSON columns are skipped, not parsed: the parser reserves room in each."""


class Column(Enum):
    """A type whose values no parser of JSON holds whole. It is part of the annotation of such a column."""

    BIGINT = "bigint"
    NUMERIC = "numeric"
    JSON = "json"


BigInt = Annotated[int, Column.BIGINT]
"""An int8."""

Numeric = Annotated[Decimal, Field(allow_inf_nan=True), Column.NUMERIC]
"""A numeric: any number of digits, or one of the strings `NaN`, `Infinity` and `-Infinity`."""

JsonObject = Annotated[dict[str, Any], Column.JSON]
"""A json or jsonb object; its members are up to the application and not validated."""

_DAY = "[0-9]{4,}-[0-9]{2}-[0-9]{2}"
_TIME = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"

_TIMESTAMP = rf"^(-?infinity|{_DAY}T{_TIME}[+-][0-9]{{2}}:[0-9]{{2}}( BC)?)$"
_DATE = rf"^(-?infinity|{_DAY}( BC)?)$"

Timestamp = Annotated[
    str,
    Field(
        pattern=_TIMESTAMP,
        json_schema_extra={"format": "postgres timestamptz"},
    ),
]
"""A timestamptz as Postgres writes it into JSON: RFC 3339 from year 1 to 9999, and beyond as in docs/types.md."""

Date = Annotated[str, Field(pattern=_DATE, json_schema_extra={"format": "postgres date"})]
"""A date as Postgres writes it into JSON."""

_ORDINARY_DAY = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_ORDINARY_TIME = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6}+)?+[+-][0-9]{2}:[0-9]{2}"
PLAIN_PATTERNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        f"^{ULID}$": ULID,
        f"^{UUID}$": UUID,
        _TIMESTAMP: f"{_ORDINARY_DAY}T{_ORDINARY_TIME}",
        _DATE: _ORDINARY_DAY,
    }
)
"""For the patterns above, one of ordinary texts that match, none of which has a quotation mark: with fewer choices it
takes half the time."""


class UnknownPack(OperatorFault):
    """There is no pack "{pack}": choose among {known}."""

    exit_code: ClassVar[int] = 64

    def __init__(self, pack: str, known: Sequence[str]) -> None:
        self.pack, self.known = pack, ", ".join(known)


class Row(BaseModel):
    """The base of a row model: exactly the published columns of one table. Validate JSON text, not Python objects."""

    # Built at the first use: commands that only read the settings import every pack.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False, defer_build=True
    )

    key: ClassVar[tuple[str, ...]] = ("id",)
    """The key columns, as passed to `rowcast.watch`."""


def columns_of(row: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a row model by the names of their columns, which not every attribute can have."""
    return {field.alias or name: field for name, field in row.model_fields.items()}


@cache
def key_model(row: type[Row]) -> type[BaseModel]:
    """The model of the keys of these rows."""
    columns = columns_of(row)
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in row.model_fields.items()
        if any(columns[column] is field for column in row.key)
    }
    return create_model(f"{row.__name__}Key", __config__=row.model_config, **fields)


@dataclass(frozen=True)
class PackSecret:
    """A secret that a pack needs. It becomes the settings ROWCAST_<NAME> and ROWCAST_<NAME>_FILE.

    `validate` returns the secret, or raises a ValueError that says what is needed and reveals nothing of the secret.
    """

    name: str
    description: str
    file_description: str
    validate: Callable[[SecretStr], SecretStr]


@dataclass(frozen=True)
class Pack:
    """One bundled schema. `topics` are regular expressions; a topic of the pack fully matches one of them.

    The hooks are functions in the schema. `presence_hook` is called with two arrays: the users who are present in a
    topic of the pack and were in none before, and those who are in none any more. `ack_hook` is called with an array
    of users and one of their devices, which have acknowledged a position. `may_signal` is asked whether a user may
    send signals in a topic; without it, those may who follow the topic.
    """

    name: str
    tables: Mapping[str, type[Row]]
    topics: tuple[str, ...]
    secrets: tuple[PackSecret, ...] = ()
    jobs: tuple[Job, ...] = ()
    may_signal: str | None = None
    presence_hook: str | None = None
    ack_hook: str | None = None
    is_default: bool = False  # served if no pack is chosen
    is_internal: bool = False  # its topics are not for clients
    migrates_on_start: bool = False  # a daemon that serves it applies pending revisions first

    @property
    def functions(self) -> list[str]:
        """The functions in the schema that a daemon calls."""
        return ["may_read", *filter(None, (self.may_signal, self.presence_hook, self.ack_hook))]

    @cached_property
    def _match_topic(self) -> Callable[[str], re.Match[str] | None]:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.topics) or "(?!)").fullmatch

    def serves(self, topic: str) -> bool:
        """Whether this is a topic of the pack."""
        return self._match_topic(topic) is not None

    def problem(self, change: Change) -> str | None:
        """Why a change must not be sent, in words that reveal nothing of its content; None if it is valid."""
        row = self.tables.get(change.model or change.table)
        if row is None:
            return "table: no_row_model"
        record = self._shown(row, change)
        if record is not None and change.kind in CONTENT and _validator(row)(change.key, record):
            return None
        match change.kind:
            case Kind.INSERT | Kind.UPDATE | Kind.RESTORE:
                if record is None:
                    return "record: missing"
                return _problem("key", row, change.key) or _problem("record", row, record)
            case Kind.DELETE | Kind.LEAVE:
                if change.record is not None:
                    return "record: not_expected"
                return _problem("key", row, change.key)
            case Kind.TRUNCATE | Kind.LOST | Kind.LIMIT | Kind.INVALID:
                if change.record is not None:
                    return "record: not_expected"
                return None if change.key == "{}" else "key: not_expected"

    def validator(self, change: Change) -> Callable[[str, str], bool] | None:
        """Whether a key and a record fit the row model of this change. False does not prove that they do not."""
        row = self.tables.get(change.model or change.table)
        return None if row is None else _validator(row)

    def needs_record(self, change: Change) -> bool:
        """Whether the outline of a change lacks something that its row model examines."""
        row = self.tables.get(change.model or change.table)
        if row is None or change.outline is None:
            return False
        return not _examined_columns(row).isdisjoint(change.outline.emptied)

    def _shown(self, row: type[Row], change: Change) -> str | None:
        """What is validated of a record: where that is enough, its outline."""
        if change.outline is None or (change.record is not None and self.needs_record(change)):
            return change.record
        return change.outline.text

    def with_exact_numbers(self, change: Change) -> Change:
        """The same change with every int8 and numeric of its key and record as a string with exactly its digits."""
        row = self.tables.get(change.model or change.table)
        columns = _exact_columns(row) if row is not None else {}
        if not columns:
            return change
        record = change.record and replace_values(change.record, columns)
        return change._replace(key=replace_values(change.key, columns), record=record)


@cache
def special_columns(row: type[Row]) -> Mapping[str, Column]:
    """The columns whose annotation names a Column, also within an array or a union."""
    found = {name: set(_columns_in((field.annotation, *field.metadata))) for name, field in columns_of(row).items()}
    return {name: column for name, columns in found.items() for column in columns}


def _columns_in(annotations: Iterable[object]) -> Iterator[Column]:
    for annotation in annotations:
        if isinstance(annotation, Column):
            yield annotation
        yield from _columns_in(get_args(annotation))


@cache
def _exact_columns(row: type[Row]) -> Mapping[str, Callable[[str], str]]:
    return {name: quoted_numbers for name, column in special_columns(row).items() if column is not Column.JSON}


@cache
def _unparsed_columns(row: type[Row]) -> Mapping[str, Callable[[str], str]]:
    """What to put in place of values that pydantic cannot parse: Postgres has done so."""
    replacements = {Column.JSON: emptied, Column.NUMERIC: quoted_numbers}
    return {name: replacements[column] for name, column in special_columns(row).items() if column in replacements}


@cache
def _examined_columns(row: type[Row]) -> frozenset[str]:
    """The columns of whose values a row model demands more than that their JSON has a certain type."""
    columns = columns_of(row).items()
    return frozenset(name for name, field in columns if _is_examined(field.annotation, field.metadata))


def _is_examined(annotation: Any, metadata: Iterable[object]) -> bool:  # noqa: ANN401 - a type
    if not all(isinstance(each, Column) for each in metadata):
        return True
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return _is_examined(inner, metadata)
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_examined(part, ()) for part in get_args(annotation))
    return annotation not in (str, Any, list[Any], dict[str, Any], NoneType)


@cache
def _validator(row: type[Row]) -> Callable[[str, str], bool]:
    """A fast path for valid records, which nearly all are."""
    key_pattern, validate_key = _validation(key_model(row))
    record_pattern, validate_record = _validation(row)
    is_key, is_ordinary = key_pattern.fullmatch, re.compile(key_pattern.pattern + record_pattern.pattern).fullmatch
    open_fields = [name for name, field in row.model_fields.items() if _is_open(field)]
    json_columns = {name: emptied for name, column in special_columns(row).items() if column is Column.JSON}

    def is_valid(key: str, record: str) -> bool:
        # Both at once: to begin a search takes as long as to look at a key.
        if len(record) < LONG_RECORD and "\\" not in (both := key + record) and is_ordinary(both):
            return True
        try:
            if not is_key(key) or "\\" in key:
                validate_key(key)
            if json_columns and len(record) > MANY_ARRAYS and record.count("[") > MANY_ARRAYS:
                record = replace_values(record, json_columns)
            found = validate_record(record)
        except Exception:  # noqa: BLE001 - _problem says what is wrong
            return False
        # pydantic parses these as numbers, which a browser's JSON.parse does not. To search costs more than to look.
        for name in open_fields:
            if getattr(found, name):
                return "NaN" not in record and "Infinity" not in record
        return True

    return is_valid


def _validation(model: type[BaseModel]) -> tuple[re.Pattern[str], Callable[[str], BaseModel]]:
    """The pattern of ordinary texts without a backslash, which are valid; and what parses any text."""
    model.model_rebuild()
    pattern = row_pattern(model.__pydantic_core_schema__, PLAIN_PATTERNS)
    return pattern, model.__pydantic_validator__.validate_json


def _is_open(field: FieldInfo) -> bool:
    """Whether a value of this field may be, or hold, what is no JSON number. Every other type refuses that."""
    annotations = (field.annotation, *field.metadata)
    return any(_columns_in(annotations)) or any(_holds_any(annotation) for annotation in annotations)


def _holds_any(annotation: object) -> bool:
    return annotation is Any or any(_holds_any(part) for part in get_args(annotation))


def _problem(part: Literal["key", "record"], row: type[Row], text: str) -> str | None:
    model = row if part == "record" else key_model(row)
    try:
        # What is inside a JSON column is the application's, however deep and long: only the row's shape is validated.
        model.__pydantic_validator__.validate_json(replace_values(text, _unparsed_columns(row)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # A name that the model does not have is part of the input, and must not be revealed.
        known = [str(place) for place in first["loc"][:1] if place in columns_of(model)]
        return " ".join([f"{part}:", first["type"], *known])
    except ValueError:
        return f"{part}: json_invalid"
    return None


@cache
def bundled() -> Mapping[str, Pack]:
    """All bundled packs, by name."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    packs: list[Pack] = [importlib.import_module(name).PACK for name in names]
    return MappingProxyType({pack.name: pack for pack in packs})


def by_schema(schemas: Mapping[str, str]) -> dict[str, Pack]:
    """The packs named by the keys of `schemas`, by the schema that each lives in. Raises UnknownPack."""
    packs = bundled()
    for name in schemas:
        if name not in packs:
            raise UnknownPack(name, list(packs))
    return {schema: packs[name] for name, schema in schemas.items()}


def contract_hash(packs: Iterable[Pack]) -> str:
    """A short hash of every payload contract. It changes when a row model does, but not with its docstrings."""
    contracts = {
        f"{pack.name}.{table}": _without_prose(TypeAdapter(model).json_schema())
        for pack in packs
        for table, model in pack.tables.items()
    }
    return sha256(json.dumps(contracts, sort_keys=True).encode()).hexdigest()[:12]


def _without_prose(schema: Any) -> Any:  # noqa: ANN401 - any part of a JSON schema
    """The schema without descriptions. A column of that name is kept: its value is a schema, not a text."""
    if isinstance(schema, dict):
        kept = {name: part for name, part in schema.items() if name != "description" or not isinstance(part, str)}
        return {name: _without_prose(part) for name, part in kept.items()}
    return [_without_prose(part) for part in schema] if isinstance(schema, list) else schema


def default_packs() -> tuple[str, ...]:
    """The names of the packs that are served if none is chosen."""
    return tuple(name for name, pack in bundled().items() if pack.is_default)


def pack_secrets() -> dict[str, PackSecret]:
    """The secrets that all bundled packs declare, by name."""
    return {secret.name: secret for pack in bundled().values() for secret in pack.secrets}


@cache
def bundled_jobs() -> Mapping[str, Job]:
    """The jobs that all bundled packs declare, and the one that belongs to no pack, by name."""
    jobs = [replace(job, pack=pack.name) for pack in bundled().values() for job in pack.jobs]
    return MappingProxyType({job.name: job for job in (*jobs, BACKUP)})
