"""Packs: for each bundled schema, what a published row looks like and which topics there are.

A pack is one module of this package that holds a `PACK`. It is found by being there: no list names it.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

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
from pydantic_core import from_json

from daemon.core.change import CONTENT, Change, Kind
from daemon.core.errors import OperatorFault

ULID = "[0-7][0-9A-HJKMNP-TV-Z]{25}"
"""What a ULID looks like, to be built into a larger pattern."""

NUMBER = "[1-9][0-9]{0,17}"
"""What an id looks like that is counted up, to be built into a larger pattern; it always fits into a bigint."""

Ulid = Annotated[str, StringConstraints(pattern=rf"^{ULID}$")]
"""An id as the tables' checks have it."""

UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""What a UUID looks like as Postgres writes it, to be built into a larger pattern."""

Uuid = Annotated[str, StringConstraints(pattern=rf"^{UUID}$")]
"""A uuid as Postgres writes it."""

SERIAL = "[1-9][0-9]{0,9}"
"""What the id of a `serial` column looks like in a topic, to be built into a larger pattern."""

Serial = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""The id that a `serial` column gives."""

Timestamp = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?[+-][0-9]{2}:[0-9]{2}$",
        json_schema_extra={"format": "date-time"},
    ),
]
"""A timestamptz as Postgres writes it into JSON: RFC 3339 with an offset. `infinity` is none."""

Date = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", json_schema_extra={"format": "date"})]
"""A date as Postgres writes it into JSON. `infinity` is none."""

JsonObject = dict[str, Any]
"""A jsonb object whose members are the application's own affair."""


class UnknownPack(OperatorFault):
    """There is no pack "{pack}": choose among {known}."""

    exit_code: ClassVar[int] = 64

    def __init__(self, pack: str, known: Sequence[str]) -> None:
        self.pack, self.known = pack, ", ".join(known)


class Row(BaseModel):
    """The published columns of one table, all of them and no others; it reads JSON text only."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    key: ClassVar[tuple[str, ...]] = ("id",)
    """The columns that tell one row from another, as `rowcast.watch` was given them."""


@cache
def _key_model(row: type[Row]) -> type[BaseModel]:
    fields: dict[str, Any] = {
        column: (row.model_fields[column].annotation, row.model_fields[column]) for column in row.key
    }
    return create_model(f"{row.__name__}Key", __config__=row.model_config, **fields)


@dataclass(frozen=True)
class PackSecret:
    """A secret that a pack needs: it becomes the settings ROWCAST_<NAME> and ROWCAST_<NAME>_FILE.

    `validate` returns the secret, or raises ValueError with what is needed, and without a word of the secret.
    """

    name: str
    description: str
    file_description: str
    validate: Callable[[SecretStr], SecretStr]


@dataclass(frozen=True)
class Pack:
    """One bundled schema. `topics` are regular expressions that a topic of this pack matches as a whole."""

    name: str
    tables: Mapping[str, type[Row]]
    topics: tuple[str, ...]
    secrets: tuple[PackSecret, ...] = ()
    is_default: bool = False  # served where no pack is named

    def serves(self, topic: str) -> bool:
        """Has this topic one of the pack's shapes?"""
        return any(re.fullmatch(shape, topic) for shape in self.topics)

    def problem(self, change: Change) -> str | None:
        """Why a change must not be sent, in a few words that hold nothing of its content; None if it may."""
        row = self.tables.get(change.model or change.table)
        if row is None:
            return "table: no_row_model"
        if change.record is not None and change.kind in CONTENT and _is_valid(row, change.key, change.record):
            return None
        match change.kind:
            case Kind.INSERT | Kind.UPDATE | Kind.RESTORE:
                if change.record is None:
                    return "record: missing"
                return _problem("key", _key_model(row), change.key) or _problem("record", row, change.record)
            case Kind.DELETE | Kind.LEAVE:
                if change.record is not None:
                    return "record: not_expected"
                return _problem("key", _key_model(row), change.key)
            case Kind.TRUNCATE | Kind.LOST | Kind.LIMIT:
                if change.record is not None:
                    return "record: not_expected"
                return None if change.key == "{}" else "key: not_expected"


@cache
def _checks(row: type[Row]) -> tuple[Callable[[str], object], Callable[[str], object]]:
    return _key_model(row).__pydantic_validator__.validate_json, row.__pydantic_validator__.validate_json


def _is_valid(row: type[Row], key: str, record: str) -> bool:
    """The quick way for what is valid, as nearly everything is; False says nothing."""
    check_key, check_record = _checks(row)
    if "NaN" in record or "Infinity" in record:
        return False
    try:
        check_key(key)
        check_record(record)
    except ValidationError:
        return False
    return True


def _problem(part: str, model: type[BaseModel], text: str) -> str | None:
    try:
        # pydantic takes NaN and Infinity for numbers, which a browser would not. As words they are rare, so
        # that few texts are read twice.
        if "NaN" in text or "Infinity" in text:
            from_json(text, allow_inf_nan=False)
        model.__pydantic_validator__.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # A name that the model does not know came with the input, and stays there.
        known = [str(place) for place in first["loc"][:1] if place in model.model_fields]
        return " ".join([f"{part}:", first["type"], *known])
    except ValueError:
        return f"{part}: json_invalid"
    return None


@cache
def bundled() -> Mapping[str, Pack]:
    """Every pack that comes with Rowcast, by name."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    packs: list[Pack] = [importlib.import_module(name).PACK for name in names]
    return MappingProxyType({pack.name: pack for pack in packs})


def by_schema(schemas: Mapping[str, str]) -> dict[str, Pack]:
    """The packs named by the keys of `schemas`, under the schema each lives in. Raises UnknownPack."""
    packs = bundled()
    for name in schemas:
        if name not in packs:
            raise UnknownPack(name, list(packs))
    return {schema: packs[name] for name, schema in schemas.items()}


def contract_hash(packs: Iterable[Pack]) -> str:
    """A short hash of every payload contract: it changes when a row model does."""
    contracts = {
        f"{pack.name}.{table}": TypeAdapter(model).json_schema()
        for pack in packs
        for table, model in pack.tables.items()
    }
    return sha256(json.dumps(contracts, sort_keys=True).encode()).hexdigest()[:12]


def default_packs() -> tuple[str, ...]:
    """The packs that are served where none is named."""
    return tuple(name for name, pack in bundled().items() if pack.is_default)


def pack_secrets() -> dict[str, PackSecret]:
    """The secrets that all bundled packs declare, by name."""
    return {secret.name: secret for pack in bundled().values() for secret in pack.secrets}
