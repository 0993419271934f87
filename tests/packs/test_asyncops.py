"""The AsyncOps schema against its specification, in a real Postgres.

Most tests run in a transaction that is rolled back; the others have a database of their own.
"""

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import ValidationError

from daemon.core.change import Change, Kind, Seq, Topic
from daemon.packs import bundled
from daemon.packs.asyncops import PACK, SummaryContent
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DatabaseFault
from daemon.schema import migrate
from tests.packs.databases import Events, session, undone
from tests.support.cases import for_each
from tests.support.postgres import CAPTURE_ROLE, Server

ROOT = Path(__file__).parents[2]

# Table, column, type, nullability and default, as in the specification, except for timestamptz, authors that are null
# once their account is deleted, archived_at, and must_change_password: see decisions 0029 to 0032.
SPECIFIED = """
users                  id                    integer                   not null  nextval('asyncops.users_id_seq'::regclass)
users                  email                 character varying(255)    not null  -
users                  password_hash         character varying(255)    not null  -
users                  full_name             character varying(255)    not null  -
users                  role                  character varying(20)     not null  'member'::character varying
users                  is_active             boolean                   not null  true
users                  must_change_password  boolean                   not null  false
users                  created_at            timestamp with time zone  not null  now()
users                  updated_at            timestamp with time zone  not null  now()
status_updates         id                    integer                   not null  nextval('asyncops.status_updates_id_seq'::regclass)
status_updates         user_id               integer                   not null  -
status_updates         title                 character varying(200)    not null  -
status_updates         content               text                      not null  -
status_updates         tags                  text[]                    null      -
status_updates         created_at            timestamp with time zone  not null  now()
status_updates         updated_at            timestamp with time zone  not null  now()
status_updates         archived_at           timestamp with time zone  null      -
incidents              id                    integer                   not null  nextval('asyncops.incidents_id_seq'::regclass)
incidents              reported_by_id        integer                   null      -
incidents              assigned_to_id        integer                   null      -
incidents              title                 character varying(200)    not null  -
incidents              description           text                      not null  -
incidents              severity              character varying(20)     not null  'medium'::character varying
incidents              status                character varying(20)     not null  'open'::character varying
incidents              resolution_notes      text                      null      -
incidents              created_at            timestamp with time zone  not null  now()
incidents              updated_at            timestamp with time zone  not null  now()
incidents              resolved_at           timestamp with time zone  null      -
incidents              archived_at           timestamp with time zone  null      -
blockers               id                    integer                   not null  nextval('asyncops.blockers_id_seq'::regclass)
blockers               reported_by_id        integer                   null      -
blockers               description           text                      not null  -
blockers               impact                text                      not null  -
blockers               status                character varying(20)     not null  'active'::character varying
blockers               resolution_notes      text                      null      -
blockers               related_status_id     integer                   null      -
blockers               related_incident_id   integer                   null      -
blockers               created_at            timestamp with time zone  not null  now()
blockers               updated_at            timestamp with time zone  not null  now()
blockers               resolved_at           timestamp with time zone  null      -
blockers               archived_at           timestamp with time zone  null      -
decisions              id                    integer                   not null  nextval('asyncops.decisions_id_seq'::regclass)
decisions              created_by_id         integer                   null      -
decisions              title                 character varying(200)    not null  -
decisions              description           text                      not null  -
decisions              context               text                      not null  -
decisions              outcome               text                      not null  -
decisions              decision_date         date                      not null  -
decisions              tags                  text[]                    null      -
decisions              created_at            timestamp with time zone  not null  now()
decisions              updated_at            timestamp with time zone  not null  now()
decision_participants  id                    integer                   not null  nextval('asyncops.decision_participants_id_seq'::regclass)
decision_participants  decision_id           integer                   not null  -
decision_participants  user_id               integer                   not null  -
decision_participants  created_at            timestamp with time zone  not null  now()
decision_audit_log     id                    integer                   not null  nextval('asyncops.decision_audit_log_id_seq'::regclass)
decision_audit_log     decision_id           integer                   not null  -
decision_audit_log     changed_by_id         integer                   null      -
decision_audit_log     change_type           character varying(20)     not null  -
decision_audit_log     field_name            character varying(100)    null      -
decision_audit_log     old_value             text                      null      -
decision_audit_log     new_value             text                      null      -
decision_audit_log     changed_at            timestamp with time zone  not null  now()
daily_summaries        id                    integer                   not null  nextval('asyncops.daily_summaries_id_seq'::regclass)
daily_summaries        summary_date          date                      not null  -
daily_summaries        content               jsonb                     not null  -
daily_summaries        status_updates_count  integer                   not null  0
daily_summaries        incidents_count       integer                   not null  0
daily_summaries        blockers_count        integer                   not null  0
daily_summaries        decisions_count       integer                   not null  0
daily_summaries        generated_at          timestamp with time zone  not null  now()
daily_summaries        created_at            timestamp with time zone  not null  now()
"""  # noqa: E501
COLUMNS = [tuple(re.split(r"\s{2,}", line)) for line in SPECIFIED.strip().splitlines()]
TABLES = list(dict.fromkeys(column[0] for column in COLUMNS))

KEYS = {
    "users_pkey": "PRIMARY KEY (id)",
    "idx_users_email": "UNIQUE (email)",
    "status_updates_pkey": "PRIMARY KEY (id)",
    "incidents_pkey": "PRIMARY KEY (id)",
    "blockers_pkey": "PRIMARY KEY (id)",
    "decisions_pkey": "PRIMARY KEY (id)",
    "decision_participants_pkey": "PRIMARY KEY (id)",
    "decision_participants_decision_id_user_id_key": "UNIQUE (decision_id, user_id)",
    "decision_audit_log_pkey": "PRIMARY KEY (id)",
    "daily_summaries_pkey": "PRIMARY KEY (id)",
}

# decision_audit_log.decision_id has no foreign key, so that the history outlives the decision: decision 0030.
FOREIGN_KEYS = {
    ("status_updates", "user_id"): ("users", "CASCADE"),
    ("incidents", "reported_by_id"): ("users", "SET NULL"),
    ("incidents", "assigned_to_id"): ("users", "SET NULL"),
    ("blockers", "reported_by_id"): ("users", "SET NULL"),
    ("blockers", "related_status_id"): ("status_updates", "SET NULL"),
    ("blockers", "related_incident_id"): ("incidents", "SET NULL"),
    ("decisions", "created_by_id"): ("users", "SET NULL"),
    ("decision_participants", "decision_id"): ("decisions", "CASCADE"),
    ("decision_participants", "user_id"): ("users", "CASCADE"),
    ("decision_audit_log", "changed_by_id"): ("users", "SET NULL"),
}

# The indexes by their specified names.
INDEXES = {
    "idx_users_email": ("users", "btree (email)"),
    "idx_users_role": ("users", "btree (role)"),
    "idx_status_updates_user_id": ("status_updates", "btree (user_id)"),
    "idx_status_updates_created_at": ("status_updates", "btree (created_at DESC)"),
    "idx_status_updates_tags": ("status_updates", "gin (tags)"),
    "idx_incidents_reported_by": ("incidents", "btree (reported_by_id)"),
    "idx_incidents_assigned_to": ("incidents", "btree (assigned_to_id)"),
    "idx_incidents_status": ("incidents", "btree (status)"),
    "idx_incidents_severity": ("incidents", "btree (severity)"),
    "idx_incidents_created_at": ("incidents", "btree (created_at DESC)"),
    "idx_incidents_status_severity": ("incidents", "btree (status, severity)"),
    "idx_blockers_reported_by": ("blockers", "btree (reported_by_id)"),
    "idx_blockers_status": ("blockers", "btree (status)"),
    "idx_blockers_created_at": ("blockers", "btree (created_at DESC)"),
    "idx_blockers_related_status": ("blockers", "btree (related_status_id)"),
    "idx_blockers_related_incident": ("blockers", "btree (related_incident_id)"),
    "idx_decisions_created_by": ("decisions", "btree (created_by_id)"),
    "idx_decisions_decision_date": ("decisions", "btree (decision_date DESC)"),
    "idx_decisions_tags": ("decisions", "gin (tags)"),
    "idx_decisions_search": (
        "decisions",
        "gin (to_tsvector('english'::regconfig, (((title)::text || ' '::text) || description)))",
    ),
    "idx_decision_participants_decision": ("decision_participants", "btree (decision_id)"),
    "idx_decision_participants_user": ("decision_participants", "btree (user_id)"),
    "idx_decision_audit_decision": ("decision_audit_log", "btree (decision_id)"),
    "idx_decision_audit_changed_by": ("decision_audit_log", "btree (changed_by_id)"),
    "idx_decision_audit_changed_at": ("decision_audit_log", "btree (changed_at DESC)"),
    "idx_daily_summaries_date": ("daily_summaries", "btree (summary_date DESC)"),
    "idx_daily_summaries_generated_at": ("daily_summaries", "btree (generated_at DESC)"),
}
UNIQUE_INDEXES = {"idx_users_email", "idx_daily_summaries_date"}

HASH = "$2b$12$" + "abcdefghijklmnopqrstu/." + "0123456789ABCDEFGHIJKLMNOPQRST"
EMPTY_CONTENT = json.dumps(
    {
        "status_updates": [],
        "incidents": [],
        "blockers": [],
        "recent_decisions": [],
        "statistics": {
            "total_status_updates": 0,
            "critical_incidents": 0,
            "active_blockers": 0,
            "decisions_last_7_days": 0,
        },
    }
)

# One row of each table, complete but for its defaults. The rows of `world` are the first of each table.
ANN, BEN, EVE, NOBODY = 1, 2, 3, 2_000_000_000
SAMPLES: Mapping[str, Mapping[str, object]] = {
    "users": {"email": "sample@example.com", "password_hash": HASH, "full_name": "Sample"},
    "status_updates": {"user_id": BEN, "title": "sample", "content": "sample"},
    "incidents": {"reported_by_id": BEN, "title": "sample", "description": "sample"},
    "blockers": {"reported_by_id": BEN, "description": "sample", "impact": "sample"},
    "decisions": {
        "created_by_id": ANN,
        "title": "sample",
        "description": "sample",
        "context": "sample",
        "outcome": "sample",
        "decision_date": date(2026, 1, 14),
    },
    "decision_participants": {"decision_id": 1, "user_id": EVE},
    "decision_audit_log": {"decision_id": 1, "changed_by_id": ANN, "change_type": "created"},
    "daily_summaries": {"summary_date": date(2026, 1, 15), "content": EMPTY_CONTENT},
}

