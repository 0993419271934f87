"""Filters in Python and in Postgres: one table of cases, and random values, for which both must find the same."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.core.change import Change, Kind, Seq, Topic
from daemon.core.column_types import Column, JsonNumber
from daemon.core.errors import BadFilter
from daemon.core.filters import Asked, view
from daemon.log.queries import query
from daemon.postgres.connect import Connection, connect
from tests.support.postgres import Server

TYPES: Final = """
create type mood as enum ('sad', 'ok', 'happy');
create domain amount as numeric(12, 2);
create domain feeling as mood;
create type pair as (a integer, b text);
"""

# Each: a type; values as SQL; a filter of the column; how many of the values it finds, in the order of the values.
CASES: Final[list[tuple[str, list[str], dict[str, Any], str]]] = [
    ("integer", ["1", "2", "null"], {"eq": 1}, "1.."),
    ("integer", ["1", "2", "null"], {"eq": "1"}, "1.."),
    ("integer", ["1", "2", "null"], {"ne": 1}, ".1."),
    ("integer", ["1", "2", "null"], {"in": [2, 7]}, ".1."),
    ("integer", ["1", "2", "null"], {"is_null": True}, "..1"),
    ("integer", ["1", "2", "null"], {"is_null": False}, "11."),
    ("integer", ["1", "2", "3", "4"], {"gt": 1, "lte": 3}, ".11."),
    ("bigint", ["9007199254740993", "9007199254740992"], {"eq": 9007199254740993}, "1."),
    ("bigint", ["9007199254740993", "9007199254740992"], {"eq": "9007199254740993"}, "1."),
    ("smallint", ["-32768", "0"], {"lt": 0}, "1."),
    ("numeric", ["0.1", "0.10", "0.1000000000000000000001", "'NaN'"], {"eq": JsonNumber("0.1")}, "11.."),
    ("numeric", ["0.1", "1e30", "'NaN'", "'Infinity'", "'-Infinity'"], {"gt": "1e29"}, ".111."),
    ("numeric", ["'NaN'", "1"], {"eq": "NaN"}, "1."),
    ("numeric", ["-0.0", "1"], {"in": [0]}, "1."),
    ("numeric(10,2)", ["1.5", "1.504"], {"eq": JsonNumber("1.5")}, "11"),
    ("numeric(10,2)", ["1.5", "1.6"], {"eq": JsonNumber("1.504")}, ".."),
    ("amount", ["1.5", "2", "null"], {"gte": 2}, ".1."),
    ("double precision", ["0.1", "0.1::float8 + 0.2", "'NaN'", "'-0'"], {"lt": JsonNumber("0.3")}, "1..1"),
    ("double precision", ["'NaN'", "'Infinity'"], {"gt": "Infinity"}, "1."),
    ("double precision", ["'-0'", "1"], {"eq": 0}, "1."),
    ("real", ["1.1", "1.2"], {"eq": JsonNumber("1.1")}, "1."),
    ("real", ["1.1", "1.2"], {"eq": JsonNumber("1.10000001")}, "1."),
    ("text", ["'a'", "'B'", "'ä'", "''", "null"], {"lt": "a"}, ".1.1."),
    ("text", ["'a'", "'B'", "'ä'", "'😀'", "null"], {"gt": "a"}, "..11."),
    ("text", ["'it''s \\ %L'", "'x'"], {"eq": "it's \\ %L"}, "1."),
    ("text", ["'a%c'", "'abc'", "'ac'", "E'a\\nc'", "null"], {"like": "a%c"}, "1111."),
    ("text", ["'a%c'", "'abc'", "'ac'"], {"like": "a\\%c"}, "1.."),
    ("text", ["'abc'", "'äbc'", "E'\\nbc'", "'bc'"], {"like": "_bc"}, "111."),
    ("text", ["'abab'", "'aab'", "'ab'", "'a'"], {"like": "a%ab"}, "11.."),
    ("text", ["'xaayb'", "'ab'", "'aXb'", "'aXcb'"], {"like": "%a_%b"}, "1.11"),
    ("text", ["'xabx'", "'axb'", "'xab'", "'éab😀'"], {"like": "%_ab_%"}, "1..1"),
    ("text", ["''", "'a'", "'ab'", "'😀é'"], {"like": "%_%_%"}, "..11"),
    ("text", ["repeat('é', 65535) || 'x'", "repeat('é', 65536) || 'x'"], {"like": "%x"}, "1."),
    ("text", ["repeat('X', 65536)", "repeat('X', 65537)", "null"], {"ilike": "%x"}, "1.."),
    ("text", ["''", "'a'"], {"like": ""}, "1."),
    ("text", ["''", "'a'", "null"], {"like": "%"}, "11."),
    ("text", ["'ABC'", "'abc'", "'äBC'", "'ÄBC'"], {"ilike": "Abc"}, "11.."),
    ("text", ["'äBC'", "'ÄBC'"], {"ilike": "äbc"}, "1."),
    ("text", ["'a%b'", "'axb'", "null"], {"starts_with": "a%"}, "1.."),
    ("text", ["'a'", "'b'", "null"], {"in": ["a", "a,b", "'"]}, "1.."),
    ("varchar(5)", ["'ab'", "'ab '"], {"eq": "ab"}, "1."),
    ("char(5)", ["'ab'", "'abc'"], {"eq": "ab"}, "1."),
    ("char(5)", ["'ab'", "'abc'"], {"in": ["ab  ", "x"]}, "1."),
    ("char(5)", ["'ab'", "'abc'"], {"like": "ab%"}, "11"),
    ("name", ["'n'", "'m'"], {"gt": "m"}, "1."),
    ("mood", ["'sad'", "'ok'", "null"], {"ne": "sad"}, ".1."),
    ("feeling", ["'sad'", "'ok'", "null"], {"in": ["ok", "happy"]}, ".1."),
    ("boolean", ["true", "false", "null"], {"eq": False}, ".1."),
    ("boolean", ["true", "false", "null"], {"in": [True, False]}, "11."),
    (
        "uuid",
        ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", "null"],
        {"eq": "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"},
        "1.",
    ),
    ("timestamptz", ["'2026-01-10 12:00:00+05:45'", "'infinity'"], {"eq": "2026-01-10T06:15:00Z"}, "1."),
    ("timestamptz", ["'2026-01-10 12:00:00.5Z'", "'infinity'"], {"gte": "2026-01-10T12:00:00.500000+00:00"}, "11"),
    (
        "timestamptz",
        ["'2026-01-10Z'", "'-infinity'", "'0044-03-15 12:00Z BC'"],
        {"lt": "0001-01-01T00:00:00Z"},
        ".11",
    ),
    (
        "timestamptz",
        ["'0044-03-15 12:00Z BC'", "'0043-03-15 12:00Z BC'"],
        {"eq": "0044-03-15T12:00:00+00:00 BC"},
        "1.",
    ),
    ("timestamptz", ["'12026-01-10Z'", "'9999-01-10Z'"], {"gte": "12026-01-10T00:00:00+00:00"}, "1."),
    ("timestamp", ["'2026-01-10 12:00'", "'infinity'"], {"lte": "2026-01-10T12:00:00"}, "1."),
    ("timestamp", ["'0044-03-15 12:00 BC'", "'infinity'"], {"eq": "0044-03-15T12:00:00 BC"}, "1."),
    ("date", ["'2026-01-10'", "'0044-03-15 BC'", "'infinity'", "'5874897-12-31'"], {"lt": "infinity"}, "11.1"),
    ("date", ["'0044-03-15 BC'", "'0043-03-15 BC'"], {"lt": "0043-03-15 BC"}, "1."),
    ("jsonb", ["'{}'", "'null'", "null"], {"is_null": True}, ".11"),
    ("json", ["'[null]'", "' null '", "null"], {"is_null": False}, "1.."),
    ("integer[]", ["'{1,null}'", "null"], {"is_null": True}, ".1"),
    ("pair", ["row(null, null)", "null"], {"is_null": True}, ".1"),
    ("interval", ["'1 day'", "null"], {"is_null": False}, "1."),
]


@pytest.fixture(scope="module")
async def db(postgres: Server) -> AsyncIterator[Connection]:
    async with postgres.chatgenius() as dsn:
        connection = await connect(dsn, application_name="test")
        await connection.execute(f"set search_path = public; {TYPES}")
        yield connection
        await connection.close()


Ask = Callable[[dict[str, Any]], Awaitable[tuple[list[int], list[int]]]]
"""Which rows a condition finds: by Postgres, and by Python."""


@asynccontextmanager
async def kept(db: Connection, type_: str, values: Sequence[str]) -> AsyncIterator[Ask]:
    """A table with these values in its column `v`, numbered by its column `id`, until the block ends."""
    transaction = db.transaction()
    await transaction.start()
    try:
        rows = ", ".join(f"({place}, ({value})::{type_})" for place, value in enumerate(values))
        await db.execute(
            f"create table public.kept (id integer primary key, v {type_});"
            "select rowcast.watch('kept', topic => $$'kept'$$, columns => '{v,id}', rows => 'true');"
            f"insert into public.kept values {rows};"
        )
        columns = {
            name: Column(name, column_type, frozenset(labels or ()))
            for _, name, column_type, labels in await db.fetch(query("compared_columns"), "public", "kept")
        }
        changes = [
            Change(Seq(1), "1", "", "public", "kept", Topic("kept"), Kind.INSERT, key, record)
            for key, record in await db.fetch("select key::text, record::text from rowcast.events order by id")
        ]

        async def ask(condition: dict[str, Any]) -> tuple[list[int], list[int]]:
            seen = view(Asked({"kept": condition}, None), {"kept": columns})
            [(*_, statement)] = await db.fetch(query("snapshot_functions"), "public", "kept", seen.condition)
            by_postgres = [json.loads(key)["id"] for key, _ in await db.fetch(statement, "kept", 1000)]
            by_python = [json.loads(change.key)["id"] for change in changes if seen.of_run([change], {})]
            return by_postgres, by_python

        yield ask
    finally:
        await transaction.rollback()


async def test_each_case_finds_the_same_rows_in_python_and_in_postgres(db: Connection) -> None:
    wrong = []
    for case in CASES:
        type_, values, condition, marks = case
        wanted = [place for place, mark in enumerate(marks) if mark == "1"]
        try:
            async with kept(db, type_, values) as ask:
                answers = await ask({"v": condition})
        except Exception as error:  # noqa: BLE001 reported at the end
            wrong.append((case, repr(error)))
            continue
        if answers != (wanted, wanted):
            wrong.append((case, repr(answers)))
    assert [] == wrong


async def test_conditions_nest_with_the_logic_of_three_values(db: Connection) -> None:
    values = ["1", "2", "3", "null"]
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"not": {"v": {"eq": 1}}}, [1, 2]),
        ({"or": [{"v": {"eq": 1}}, {"v": {"is_null": True}}]}, [0, 3]),
        ({"and": [{"v": {"gt": 1}}, {"not": {"v": {"eq": 3}}}]}, [1]),
        ({"not": {"or": [{"v": {"eq": 1}}, {"id": {"eq": 2}}]}}, [1]),
        ({"or": [{"v": {"eq": 1}}, {"id": {"eq": 3}}]}, [0, 3]),
        ({"not": {"and": [{"v": {"eq": 1}}, {"id": {"eq": 2}}]}}, [0, 1, 2, 3]),
        ({"v": {"gte": 2}, "id": {"lte": 1}}, [1]),
    ]
    async with kept(db, "integer", values) as ask:
        for condition, wanted in cases:
            assert (wanted, wanted) == await ask(condition), condition
    async with kept(
        db, "text", ["repeat('x', 65537)", "'y'", "null"]
    ) as ask:  # no pattern is compared with the first
        assert ([1], [1]) == await ask({"not": {"v": {"like": "x%"}}})


def _sql(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6) | st.text(
    "aAbB%_\\äÄ ", max_size=6
)
_DECIMALS = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9)
_DAYS = st.dates().map(str) | st.sampled_from(["infinity", "-infinity", "0044-03-15 BC", "12026-02-28"])
_TIMES = st.builds(
    lambda moment, bc: moment.isoformat() + bc,
    st.datetimes(max_value=datetime.fromisoformat("4000-01-01")),
    st.sampled_from(["", " BC"]),
)
_ZONED = st.builds(
    lambda moment, offset: moment.isoformat() + offset,
    st.datetimes(min_value=datetime.fromisoformat("0002-01-01")),
    st.sampled_from(["Z", "+05:45", "-11:30"]),
)
_ORDER = ("eq", "ne", "lt", "lte", "gt", "gte")
RANDOM: Final[list[tuple[str, st.SearchStrategy[str], tuple[str, ...]]]] = [
    ("bigint", st.integers(-(2**63), 2**63 - 1).map(str) | st.integers(-2, 2).map(str), _ORDER),
    (
        "numeric",
        _DECIMALS.map(lambda value: format(value, "f")) | st.sampled_from(["NaN", "-Infinity", "1e5"]),
        _ORDER,
    ),
    ("double precision", st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False).map(repr), _ORDER),
    ("real", st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False).map(repr), _ORDER),
    ("text", _TEXTS, (*_ORDER, "like", "ilike", "starts_with")),
    ("char(7)", _TEXTS, (*_ORDER, "like", "ilike", "starts_with")),
    ("date", _DAYS, _ORDER),
    ("timestamp", _TIMES, _ORDER),
    ("timestamptz", _ZONED, _ORDER),
    ("uuid", st.uuids().map(str), _ORDER),
]


@pytest.mark.parametrize(("type_", "texts", "operators"), RANDOM, ids=[case[0] for case in RANDOM])
async def test_random_values_compare_the_same_in_python_and_in_postgres(
    db: Connection, type_: str, texts: st.SearchStrategy[str], operators: tuple[str, ...]
) -> None:
    values: list[str] = []
    terms: list[tuple[str, str]] = []

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(texts, min_size=1, max_size=4), st.lists(st.tuples(st.sampled_from(operators), texts), min_size=2)
    )
    def collect(some_values: list[str], some_terms: list[tuple[str, str]]) -> None:
        values.extend(some_values)
        terms.extend(some_terms[:4])
        terms.append((some_terms[0][0], some_values[0]))

    collect()
    async with kept(db, type_, list(map(_sql, values))) as ask:
        for operator, other in terms:
            try:
                by_postgres, by_python = await ask({"v": {operator: other}})
            except BadFilter:  # a pattern that is refused
                assert "like" in operator
            else:
                assert by_postgres == by_python, (values, operator, other)


def test_exact_numbers_of_a_filter_keep_their_digits() -> None:
    column = Column("v", "numeric")
    assert (0, Decimal("0.1000000000000000000001")) == column.parse(
        column.text(JsonNumber("0.1000000000000000000001"))
    )
