"""What a table accepts is told: whatever INSERT or UPDATE a pack's table accepts, its row model accepts too.

Every column is given the edge values of its type, and random ones together with others. Postgres says which rows the
table accepts; their events must be valid changes, and JSON as a browser parses it.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from daemon import packs
from daemon.core.change import Change, Kind, Seq, Topic
from daemon.packs import Pack, Row, bundled, special_columns
from daemon.postgres.connect import Connection
from tests.packs.databases import load_demo

DEEP = "[" * 1000 + "]" * 1000
LONG = "9" * 5000
DAYS = ["infinity", "-infinity", "4713-01-01 BC", "0044-03-15 BC", "0001-01-01", "9999-12-31", "10000-01-01"]
TEXTS = [
    "", " ", "a", "a\n", "\n", "NaN", "-Infinity", '"\\', "{}[],:", "\x01\x7f", "'", "İ\u017f", "A b", "😀" * 3,
    "null", "0", "a@b.example", "é" * 26, "x" * 20_000,
]  # fmt: skip
JSON = [
    "{}", "[]", "null", "1", '"a"', f'{{"deep": {DEEP}}}', '{"a":' * 999 + "1" + "}" * 999,
    f'{{"long": {LONG}, "small": -0.{LONG}}}', f'{{"NaN": ["Infinity", {DEEP}, "]}}\\""]}}',
    '{"😀": "\\u2028 \\ud83d\\ude00"}',
]  # fmt: skip
EDGES: dict[str, list[str]] = {
    "boolean": ["true", "false"],
    "integer": ["0", "1", "-1", "5", "2147483647", "-2147483648"],
    "bigint": ["0", "1", "-1", "2147483648", "9007199254740993", "9223372036854775807", "-9223372036854775808"],
    "double precision": [
        "0", "1", "0.5", "-0", "5e-324", "1e308", "-1", "NaN", "Infinity", "0.1234567890123456789", "1e-7",
    ],
    "text": TEXTS,
    "character varying": TEXTS,
    "text[]": [
        "{}", "{a,b}", '{"a,\\"b",""}', "[0:1]={a,b}", "{NULL}", "{{a},{b}}", "{NaN,Infinity}",
        "{" + ",".join(["x"] * 50) + "}", "{" + ",".join(["x"] * 51) + "}",
    ],
    "jsonb": JSON,
    "json": JSON,
    "uuid": ["00000000-0000-0000-0000-000000000000", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF"],
    "bytea": ["\\x", "\\x00", "\\x000102030405060708090a0b"],
    "date": [*DAYS, "5874897-12-31"],
    "timestamp with time zone": [
        *DAYS, "294276-12-31 23:59:59.999999+00", "2026-01-10 12:00:00.1+05:45",
        "1883-11-18 12:00:00 America/New_York",
    ],
}  # fmt: skip

# Runs statements, returns the events that they caused, and undoes them; null if one was refused.
TRY = """
create function pg_temp.try(statements text []) returns json
language plpgsql set datestyle = 'ISO, YMD' as $$
declare
    before constant bigint := (select coalesce(max(e.id), 0) from rowcast.events as e);
    events json;
    statement text;
begin
    foreach statement in array statements loop
        execute statement;
    end loop;
    set constraints all immediate;
    select coalesce(json_agg(json_build_array(w.table_name, w.model, e.kind, e.key::text, e.record::text)), '[]')
      into events
      from rowcast.events as e join rowcast.watched as w on w.id = e.watch where e.id > before;
    raise exception using errcode = 'RB001';
exception
    when sqlstate 'RB001' then return events;
    when integrity_constraint_violation or data_exception or object_not_in_prerequisite_state or raise_exception
         or program_limit_exceeded or insufficient_privilege
    then return null;