NO_BCRYPT: list[object] = [
    "",
    "secret",
    "5ebe2294ecd0e0f08eab7690d2a6ee69",  # MD5
    "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b0dWRWJTmaaJObG",
    "$6$rounds=5000$saltsalt$" + "a" * 86,  # SHA-512
    HASH[:-1],
    HASH + "a",
    HASH + "\n",
    " " + HASH,
    HASH.replace("$2b$", "$2x$"),
    HASH.replace("$12$", "$03$"),
    HASH.replace("$12$", "$32$"),
    HASH[:-1] + "=",
]
NO_WORDS: list[object] = [["a", None], [["a"], ["b"]]]
NO_CONTENT: list[object] = [
    "{}",
    "[]",
    "null",
    EMPTY_CONTENT.replace("recent_decisions", "decisions"),
    EMPTY_CONTENT.replace('"blockers": []', '"blockers": {}'),
]
# Blanks and characters that nobody sees.
UNSEEN = [" ", "\t", "\n", "\x7f", "\u00a0", "\u00ad", "\u200b", "\u2060", "\u3000", "\ufeff"]

# For every check constraint, values that violate it and no other.
VIOLATIONS: dict[str, tuple[str, str, list[object]]] = {
    "users_role_known": ("users", "role", ["", "Admin", "guest"]),
    "users_email_is_address": ("users", "email", ["", "ada", "@", "ada@", "@example.com", "a@b@c"]),
    "users_email_well_formed": ("users", "email", [f"{blank}ada@example.com" for blank in UNSEEN]),
    "users_full_name_visible": ("users", "full_name", ["", *UNSEEN]),
    "status_updates_title_visible": ("status_updates", "title", ["", *UNSEEN]),
    "incidents_title_visible": ("incidents", "title", ["", *UNSEEN]),
    "decisions_title_visible": ("decisions", "title", ["", *UNSEEN]),
    "users_password_hash_is_bcrypt": ("users", "password_hash", NO_BCRYPT),
    "status_updates_content_length": ("status_updates", "content", ["ä" * 10_001]),
    "status_updates_tags_are_words": ("status_updates", "tags", NO_WORDS),
    "incidents_severity_known": ("incidents", "severity", ["", "urgent", "Low"]),
    "incidents_status_known": ("incidents", "status", ["", "active", "in progress"]),
    "incidents_description_length": ("incidents", "description", ["ä" * 5_001]),
    "blockers_status_known": ("blockers", "status", ["", "open", "closed"]),
    "blockers_description_length": ("blockers", "description", ["ä" * 2_001]),
    "blockers_impact_length": ("blockers", "impact", ["ä" * 1_001]),
    # The driver sends these two as minus and plus infinity.
    "decisions_decision_date_is_a_day": ("decisions", "decision_date", [date.min, date.max]),
    "decisions_decision_date_not_ahead": ("decisions", "decision_date", [date(9999, 12, 30)]),
    "decisions_description_length": ("decisions", "description", ["ä" * 5_001]),
    "decisions_context_length": ("decisions", "context", ["ä" * 5_001]),
    "decisions_outcome_length": ("decisions", "outcome", ["ä" * 5_001]),
    "decisions_tags_are_words": ("decisions", "tags", NO_WORDS),
    "decision_audit_log_change_type_known": ("decision_audit_log", "change_type", ["", "Created", "archived"]),
    "decision_audit_log_update_names_its_field": ("decision_audit_log", "change_type", ["updated"]),
    "daily_summaries_summary_date_is_a_day": ("daily_summaries", "summary_date", [date.min, date.max]),
    "daily_summaries_summary_date_not_ahead": ("daily_summaries", "summary_date", [date(9999, 12, 30)]),
    "daily_summaries_content_is_structured": ("daily_summaries", "content", NO_CONTENT),
    "daily_summaries_counts_not_negative": ("daily_summaries", "blockers_count", [-1]),
}

ENUMERATIONS = {
    ("users", "role"): ["admin", "member"],
    ("incidents", "severity"): ["low", "medium", "high", "critical"],
    ("incidents", "status"): ["open", "in_progress", "resolved", "closed"],
    ("blockers", "status"): ["active", "resolved"],
    ("decision_audit_log", "change_type"): ["created", "deleted"],  # and updated, which names a field
}

LIMITS = {
    ("users", "full_name"): 255,
    ("status_updates", "title"): 200,
    ("status_updates", "content"): 10_000,
    ("incidents", "title"): 200,
    ("incidents", "description"): 5_000,
    ("blockers", "description"): 2_000,
    ("blockers", "impact"): 1_000,
    ("decisions", "title"): 200,
    ("decisions", "description"): 5_000,
    ("decisions", "context"): 5_000,
    ("decisions", "outcome"): 5_000,
}


async def insert(db: Connection, table: str, /, **values: object) -> asyncpg.Record:
    """Insert the sample row of a table, with `values` in place of its own."""
    row = {**SAMPLES[table], **values}
    places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    statement = f"insert into asyncops.{table} ({', '.join(row)}) values ({places}) returning *"
    inserted = await db.fetchrow(statement, *row.values())
    assert inserted is not None
    return inserted


async def small_team(db: Connection) -> None:
    """Ann, an admin, decided something with Ben; he wrote an update, and reported a blocker and her incident."""
    for name, role in [("Ann", "admin"), ("Ben", "member"), ("Eve", "member")]:
        await insert(db, "users", email=f"{name.lower()}@example.com", full_name=name, role=role)
    await insert(db, "status_updates", title="hello")
    await insert(db, "incidents", assigned_to_id=ANN)
    await insert(db, "blockers", related_status_id=1, related_incident_id=1)
    await insert(db, "decisions")
    await insert(db, "decision_participants", user_id=BEN)
    assert [(ANN, "Ann"), (BEN, "Ben"), (EVE, "Eve")] == [
        tuple(row) for row in await db.fetch("select id, full_name from asyncops.users order by id")
    ]


@pytest.fixture
async def world(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "asyncops-world", small_team) as connection:
        yield connection


async def load_demo(db: Connection) -> None:
    await db.execute((ROOT / "ddl/asyncops/demo.sql").read_text())


async def count(db: Connection, table: str, where: str = "true", *values: object) -> int:
    return int(await db.fetchval(f"select count(*) from asyncops.{table} where {where}", *values))


async def act_as(db: Connection, user: int | str) -> None:
    """Set the acting user for the rest of the transaction."""
    await db.execute("select set_config('rowcast.actor', $1, true)", str(user))


@asynccontextmanager
async def attempt(db: Connection) -> AsyncIterator[None]:
    """A savepoint that is always rolled back."""
    transaction = db.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


# --- Structure -------------------------------------------------------------------------------------------------


async def test_the_eight_tables_of_the_specification_exist(db: Connection) -> None:
    tables = await db.fetch(
        "select tablename from pg_tables where schemaname = 'asyncops' and tablename <> 'alembic_version'"
    )
    assert sorted(TABLES) == sorted(table["tablename"] for table in tables)
    assert len(TABLES) == 8


@for_each("table", TABLES)
async def test_a_table_has_exactly_the_specified_columns(db: Connection, table: str) -> None:
    columns = await db.fetch(
        "select a.attname, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull,"
        "       coalesce(pg_get_expr(d.adbin, d.adrelid), '-') as default"
        " from pg_attribute a left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)"
        " where a.attrelid = $1::text::regclass and a.attnum > 0 and not a.attisdropped order by a.attnum",
        f"asyncops.{table}",
    )
    assert [column for column in COLUMNS if column[0] == table] == [
        (table, c["attname"], c["type"], "not null" if c["attnotnull"] else "null", c["default"]) for c in columns
    ]


async def test_every_timestamp_has_a_time_zone(db: Connection) -> None:
    types = await db.fetch(
        "select distinct data_type from information_schema.columns where table_schema = 'asyncops'"
        " and column_name like '%\\_at'"
    )
    assert ["timestamp with time zone"] == [t["data_type"] for t in types]


async def test_the_keys_are_those_of_the_specification(db: Connection) -> None:
    keys = await db.fetch(
        "select conname, pg_get_constraintdef(oid) as definition from pg_constraint"
        " where connamespace = 'asyncops'::regnamespace and contype in ('p', 'u')"
        " and conrelid <> coalesce(to_regclass('asyncops.alembic_version'), 0)"
    )
    assert KEYS == {key["conname"]: key["definition"] for key in keys}


async def test_every_foreign_key_exists_with_its_on_delete_action(db: Connection) -> None:
    keys = await db.fetch(
        "select conname, pg_get_constraintdef(oid) as definition"
        " from pg_constraint where connamespace = 'asyncops'::regnamespace and contype = 'f'"
    )
    assert {
        f"{table}_{column}_fkey": f"FOREIGN KEY ({column}) REFERENCES asyncops.{other}(id) ON DELETE {action}"
        for (table, column), (other, action) in FOREIGN_KEYS.items()
    } == {key["conname"]: key["definition"] for key in keys}


@for_each("name", INDEXES)
async def test_every_index_of_the_specification_exists_by_its_name(db: Connection, name: str) -> None:
    table, definition = INDEXES[name]
    unique = "UNIQUE " if name in UNIQUE_INDEXES else ""
    assert f"CREATE {unique}INDEX {name} ON asyncops.{table} USING {definition}" == await db.fetchval(
        "select pg_get_indexdef($1::text::regclass)", f"asyncops.{name}"
    )


async def test_all_foreign_key_columns_are_indexed(db: Connection) -> None:
    bare = await db.fetch(
        "select c.conname from pg_constraint c"
        " where c.connamespace = 'asyncops'::regnamespace and c.contype = 'f' and not exists ("
        "   select from pg_index i where i.indrelid = c.conrelid and i.indkey[0] = c.conkey[1]"
        "   and i.indisvalid and i.indpred is null)"
    )
    assert [] == [key["conname"] for key in bare]


