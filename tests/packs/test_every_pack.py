"""Rules for every bundled pack: its parts exist and agree with one another."""

import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from daemon.core.change import Change, Kind, Seq, Topic
from daemon.packs import NUMBER, SERIAL, ULID, UUID, Column, Pack, Row, bundled, special_columns
from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.packs.databases import load_demo, session
from tests.support.cases import for_each
from tests.support.catalog import catalog
from tests.support.postgres import Server

ROOT = Path(__file__).parents[2]
SOME_IDS = {
    ULID: "01JH000000S0ME1D0000000000",
    UUID: "01234567-89ab-4cde-8f01-23456789abcd",
    SERIAL: "2147483647",
    NUMBER: "1",
}

UNDECIDED_KEYS = {
    "sender_emails_sender_fkey": "deferred: a trigger writes the sender at the end of the statement",
    "unsubscribe_history_sender_fkey": "deferred for the same reason",
}

every_pack = pytest.mark.parametrize("pack", bundled().values(), ids=list(bundled()))
every_pack_in_turn = for_each("pack", bundled().values())
every_table_in_turn = for_each(
    ("pack", "table"), [(pack, table) for pack in bundled().values() for table in pack.tables]
)

# The JSON Schema type of each column type.
JSON_TYPES = {
    "character varying": "string",
    "text": "string",
    "timestamp with time zone": "string",
    "bigint": "integer",
    "integer": "integer",
    "boolean": "boolean",
    "jsonb": "object",
    "date": "string",
    "uuid": "string",
    "double precision": "number",
    "ARRAY": "array",
    "USER-DEFINED": "string",  # an enum type
}
# The JSON Schema formats of strings; other strings have none.
FORMATS = {"timestamp with time zone": "postgres timestamptz", "date": "postgres date"}


async def captured(db: Connection, pack: Pack) -> list[Change]:
    """All captured changes of the pack's tables, in order."""
    rows = await db.fetch(
        "select e.id, w.schema_name, w.table_name, w.model, e.topic, e.kind, e.key, e.record"
        " from rowcast.events e join rowcast.watched w on w.id = e.watch where w.pack = $1 order by e.id",
        pack.name,
    )
    return [
        Change(
            seq=Seq(row["id"]),
            tx="1",
            at="2026-01-10T12:00:00.000000Z",
            schema=row["schema_name"],
            table=row["table_name"],
            model=row["model"],
            topic=Topic(row["topic"]),
            kind=Kind(row["kind"]),
            key=row["key"],
            record=row["record"],
        )
        for row in rows
    ]


@every_pack
def test_a_pack_has_its_files_in_their_places(pack: Pack) -> None:
    for path in (
        f"ddl/{pack.name}/demo.sql",
        f"triggers/{pack.name}.sql",
        f"daemon/packs/{pack.name}.py",
        f"tests/packs/test_{pack.name}.py",
        f"docs/packs/{pack.name}/README.md",
    ):
        assert (ROOT / path).is_file(), path


def revisions(pack: Pack) -> list[Path]:
    """The Python files of the pack's revisions, oldest first."""
    return sorted((ROOT / "ddl" / pack.name).glob("[0-9]*.py"))


@every_pack
def test_every_revision_has_an_up_and_a_down_file_and_the_revisions_are_a_chain(pack: Pack) -> None:
    before = "None"
    for number, path in enumerate(revisions(pack), 1):
        name = f'"{pack.name}_{number:04}"'
        assert f"revision = {name}\ndown_revision = {before}\n" in path.read_text()
        assert path.with_suffix(".up.sql").is_file()
        assert path.with_suffix(".down.sql").is_file()
        before = name
    assert before != "None"


@every_pack_in_turn
async def test_every_foreign_key_says_what_a_deletion_does_and_has_an_index(db: Connection, pack: Pack) -> None:
    keys = await db.fetch(
        "select c.conname as name, c.confdeltype <> 'a' as decided, exists ("
        "   select from pg_index as i where i.indrelid = c.conrelid and i.indkey[0] = c.conkey[1]"
        "   and i.indisvalid and i.indpred is null) as indexed"
        " from pg_constraint as c where c.connamespace = $1::text::regnamespace and c.contype = 'f'",
        pack.name,
    )
    assert keys
    assert [] == [key["name"] for key in keys if not key["decided"] and key["name"] not in UNDECIDED_KEYS]
    assert [] == [key["name"] for key in keys if not key["indexed"]]


