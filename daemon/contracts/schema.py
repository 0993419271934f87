"""Everything that goes over the wire as JSON Schema: the frames, and the rows of the packs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args, get_type_hints
from urllib.parse import quote

from pydantic import TypeAdapter

from daemon.core.change import Numbers
from daemon.core.frames import ServerFrame
from daemon.core.wire import ClientFrame
from daemon.packs import Column, Pack, Row, contract_hash, special_columns

Schema = dict[str, Any]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_NOT_A_NUMBER: Final = {"enum": ["NaN", "Infinity", "-Infinity"]}
_DIGITS: Final = {"type": "string", "pattern": r"^-?[0-9]+$"}


@dataclass(frozen=True)
class Table:
    """A published table: the pack that it belongs to, its row model, and a name that no other one has."""

    pack: str
    table: str
    row: type[Row]
    name: str


def tables_of(packs: Iterable[Pack]) -> list[Table]:
    """The tables of these packs. A name consists of what the names of components may."""
    found: dict[str, Table] = {}
    for pack in packs:
        for table, row in pack.tables.items():
            name = re.sub(r"[^\w.-]", "_", f"{pack.name}.{table}", flags=re.ASCII)
            while name in found:
                name += "_"
            found[name] = Table(pack.name, table, row, name)
    return list(found.values())


def json_schema(packs: Iterable[Pack]) -> Schema:
    """One JSON Schema: a document is valid if it is a frame."""
    packs = list(packs)
    return {
        "$schema": DIALECT,
        "title": "rowcast.v1",
        "description": "A frame of the protocol. A server may send members that are not mentioned here.",
        "x-rowcast-schema": contract_hash(packs),
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in (*frames("client"), *frames("server"))],
        "$defs": definitions(packs, "#/$defs/"),
    }


def frames(side: str) -> dict[str, type]:
    """The classes of the frames of one side, `client` or `server`, by their names in the contracts."""
    classes = get_args(ClientFrame if side == "client" else ServerFrame)
    return {f"{side}.{get_args(get_type_hints(found)['op'])[0]}": found for found in classes}


def definitions(packs: Iterable[Pack], place: str) -> dict[str, Schema]:
    """All schemas by name: `client.OP`, `server.OP`, what these consist of, and `PACK.TABLE`.

    `place` is where they will be, as the beginning of a reference.
    """
    found: dict[str, Schema] = {}
    for side in ("client", "server"):
        for name, frame in frames(side).items():
            schema = _tidy(TypeAdapter(frame).json_schema(ref_template=f"{place}{side}.{{model}}"), optional=True)
            found |= {f"{side}.{part}": value for part, value in schema.pop("$defs", {}).items()}
            found[name] = schema
    tables = tables_of(packs)
    found |= {table.name: row_schema(table.row) for table in tables}
    if tables:
        changes, snapshot = found["server.changes"]["properties"], found["server.snapshot"]
        changes["changes"]["items"] = {
            "allOf": [changes["changes"]["items"], {"anyOf": [_change(table, place) for table in tables]}]
        }
        snapshot["anyOf"] = [_snapshot(table, place) for table in tables]
    return found


def _change(table: Table, place: str) -> Schema:
    members = {"record": _record(table, place), "key": _key(table, place)}
    return {"properties": {"table": {"const": table.table}, **members}}


def _snapshot(table: Table, place: str) -> Schema:
    row = {"properties": {"record": _record(table, place), "key": _key(table, place)}}
    return {"properties": {"table": {"const": table.table}, "rows": {"items": row}}}


def _record(table: Table, place: str) -> Schema:
    """The row, or what a client has asked for with `columns`."""
    columns = _columns(table, place, TypeAdapter(table.row).json_schema()["properties"])
    return {"anyOf": [{"$ref": place + table.name}, columns]}


def _key(table: Table, place: str) -> Schema:
    names = sorted(set(table.row.key))
    return _columns(table, place, names) | {"required": names}


def _columns(table: Table, place: str, names: Iterable[str]) -> Schema:
    """An object that has some of these columns, and nothing else."""
    pointers = {name: quote(name.replace("~", "~0").replace("/", "~1")) for name in names}
    columns = {name: {"$ref": f"{place}{table.name}/properties/{pointer}"} for name, pointer in pointers.items()}
    return {"type": "object", "properties": columns, "additionalProperties": False}


def row_schema(row: type[Row], numbers: Numbers | None = None) -> Schema:
    """A row model as it looks with this form of numbers, or in both."""
    schema: Schema = _tidy(TypeAdapter(row).json_schema())
    if parts := schema.pop("$defs", None):
        schema = _inlined(schema, parts)
    for name, column in special_columns(row).items():
        if column is not Column.JSON:
            schema["properties"][name] = _with_numbers(schema["properties"][name], column, numbers)
    return schema


def _inlined(schema: Any, parts: Mapping[str, Schema]) -> Any:  # noqa: ANN401 - any part of a JSON schema
    """The schema with its definitions in place of the references to them."""
    if isinstance(schema, dict):
        if reference := schema.get("$ref"):
            return _inlined(parts[reference.rpartition("/")[2]], parts)
        return {name: _inlined(part, parts) for name, part in schema.items()}
    return [_inlined(part, parts) for part in schema] if isinstance(schema, list) else schema


def _with_numbers(schema: Schema, column: Column, numbers: Numbers | None) -> Schema:
    """The schema of a column of exact numbers, whose numbers are at the end of its alternatives and arrays."""
    if alternatives := schema.get("anyOf"):
        kinds = {part.get("type") for part in alternatives}
        if column is Column.NUMERIC and "number" in kinds:  # Decimal: a number, or a string of digits
            others = [part for part in alternatives if part.get("type") not in {"number", "string"}]
            return _any_of([*_exact(column, {"type": "number"}, numbers), *others])
        return schema | {"anyOf": [_with_numbers(part, column, numbers) for part in alternatives]}
    if isinstance(items := schema.get("items"), dict):
        return schema | {"items": _with_numbers(items, column, numbers)}
    return _any_of(_exact(column, schema, numbers)) if schema.get("type") in {"integer", "number"} else schema


def _exact(column: Column, number: Schema, numbers: Numbers | None) -> list[Schema]:
    digits = _DIGITS if column is Column.BIGINT else {"type": "string"}
    unusual = [_NOT_A_NUMBER] if column is Column.NUMERIC else []
    match numbers:
        case Numbers.JSON:
            return [number, *unusual]
        case Numbers.STRING:
            return [digits]
        case None:
            return [number, digits]


def _any_of(schemas: list[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _tidy(schema: Any, *, optional: bool = False) -> Any:  # noqa: ANN401 - any part of a JSON schema
    """The schema without the titles that repeat names.

    `optional`: null stands for a missing member, and is left out; a member that may only be null is reserved.
    """
    if isinstance(schema, list):
        return [_tidy(part, optional=optional) for part in schema]
    if not isinstance(schema, dict):
        return schema
    tidied = {
        name: _tidy(part, optional=optional)
        for name, part in schema.items()
        if (name != "title" or not isinstance(part, str)) and not (optional and _is_reserved(part))
    }
    if optional and "default" in tidied and tidied["default"] is None:
        del tidied["default"]
        if "anyOf" in tidied:
            tidied |= _any_of([part for part in tidied.pop("anyOf") if part != {"type": "null"}])
    return tidied


def _is_reserved(schema: object) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "null" and "default" in schema