async def test_the_initial_migration_follows_the_order_of_the_specification(db: Connection) -> None:
    text = (ROOT / "ddl/asyncops/0001_tables.up.sql").read_text()
    assert re.findall(r"^create table asyncops\.(\w+)", text, re.MULTILINE) == TABLES
    assert text.rindex("create table") < text.index("create index")
    assert "create trigger" not in text
    assert "create trigger update_updated_at" in (ROOT / "ddl/asyncops/0002_rules.up.sql").read_text()


async def test_update_updated_at_is_a_trigger_of_every_table_that_has_the_column(db: Connection) -> None:
    triggers = await db.fetch(
        "select c.relname from pg_trigger t join pg_class c on c.oid = t.tgrelid"
        " where t.tgname = 'update_updated_at' and c.relnamespace = 'asyncops'::regnamespace"
    )
    assert {c[0] for c in COLUMNS if c[1] == "updated_at"} == {t["relname"] for t in triggers}


# --- Integrity -------------------------------------------------------------------------------------------------


@for_each("table", TABLES)
async def test_a_row_needs_only_what_the_specification_requires(world: Connection, table: str) -> None:
    row = await insert(world, table)
    assert SAMPLES[table].items() <= {**row, "content": SAMPLES[table].get("content")}.items()


@for_each("table", TABLES)
async def test_a_required_column_refuses_null(world: Connection, table: str) -> None:
    for column in [c[1] for c in COLUMNS if c[0] == table and c[3] == "not null"]:
        with pytest.raises(asyncpg.NotNullViolationError) as caught:
            async with world.transaction():
                await insert(world, table, **{column: None})
        assert (table, column) == (caught.value.table_name, caught.value.column_name)


@for_each("constraint", VIOLATIONS)
async def test_every_check_constraint_refuses_its_violations(world: Connection, constraint: str) -> None:
    table, column, values = VIOLATIONS[constraint]
    for value in values:
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            async with world.transaction():
                await insert(world, table, **{column: value})
        assert constraint == caught.value.constraint_name


async def test_every_check_constraint_is_tested(db: Connection) -> None:
    checks = await db.fetch(
        "select conname from pg_constraint where connamespace = 'asyncops'::regnamespace and contype = 'c'"
    )
    assert set(VIOLATIONS) == {check["conname"] for check in checks}


@for_each(("table", "column"), ENUMERATIONS)
async def test_every_value_of_an_enumeration_is_accepted(world: Connection, table: str, column: str) -> None:
    for word in ENUMERATIONS[table, column]:
        async with attempt(world):
            assert word == (await insert(world, table, **{column: word}))[column]


@for_each(("table", "column"), LIMITS)
async def test_text_of_the_maximum_length_is_accepted_and_longer_text_is_not(
    world: Connection, table: str, column: str
) -> None:
    limit = LIMITS[table, column]
    async with attempt(world):
        assert limit == len((await insert(world, table, **{column: "ä" * limit}))[column])
    with pytest.raises((asyncpg.CheckViolationError, asyncpg.StringDataRightTruncationError)):
        await insert(world, table, **{column: "ä" * (limit + 1)})


@for_each("tags", [None, [], ["one"], ["one", "two", "one"]])
@for_each("table", ["status_updates", "decisions"])
async def test_tags_are_null_or_any_words(world: Connection, table: str, tags: list[str] | None) -> None:
    assert tags == (await insert(world, table, tags=tags))["tags"]


@for_each(("table", "column"), FOREIGN_KEYS)
async def test_a_reference_to_a_missing_row_is_refused(world: Connection, table: str, column: str) -> None:
    with pytest.raises(asyncpg.ForeignKeyViolationError) as caught:
        async with world.transaction():
            await insert(world, table, **{column: NOBODY})
    assert f"{table}_{column}_fkey" == caught.value.constraint_name


@for_each(
    ("constraint", "table", "values"),
    [
        ("users_pkey", "users", {"id": ANN}),
        ("idx_users_email", "users", {"email": "ann@example.com"}),
        ("users_email_lower_key", "users", {"email": "ANN@Example.com"}),
        ("decision_participants_decision_id_user_id_key", "decision_participants", {"user_id": BEN}),
        ("idx_daily_summaries_date", "daily_summaries", {}),
    ],
)
async def test_a_duplicate_of_a_unique_value_is_refused(
    world: Connection, constraint: str, table: str, values: dict[str, object]
) -> None:
    if table == "daily_summaries":
        await insert(world, table)
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(world, table, **values)
    assert constraint == caught.value.constraint_name


# --- Creators, and what outlives an account --------------------------------------------------------------------

AUTHORS = [("incidents", "reported_by_id"), ("blockers", "reported_by_id"), ("decisions", "created_by_id")]


@for_each(("table", "column"), AUTHORS)
async def test_a_row_names_its_creator_while_the_account_exists(world: Connection, table: str, column: str) -> None:
    await act_as(world, ANN)
    for statement in (
        f"insert into asyncops.{table} select (x).* from"
        f' (select jsonb_populate_record(t, \'{{"id": 99, "{column}": null}}\') as x from asyncops.{table} t) as o',
        f"update asyncops.{table} set {column} = null",
    ):
        with pytest.raises(asyncpg.NotNullViolationError) as caught:
            async with world.transaction():
                await world.execute(statement)
        assert (table, column) == (caught.value.table_name, caught.value.column_name)
    await world.execute(f"update asyncops.{table} set {column} = $1", EVE)
    assert EVE == await world.fetchval(f"select {column} from asyncops.{table}")


async def test_incidents_blockers_and_decisions_outlive_the_account(world: Connection) -> None:
    await world.execute("delete from asyncops.users where id in ($1, $2)", ANN, BEN)
    incident = await world.fetchrow("select * from asyncops.incidents")
    blocker = await world.fetchrow("select * from asyncops.blockers")
    decision = await world.fetchrow("select * from asyncops.decisions")
    assert incident is not None
    assert blocker is not None
    assert decision is not None
    assert (None, None) == (incident["reported_by_id"], incident["assigned_to_id"])
    assert (None, None, 1) == (
        blocker["reported_by_id"],
        blocker["related_status_id"],
        blocker["related_incident_id"],
    )
    assert None is decision["created_by_id"]
    await world.execute("update asyncops.incidents set title = 'still to be worked on'")


async def test_status_updates_and_participations_are_deleted_with_the_account(world: Connection) -> None:
    await world.execute("delete from asyncops.users where id = $1", BEN)
    assert (0, 0) == (await count(world, "status_updates"), await count(world, "decision_participants"))


async def test_a_blocker_outlives_what_it_is_related_to(world: Connection) -> None:
    await world.execute("delete from asyncops.status_updates")
    await world.execute("delete from asyncops.incidents")
    assert [(None, None)] == [
        tuple(row)
        for row in await world.fetch("select related_status_id, related_incident_id from asyncops.blockers")
    ]


async def test_participants_are_deleted_with_their_decision(world: Connection) -> None:
    await act_as(world, ANN)
    await world.execute("delete from asyncops.decisions")
    assert 0 == await count(world, "decision_participants")


async def test_one_to_many_and_many_to_many_relationships_hold_many_rows(world: Connection) -> None:
    for _ in range(2):
        await insert(world, "status_updates")
        await insert(world, "incidents", assigned_to_id=EVE)
        await insert(world, "blockers", related_status_id=1, related_incident_id=1)
        decision = (await insert(world, "decisions"))["id"]
        for user in (ANN, BEN, EVE):
            await insert(world, "decision_participants", decision_id=decision, user_id=user)
    assert 3 == await count(world, "status_updates", "user_id = $1", BEN)
    assert 3 == await count(world, "incidents", "reported_by_id = $1", BEN)
    assert 2 == await count(world, "incidents", "assigned_to_id = $1", EVE)
    assert 3 == await count(world, "blockers", "reported_by_id = $1", BEN)
    assert 3 == await count(world, "blockers", "related_status_id = 1 and related_incident_id = 1")
    assert 3 == await count(world, "decisions", "created_by_id = $1", ANN)
    assert 3 == await count(world, "decision_participants", "user_id = $1", BEN)
    assert 3 == await count(world, "decision_participants", "decision_id = $1", decision)
    assert 3 == await count(world, "decision_audit_log", "changed_by_id = $1", ANN)
    await act_as(world, ANN)
    await world.execute("update asyncops.decisions set outcome = 'As expected.' where id = $1", decision)
    assert 2 == await count(world, "decision_audit_log", "decision_id = $1", decision)


# --- updated_at, resolved_at -----------------------------------------------------------------------------------

TOUCHED = {
    "users": "full_name",
    "status_updates": "content",
    "incidents": "description",
    "blockers": "impact",
    "decisions": "outcome",
}


@for_each("table", TOUCHED)
async def test_updated_at_follows_every_change_of_a_row(world: Connection, table: str) -> None:
    await act_as(world, ANN)
    change = f"update asyncops.{table} set {TOUCHED[table]} = $1 where id = 1 returning updated_at"
    created = await world.fetchval(f"select updated_at from asyncops.{table} where id = 1")
    # Both updates are in one transaction, so updated_at is the clock's time, not the transaction's.
    first, second = await world.fetchval(change, "one"), await world.fetchval(change, "two")
    assert created < first < second
    # It cannot be set, and an update that changes nothing leaves it.
    same = f"update asyncops.{table} set {TOUCHED[table]} = {TOUCHED[table]} where id = 1 returning updated_at"
    assert second == await world.fetchval(same)
    back = f"update asyncops.{table} set updated_at = '2001-01-01Z' where id = 1 returning updated_at"
    assert second < await world.fetchval(back)


@for_each(("table", "word"), [("incidents", "resolved"), ("incidents", "closed"), ("blockers", "resolved")])
async def test_a_resolved_row_has_a_resolution_time(world: Connection, table: str, word: str) -> None:
    change = f"update asyncops.{table} set status = $1 where id = 1 returning resolved_at"
    started = await world.fetchval("select clock_timestamp()")
    assert started < await world.fetchval(change, word)
    assert None is await world.fetchval(change, "open" if table == "incidents" else "active")
    assert (await insert(world, table, status=word))["resolved_at"] is not None
    at = await world.fetchval("select '2026-01-02 03:04:05Z'::timestamptz")
    assert at == (await insert(world, table, status=word, resolved_at=at))["resolved_at"]
    assert None is (await insert(world, table, resolved_at=at))["resolved_at"]


