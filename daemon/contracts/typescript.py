"""The rows and topics of the packs as types for the JavaScript client."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Final

from daemon.contracts.schema import Schema, Table, row_schema, tables_of
from daemon.core.change import Numbers
from daemon.packs import Pack, contract_hash

_SIMPLE: Final = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}
_RESERVED: Final = {"Tables", "Topic"}


def typescript(packs: Iterable[Pack], numbers: Numbers = Numbers.JSON) -> str:
    """A module of types. `numbers` is the form that the client asks for."""
    packs = list(packs)
    names = _names(tables_of(packs))
    tables: defaultdict[str, list[str]] = defaultdict(list)  # the types of each table: packs may have equal ones
    for name, table in names.items():
        tables[table.table].append(name)
    topics = dict.fromkeys(_template(pattern) for pack in packs for pattern in pack.topics)
    lines = [
        "// The rows that Rowcast publishes, made by `daemon types --typescript`. Make it again when tables change.",
        f'// The types are for clients with numbers: "{numbers}".',
        "",
        "/** `welcome` says the same while these types hold. */",
        f'export const SCHEMA = "{contract_hash(packs)}";',
        "",
        *(line for name, table in names.items() for line in _interface(name, table, numbers)),
        "/** The type of the rows of each table. */",
        "export interface Tables {",
        *(f"  {_member(table)}: {' | '.join(types)};" for table, types in sorted(tables.items())),
        "}",
        "",
        "/** What can be subscribed to. */",
        *(
            ["export type Topic =", *(f"  | {topic}" for topic in topics)]
            if topics
            else ["export type Topic = never"]
        ),
    ]
    return "\n".join(lines) + ";\n"


def _names(tables: list[Table]) -> dict[str, Table]:
    """The names of the types: those of the tables, with that of the pack where several have such a table."""
    count = Counter(_pascal(table.table) for table in tables)
    found: dict[str, Table] = {}
    for table in tables:
        name = _pascal(table.table)
        if count[name] > 1 or name in _RESERVED:
            name = _pascal(table.name)
        while name in found:
            name += "_"
        found[name] = table
    return found


def _pascal(name: str) -> str:
    words = re.findall(r"[^\W_]+", name)
    joined = "".join(word[0].upper() + word[1:] for word in words)
    return joined if re.match(r"[^\W\d]", joined) else f"_{joined}"


def _interface(name: str, table: Table, numbers: Numbers) -> Iterator[str]:
    schema = row_schema(table.row, numbers)
    if description := schema.get("description"):
        yield from _comment(description)
    yield f"export interface {name} {{"
    yield from (f"  {member};" for member in _members(schema))
    yield "}"
    yield ""


def _comment(text: str) -> Iterator[str]:
    first, *rest = text.replace("*/", "* /").splitlines()
    if rest:
        yield from ("/**", *(f" * {line}".rstrip() for line in (first, *rest)), " */")
    else:
        yield f"/** {first} */"


def _member(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_$][\w$]*", name, re.ASCII) else json.dumps(name)


def type_of(schema: Schema) -> str:
    """A JSON Schema without references as a type; `unknown` where it allows anything."""
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(map(type_of, schema["anyOf"])))
    match schema.get("type"):
        case "array":
            item = type_of(schema.get("items", {}))
            return f"({item})[]" if "|" in item else f"{item}[]"
        case "object":
            return _object(schema)
        case str() as simple:
            return _SIMPLE[simple]
    return "unknown"


def _object(schema: Schema) -> str:
    if not schema.get("properties"):
        values = schema.get("additionalProperties", True)
        return f"Record<string, {'unknown' if isinstance(values, bool) else type_of(values)}>"
    return f"{{ {'; '.join(_members(schema))} }}"


def _members(schema: Schema) -> Iterator[str]:
    for name, part in schema["properties"].items():
        yield f"{_member(name)}{'' if name in schema.get('required', ()) else '?'}: {type_of(part)}"


def _template(pattern: str) -> str:
    """The topics that match a pattern as a template literal: its letters stand for themselves, all else for a text.

    Texts that only a hyphen or the like separates are one, since an application has them in one variable.
    """
    text = "".join(_templates(re._parser.parse(pattern)))  # type: ignore[attr-defined]
    text = re.sub(r"\$\{string\}([^:/$]*\$\{string\})*", "${string}", text)
    return f"`{text}`" if "${string}" in text else json.dumps(text)


def _templates(parsed: Any) -> Iterator[str]:  # noqa: ANN401 - of no public type
    for kind, value in parsed:
        match str(kind):
            case "LITERAL":
                yield re.sub(r"[`$\\]", r"\\\g<0>", chr(value))
            case "SUBPATTERN":
                yield from _templates(value[-1])
            case "AT":
                pass
            case _:
                yield "${string}"