@every_pack_in_turn
async def test_tables_are_captured_before_those_that_they_refer_to(db: Connection, pack: Pack) -> None:
    """A writer locks them in this order: in another one, `--apply-ddl` and writers could wait for each other."""
    text = (ROOT / "triggers" / f"{pack.name}.sql").read_text()
    order = re.findall(rf"^    '{pack.name}\.(\w+)'", text, re.MULTILINE)
    references = await db.fetch(
        "select conrelid::regclass::text as of_table, confrelid::regclass::text as to_table from pg_constraint"
        " where contype = 'f' and connamespace = $1::text::regnamespace and conrelid <> confrelid",
        pack.name,
    )
    pairs = [[name.rpartition(".")[2] for name in row] for row in references]
    assert pairs
    late = [(one, other) for one, other in pairs if one in order and other in order[: order.index(one)]]
    assert [] == late


@every_pack_in_turn
async def test_names_of_constraints_and_indexes_begin_with_their_table_or_idx(db: Connection, pack: Pack) -> None:
    strays = await db.fetch(
        "select t.relname, named.name from pg_class as t join ("
        "   select conrelid, conname from pg_constraint"
        "   union select indrelid, relname from pg_index join pg_class on pg_class.oid = indexrelid"
        " ) as named (relation, name) on named.relation = t.oid"
        " where t.relnamespace = $1::text::regnamespace"
        " and not starts_with(named.name, t.relname || '_') and not starts_with(named.name, 'idx_')",
        pack.name,
    )
    assert [] == [tuple(stray) for stray in strays]


@every_pack_in_turn
async def test_every_captured_table_has_a_model_and_every_model_a_captured_table(db: Connection, pack: Pack) -> None:
    watched = await db.fetch(
        "select table_name, model, schema_name from rowcast.watched where pack = $1 and function_name is not null",
        pack.name,
    )
    assert {pack.name} == {row["schema_name"] for row in watched}
    assert {(table, table) for table in pack.tables} == {(row["table_name"], row["model"]) for row in watched}


@every_table_in_turn
async def test_a_model_holds_the_published_columns_and_their_key(db: Connection, pack: Pack, table: str) -> None:
    watched = await db.fetchrow(
        "select columns, key from rowcast.watched where (pack, table_name) = ($1, $2)", pack.name, table
    )
    assert watched is not None
    model = pack.tables[table]
    assert sorted(model.model_fields) == sorted(watched["columns"])
    assert list(model.key) == watched["key"]


@every_table_in_turn
async def test_a_model_has_the_types_and_limits_of_its_table(db: Connection, pack: Pack, table: str) -> None:
    columns = await db.fetch(
        "select column_name, data_type, is_nullable, character_maximum_length as length"
        " from information_schema.columns where (table_schema, table_name) = ($1, $2)",
        pack.name,
        table,
    )
    words = await enumerations(db, pack, table)
    lengths = await longest(db, pack, table)
    schema = pack.tables[table].model_json_schema()
    fields = schema["properties"]
    for column in columns:
        name = column["column_name"]
        if name not in fields:
            continue
        shape, nullable = without_null(fields[name])
        if "$ref" in shape:
            shape = schema["$defs"][shape["$ref"].removeprefix("#/$defs/")]
        assert (column["is_nullable"] == "YES") == nullable, name
        assert JSON_TYPES[column["data_type"]] == shape["type"], name
        assert FORMATS.get(column["data_type"]) == shape.get("format"), name
        if name in words:
            assert words[name] == shape["enum"]
        elif rf"^{ULID}$" == shape.get("pattern"):
            assert column["length"] == 26
        elif column["data_type"] == "uuid":
            assert rf"^{UUID}$" == shape.get("pattern"), name
        else:
            assert (column["length"] or lengths.get(name)) == shape.get("maxLength"), name


@every_table_in_turn
async def test_a_model_names_its_columns_of_types_that_a_parser_may_not_hold(
    db: Connection, pack: Pack, table: str
) -> None:
    types = await db.fetch(
        """with recursive based (column_name, type) as (
               select a.attname, a.atttypid from pg_catalog.pg_attribute as a
               where a.attrelid = $1::text::regclass and a.attnum > 0 and not a.attisdropped
               union all
               select b.column_name, case when t.typtype = 'd' then t.typbasetype else t.typelem end
               from based as b join pg_catalog.pg_type as t on t.oid = b.type
               where t.typtype = 'd' or t.typcategory = 'A'
           )
           select column_name, replace(type::regtype::text, 'jsonb', 'json') as type from based""",
        f"{pack.name}.{table}",
    )
    model = pack.tables[table]
    known = {column.value for column in Column}
    expected = {
        row["column_name"]: Column(row["type"])
        for row in types
        if row["type"] in known and row["column_name"] in model.model_fields
    }
    assert expected == special_columns(model)