async def test_closing_a_resolved_incident_keeps_its_resolution_time(world: Connection) -> None:
    change = "update asyncops.incidents set status = $1 returning resolved_at"
    assert await world.fetchval(change, "resolved") == await world.fetchval(change, "closed")


# --- The audit log ---------------------------------------------------------------------------------------------


async def audit(db: Connection, after: int = 1) -> list[tuple[object, ...]]:
    """(user, change, field, old value, new value) of each entry, without the creation of the decision in `world`."""
    return [
        tuple(row)
        for row in await db.fetch(
            "select changed_by_id, change_type, field_name, old_value, new_value"
            " from asyncops.decision_audit_log where id > $1 order by id",
            after,
        )
    ]


async def test_creating_a_decision_is_logged_under_its_creator(world: Connection) -> None:
    decision = await insert(world, "decisions", created_by_id=EVE)
    assert [(EVE, "created", None, None, None)] == await audit(world)
    assert decision["id"] == await world.fetchval("select max(decision_id) from asyncops.decision_audit_log")
    await act_as(world, ANN)
    await insert(world, "decisions", created_by_id=EVE)
    assert (ANN, "created", None, None, None) == (await audit(world))[-1]


async def test_an_update_logs_an_entry_per_field_with_old_and_new_value(world: Connection) -> None:
    await act_as(world, BEN)
    await world.execute(
        "update asyncops.decisions set title = 'new', outcome = 'sample', decision_date = '2026-02-03',"
        " tags = '{a, \"b c\"}', created_by_id = $1",
        EVE,
    )
    assert [
        (BEN, "updated", "created_by_id", "1", "3"),
        (BEN, "updated", "title", "sample", "new"),
        (BEN, "updated", "decision_date", "2026-01-14", "2026-02-03"),
        (BEN, "updated", "tags", None, '["a", "b c"]'),
    ] == await audit(world)
    await world.execute("update asyncops.decisions set title = 'new', updated_at = now()")
    assert 4 == len(await audit(world))


CHANGED = {
    "title": "x",
    "description": "x",
    "context": "x",
    "outcome": "x",
    "decision_date": "2000-01-01",
    "tags": "{x}",
    "created_by_id": "3",
    "created_at": "2000-01-01Z",
    "id": "77",
}


@for_each(("column", "value"), CHANGED.items())
async def test_a_change_of_any_field_of_a_decision_is_logged(world: Connection, column: str, value: str) -> None:
    await act_as(world, ANN)
    await world.execute("delete from asyncops.decision_participants")  # which refer to the decision by its id
    await world.execute(f"update asyncops.decisions set {column} = '{value}'")
    assert [(ANN, "updated", column)] == [entry[:3] for entry in await audit(world)]


async def test_every_column_of_a_decision_is_tested(db: Connection) -> None:
    assert {c[1] for c in COLUMNS if c[0] == "decisions"} == {*CHANGED, "updated_at"}


async def test_a_column_that_is_added_later_is_audited_automatically(world: Connection) -> None:
    await act_as(world, ANN)
    await world.execute("alter table asyncops.decisions add column area text")
    await world.execute("update asyncops.decisions set area = 'process'")
    assert [(ANN, "updated", "area", None, "process")] == await audit(world)


async def test_a_deleted_decision_keeps_its_whole_history_in_the_log(world: Connection) -> None:
    await act_as(world, BEN)
    await world.execute("update asyncops.decisions set title = 'new'")
    await world.execute("delete from asyncops.decisions")
    assert [
        (ANN, "created", None, None, None),
        (BEN, "updated", "title", "sample", "new"),
        (BEN, "deleted", None, None, None),
    ] == await audit(world, 0)
    assert 3 == await count(world, "decision_audit_log", "decision_id = 1")


@for_each("actor", ["", "ann", "0", "01", "1 ", "-1", str(NOBODY), "99999999999999999999"])
@for_each("statement", ["update asyncops.decisions set title = 'x'", "delete from asyncops.decisions"])
async def test_a_decision_cannot_be_changed_without_naming_a_user(
    world: Connection, statement: str, actor: str
) -> None:
    await act_as(world, actor)
    with pytest.raises(asyncpg.NotNullViolationError, match="the user who changes this decision is not known"):
        await world.execute(statement)


@for_each(
    "statement",
    [
        "update asyncops.decisions set title = 'x'",
        "delete from asyncops.decisions",
        "insert into asyncops.decisions (created_by_id, title, description, context, outcome, decision_date)"
        f" values ({ANN}, 'x', 'x', 'x', 'x', '2026-01-01')",
    ],
)
async def test_a_deactivated_user_changes_no_decision(world: Connection, statement: str) -> None:
    await world.execute("update asyncops.users set is_active = false where id = $1", BEN)
    await act_as(world, BEN)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="deactivated"):
        await world.execute(statement)


AUTHOR_COLUMNS = {
    "status_updates": "user_id",
    "incidents": "reported_by_id",
    "blockers": "reported_by_id",
    "decisions": "created_by_id",
}


@for_each("table", AUTHOR_COLUMNS)
async def test_a_deactivated_user_creates_nothing_and_keeps_what_is_there(world: Connection, table: str) -> None:
    await act_as(world, BEN)
    await world.execute("update asyncops.users set is_active = false where id = $1", EVE)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match=f"{AUTHOR_COLUMNS[table]} .* is deactivated"):
        async with world.transaction():
            await insert(world, table, **{AUTHOR_COLUMNS[table]: EVE})
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="is deactivated"):
        async with world.transaction():
            await world.execute(f"update asyncops.{table} set {AUTHOR_COLUMNS[table]} = $1", EVE)
    row = await insert(world, table, **{AUTHOR_COLUMNS[table]: ANN})
    await world.execute("update asyncops.users set is_active = false where id = $1", ANN)
    edited = "impact" if table == "blockers" else "title"
    await world.execute(
        f"update asyncops.{table} set {AUTHOR_COLUMNS[table]} = $1, {edited} = 'edited' where id = $2", ANN, row["id"]
    )


async def test_a_change_without_a_user_fails_with_a_hint(world: Connection) -> None:
    with pytest.raises(asyncpg.NotNullViolationError) as caught:
        await world.execute("update asyncops.decisions set title = 'x'")
    assert "rowcast.actor" in str(caught.value.hint)
    assert ("decision_audit_log", "changed_by_id") == (caught.value.table_name, caught.value.column_name)


async def test_entries_of_a_deleted_account_stay_without_a_name(world: Connection) -> None:
    await act_as(world, ANN)
    await world.execute("delete from asyncops.users where id = $1", ANN)
    entries = await audit(world, 0)
    assert {
        (None, "created", None, None, None),
        (None, "updated", "created_by_id", "1", None),
    } == set(entries)
    assert 2 == len(entries)


@for_each(
    "statement",
    [
        "update asyncops.decision_audit_log set change_type = 'deleted'",
        "update asyncops.decision_audit_log set changed_by_id = 2",
        "update asyncops.decision_audit_log set changed_by_id = null",
        "update asyncops.decision_audit_log set changed_at = now()",
        "delete from asyncops.decision_audit_log",
        "truncate asyncops.decision_audit_log",
        "truncate asyncops.decisions cascade",
        "truncate asyncops.users cascade",
    ],
)
async def test_the_audit_log_is_append_only_even_for_its_owner(world: Connection, statement: str) -> None:
    before = await audit(world, 0)
    with pytest.raises(asyncpg.RestrictViolationError):
        async with world.transaction():
            await world.execute(statement)
    assert before == await audit(world, 0)
    assert 1 == await count(world, "decisions")


async def test_a_decision_and_its_entry_are_committed_or_rolled_back_together(world: Connection) -> None:
    async with attempt(world):
        await insert(world, "decisions")
        assert 1 == len(await audit(world))
    assert [] == await audit(world)


# --- Daily summaries -------------------------------------------------------------------------------------------

DAY = date(2026, 1, 15)


async def eventful_day(db: Connection) -> None:
    """Events around 15 January 2026, in UTC; the rows of `world` are later."""
    at = "select $1::text::timestamptz"
    for title, created in [
        ("the day before", "2026-01-14 23:59:59.999999Z"),
        ("first", "2026-01-15 00:00:00Z"),
        ("elsewhere the next day", "2026-01-16 00:30:00+01"),
        ("the day after", "2026-01-16 00:00:00Z"),
    ]:
        await insert(db, "status_updates", title=title, created_at=await db.fetchval(at, created))
    for title, severity, created, resolved in [
        ("new", "critical", "2026-01-15 09:00Z", None),
        ("resolved before", "critical", "2026-01-10 09:00Z", "2026-01-14 10:00Z"),
        ("resolved on the day", "high", "2026-01-10 09:00Z", "2026-01-15 10:00Z"),
        ("resolved after", "low", "2026-01-10 09:00Z", "2026-01-16 10:00Z"),
        ("reported after", "critical", "2026-01-16 09:00Z", None),
    ]:
        await insert(
            db,
            "incidents",
            title=title,
            severity=severity,
            status="resolved" if resolved else "open",
            created_at=await db.fetchval(at, created),
            resolved_at=await db.fetchval(at, resolved),
        )
    for description, created, resolved in [
        ("Waiting on API key", "2026-01-12 09:00Z", None),
        ("over", "2026-01-12 09:00Z", "2026-01-13 09:00Z"),
    ]:
        await insert(
            db,
            "blockers",
            description=description,
            status="resolved" if resolved else "active",
            created_at=await db.fetchval(at, created),
            resolved_at=await db.fetchval(at, resolved),
        )
    await act_as(db, ANN)
    await db.execute("delete from asyncops.decisions")
    for title, day in [
        ("eight days ago", 8),
        ("seven", 9),
        ("Adopt new framework", 14),
        ("today", 15),
        ("later", 16),
    ]:
        await insert(db, "decisions", title=title, decision_date=date(2026, 1, day))


async def generate(db: Connection, day: date = DAY) -> tuple[dict[str, Any], asyncpg.Record]:
    row = await db.fetchrow("select * from asyncops.generate_daily_summary($1)", day)
    assert row is not None
    return json.loads(row["content"]), row