end
$$
"""

COLUMNS = """
select a.attname as name, format_type(a.atttypid, null) as type, a.atttypmod as typmod, a.attnotnull as required,
       a.atthasdef or a.attidentity <> '' as has_default, a.attgenerated <> '' as generated,
       exists (select from pg_catalog.pg_index as i
               where i.indrelid = a.attrelid and i.indisprimary and a.attnum = any (i.indkey)) as in_key,
       exists (select from pg_catalog.pg_index as i
               where i.indrelid = a.attrelid and i.indisunique and a.attnum = any (i.indkey)) as is_unique,
       array(select e.enumlabel::text from pg_catalog.pg_enum as e where e.enumtypid = a.atttypid) as labels,
       -- The words of the checks on this column: some of them are values that it may have.
       array(select distinct m[1] from pg_catalog.pg_constraint as c,
                    regexp_matches(pg_get_constraintdef(c.oid), '''([^'']*)''::', 'g') as m
             where c.conrelid = a.attrelid and c.contype = 'c' and a.attnum = any (c.conkey)) as words,
       (select format('select distinct %I::text from %s', f.attname, c.confrelid::regclass)
        from pg_catalog.pg_constraint as c
        join pg_catalog.pg_attribute as f on f.attrelid = c.confrelid and f.attnum = c.confkey[1]
        where c.conrelid = a.attrelid and c.contype = 'f' and c.conkey[1] = a.attnum) as referenced
from pg_catalog.pg_attribute as a
where a.attrelid = $1::text::regclass and a.attnum > 0 and not a.attisdropped order by a.attnum
"""


@dataclass(frozen=True)
class Column:
    """A column of a table, and the values to try in it, as texts; None is null."""

    name: str
    type: str
    has_default: bool
    in_key: bool
    is_unique: bool
    values: Sequence[str | None]


@dataclass(frozen=True)
class Table:
    """A watched table with its sample rows, as texts."""

    pack: Pack
    name: str
    columns: Sequence[Column]
    rows: Sequence[dict[str, str | None]]

    def insert(self, row: dict[str, str | None]) -> list[str]:
        """Statements that put this row in the place of the sample row that has its key, or beside it."""
        relation = f"{self.pack.name}.{self.name}"
        keys = [column for column in self.columns if column.in_key]
        chosen = self.columns
        if all(column.has_default for column in keys):
            before, chosen = [], [column for column in self.columns if not column.in_key or row[column.name] != "new"]
        else:
            matches = " and ".join(f"{column.name} = {literal(row[column.name], column)}" for column in keys)
            before = [f"delete from {relation} where {matches}"]
        names = ", ".join(f'"{column.name}"' for column in chosen)
        values = ", ".join(literal(row[column.name], column) for column in chosen)
        return [*before, f"insert into {relation} ({names}) values ({values})"]

    def update(self, row: dict[str, str | None], values: dict[str, str | None]) -> list[str]:
        """A statement that changes this sample row."""
        columns = {column.name: column for column in self.columns}
        keys = " and ".join(f"{name} = {literal(row[name], c)}" for name, c in columns.items() if c.in_key)
        settings = ", ".join(f'"{name}" = {literal(value, columns[name])}' for name, value in values.items())
        return [f"update {self.pack.name}.{self.name} set {settings} where {keys}"]


def literal(value: str | None, column: Column) -> str:
    return "null" if value is None else "'" + value.replace("'", "''") + f"'::{column.type}"


async def described(db: Connection, pack: Pack, name: str) -> Table:
    columns = []
    for found in await db.fetch(COLUMNS, f"{pack.name}.{name}"):
        if found["generated"]:
            continue
        edges = found["labels"] or EDGES[found["type"]]
        longest = found["typmod"] - 4 if found["type"] == "character varying" and found["typmod"] > 4 else 0
        lengths = ["é" * length for length in (longest, longest + 1) if longest]
        referenced = [row[0] for row in await db.fetch(found["referenced"])] if found["referenced"] else []
        values = [None, *edges, *lengths, *found["words"], *(word.upper() for word in found["words"]), *referenced]
        columns.append(
            Column(found["name"], found["type"], found["has_default"], found["in_key"], found["is_unique"], values)
        )
    names = ", ".join(f'"{column.name}"::text' for column in columns)
    rows = await db.fetch(f"select {names} from {pack.name}.{name} limit 4")
    return Table(pack, name, columns, [dict(row) for row in rows])


def beside(table: Table, row: dict[str, str | None], chance: random.Random) -> dict[str, str | None]:
    """The sample row with new unique values, as far as a constant can be one."""
    new = dict(row)
    for column in table.columns:
        value = row[column.name] or ""
        if column.in_key and column.has_default:
            new[column.name] = "new"
        elif column.is_unique and column.type == "character varying" and not column.in_key:
            new[column.name] = f"n{chance.randrange(10**9)}" + value[value.find("@") :] * ("@" in value)
        elif column.type == "bytea":
            new[column.name] = "\\x" + chance.randbytes(len(value) // 2 - 1).hex()
        elif column.type == "date":
            new[column.name] = f"{chance.randrange(3000, 9999)}-01-01"
    return new


def near(value: str, type_: str) -> list[str]:
    """Values that differ little from a valid one."""
    if type_ in {"json", "jsonb"} and value.endswith("}"):
        return [f'{value[:-1]}, "deep": {DEEP}, "long": {LONG}}}']
    if type_ in {"text", "character varying"}:
        return [value + "\n", value + " ", value.swapcase(), f"{value} {value}"]
    return []


def attempts(table: Table, chance: random.Random) -> Iterator[tuple[set[str], list[str]]]:
    """Columns, and the statements that give each of them another value."""
    row = table.rows[0]
    for column in table.columns:
        for value in (*column.values, *near(row[column.name] or "", column.type)):
            yield {column.name}, table.insert(beside(table, row, chance) | {column.name: value})
            yield {column.name}, table.update(row, {column.name: value})
    for _ in range(40):
        row = chance.choice(table.rows)
        yield set(), table.insert(beside(table, row, chance))
        changed = {c.name: chance.choice(c.values) for c in chance.sample(table.columns, min(3, len(table.columns)))}
        yield set(), table.insert(beside(table, row, chance) | changed)
        yield set(), table.update(row, changed)


def parse_as_a_browser(text: str) -> Any:
    """JSON without the extensions of Python's parser, and without its limit on digits."""
    return json.loads(text, parse_constant=refuse, parse_int=str, parse_float=str)


def refuse(constant: str) -> None:
    raise ValueError(constant)


def check_both_forms(plain: Change, exact: Change, model: type[Row]) -> None:
    """A browser parses both, they have the same digits, and in one of them bigint and numeric columns are strings."""
    for text, other in ((plain.key, exact.key), (plain.record or "{}", exact.record or "{}")):
        assert parse_as_a_browser(text) == parse_as_a_browser(other)
        values = json.loads(other, parse_int=float)
        for name, column in special_columns(model).items():
            assert column is packs.Column.JSON or type(values.get(name)) is not float, other


@contextmanager
def deep_recursion() -> Iterator[None]:
    """A browser parses any depth; Python does within its recursion limit."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    yield
    sys.setrecursionlimit(limit)


TABLES = [(pack, name) for pack in bundled().values() for name in pack.tables]


@pytest.mark.parametrize(("pack", "name"), TABLES, ids=[f"{pack.name}.{name}" for pack, name in TABLES])
async def test_what_a_table_accepts_its_model_accepts_and_a_browser_parses(
    db: Connection, pack: Pack, name: str
) -> None:
    await load_demo(db, pack)
    await db.execute(TRY)
    # Who acts: the audit log of asyncops asks for it.
    await db.execute(
        "select set_config('rowcast.actor', coalesce(min(id)::text, ''), true) from asyncops.users where is_active"
    )
    refused = []
    accepted: set[str] = set()
    table = await described(db, pack, name)
    for columns, statements in attempts(table, random.Random(name)):
        events = await db.fetchval("select pg_temp.try($1)", statements)
        if events is None:
            continue
        accepted |= columns
        for table_name, model, kind, key, record in json.loads(events):
            change = Change(Seq(1), "1", "", pack.name, table_name, Topic("t"), Kind(kind), key, record, model=model)
            problem = pack.problem(change)
            if problem is not None:
                refused.append((problem, statements[-1][:300]))
            with deep_recursion():
                check_both_forms(change, pack.with_exact_numbers(change), pack.tables[table_name])
    assert [] == refused
    published = {c.name for c in table.columns if c.name in pack.tables[name].model_fields and not c.in_key}
    assert set() == published - accepted, "no value was accepted in these columns, so nothing was tested"