async def enumerations(db: Connection, pack: Pack, table: str) -> dict[str, list[str]]:
    """The values that a column may hold: those of its enum type, or of its check <table>_<column>_known."""
    checks = await db.fetch(
        "select conname, pg_get_constraintdef(oid) as definition from pg_constraint"
        " where conrelid = $1::text::regclass and contype = 'c' and conname like '%\\_known'",
        f"{pack.name}.{table}",
    )
    types = await db.fetch(
        "select a.attname, array_agg(e.enumlabel::text order by e.enumsortorder) as words"
        " from pg_attribute a join pg_enum e on e.enumtypid = a.atttypid"
        " where a.attrelid = $1::text::regclass and not a.attisdropped group by a.attname",
        f"{pack.name}.{table}",
    )
    return {column["attname"]: column["words"] for column in types} | {
        check["conname"].removeprefix(f"{table}_").removesuffix("_known"): re.findall(
            r"'([^']*)'::", check["definition"]
        )
        for check in checks
    }


async def longest(db: Connection, pack: Pack, table: str) -> dict[str, int]:
    """The maximum lengths by column, from the checks <table>_<column>_length."""
    checks = await db.fetch(
        "select conname, pg_get_constraintdef(oid) as definition from pg_constraint"
        " where conrelid = $1::text::regclass and contype = 'c' and conname like '%\\_length'",
        f"{pack.name}.{table}",
    )
    return {
        check["conname"].removeprefix(f"{table}_").removesuffix("_length"): int(limit[1])
        for check in checks
        if (limit := re.search(r"<= (\d+)\b", check["definition"]))
    }