async def test_a_summary_has_exactly_the_structure_of_the_specification(world: Connection) -> None:
    await eventful_day(world)
    ids = {row["title"]: row["id"] for row in await world.fetch("select id, title from asyncops.status_updates")}
    ids |= {row["title"]: row["id"] for row in await world.fetch("select id, title from asyncops.incidents")}
    ids |= {row["title"]: row["id"] for row in await world.fetch("select id, title from asyncops.decisions")}
    blocker = await world.fetchval("select id from asyncops.blockers where description = 'Waiting on API key'")
    content, _ = await generate(world)
    assert {
        "status_updates": [
            {"id": ids["first"], "title": "first", "author": "Ben", "created_at": "2026-01-15T00:00:00Z"},
            {
                "id": ids["elsewhere the next day"],
                "title": "elsewhere the next day",
                "author": "Ben",
                "created_at": "2026-01-15T23:30:00Z",
            },
        ],
        "incidents": [
            {"id": ids["resolved after"], "title": "resolved after", "severity": "low", "status": "resolved"},
            {"id": ids["new"], "title": "new", "severity": "critical", "status": "open"},
        ],
        "blockers": [{"id": blocker, "description": "Waiting on API key", "status": "active"}],
        "recent_decisions": [
            {"id": ids["seven"], "title": "seven", "decision_date": "2026-01-09"},
            {"id": ids["Adopt new framework"], "title": "Adopt new framework", "decision_date": "2026-01-14"},
            {"id": ids["today"], "title": "today", "decision_date": "2026-01-15"},
        ],
        "statistics": {
            "total_status_updates": 2,
            "critical_incidents": 1,
            "active_blockers": 1,
            "decisions_last_7_days": 3,
        },
    } == content


async def test_the_counts_of_a_summary_agree_with_its_content(world: Connection) -> None:
    await eventful_day(world)
    content, row = await generate(world)
    counts = tuple(row[f"{name}_count"] for name in ("status_updates", "incidents", "blockers", "decisions"))
    assert (2, 2, 1, 3) == counts
    assert counts == tuple(
        len(content[name]) for name in ("status_updates", "incidents", "blockers", "recent_decisions")
    )


async def test_a_day_without_events_has_an_empty_summary(world: Connection) -> None:
    content, row = await generate(world, date(2020, 1, 1))
    assert json.loads(EMPTY_CONTENT) == content
    assert 0 == row["status_updates_count"] + row["incidents_count"] + row["blockers_count"] + row["decisions_count"]


async def test_generating_a_summary_again_refreshes_the_one_row_of_its_date(world: Connection) -> None:
    _, first = await generate(world)
    await eventful_day(world)
    _, again = await generate(world)
    assert (first["id"], first["created_at"]) == (again["id"], again["created_at"])
    assert first["generated_at"] < again["generated_at"]
    assert (0, 2) == (first["status_updates_count"], again["status_updates_count"])
    assert 1 == await count(world, "daily_summaries")


@for_each("days", [1, 400])
async def test_a_day_that_has_not_begun_has_no_summary(world: Connection, days: int) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await world.execute(
            "select asyncops.generate_daily_summary((now() at time zone 'UTC')::date + $1::integer)", days
        )
    assert "daily_summaries_summary_date_not_ahead" == caught.value.constraint_name


async def test_a_summary_of_today_is_the_default_and_shows_what_is_active_now(world: Connection) -> None:
    await world.execute("update asyncops.status_updates set created_at = now()")  # which may be yesterday's
    today = await world.fetchval("select (now() at time zone 'UTC')::date")
    row = await world.fetchrow("select * from asyncops.generate_daily_summary()")
    assert row is not None
    assert (today, 1, 1, 1) == (
        row["summary_date"],
        row["status_updates_count"],
        row["incidents_count"],
        row["blockers_count"],
    )


@for_each("zone", ["UTC", "Pacific/Auckland", "America/Los_Angeles"])
async def test_days_are_utc_days_in_every_session_time_zone(world: Connection, zone: str) -> None:
    await eventful_day(world)
    await world.execute(f"set local timezone = '{zone}'; set local datestyle = 'SQL, DMY'")
    content, row = await generate(world)
    assert 2 == row["status_updates_count"]
    assert "2026-01-15T00:00:00Z" == content["status_updates"][0]["created_at"]
    assert "2026-01-14" == content["recent_decisions"][1]["decision_date"]


async def test_a_summary_that_is_generated_again_after_archiving_is_the_same(world: Connection) -> None:
    await eventful_day(world)
    before, _ = await generate(world)
    await world.execute("update asyncops.status_updates set archived_at = now()")
    await world.execute("update asyncops.incidents set archived_at = now()")
    await world.execute("update asyncops.blockers set archived_at = now()")
    assert before == (await generate(world))[0]


async def test_a_generated_summary_has_exactly_the_structure_of_its_model(world: Connection) -> None:
    await eventful_day(world)
    content, _ = await generate(world)
    assert content == SummaryContent.model_validate(content).model_dump()
    record = json.loads(await world.fetchval("select record from rowcast.events order by id desc limit 1"))
    assert None is problem("daily_summaries", record)
    for broken in (
        content | {"more": []},
        {name: part for name, part in content.items() if name != "blockers"},
        content | {"statistics": content["statistics"] | {"active_blockers": "1"}},
        content | {"incidents": [content["incidents"][0] | {"severity": "urgent"}]},
        content | {"recent_decisions": [content["recent_decisions"][0] | {"decision_date": "14.1.2026"}]},
    ):
        with pytest.raises(ValidationError):
            SummaryContent.model_validate(broken)


# --- Archiving -------------------------------------------------------------------------------------------------


async def old_things(db: Connection) -> None:
    """Of each kind a row that is old enough, one that is nearly so, and one that is not resolved."""
    ago = "select now() - $1::text::interval"
    for age in ("1 year 1 hour", "364 days"):
        await insert(db, "status_updates", title=age, created_at=await db.fetchval(ago, age))
    for status, age in [
        ("resolved", "1 year 1 hour"),
        ("closed", "1 year 1 hour"),
        ("open", "1 year 1 hour"),
        ("in_progress", "1 year 1 hour"),
        ("resolved", "364 days"),
    ]:
        await insert(db, "incidents", title=f"{status} {age}", status=status, created_at=await db.fetchval(ago, age))
    for status, age, resolved in [
        ("resolved", "10 years", "6 months 1 hour"),
        ("resolved", "10 years", "5 months 25 days"),
        ("active", "10 years", None),
    ]:
        await insert(
            db,
            "blockers",
            description=f"{status} {resolved}",
            status=status,
            created_at=await db.fetchval(ago, age),
            resolved_at=await db.fetchval(ago, resolved),
        )


async def archive(db: Connection) -> tuple[int, ...]:
    """Archive, and return the numbers of status updates, incidents and blockers."""
    return tuple(await db.fetchrow("select * from asyncops.archive()") or ())


async def archived(db: Connection) -> set[str]:
    rows = await db.fetch(
        "select title from asyncops.status_updates where archived_at is not null union all"
        " select title from asyncops.incidents where archived_at is not null union all"
        " select description from asyncops.blockers where archived_at is not null"
    )
    return {row["title"] for row in rows}


async def test_archiving_follows_the_retention_policy(world: Connection) -> None:
    await old_things(world)
    assert (1, 2, 1) == await archive(world)
    assert {
        "1 year 1 hour",
        "resolved 1 year 1 hour",
        "closed 1 year 1 hour",
        "resolved 6 months 1 hour",
    } == await archived(world)
    assert (0, 0, 0) == await archive(world)


async def test_archiving_deletes_nothing_and_archives_nothing_else(world: Connection) -> None:
    await old_things(world)
    before = {table: await count(world, table) for table in TABLES}
    await world.execute("select asyncops.archive(as_of => now() + interval '100 years')")
    assert before == {table: await count(world, table) for table in TABLES}
    has_mark = {c[0] for c in COLUMNS if c[1] == "archived_at"}
    assert {"status_updates", "incidents", "blockers"} == has_mark


async def test_archiving_goes_in_batches_oldest_first(world: Connection) -> None:
    await world.execute(
        "insert into asyncops.status_updates (user_id, title, content, created_at)"
        " select $1, n, 'old', now() - interval '1 year' - make_interval(days => n) from generate_series(1, 25) n",
        BEN,
    )
    for expected in (10, 10, 5, 0):
        assert expected == await world.fetchval("select status_updates from asyncops.archive(10)")
        done = await count(world, "status_updates", "archived_at is not null")
        left = "select max(title::int) from asyncops.status_updates where archived_at is null and content = 'old'"
        assert (25 - done or None) == await world.fetchval(left)


async def test_archiving_does_not_wait_for_locked_rows(empty_database: str) -> None:
    await migrate.apply(empty_database, ["asyncops"], report=lambda _: None)
    async with session(empty_database) as first, session(empty_database) as second:
        await small_team(first)
        await old_things(first)
        busy = first.transaction()
        await busy.start()
        await first.execute("select from asyncops.status_updates where title = '1 year 1 hour' for update")
        assert (0, 2, 1) == await archive(second)
        await busy.rollback()
        assert (1, 0, 0) == await archive(second)


@for_each("table", ["status_updates", "incidents", "blockers"])
async def test_default_reads_omit_archived_rows_which_stay_accessible(world: Connection, table: str) -> None:
    assert 1 == await count(world, f"live_{table}")
    await world.execute(f"update asyncops.{table} set archived_at = now()")
    assert (0, 1) == (await count(world, f"live_{table}"), await count(world, table))
    await world.execute(f"update asyncops.{table} set archived_at = null")
    assert 1 == await count(world, f"live_{table}")
    columns = await world.fetch(
        "select column_name from information_schema.columns where (table_schema, table_name) = ('asyncops', $1)",
        f"live_{table}",
    )
    assert [c[1] for c in COLUMNS if c[0] == table and c[1] != "archived_at"] == [c["column_name"] for c in columns]


