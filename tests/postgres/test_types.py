"""docs/types.md against a real Postgres: each row of its tables is stored, captured and compared."""

import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from daemon.core.change import Change, Kind, Seq, Topic
from daemon.core.json_text import quoted_numbers, replace_values
from daemon.delivery.own_tables import pack_of
from daemon.log.own_tables import PgOwnTableReader
from daemon.packs import columns_of
from daemon.postgres.connect import Connection, Pool, connect

GUIDE = (Path(__file__).parents[2] / "docs" / "types.md").read_text(encoding="utf-8")


class Value(NamedTuple):
    """A row of a table: a type, a value as SQL, and its JSON in both forms of numbers."""

    section: str
    type: str
    stored: str
    received: str
    exact: str | None = None


def values() -> list[Value]:
    return [
        Value(section.partition("\n")[0], *re.findall(r"`([^`]*)`", line))
        for section in GUIDE.split("\n## ")[1:]
        for line in section.splitlines()
        if line.startswith("| `")
    ]


@pytest.fixture
async def db(database: str) -> AsyncIterator[Connection]:
    """A session with the types of the guide."""
    connection = await connect(database, application_name="test")
    [types] = re.findall(r"```sql\n(.*?)```", GUIDE, re.DOTALL)
    await connection.execute(f"set search_path = public; {types}")
    yield connection
    await connection.close()


async def received(db: Connection, stored: Sequence[tuple[str, str]], settings: str = "") -> list[str]:
    """These values, each a type and SQL, as they stand in the record of an INSERT under these settings."""
    names = [f"v{number}" for number in range(len(stored))]
    columns = ", ".join(f"{name} {type_}" for name, (type_, _) in zip(names, stored, strict=True))
    row = ", ".join(f"({value})::{type_}" for type_, value in stored)
    await db.execute(
        f"""
        create table kept (id integer primary key, {columns});
        select rowcast.watch('kept', topic => $$'kept'$$, columns => '{{{",".join(names)}}}');
        {settings}
        insert into kept values (1, {row});
        """
    )
    record = await db.fetchval("select record::text from rowcast.events order by id desc limit 1")
    json.loads(record, parse_constant=pytest.fail)
    found: list[str] = []

    def remember(value: str) -> str:
        found.append(value)
        return value

    replace_values(record, dict.fromkeys(names, remember))
    return found


def test_the_guide_has_rows_in_every_section_but_none_twice() -> None:
    rows = values()
    assert len(re.findall(r"^## ", GUIDE, re.MULTILINE)) == len({value.section for value in rows})
    assert len(rows) == len({(value.type, value.stored) for value in rows}) > 60


OTHER_SETTINGS = """
set timezone = 'Asia/Kathmandu'; set datestyle = 'German'; set intervalstyle = 'iso_8601';
set extra_float_digits = -15; set bytea_output = 'escape'; set quote_all_identifiers = on;
set xmloption = 'document'; set lc_monetary = 'C';
"""


@pytest.mark.parametrize("settings", ["", OTHER_SETTINGS], ids=["default settings", "other settings"])
async def test_a_value_looks_as_the_guide_says_whatever_its_writer_has_set(db: Connection, settings: str) -> None:
    rows = values()
    found = await received(db, [(value.type, value.stored) for value in rows], settings)
    assert [(value.type, value.stored, value.received) for value in rows] == [
        (value.type, value.stored, text) for value, text in zip(rows, found, strict=True)
    ]


def test_exact_numbers_look_as_the_guide_says() -> None:
    rows = [value for value in values() if value.exact is not None]
    assert {"Numbers"} == {value.section for value in rows}
    for value in rows:
        is_exact = re.match("bigint|numeric", value.type)
        assert value.exact == (quoted_numbers(value.received) if is_exact else value.received)


async def test_null_is_null_in_every_type(db: Connection) -> None:
    types = {value.type for value in values()}
    assert ["null"] * len(types) == await received(db, [(type_, "null") for type_ in types])


async def test_a_row_model_made_from_the_catalog_accepts_every_value_of_the_guide(db: Connection, pool: Pool) -> None:
    rows = values()
    names = [f"{row.type} {number}" for number, row in enumerate(rows)]  # none could be the name of an attribute
    columns = ", ".join(f"{quoted(name)} {row.type}" for name, row in zip(names, rows, strict=True))
    await db.execute(f"create table own (id bigint primary key, {columns})")
    await db.execute("select rowcast.serve('own', $$'own'$$, 'true')")
    stored = ", ".join(f"({row.stored})::{row.type}" for row in rows)
    await db.execute(f"insert into own values (1, {stored}); insert into own values (2)")
    [table] = await PgOwnTableReader(pool).read()
    pack = pack_of(table)
    assert ["id", *names] == list(columns_of(pack.tables["own"]))
    texts = await db.fetch(
        "select e.key::text, e.record::text from rowcast.events as e where e.kind = 'insert' order by id"
    )
    changes = [Change(Seq(1), "", "", "public", "own", Topic("own"), Kind.INSERT, *row) for row in texts]
    assert [None, None] == [pack.problem(change) for change in changes]
    exact = pack.with_exact_numbers(changes[0])
    found: list[str] = []

    def remember(value: str) -> str:
        found.append(value)
        return value

    replace_values(exact.record or "", dict.fromkeys(names, remember))
    assert '{"id":"1"}' == exact.key
    assert found == [
        quoted_numbers(row.received) if re.match("bigint|numeric", column.shape) else row.received
        for row, column in zip(rows, table.columns[1:], strict=True)
    ]


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