def without_null(shape: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A column's JSON Schema without null, and whether null was allowed."""
    choices = shape.get("anyOf", [shape])
    real = [choice for choice in choices if choice.get("type") != "null"]
    assert len(real) == 1
    return real[0], len(choices) > 1


def some_topics(pack: Pack) -> list[str]:
    """One topic for each of the pack's patterns."""
    topics = list(pack.topics)
    for form, some_id in SOME_IDS.items():
        topics = [topic.replace(form, some_id) for topic in topics]
    return topics


@every_pack
def test_no_other_pack_serves_a_topic_of_this_one(pack: Pack) -> None:
    others = [other for other in bundled().values() if other is not pack]
    assert [] == [(topic, other.name) for topic in some_topics(pack) for other in others if other.serves(topic)]


@every_pack_in_turn
async def test_may_read_refuses_a_stranger_every_kind_of_topic(db: Connection, pack: Pack) -> None:
    for topic in some_topics(pack):
        assert pack.serves(topic)
        for some_id in SOME_IDS.values():
            assert await db.fetchval(f"select {pack.name}.may_read($1, $2)", some_id, topic) is False


@every_pack_in_turn
async def test_loading_the_sample_data_twice_publishes_them_once(db: Connection, pack: Pack) -> None:
    await load_demo(db, pack)
    once = await captured(db, pack)
    await load_demo(db, pack)
    assert once == await captured(db, pack)
    assert once


@every_pack_in_turn
async def test_the_sample_data_fill_every_table_with_valid_rows_in_topics_that_are_served(
    db: Connection, pack: Pack
) -> None:
    await load_demo(db, pack)
    changes = await captured(db, pack)
    assert set(pack.tables) == {change.table for change in changes}
    assert [] == [change for change in changes if pack.problem(change) is not None]
    assert [] == [change for change in changes if not pack.serves(change.topic)]
    assert {Kind.INSERT} == {change.kind for change in changes}


@every_pack
def test_the_key_columns_are_published(pack: Pack) -> None:
    assert all(issubclass(model, Row) for model in pack.tables.values())
    assert all(set(model.key) <= set(model.model_fields) for model in pack.tables.values())


def ignore(line: str) -> None:
    """A `report` that discards its lines."""


@every_pack
async def test_up_down_and_up_again_leaves_the_same_catalog(empty_database: str, pack: Pack) -> None:
    schemas = [pack.name, "rowcast"]
    await migrate.apply(empty_database, [], report=ignore)
    before = await catalog(empty_database, schemas)
    await migrate.apply(empty_database, [pack.name], report=ignore)
    up = await catalog(empty_database, schemas)
    assert before != up
    await migrate.rollback(empty_database, pack.name, report=ignore)
    assert before == await catalog(empty_database, schemas)
    await migrate.apply(empty_database, [pack.name], report=ignore)
    assert up == await catalog(empty_database, schemas)


@every_pack
async def test_every_revision_can_be_rolled_back_and_applied_again(empty_database: str, pack: Pack) -> None:
    schemas = [pack.name, "rowcast"]
    await migrate.apply(empty_database, [pack.name], report=ignore)
    up = await catalog(empty_database, schemas)
    for revision in revisions(pack)[-2::-1]:
        await migrate.rollback(empty_database, pack.name, to=f"{pack.name}_{revision.name[:4]}", report=ignore)
    await migrate.apply(empty_database, [pack.name], report=ignore)
    assert up == await catalog(empty_database, schemas)


@every_pack
async def test_a_pack_works_in_another_schema(empty_database: str, pack: Pack) -> None:
    await migrate.apply(empty_database, [pack.name], schemas={pack.name: "elsewhere"}, report=ignore)
    everything = await catalog(empty_database, ["elsewhere", "rowcast"])
    assert f"schema {pack.name}" not in everything
    assert f"{pack.name}." not in str(everything)
    async with session(empty_database) as db:
        demo = (ROOT / "ddl" / pack.name / "demo.sql").read_text()
        await db.execute(re.sub(rf"\b{pack.name}\.", "elsewhere.", demo))
        changes = await captured(db, pack)
        assert set(pack.tables) == {change.table for change in changes}
        assert {"elsewhere"} == {change.schema for change in changes}
        assert [] == [change for change in changes if pack.problem(change) is not None]
        wanted = await db.fetch("select distinct wanted_by from rowcast.extensions")
        assert {"elsewhere"} >= {row["wanted_by"] for row in wanted}


@every_pack_in_turn
async def test_what_a_table_refuses_is_not_in_the_log_of_the_embedded_server(
    db: Connection, pack: Pack, postgres: Server
) -> None:
    columns = await db.fetch(
        "select a.attrelid::regclass::text as table, quote_ident(a.attname) as name,"
        " format_type(a.atttypid, a.atttypmod) as type from pg_attribute a join pg_class c on c.oid = a.attrelid"
        " where c.relnamespace = $1::text::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped"
        " and a.attgenerated = ''",
        pack.name,
    )
    refused = 0
    for column in columns:
        insert = f"insert into {column['table']} ({column['name']}) overriding system value values "
        for values, arguments in (("('canary')", []), (f"(cast($1::text as {column['type']}))", ["canary"])):
            try:
                async with db.transaction():
                    await db.execute(insert + values, *arguments)
            except asyncpg.PostgresError:
                refused += 1
    assert refused > len(columns)
    assert "canary" not in (postgres.embedded.data_dir / "postgres.log").read_text()


@for_each(("number", "divisor"), [(1, 0), (2, 1), (3, 0)])
async def divided(db: Connection, number: int, divisor: int) -> None:
    await db.execute("create table public.seen ()")  # is undone, or there could be no second
    await db.fetchval("select $1::int / $2::int", number, divisor)


async def test_of_many_cases_each_is_tried_and_all_that_fail_are_named(db: Connection) -> None:
    with pytest.raises(AssertionError, match=r"2 of 3 cases:\n1, 0: DivisionByZero.*\n3, 0: DivisionByZero.*$"):
        await divided(db=db)


@every_pack_in_turn
async def test_capture_may_read_only_what_it_sends_or_looks_up(db: Connection, pack: Pack) -> None:
    readable = await db.fetch(
        "select c.relname, a.attname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0"
        " where c.relnamespace = to_regnamespace($1) and c.relkind in ('r', 'p', 'v')"
        " and has_column_privilege('rowcast_capture', c.oid, a.attnum, 'select')",
        pack.name,
    )
    watched = await db.fetch(
        "select table_name, columns || key || soft_delete as sent, concat_ws(' ', topic, revokes) as expressions"
        " from rowcast.watched where pack = $1",
        pack.name,
    )
    expressions = " ".join(row["expressions"] for row in watched)
    sent = {(row["table_name"], column) for row in watched for column in row["sent"]}
    unexplained = {tuple(column) for column in readable} - sent
    assert not [column for _, column in unexplained if not re.search(rf"\b{column}\b", expressions)]