@for_each(
    ("table", "closed", "opened"),
    [
        ("incidents", "resolved", "open"),
        ("incidents", "closed", "in_progress"),
        ("blockers", "resolved", "active"),
    ],
)
async def test_a_row_that_is_opened_again_returns_from_the_archive(
    world: Connection, table: str, closed: str, opened: str
) -> None:
    await world.execute(f"update asyncops.{table} set status = $1", closed)
    await world.execute(f"update asyncops.{table} set archived_at = now()")
    events = await Events.from_now(world)
    await world.execute(f"update asyncops.{table} set status = $1", opened)
    assert 1 == await count(world, f"live_{table}")
    assert {"restore"} == {kind for _, _, kind in await events.seen()}
    await world.execute(f"update asyncops.{table} set status = $1", closed)
    await world.execute(f"update asyncops.{table} set archived_at = now()")
    await world.execute(f"update asyncops.{table} set resolution_notes = 'still closed'")
    assert 0 == await count(world, f"live_{table}")


async def test_rows_that_were_opened_again_before_the_rule_return_with_it(empty_database: str) -> None:
    async def apply() -> None:
        await migrate.apply(empty_database, ["asyncops"], report=lambda _: None)

    await apply()
    await migrate.rollback(empty_database, "asyncops", to="asyncops_0004", report=lambda _: None)
    async with session(empty_database) as db:
        await small_team(db)
        await db.execute(
            "update asyncops.incidents set archived_at = now(); update asyncops.blockers set archived_at = now()"
        )
        await db.execute("update asyncops.users set email = ' ben@example.com' where id = $1", BEN)
    with pytest.raises(DatabaseFault, match="users_email_well_formed"):
        await apply()
    async with session(empty_database) as db:
        await db.execute("update asyncops.users set email = 'ben@example.com' where id = $1", BEN)
    await apply()
    async with session(empty_database) as db:
        assert (1, 1) == (await count(db, "live_incidents"), await count(db, "live_blockers"))


@for_each("table", ["status_updates", "incidents", "blockers"])
async def test_archived_rows_leave_the_feed_and_return_when_restored(world: Connection, table: str) -> None:
    events = await Events.from_now(world)
    await world.execute(f"update asyncops.{table} set archived_at = now()")
    await world.execute(f"update asyncops.{table} set archived_at = null")
    topics = {f"team:{table}", *(["user:1"] if table == "incidents" else [])}
    assert {(table, topic, kind) for topic in topics for kind in ("delete", "restore")} == set(await events.seen())


# --- The first admin -------------------------------------------------------------------------------------------


async def test_the_first_admin_gets_a_password_that_only_the_result_contains(db: Connection) -> None:
    made = await db.fetchrow("select * from asyncops.create_admin()")
    assert made is not None
    user = await db.fetchrow("select * from asyncops.users where id = $1", made["id"])
    assert user is not None
    assert ("admin@asyncops.local", "admin", True, True) == (
        user["email"],
        user["role"],
        user["is_active"],
        user["must_change_password"],
    )
    assert re.fullmatch(r"[\w-]{24}", made["password"])
    assert user["password_hash"].startswith("$2a$12$")
    assert user["password_hash"] == await db.fetchval(
        "select public.crypt($1, $2)", made["password"], user["password_hash"]
    )
    everything = await db.fetchval(
        "select (select string_agg(u::text, ' ') from asyncops.users u)"
        " || (select string_agg(e::text, ' ') from rowcast.events e)"
    )
    assert made["password"] not in everything


async def test_every_admin_gets_a_different_password(db: Connection) -> None:
    made = "select password from asyncops.create_admin($1)"
    assert await db.fetchval(made, "one@example.com") != await db.fetchval(made, "two@example.com")


async def test_applying_the_schema_creates_no_account_and_prints_no_password(empty_database: str) -> None:
    lines: list[str] = []
    await migrate.apply(empty_database, ["asyncops"], report=lines.append)
    async with session(empty_database) as db:
        assert 0 == await count(db, "users")
    assert not any("password" in line for line in lines)


async def test_an_operator_needs_a_password_hash_or_the_extension(db: Connection) -> None:
    await db.execute("drop extension pgcrypto")
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="pgcrypto") as caught:
        async with db.transaction():
            await db.fetch("select asyncops.create_admin()")
    assert "bcrypt" in str(caught.value.hint)
    made = await db.fetchrow("select * from asyncops.create_admin('me@example.com', 'Me', $1)", HASH)
    assert made is not None
    assert None is made["password"]
    assert 1 == await count(db, "users", "password_hash = $1 and must_change_password", HASH)


async def test_a_password_that_is_not_a_hash_is_refused_for_an_admin_too(db: Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await db.fetch("select asyncops.create_admin(password_hash => 'secret')")


async def test_a_second_admin_with_the_same_address_is_refused(db: Connection) -> None:
    await db.fetch("select asyncops.create_admin(password_hash => $1)", HASH)
    with pytest.raises(asyncpg.UniqueViolationError):
        await db.fetch("select asyncops.create_admin(password_hash => $1)", HASH)


async def test_changing_the_password_clears_must_change_password(db: Connection) -> None:
    await db.fetch("select asyncops.create_admin(password_hash => $1)", HASH)
    must = "select must_change_password from asyncops.users"
    await db.execute("update asyncops.users set full_name = 'The Admin', password_hash = password_hash")
    assert await db.fetchval(must)
    await db.execute("update asyncops.users set password_hash = $1", HASH.replace("$2b$", "$2y$"))
    assert not await db.fetchval(must)
    await db.execute("update asyncops.users set must_change_password = true")
    assert await db.fetchval(must)


@for_each("version", ["2a", "2b", "2y"])
@for_each("cost", ["04", "12", "31"])
async def test_every_bcrypt_hash_is_accepted_as_a_password(db: Connection, version: str, cost: str) -> None:
    hashed = HASH.replace("2b", version).replace("$12$", f"${cost}$")
    assert hashed == (await insert(db, "users", password_hash=hashed))["password_hash"]


async def test_in_another_schema_the_admins_address_stays_the_same(empty_database: str) -> None:
    await migrate.apply(empty_database, ["asyncops"], schemas={"asyncops": "elsewhere"}, report=lambda _: None)
    async with session(empty_database) as db:
        await db.fetch("select elsewhere.create_admin(password_hash => $1)", HASH)
        assert "admin@asyncops.local" == await db.fetchval("select email from elsewhere.users")


# --- Least privilege -------------------------------------------------------------------------------------------

WRITABLE = ["users", "status_updates", "incidents", "blockers", "decisions", "decision_participants"]


@for_each("table", WRITABLE)
async def test_the_application_reads_and_writes_rows(world: Connection, table: str) -> None:
    await act_as(world, ANN)
    await world.execute("set local role asyncops_app")
    row = await insert(world, table)
    assert row in await world.fetch(f"select * from asyncops.{table}")
    await world.execute(f"update asyncops.{table} set created_at = now() where id = $1", row["id"])
    assert "DELETE 1" == await world.execute(f"delete from asyncops.{table} where id = $1", row["id"])


async def test_the_application_can_delete_an_account_that_the_audit_log_names(world: Connection) -> None:
    await world.execute("set local role asyncops_app")
    await act_as(world, BEN)
    await world.execute("delete from asyncops.users where id = $1", ANN)
    assert {(None, "created", None, None, None), (BEN, "updated", "created_by_id", "1", None)} == set(
        await audit(world, 0)
    )
    assert 1 == await count(world, "decisions", "created_by_id is null")


async def test_the_application_can_generate_summaries_archive_and_read_the_results(world: Connection) -> None:
    await world.execute("set local role asyncops_app")
    await world.fetch("select asyncops.generate_daily_summary()")
    await world.fetch("select asyncops.archive()")
    assert (1, 1) == (await count(world, "daily_summaries"), await count(world, "decision_audit_log"))
    for table in ("status_updates", "incidents", "blockers"):
        assert 1 == await count(world, f"live_{table}")


@for_each(
    "statement",
    [
        "create table asyncops.more (id integer)",
        "alter table asyncops.users add column more text",
        "alter table asyncops.users disable trigger all",
        "drop table asyncops.daily_summaries",
        "drop schema asyncops cascade",
        "create index on asyncops.users (full_name)",
        "truncate asyncops.status_updates",
        "create function asyncops.more() returns integer language sql as 'select 1'",
        "create trigger more before update on asyncops.users for each row execute function asyncops.set_updated_at()",
        "insert into asyncops.decision_audit_log (decision_id, change_type) values (1, 'deleted')",
        "update asyncops.decision_audit_log set changed_by_id = null",
        "delete from asyncops.decision_audit_log",
        "delete from asyncops.daily_summaries",
        "update asyncops.daily_summaries set content = '{}'",
        "select asyncops.create_admin()",
        "select asyncops.may_read('1', 'team:members')",
        "select * from rowcast.events",
        "create role more",
    ],
)
async def test_the_application_can_change_neither_the_schema_nor_rows_that_only_the_database_writes(
    world: Connection, statement: str
) -> None:
    await world.execute("set local role asyncops_app")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await world.execute(statement)


async def test_the_role_of_the_application_has_no_login_and_no_special_attributes(db: Connection) -> None:
    role = await db.fetchrow(
        "select rolsuper, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls"
        " from pg_roles where rolname = 'asyncops_app'"
    )
    assert role is not None
    assert not any(role)


@pytest.fixture
async def plain_owner(empty_database: str) -> AsyncIterator[str]:
    """The DSN of a database owner who may not create roles, on a server without the application's role."""
    async with session(empty_database) as db:
        superuser, name = await db.fetchval("select current_user"), await db.fetchval("select current_database()")
        if await db.fetchval("select to_regrole('asyncops_app') is null"):
            await db.execute("create role asyncops_app")
        await db.execute("alter role asyncops_app rename to asyncops_app_elsewhere")
        await db.execute(CAPTURE_ROLE)
        await db.execute("create role plain_owner login password 'open sesame'")
        await db.execute("grant rowcast_capture to plain_owner")
        await db.execute(f"alter database {name} owner to plain_owner")
        yield re.sub("//[^@]+@", "//plain_owner:open%20sesame@", empty_database)
        await db.execute("alter role asyncops_app_elsewhere rename to asyncops_app")
        await db.execute(f"alter database {name} owner to {superuser}")
        await db.execute("drop owned by plain_owner cascade; drop role plain_owner")


async def test_the_pack_can_be_applied_again_once_the_missing_role_exists(
    plain_owner: str, empty_database: str
) -> None:
    lines: list[str] = []
    await migrate.apply(plain_owner, ["asyncops"], report=lines.append)
    assert any("plain_owner may not create the role asyncops_app" in line for line in lines)
    may_read = "select has_table_privilege($1, 'asyncops.users', 'select, insert, update, delete')"
    async with session(empty_database) as db:
        async with attempt(db):
            await db.execute("create role asyncops_app")
            assert not await db.fetchval(may_read, "asyncops_app")
        await db.execute("alter role asyncops_app_elsewhere rename to asyncops_app")
        await migrate.apply(plain_owner, ["asyncops"], report=lines.append)
        assert await db.fetchval(may_read, "asyncops_app")
        await migrate.rollback(plain_owner, "asyncops", report=lines.append)
        await db.execute("alter role asyncops_app rename to asyncops_app_elsewhere")


async def test_security_definer_functions_ignore_the_callers_search_path(db: Connection) -> None:
    functions = await db.fetch(
        "select proname, prosecdef, proconfig, has_function_privilege('public', oid, 'execute') as by_all"
        " from pg_proc where pronamespace = 'asyncops'::regnamespace"
    )
    assert {"may_read", "require_author", "audit_decision", "keep_audit_log", "generate_daily_summary"} == {
        f["proname"] for f in functions if f["prosecdef"]
    }
    assert all(f["proconfig"] == ["search_path=pg_catalog, pg_temp"] for f in functions)
    assert not any(f["by_all"] for f in functions)


async def test_objects_that_a_caller_puts_first_in_the_path_are_ignored(world: Connection) -> None:
    await world.execute("create role asyncops_sample_stranger")
    await world.execute("grant asyncops_app to asyncops_sample_stranger")
    await world.execute("set local role asyncops_sample_stranger; set local search_path = pg_temp, asyncops, public")
    await world.execute("create temp table users (id integer, is_active boolean)")
    await world.execute("create temp table decision_audit_log (like asyncops.decision_audit_log)")
    await act_as(world, NOBODY)
    await world.execute("insert into pg_temp.users values ($1, true)", NOBODY)
    with pytest.raises(asyncpg.NotNullViolationError):
        async with world.transaction():
            await world.execute("delete from asyncops.decisions")
    await act_as(world, ANN)
    await world.execute("delete from asyncops.decisions")
    assert 0 == await world.fetchval("select count(*) from pg_temp.decision_audit_log")
    assert [(ANN, "deleted", None, None, None)] == await audit(world)


# --- Capture ---------------------------------------------------------------------------------------------------

TOPICS = {
    "users": {"team:members"},
    "status_updates": {"team:status_updates"},
    "incidents": {"team:incidents"},
    "blockers": {"team:blockers"},
    "decisions": {"team:decisions"},
    "decision_participants": {"team:decisions", f"user:{EVE}"},
    "decision_audit_log": {"team:decisions"},
    "daily_summaries": {"team:summaries"},
}


@for_each("table", TABLES)
async def test_a_new_row_is_published_in_its_topics(world: Connection, table: str) -> None:
    events = await Events.from_now(world)
    await insert(world, table)
    seen = [event for event in await events.seen() if event[0] == table]
    assert {(table, topic, "insert") for topic in TOPICS[table]} == set(seen)
    assert len(TOPICS[table]) == len(seen)


async def test_an_incident_is_published_to_its_assignee_while_it_is_assigned(world: Connection) -> None:
    events = await Events.from_now(world)
    incident = (await insert(world, "incidents", assigned_to_id=BEN))["id"]
    assign = "update asyncops.incidents set assigned_to_id = $2 where id = $1"
    await world.execute(assign, incident, EVE)
    await world.execute(assign, incident, None)
    own = [(topic, kind) for _, topic, kind in await events.seen() if topic.startswith("user:")]
    assert [("user:2", "insert"), ("user:2", "leave"), ("user:3", "insert"), ("user:3", "leave")] == own
    assert 3 == len([topic for _, topic, _ in await events.seen() if topic == "team:incidents"])


async def test_addresses_and_passwords_are_never_published(world: Connection) -> None:
    published = await world.fetch("select table_name, columns from rowcast.watched where pack = 'asyncops'")
    assert set(TABLES) == {watched["table_name"] for watched in published}
    for watched in published:
        assert not {"email", "password_hash", "must_change_password", "archived_at"} & set(watched["columns"])
    await load_demo(world)
    await world.execute(
        "update asyncops.users set email = 'new@example.com', password_hash = $1, full_name = 'Ann A' where id = $2",
        HASH.replace("2b", "2y"),
        ANN,
    )
    await world.fetch("select asyncops.generate_daily_summary()")
    everything = await world.fetchval("select string_agg(e::text, ' ') from rowcast.events e")
    assert "Ann A" in everything
    assert "Cleo Carter" in everything
    for secret in ("@example.com", "$2b$", "$2y$", "password"):
        assert secret not in everything


def problem(table: str, record: Mapping[str, object]) -> str | None:
    """Why an insert of this record would not be sent; None if it would."""
    return PACK.problem(
        Change(
            seq=Seq(1),
            tx="1",
            at="2026-01-10T12:00:00.000000Z",
            schema="asyncops",
            table=table,
            topic=Topic("team:members"),
            kind=Kind.INSERT,
            key=json.dumps({"id": record["id"]}),
            record=json.dumps(record),
        )
    )


@pytest.fixture
async def records(world: Connection) -> dict[str, dict[str, Any]]:
    """A published row of each table, as captured."""
    events = await Events.from_now(world)
    for table in TABLES:
        await insert(world, table)
    return {row["table_name"]: json.loads(row["record"]) for row in await events.rows()}


@pytest.mark.parametrize(("table", "column"), LIMITS, ids=str)
async def test_a_row_model_accepts_the_longest_text_and_no_longer_one(
    records: dict[str, dict[str, Any]], table: str, column: str
) -> None:
    assert None is problem(table, records[table] | {column: "ä" * LIMITS[table, column]})
    assert f"record: string_too_long {column}" == problem(
        table, records[table] | {column: "ä" * (LIMITS[table, column] + 1)}
    )


@pytest.mark.parametrize(
    ("table", "members", "reason"),
    [
        ("users", {"role": "guest"}, "record: literal_error role"),
        ("users", {"is_active": 1}, "record: bool_type is_active"),
        ("users", {"email": "ann@example.com"}, "record: extra_forbidden"),
        ("users", {"password_hash": HASH}, "record: extra_forbidden"),
        ("status_updates", {"tags": ["a", None]}, "record: string_type tags"),
        ("status_updates", {"user_id": "2"}, "record: int_type user_id"),
        ("status_updates", {"user_id": 2**31}, "record: less_than_equal user_id"),
        ("incidents", {"id": 2**31}, "key: less_than_equal id"),
        ("incidents", {"severity": "urgent"}, "record: literal_error severity"),
        ("incidents", {"resolved_at": "2026-01-10T12:00:00"}, "record: string_pattern_mismatch resolved_at"),
        ("blockers", {"status": "open"}, "record: literal_error status"),
        ("decisions", {"decision_date": "10 January 2026"}, "record: string_pattern_mismatch decision_date"),
        ("decisions", {"decision_date": "2026-01-10T12:00:00"}, "record: string_pattern_mismatch decision_date"),
        ("decision_participants", {"user_id": None}, "record: int_type user_id"),
        ("decision_audit_log", {"change_type": "seen"}, "record: literal_error change_type"),
        ("daily_summaries", {"blockers_count": -1}, "record: greater_than_equal blockers_count"),
        ("daily_summaries", {"content": []}, "record: dict_type content"),
    ],
)
async def test_a_row_model_refuses_values_that_are_not_specified(
    records: dict[str, dict[str, Any]], table: str, members: dict[str, object], reason: str
) -> None:
    assert None is problem(table, records[table])
    assert reason == problem(table, records[table] | members)


# --- Rights ----------------------------------------------------------------------------------------------------

FEEDS = ["members", "status_updates", "incidents", "blockers", "decisions", "summaries"]
MAY_READ: list[tuple[str | None, str | None, bool]] = [
    *(("1", f"team:{feed}", True) for feed in FEEDS),
    *(("3", f"team:{feed}", True) for feed in FEEDS),
    ("1", "user:1", True),
    ("1", "user:2", False),
    ("1", "user:01", False),
    ("1", "user:1 ", False),
    ("1", "user:", False),
    ("1", "team:", False),
    ("1", "team:users", False),
    ("1", "TEAM:members", False),
    ("1", "team:members\n", False),
    ("1", "team:%", False),
    ("1", "users", False),
    ("1", "*asyncops", False),
    ("1", "", False),
    ("1", None, False),
    ("01", "team:members", False),
    ("1 ", "team:members", False),
    ("1\n", "team:members", False),
    ("+1", "team:members", False),
    ("1.0", "team:members", False),
    ("0", "team:members", False),
    ("-1", "team:members", False),
    ("4", "team:members", False),
    ("4", "user:4", False),
    ("9999999999", "team:members", False),
    ("99999999999999999999", "team:members", False),
    ("one", "team:members", False),
    ("", "user:", False),
    ("", "team:members", False),
    (None, "team:members", False),
    (None, None, False),
    ("1' or true --", "team:members", False),
]


async def test_may_read_is_true_for_the_right_users_only_and_never_null(world: Connection) -> None:
    assert MAY_READ == [
        (user, topic, await world.fetchval("select asyncops.may_read($1, $2)", user, topic))
        for user, topic, _ in MAY_READ
    ]


@for_each("topic", [*(f"team:{feed}" for feed in FEEDS), "user:2"])
async def test_a_deactivated_user_may_read_nothing_until_activated_again(world: Connection, topic: str) -> None:
    for active in (False, True):
        await world.execute("update asyncops.users set is_active = $1 where id = $2", active, BEN)
        assert active is await world.fetchval("select asyncops.may_read('2', $1)", topic)
    await world.execute("delete from asyncops.users where id = $1", BEN)
    assert False is await world.fetchval("select asyncops.may_read('2', $1)", topic)


async def test_all_rights_end_with_deletion_or_deactivation_and_return_with_reactivation(world: Connection) -> None:
    async def changed_rights(statement: str) -> list[tuple[object, object]]:
        async with attempt(world):
            events = await Events.from_now(world)
            await world.execute(statement, BEN)
            return [
                (row["grants"] and json.loads(row["grants"]), row["revokes"] and json.loads(row["revokes"]))
                for row in await events.rows()
                if row["grants"] or row["revokes"]
            ]

    ben = {"user": "2"}
    assert [(None, ben)] == await changed_rights("update asyncops.users set is_active = false where id = $1")
    assert [(None, ben)] == await changed_rights("delete from asyncops.users where id = $1")
    assert [] == await changed_rights("update asyncops.users set full_name = 'B', role = 'admin' where id = $1")
    await world.execute("update asyncops.users set is_active = false where id = $1", BEN)
    assert [(ben, None)] == await changed_rights("update asyncops.users set is_active = true where id = $1")
    assert [] == await changed_rights("delete from asyncops.users where id = $1")


async def test_no_other_pack_serves_a_topic_of_this_one() -> None:
    topics = [*(f"team:{feed}" for feed in FEEDS), "user:1", "user:2147483647"]
    assert all(PACK.serves(topic) for topic in topics)
    assert {"asyncops"} == {pack.name for pack in bundled().values() for topic in topics if pack.serves(topic)}


# --- Speed -----------------------------------------------------------------------------------------------------


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for child in plan.get("Plans", []) for node in nodes(child)]


async def crowded(db: Connection) -> None:
    """Fifty users and 5,000 rows of each kind, few of which match the queries."""
    await db.execute(
        f"""
        insert into asyncops.users (email, password_hash, full_name)
        select n || '@example.com', '{HASH}', n from generate_series(1, 50) n;
        insert into asyncops.status_updates (user_id, title, content, tags, created_at)
        select 1 + n % 50, n, n, array['tag' || n % 200, 'common'], now() - make_interval(hours => n)
        from generate_series(1, 5000) n;
        insert into asyncops.incidents
            (reported_by_id, assigned_to_id, title, description, severity, status, created_at)
        select 1 + n % 50, 1 + n % 49, n, n, (array['low', 'medium', 'high', 'critical'])[1 + n / 7 % 4],
               case when n % 10 = 3 then 'open' when n % 10 = 4 then 'in_progress' else 'closed' end,
               now() - make_interval(hours => n)
        from generate_series(1, 5000) n;
        insert into asyncops.blockers (reported_by_id, description, impact, status, related_status_id,
                                       related_incident_id, created_at)
        select 1 + n % 50, n, n, case when n % 100 = 0 then 'active' else 'resolved' end, n, n,
               now() - make_interval(hours => n)
        from generate_series(1, 5000) n;
        insert into asyncops.decisions (created_by_id, title, description, context, outcome, decision_date, tags)
        select 1 + n % 50, 'Number ' || n, case when n % 500 = 0 then 'We adopt frameworks' else 'We wait' end, n, n,
               current_date - n, array['tag' || n % 200, 'common']
        from generate_series(1, 5000) n;
        insert into asyncops.decision_participants (decision_id, user_id)
        select n, 1 + n % 50 from generate_series(1, 5000) n;
        insert into asyncops.daily_summaries (summary_date, content, generated_at)
        select current_date - n, '{EMPTY_CONTENT}', now() - make_interval(days => n) from generate_series(1, 1000) n;
        update asyncops.status_updates set archived_at = now() where created_at < now() - interval '30 days';
        """
    )
    # VACUUM merges the pending list of each GIN index, which would look expensive to the planner.
    await db.execute("vacuum (analyze)")


@pytest.fixture
async def crowd(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "asyncops-crowd", crowded) as connection:
        yield connection


@for_each(
    ("index", "query"),
    [
        ("idx_incidents_status_severity", "asyncops.incidents where status = 'open' and severity = 'critical'"),
        (
            "idx_incidents_status_severity",
            "asyncops.live_incidents where status = 'open' and severity = 'critical'",
        ),
        ("idx_incidents_created_at", "asyncops.incidents order by created_at desc limit 20"),
        ("idx_incidents_assigned_to", "asyncops.incidents where assigned_to_id = 7 and status = 'in_progress'"),
        ("idx_incidents_reported_by", "asyncops.incidents where reported_by_id = 7"),
        ("idx_status_updates_created_at", "asyncops.status_updates order by created_at desc limit 20"),
        ("idx_status_updates_user_id", "asyncops.status_updates where user_id = 7"),
        ("idx_status_updates_tags", "asyncops.status_updates where tags @> array['tag7']"),
        ("idx_status_updates_tags", "asyncops.live_status_updates where tags @> array['tag7']"),
        ("idx_blockers_status", "asyncops.blockers where status = 'active'"),
        ("idx_blockers_created_at", "asyncops.blockers order by created_at desc limit 20"),
        ("idx_blockers_related_status", "asyncops.blockers where related_status_id = 7"),
        ("idx_blockers_related_incident", "asyncops.blockers where related_incident_id = 7"),
        ("idx_decisions_decision_date", "asyncops.decisions order by decision_date desc limit 20"),
        ("idx_decisions_tags", "asyncops.decisions where tags @> array['tag7']"),
        (
            "idx_decisions_search",
            "asyncops.decisions where to_tsvector('english', title || ' ' || description)"
            " @@ websearch_to_tsquery('english', 'adopting framework')",
        ),
        ("idx_decision_participants_user", "asyncops.decision_participants where user_id = 7"),
        ("idx_decision_audit_decision", "asyncops.decision_audit_log where decision_id = 7"),
        ("idx_decision_audit_changed_at", "asyncops.decision_audit_log order by changed_at desc limit 20"),
        ("idx_daily_summaries_date", "asyncops.daily_summaries order by summary_date desc limit 7"),
        ("idx_daily_summaries_date", "asyncops.daily_summaries where summary_date = current_date - 7"),
        ("idx_daily_summaries_generated_at", "asyncops.daily_summaries order by generated_at desc limit 7"),
    ],
)
async def test_a_performance_critical_query_is_answered_by_its_index(
    crowd: Connection, index: str, query: str
) -> None:
    plan = json.loads(await crowd.fetchval(f"explain (format json) select * from {query}"))
    steps = nodes(plan[0]["Plan"])
    assert index in {step.get("Index Name") for step in steps}
    assert "Seq Scan" not in {step["Node Type"] for step in steps}
    if "order by" in query and "where" not in query:
        assert "Sort" not in {step["Node Type"] for step in steps}
    assert await crowd.fetch(f"select * from {query}")


@for_each("table", ["status_updates", "incidents", "blockers", "decisions"])
async def test_pages_of_a_list_continue_in_order_without_a_gap(crowd: Connection, table: str) -> None:
    column = "decision_date" if table == "decisions" else "created_at"
    ids: list[int] = []
    place: tuple[object, int] | None = None
    for _ in range(5):
        page = await crowd.fetch(
            f"select id, {column} from asyncops.{table} where $1::text is null or"
            f" ({column}, id) < ($1::text::{'date' if table == 'decisions' else 'timestamptz'}, $2)"
            f" order by {column} desc, id desc limit 20",
            str(place[0]) if place else None,
            place[1] if place else 0,
        )
        ids += [row["id"] for row in page]
        place = (page[-1][column], page[-1]["id"])
    assert ids == [
        row["id"]
        for row in await crowd.fetch(f"select id from asyncops.{table} order by {column} desc, id desc limit 100")
    ]


@for_each("table", ["status_updates", "incidents", "blockers"])
async def test_archiving_finds_its_rows_through_a_partial_index(crowd: Connection, table: str) -> None:
    await crowd.execute("load 'auto_explain'; set local auto_explain.log_min_duration = 0")
    await crowd.execute("set local auto_explain.log_nested_statements = on; set local auto_explain.log_format = json")
    plans: list[str] = []
    crowd.add_log_listener(lambda _, message: plans.append(message.message))
    await crowd.execute("set local client_min_messages = log")
    await crowd.execute("select asyncops.archive(10)")
    await crowd.execute("set local client_min_messages = notice")
    [plan] = [text for text in plans if f"update asyncops.{table} " in text]
    steps = nodes(json.loads(plan[plan.index("{") :])["Plan"])
    assert f"{table}_to_archive" in {step.get("Index Name") for step in steps}


# --- Sample data, and what the guide shows ---------------------------------------------------------------------


async def test_the_sample_data_are_as_many_as_the_specification_says(db: Connection) -> None:
    await load_demo(db)
    assert 5 <= await count(db, "users") <= 10
    assert 2 == await db.fetchval("select count(distinct role) from asyncops.users")
    assert 20 <= await count(db, "status_updates") <= 30
    assert 5 <= await count(db, "incidents") <= 10
    assert (4, 4) == tuple(
        await db.fetchrow("select count(distinct severity), count(distinct status) from asyncops.incidents") or ()
    )
    assert 5 <= await count(db, "blockers") <= 10
    assert 2 == await db.fetchval("select count(distinct status) from asyncops.blockers")
    assert 10 <= await count(db, "decisions") <= 15
    assert 0 == await count(
        db,
        "decisions",
        "not exists (select from asyncops.decision_participants p where p.decision_id = decisions.id)",
    )
    days = await db.fetch("select summary_date from asyncops.daily_summaries order by summary_date")
    assert 7 == len(days)
    assert 6 == (days[-1]["summary_date"] - days[0]["summary_date"]).days
    assert 0 < await db.fetchval("select min(incidents_count + blockers_count) from asyncops.daily_summaries")


async def test_the_sample_users_can_sign_in_and_read_everything(db: Connection) -> None:
    await load_demo(db)
    statement = (ROOT / "ddl/asyncops/demo_users.sql").read_text()
    people = await db.fetch(statement)
    assert 8 == len(people)
    for person in people:
        assert isinstance(person["id"], str)
        for topic in (*(f"team:{feed}" for feed in FEEDS), f"user:{person['id']}"):
            assert await db.fetchval("select asyncops.may_read($1, $2)", person["id"], topic)
    await db.execute("update asyncops.users set is_active = false where id = $1", int(people[0]["id"]))
    assert 7 == len(await db.fetch(statement))


async def test_every_statement_that_the_guide_shows_runs(db: Connection) -> None:
    guide = (ROOT / "docs/packs/asyncops/README.md").read_text()
    blocks = re.findall(r"```sql\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) > 3
    await load_demo(db)
    for block in blocks:
        async with attempt(db):
            await db.execute(block)
