"""The ChatGenius schema against its specification, in a real Postgres.

Every test runs in a transaction that is rolled back.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from ulid import ULID

from daemon.postgres.connect import Connection
from tests.packs.databases import Events, session, undone
from tests.support.cases import for_each
from tests.support.postgres import Server

ROOT = Path(__file__).parents[2]

# Table, column, type, nullability and default, as in the specification; plus the default of the ids.
SPECIFIED = """
users            id                     character varying(26)     not null  rowcast.ulid()
users            auth0_id               character varying(128)    not null  -
users            email                  character varying(255)    not null  -
users            username               character varying(255)    not null  -
users            full_name              character varying(255)    null      -
users            avatar_url             text                      null      -
users            created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
users            updated_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
users            deleted_at             timestamp with time zone  null      -
channels         id                     character varying(26)     not null  rowcast.ulid()
channels         name                   character varying(255)    not null  -
channels         description            text                      null      -
channels         created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
channels         updated_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
channels         deleted_at             timestamp with time zone  null      -
messages         id                     character varying(26)     not null  rowcast.ulid()
messages         channel_id             character varying(26)     not null  -
messages         user_id                character varying(26)     not null  -
messages         content                text                      not null  -
messages         created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
messages         updated_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
messages         deleted_at             timestamp with time zone  null      -
messages         metadata               jsonb                     null      -
channel_members  channel_id             character varying(26)     not null  -
channel_members  user_id                character varying(26)     not null  -
channel_members  role                   character varying(50)     not null  'member'::character varying
channel_members  joined_at              timestamp with time zone  not null  CURRENT_TIMESTAMP
reactions        id                     character varying(26)     not null  rowcast.ulid()
reactions        message_id             character varying(26)     not null  -
reactions        user_id                character varying(26)     not null  -
reactions        emoji                  character varying(50)     not null  -
reactions        created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
files            id                     character varying(26)     not null  rowcast.ulid()
files            message_id             character varying(26)     null      -
files            name                   character varying(255)    not null  -
files            type                   character varying(100)    not null  -
files            size                   bigint                    not null  -
files            url                    text                      not null  -
files            created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
user_settings    user_id                character varying(26)     not null  -
user_settings    theme                  character varying(50)     null      'light'::character varying
user_settings    notifications_enabled  boolean                   null      true
user_settings    preferences            jsonb                     null      '{}'::jsonb
user_status      user_id                character varying(26)     not null  -
user_status      status                 character varying(50)     not null  'offline'::character varying
user_status      last_seen              timestamp with time zone  not null  CURRENT_TIMESTAMP
user_status      custom_status          text                      null      -
message_reads    message_id             character varying(26)     not null  -
message_reads    user_id                character varying(26)     not null  -
message_reads    read_at                timestamp with time zone  not null  CURRENT_TIMESTAMP
sync_state       id                     character varying(26)     not null  rowcast.ulid()
sync_state       user_id                character varying(26)     not null  -
sync_state       last_sync              timestamp with time zone  not null  CURRENT_TIMESTAMP
sync_state       sync_type              character varying(50)     not null  -
sync_state       metadata               jsonb                     null      -
"""
COLUMNS = [tuple(re.split(r"\s{2,}", line)) for line in SPECIFIED.strip().splitlines()]
TABLES = list(dict.fromkeys(column[0] for column in COLUMNS))

KEYS = {
    "users_pkey": "PRIMARY KEY (id)",
    "users_auth0_id_key": "UNIQUE (auth0_id)",
    "users_email_key": "UNIQUE (email)",
    "channels_pkey": "PRIMARY KEY (id)",
    "messages_pkey": "PRIMARY KEY (id)",
    "channel_members_pkey": "PRIMARY KEY (channel_id, user_id)",
    "reactions_pkey": "PRIMARY KEY (id)",
    "reactions_message_id_user_id_emoji_key": "UNIQUE (message_id, user_id, emoji)",
    "files_pkey": "PRIMARY KEY (id)",
    "user_settings_pkey": "PRIMARY KEY (user_id)",
    "user_status_pkey": "PRIMARY KEY (user_id)",
    "message_reads_pkey": "PRIMARY KEY (message_id, user_id)",
    "sync_state_pkey": "PRIMARY KEY (id)",
}

# The ON DELETE action of each foreign key; docs/packs/chatgenius/README.md gives the reasons.
FOREIGN_KEYS = {
    ("messages", "channel_id"): ("channels", "CASCADE"),
    ("messages", "user_id"): ("users", "RESTRICT"),
    ("channel_members", "channel_id"): ("channels", "CASCADE"),
    ("channel_members", "user_id"): ("users", "CASCADE"),
    ("reactions", "message_id"): ("messages", "CASCADE"),
    ("reactions", "user_id"): ("users", "CASCADE"),
    ("files", "message_id"): ("messages", "SET NULL"),
    ("user_settings", "user_id"): ("users", "CASCADE"),
    ("user_status", "user_id"): ("users", "CASCADE"),
    ("message_reads", "message_id"): ("messages", "CASCADE"),
    ("message_reads", "user_id"): ("users", "CASCADE"),
    ("sync_state", "user_id"): ("users", "CASCADE"),
}

# One row of each table, complete but for its defaults. The rows of `world` hold these ids.
ANN = "01JH000000VSER00000000ANNA"
BEN = "01JH000000VSER000000000BEN"
EVE = "01JH000000VSER000000000EVE"
TEAM = "01JH000000CHAN00000000TEAM"
MESSAGE = "01JH000000MSG0000000000001"
REACTION = "01JH000000REACT00000000001"
FILE = "01JH000000F11E000000000001"
NOBODY = "01JH000000N0B0DY0000000000"
SAMPLES: Mapping[str, Mapping[str, object]] = {
    "users": {"auth0_id": "auth0|sample", "email": "sample@example.com", "username": "sample"},
    "channels": {"name": "sample"},
    "messages": {"channel_id": TEAM, "user_id": ANN, "content": "sample"},
    "channel_members": {"channel_id": TEAM, "user_id": EVE},
    "reactions": {"message_id": MESSAGE, "user_id": BEN, "emoji": "👎"},
    "files": {"message_id": MESSAGE, "name": "a.pdf", "type": "application/pdf", "size": 1, "url": "s3://a"},
    "user_settings": {"user_id": EVE},
    "user_status": {"user_id": EVE},
    "message_reads": {"message_id": MESSAGE, "user_id": BEN},
    "sync_state": {"user_id": ANN, "sync_type": "full"},
}

# Blanks and characters that nobody sees.
UNSEEN: list[object] = [" ", "\t", "\n", "\x7f", "\u00a0", "\u00ad", "\u200b", "\u2060", "\u3000", "\ufeff"]

# For every check constraint, values that violate it and no other.
MALFORMED_IDS = [
    "",
    "01JH",
    MESSAGE.lower(),
    "8" + MESSAGE[1:],
    MESSAGE[:-1] + "U",
    MESSAGE[:-1] + "I",
    MESSAGE[:-1] + "\n",
]
VIOLATIONS: dict[str, tuple[str, str, list[object]]] = {
    "users_id_is_ulid": ("users", "id", [*MALFORMED_IDS]),
    "users_auth0_id_not_empty": ("users", "auth0_id", [""]),
    "users_email_not_empty": ("users", "email", [""]),
    "users_email_shaped": ("users", "email", ["ada", "@", "ada@", "@example.com", "a@b@c"]),
    "users_email_well_formed": ("users", "email", [f"{blank}ada@example.com" for blank in UNSEEN]),
    "users_username_not_empty": ("users", "username", [""]),
    "users_username_visible": ("users", "username", UNSEEN),
    "users_full_name_visible": ("users", "full_name", ["", *UNSEEN]),
    "users_avatar_url_well_formed": ("users", "avatar_url", ["", *(f"https://a.example/{c}b" for c in UNSEEN)]),
    "channels_id_is_ulid": ("channels", "id", [*MALFORMED_IDS]),
    "channels_name_not_empty": ("channels", "name", [""]),
    "channels_name_visible": ("channels", "name", UNSEEN),
    "messages_id_is_ulid": ("messages", "id", [*MALFORMED_IDS]),
    "messages_metadata_is_object": ("messages", "metadata", ["[]", "null", "1", '"text"']),
    "channel_members_role_known": ("channel_members", "role", ["", "Owner", "root"]),
    "reactions_id_is_ulid": ("reactions", "id", [*MALFORMED_IDS]),
    "reactions_emoji_not_empty": ("reactions", "emoji", [""]),
    "files_id_is_ulid": ("files", "id", [*MALFORMED_IDS]),
    "files_name_not_empty": ("files", "name", [""]),
    "files_name_visible": ("files", "name", UNSEEN),
    "files_url_well_formed": ("files", "url", [f"s3://bucket/{blank}a" for blank in UNSEEN]),
    "files_type_not_empty": ("files", "type", [""]),
    "files_size_not_negative": ("files", "size", [-1]),
    "files_url_not_empty": ("files", "url", [""]),
    "user_settings_theme_known": ("user_settings", "theme", ["", "pink", "LIGHT"]),
    "user_settings_preferences_is_object": ("user_settings", "preferences", ["[]", "null"]),
    "user_status_status_known": ("user_status", "status", ["", "Online", "asleep"]),
    "sync_state_id_is_ulid": ("sync_state", "id", [*MALFORMED_IDS]),
    "sync_state_sync_type_known": ("sync_state", "sync_type", ["", "Full", "everything"]),
    "sync_state_metadata_is_object": ("sync_state", "metadata", ["[]", "0"]),
}

ENUMERATIONS: Mapping[tuple[str, str], list[str | None]] = {
    ("channel_members", "role"): ["owner", "admin", "member", "guest"],
    ("user_settings", "theme"): ["light", "dark", "system", None],
    ("user_status", "status"): ["online", "away", "busy", "dnd", "offline"],
    ("sync_state", "sync_type"): [
        *("full", "incremental", "channels", "messages", "reactions", "files", "reads", "users"),
    ],
}


async def insert(db: Connection, table: str, /, **values: object) -> asyncpg.Record:
    """Insert the sample row of a table, with `values` in place of its own."""
    row = {**SAMPLES[table], **values}
    places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    statement = f"insert into chatgenius.{table} ({', '.join(row)}) values ({places}) returning *"
    inserted = await db.fetchrow(statement, *row.values())
    assert inserted is not None
    return inserted


async def small_world(db: Connection) -> None:
    """Ann and Ben are members of a channel, Eve is not. Ben reacted to a message that Ann wrote there."""
    for id_, name in [(ANN, "ann"), (BEN, "ben"), (EVE, "eve")]:
        await insert(db, "users", id=id_, auth0_id=name, email=f"{name}@example.com", username=name)
    await insert(db, "channels", id=TEAM, name="team")
    await insert(db, "channel_members", user_id=ANN, role="owner")
    await insert(db, "channel_members", user_id=BEN)
    await insert(db, "messages", id=MESSAGE, content="hello")
    await insert(db, "reactions", id=REACTION, emoji="👍")
    await insert(db, "files", id=FILE)
    await insert(db, "message_reads", user_id=ANN)
    for table in ("user_settings", "user_status", "sync_state"):
        await insert(db, table, user_id=BEN)


@pytest.fixture
async def world(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "chatgenius-world", small_world) as connection:
        yield connection


async def count(db: Connection, table: str, where: str = "true", *values: object) -> int:
    return int(await db.fetchval(f"select count(*) from chatgenius.{table} where {where}", *values))


# --- Structure -------------------------------------------------------------------------------------------------


async def test_should_create_all_tables(db: Connection) -> None:
    tables = await db.fetch(
        "select tablename from pg_tables where schemaname = 'chatgenius' and tablename <> 'alembic_version'"
    )
    assert sorted(TABLES) == sorted(table["tablename"] for table in tables)
    assert len(TABLES) == 10


@for_each("table", TABLES)
async def test_a_table_has_exactly_the_specified_columns(db: Connection, table: str) -> None:
    columns = await db.fetch(
        "select a.attname, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull,"
        "       coalesce(pg_get_expr(d.adbin, d.adrelid), '-') as default"
        " from pg_attribute a left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)"
        " where a.attrelid = $1::text::regclass and a.attnum > 0 and not a.attisdropped order by a.attnum",
        f"chatgenius.{table}",
    )
    assert [column for column in COLUMNS if column[0] == table] == [
        (table, c["attname"], c["type"], "not null" if c["attnotnull"] else "null", c["default"]) for c in columns
    ]


async def test_information_schema_shows_no_timestamp_without_a_time_zone(db: Connection) -> None:
    types = await db.fetch(
        "select distinct data_type from information_schema.columns where table_schema = 'chatgenius'"
        " and table_name <> 'alembic_version'"
    )
    assert {"character varying", "text", "timestamp with time zone", "jsonb", "bigint", "boolean"} == {
        t["data_type"] for t in types
    }


async def test_every_id_and_every_reference_compares_by_bytes(db: Connection) -> None:
    ids = await db.fetch(
        "select table_name, column_name, collation_name from information_schema.columns"
        " where table_schema = 'chatgenius' and character_maximum_length = 26"
    )
    assert {"C"} == {i["collation_name"] for i in ids}
    # The views repeat the columns of their tables, so there are more columns than the tables have.
    assert len([c for c in COLUMNS if c[2] == "character varying(26)"]) <= len(ids)


async def test_the_keys_are_those_of_the_specification(db: Connection) -> None:
    keys = await db.fetch(
        "select conname, pg_get_constraintdef(oid) as definition from pg_constraint"
        " where connamespace = 'chatgenius'::regnamespace and contype in ('p', 'u')"
        " and conrelid <> coalesce(to_regclass('chatgenius.alembic_version'), 0)"
    )
    assert KEYS == {key["conname"]: key["definition"] for key in keys}


async def test_every_foreign_key_exists_with_its_on_delete_action(db: Connection) -> None:
    keys = await db.fetch(
        "select conname, conrelid::regclass::text as table, pg_get_constraintdef(oid) as definition"
        " from pg_constraint where connamespace = 'chatgenius'::regnamespace and contype = 'f'"
    )
    assert {
        f"{table}_{column}_fkey": f"FOREIGN KEY ({column}) REFERENCES chatgenius.{other}(id) ON DELETE {action}"
        for (table, column), (other, action) in FOREIGN_KEYS.items()
    } == {key["conname"]: key["definition"] for key in keys}


async def test_every_foreign_key_is_covered_by_an_index(db: Connection) -> None:
    bare = await db.fetch(
        "select c.conname from pg_constraint c"
        " where c.connamespace = 'chatgenius'::regnamespace and c.contype = 'f' and not exists ("
        "   select from pg_index i where i.indrelid = c.conrelid and i.indkey[0] = c.conkey[1]"
        "   and i.indisvalid and i.indpred is null)"
    )
    assert [] == [key["conname"] for key in bare]


async def test_no_index_is_a_prefix_of_another(db: Connection) -> None:
    repeated = await db.fetch(
        "select a.indexrelid::regclass::text as name from pg_index a join pg_index b"
        " on b.indrelid = a.indrelid and b.indexrelid <> a.indexrelid and b.indpred is null"
        " and a.indpred is null and a.indexprs is null and not a.indisunique"
        " and (b.indkey::text || ' ') like (a.indkey::text || ' %')"
        " join pg_class c on c.oid = a.indrelid where c.relnamespace = 'chatgenius'::regnamespace"
    )
    assert [] == [index["name"] for index in repeated]


async def test_the_extensions_exist_where_the_server_has_them_and_nothing_needs_them(db: Connection) -> None:
    dependent = await db.fetch(
        "select e.extname from pg_depend d join pg_extension e on e.oid = d.refobjid"
        " and d.refclassid = 'pg_extension'::regclass where e.extname in ('uuid-ossp', 'pgcrypto', 'citext')"
        " and d.deptype <> 'e'"
    )
    assert [] == [d["extname"] for d in dependent]
    wanted = await db.fetch("select name from rowcast.extensions where wanted_by = 'chatgenius'")
    there = await db.fetch(
        "select name, installed_version from pg_available_extensions"
        " where name in ('uuid-ossp', 'pgcrypto', 'citext')"
    )
    assert {e["name"] for e in there} == {w["name"] for w in wanted}
    assert all(e["installed_version"] for e in there)


# --- Integrity -------------------------------------------------------------------------------------------------


@for_each("table", TABLES)
async def test_a_row_needs_only_what_the_specification_requires(world: Connection, table: str) -> None:
    row = await insert(world, table)
    assert SAMPLES[table].items() <= dict(row).items()


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
        "select conname from pg_constraint where connamespace = 'chatgenius'::regnamespace and contype = 'c'"
    )
    assert set(VIOLATIONS) == {check["conname"] for check in checks}


@for_each(("table", "column"), ENUMERATIONS)
async def test_every_value_of_an_enumeration_is_accepted(world: Connection, table: str, column: str) -> None:
    for word in ENUMERATIONS[table, column]:
        undone = world.transaction()
        await undone.start()
        assert word == (await insert(world, table, **{column: word}))[column]
        await undone.rollback()


async def test_values_that_may_be_empty_are_accepted(world: Connection) -> None:
    assert (await insert(world, "messages", content=""))["content"] == ""
    assert (await insert(world, "files", size=0, message_id=None))["message_id"] is None


@for_each(("table", "column"), FOREIGN_KEYS)
async def test_should_enforce_foreign_key_constraints(world: Connection, table: str, column: str) -> None:
    with pytest.raises(asyncpg.ForeignKeyViolationError) as caught:
        async with world.transaction():
            await insert(world, table, **{column: NOBODY})
    assert f"{table}_{column}_fkey" == caught.value.constraint_name


@for_each(
    ("constraint", "table", "values"),
    [
        ("users_pkey", "users", {"id": ANN}),
        ("users_auth0_id_key", "users", {"auth0_id": "ann"}),
        ("users_email_key", "users", {"email": "ann@example.com"}),
        ("users_email_lower_key", "users", {"email": "ANN@Example.com"}),
        ("channels_pkey", "channels", {"id": TEAM}),
        ("messages_pkey", "messages", {"id": MESSAGE}),
        ("channel_members_pkey", "channel_members", {"user_id": ANN}),
        ("reactions_pkey", "reactions", {"id": REACTION}),
        ("reactions_message_id_user_id_emoji_key", "reactions", {"emoji": "👍"}),
        ("files_pkey", "files", {"id": FILE}),
        ("user_settings_pkey", "user_settings", {"user_id": BEN}),
        ("user_status_pkey", "user_status", {"user_id": BEN}),
        ("message_reads_pkey", "message_reads", {"user_id": ANN}),
    ],
)
async def test_a_duplicate_of_a_unique_value_is_refused(
    world: Connection, constraint: str, table: str, values: dict[str, object]
) -> None:
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(world, table, **values)
    assert constraint == caught.value.constraint_name


async def test_users_may_share_an_emoji_and_one_user_may_add_several(world: Connection) -> None:
    await insert(world, "reactions", user_id=ANN, emoji="👍")
    await insert(world, "reactions", user_id=BEN, emoji="🎉")
    assert await count(world, "reactions") == 3


# --- Ids -------------------------------------------------------------------------------------------------------


async def test_generated_ids_are_ulids_of_their_time(db: Connection) -> None:
    before = await db.fetchval("select date_trunc('milliseconds', clock_timestamp())")
    ids = [(await insert(db, "channels"))["id"] for _ in range(20)]
    after = await db.fetchval("select clock_timestamp()")
    assert all(before <= ULID.from_str(id_).datetime <= after for id_ in ids)


async def test_ids_of_later_rows_sort_after_earlier_ones(db: Connection) -> None:
    ids = [(await insert(db, "channels"))["id"] for _ in range(200)]
    assert ids == sorted(ids)
    assert ids == [row["id"] for row in await db.fetch("select id from chatgenius.channels order by id")]


async def test_ids_of_ten_thousand_rows_are_all_different(db: Connection) -> None:
    await db.execute("insert into chatgenius.channels (name) select 'n' from generate_series(1, 10000)")
    assert await db.fetchval("select count(distinct id) from chatgenius.channels") == 10_000


# --- updated_at ------------------------------------------------------------------------------------------------

TOUCHED = {"users": ("full_name", ANN), "channels": ("description", TEAM), "messages": ("content", MESSAGE)}


@for_each("table", TOUCHED)
async def test_updated_at_follows_every_change_of_a_row(world: Connection, table: str) -> None:
    column, id_ = TOUCHED[table]
    change = f"update chatgenius.{table} set {column} = $2 where id = $1 returning updated_at"
    created = await world.fetchval(f"select updated_at from chatgenius.{table} where id = $1", id_)
    # Both updates are in one transaction, so updated_at is the clock's time, not the transaction's.
    first = await world.fetchval(change, id_, "one")
    second = await world.fetchval(change, id_, "two")
    assert created < first < second


@for_each("table", TOUCHED)
async def test_an_update_that_changes_nothing_leaves_updated_at(world: Connection, table: str) -> None:
    column, id_ = TOUCHED[table]
    before = await world.fetchval(f"select updated_at from chatgenius.{table} where id = $1", id_)
    statement = f"update chatgenius.{table} set {column} = {column} where id = $1 returning updated_at"
    assert before == await world.fetchval(statement, id_)


@for_each("table", TOUCHED)
async def test_updated_at_cannot_be_set_back(world: Connection, table: str) -> None:
    _, id_ = TOUCHED[table]
    statement = (
        f"update chatgenius.{table} set updated_at = '2001-01-01Z' where id = $1 returning updated_at >= created_at"
    )
    assert await world.fetchval(statement, id_)


async def test_the_later_of_two_versions_has_the_later_time_whenever_its_transaction_began(database: str) -> None:
    async with session(database) as first, session(database) as second, session(database) as watcher:
        await insert(first, "channels", id=TEAM)
        change = "update chatgenius.channels set name = $1 returning updated_at"
        ahead, behind = first.transaction(), second.transaction()
        await ahead.start()
        await behind.start()
        await first.fetchval(change, "ahead")
        waiting = asyncio.create_task(second.fetchval(change, "behind"))
        while not await watcher.fetchval("select pg_blocking_pids($1) <> '{}'", second.get_server_pid()):
            pass  # until the server reports it
        committed = await first.fetchval("select clock_timestamp()")
        await ahead.commit()
        assert committed < await waiting
        await behind.rollback()


# --- Soft delete -----------------------------------------------------------------------------------------------


async def live(db: Connection, kind: str) -> set[str]:
    return {row["id"] for row in await db.fetch(f"select id from chatgenius.live_{kind}")}


async def set_deleted(db: Connection, table: str, id_: str, *, deleted: bool = True) -> None:
    await db.execute(
        f"update chatgenius.{table} set deleted_at = case when $2 then now() end where id = $1", id_, deleted
    )


async def test_should_handle_soft_deletes(world: Connection) -> None:
    assert ({ANN, BEN, EVE}, {TEAM}, {MESSAGE}) == (
        await live(world, "users"),
        await live(world, "channels"),
        await live(world, "messages"),
    )
    await set_deleted(world, "messages", MESSAGE)
    assert set() == await live(world, "messages")
    assert await count(world, "messages", "id = $1 and content = 'hello'", MESSAGE) == 1
    await set_deleted(world, "messages", MESSAGE, deleted=False)
    assert {MESSAGE} == await live(world, "messages")


async def test_the_messages_of_a_deleted_channel_are_not_live_until_it_is_restored(world: Connection) -> None:
    await set_deleted(world, "channels", TEAM)
    assert (set(), set()) == (await live(world, "channels"), await live(world, "messages"))
    await set_deleted(world, "channels", TEAM, deleted=False)
    assert ({TEAM}, {MESSAGE}) == (await live(world, "channels"), await live(world, "messages"))


async def test_the_messages_of_a_deleted_author_stay(world: Connection) -> None:
    await set_deleted(world, "users", ANN)
    assert {BEN, EVE} == await live(world, "users")
    assert {MESSAGE} == await live(world, "messages")


async def test_the_address_of_a_deleted_user_stays_taken(world: Connection) -> None:
    await set_deleted(world, "users", ANN)
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(world, "users", email="ann@example.com")


@for_each("table", ["users", "channels", "messages"])
async def test_a_live_view_shows_all_columns_but_deleted_at(db: Connection, table: str) -> None:
    columns = await db.fetch(
        "select column_name from information_schema.columns where table_schema = 'chatgenius' and table_name = $1",
        f"live_{table}",
    )
    specified = {column[1] for column in COLUMNS if column[0] == table}
    assert specified - {"deleted_at"} == {column["column_name"] for column in columns}


@for_each("view", ["live_users", "live_channels", "live_messages"])
async def test_since_postgres_15_a_grant_on_a_view_does_not_bypass_the_tables_grants(
    world: Connection, view: str
) -> None:
    await world.execute("create role chatgenius_sample_reader")
    await world.execute("grant usage on schema chatgenius to chatgenius_sample_reader")
    await world.execute(f"grant select on chatgenius.{view} to chatgenius_sample_reader")
    await world.execute("set local role chatgenius_sample_reader")
    if world.get_server_version().major >= 15:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await world.fetch(f"select * from chatgenius.{view}")
    else:
        assert await world.fetch(f"select * from chatgenius.{view}")


# --- Hard delete -----------------------------------------------------------------------------------------------


async def test_deleting_a_message_deletes_reactions_and_receipts_but_not_files(world: Connection) -> None:
    await world.execute("delete from chatgenius.messages where id = $1", MESSAGE)
    assert (0, 0) == (await count(world, "reactions"), await count(world, "message_reads"))
    assert [(FILE, None)] == [tuple(f) for f in await world.fetch("select id, message_id from chatgenius.files")]


async def test_deleting_a_channel_deletes_its_history_and_members(world: Connection) -> None:
    await world.execute("delete from chatgenius.channels where id = $1", TEAM)
    for table in ("messages", "channel_members", "reactions", "message_reads"):
        assert await count(world, table) == 0
    assert (3, 1) == (await count(world, "users"), await count(world, "files"))


async def test_a_user_who_has_written_cannot_be_deleted(world: Connection) -> None:
    with pytest.raises(asyncpg.PostgresError) as caught:
        async with world.transaction():
            await world.execute("delete from chatgenius.users where id = $1", ANN)
    # Postgres 18 reports RESTRICT as 23001, earlier versions as 23503.
    assert caught.value.sqlstate in ("23001", "23503")
    assert isinstance(caught.value, asyncpg.IntegrityConstraintViolationError)
    assert caught.value.constraint_name == "messages_user_id_fkey"


async def test_deleting_a_user_who_has_not_written_deletes_all_their_rows(world: Connection) -> None:
    await world.execute("delete from chatgenius.users where id = $1", BEN)
    for table in ("channel_members", "reactions", "user_settings", "user_status", "message_reads", "sync_state"):
        assert await count(world, table, "user_id = $1", BEN) == 0
    assert await count(world, "messages") == 1


async def test_deleting_a_message_keeps_the_children_of_others(world: Connection) -> None:
    other = (await insert(world, "messages"))["id"]
    await insert(world, "reactions", message_id=other)
    await world.execute("delete from chatgenius.messages where id = $1", MESSAGE)
    assert [other] == [row["message_id"] for row in await world.fetch("select * from chatgenius.reactions")]


async def test_deleting_a_message_needs_no_rights_on_its_children(world: Connection) -> None:
    await world.execute("create role chatgenius_sample_app")
    await world.execute("grant usage on schema chatgenius to chatgenius_sample_app")
    await world.execute("grant select, delete on chatgenius.messages to chatgenius_sample_app")
    await world.execute("set local role chatgenius_sample_app")
    await world.execute("delete from chatgenius.messages where id = $1", MESSAGE)
    await world.execute("reset role")
    assert await count(world, "reactions") == 0


# --- Capture ---------------------------------------------------------------------------------------------------

CHANNEL = f"channel:{TEAM}"


async def test_the_channel_receives_the_deletion_of_a_messages_children(world: Connection) -> None:
    events = await Events.from_now(world)
    await world.execute("delete from chatgenius.messages where id = $1", MESSAGE)
    assert [
        ("reactions", CHANNEL, "delete", {"id": REACTION}),
        ("message_reads", CHANNEL, "delete", {"message_id": MESSAGE, "user_id": ANN}),
        ("files", CHANNEL, "leave", {"id": FILE}),
        ("messages", CHANNEL, "delete", {"id": MESSAGE}),
    ] == await events.seen_with_keys()


async def test_the_channel_receives_every_child_when_many_messages_are_deleted_at_once(world: Connection) -> None:
    for _ in range(10):
        message = (await insert(world, "messages"))["id"]
        await insert(world, "reactions", message_id=message)
    events = await Events.from_now(world)
    await world.execute("delete from chatgenius.messages")
    deleted = [(table, topic, kind) for table, topic, kind, _ in await events.seen_with_keys()]
    assert deleted.count(("reactions", CHANNEL, "delete")) == 11
    assert deleted.count(("messages", CHANNEL, "delete")) == 11


async def test_members_receive_the_deletion_of_a_channel_and_its_contents(world: Connection) -> None:
    events = await Events.from_now(world)
    await world.execute("delete from chatgenius.channels where id = $1", TEAM)
    seen = await events.seen_with_keys()
    assert ("channels", CHANNEL, "delete", {"id": TEAM}) in seen
    assert ("messages", CHANNEL, "delete", {"id": MESSAGE}) in seen
    assert ("reactions", CHANNEL, "delete", {"id": REACTION}) in seen
    for user in (ANN, BEN):
        key = {"channel_id": TEAM, "user_id": user}
        assert ("channel_members", f"user:{user}", "delete", key) in seen
        assert ("channel_members", CHANNEL, "delete", key) in seen


TOPICS = {
    "users": {"users"},
    "channels": None,  # a topic of its own
    "messages": {CHANNEL},
    "channel_members": {CHANNEL, f"user:{EVE}"},
    "reactions": {CHANNEL},
    "files": {CHANNEL},
    "user_settings": {f"user:{EVE}"},
    "user_status": {"users"},
    "message_reads": {CHANNEL},
    "sync_state": {f"user:{ANN}"},
}


@for_each("table", TABLES)
async def test_a_new_row_is_published_in_its_topics(world: Connection, table: str) -> None:
    events = await Events.from_now(world)
    row = await insert(world, table)
    expected = TOPICS[table] or {f"channel:{row['id']}"}
    assert {(table, topic, "insert") for topic in expected} == {seen[:3] for seen in await events.seen_with_keys()}


async def test_a_file_is_published_once_it_belongs_to_a_message(world: Connection) -> None:
    events = await Events.from_now(world)
    file = (await insert(world, "files", message_id=None))["id"]
    assert [] == await events.seen_with_keys()
    await world.execute("update chatgenius.files set message_id = $1 where id = $2", MESSAGE, file)
    assert [("files", CHANNEL, "insert", {"id": file})] == await events.seen_with_keys()


async def test_addresses_and_account_ids_are_never_published(world: Connection) -> None:
    published = await world.fetch("select table_name, columns from rowcast.watched where pack = 'chatgenius'")
    assert set(TABLES) == {watched["table_name"] for watched in published}
    for watched in published:
        assert not {"email", "auth0_id", "deleted_at"} & set(watched["columns"])
    await world.execute(
        "update chatgenius.users set email = 'new@example.com', full_name = 'Ann A' where id = $1", ANN
    )
    everything = await world.fetchval("select string_agg(e::text, ' ') from rowcast.events e")
    assert "example.com" not in everything
    assert "Ann A" in everything


async def test_rights_end_with_membership_channel_and_user(world: Connection) -> None:
    async def revoked_by(statement: str, *values: object) -> list[object]:
        undone = world.transaction()
        await undone.start()
        events = await Events.from_now(world)
        await world.execute(statement, *values)
        rows = [row for row in await events.rows() if row["revokes"]]
        await undone.rollback()
        return [json.loads(row["revokes"]) for row in rows]

    ends = {"user": BEN, "topic": CHANNEL}
    leaves = "delete from chatgenius.channel_members where user_id = $1"
    # The revocation is in both topics of the membership, so followers of either apply it at its place in the log.
    assert [ends, ends] == await revoked_by(leaves, BEN)
    soft_delete = "update chatgenius.{} set deleted_at = now() where id = $1"
    assert [{"topic": CHANNEL}] == await revoked_by(soft_delete.format("channels"), TEAM)
    assert [{"user": EVE}] == await revoked_by(soft_delete.format("users"), EVE)
    assert [{"user": EVE}] == await revoked_by("delete from chatgenius.users where id = $1", EVE)
    assert [] == await revoked_by(soft_delete.format("messages"), MESSAGE)


# --- Rights ----------------------------------------------------------------------------------------------------

MAY_READ: list[tuple[str | None, str | None, bool]] = [
    (ANN, "users", True),
    (EVE, "users", True),
    (ANN, f"user:{ANN}", True),
    (ANN, f"user:{BEN}", False),
    (ANN, CHANNEL, True),
    (BEN, CHANNEL, True),
    (EVE, CHANNEL, False),
    (ANN, f"channel:{NOBODY}", False),
    (NOBODY, "users", False),
    (NOBODY, f"user:{NOBODY}", False),
    (NOBODY, CHANNEL, False),
    ("", "users", False),
    ("", "user:", False),
    (None, "users", False),
    (None, None, False),
    (ANN, None, False),
    (ANN, "", False),
    (ANN, "user:", False),
    (ANN, "user", False),
    (ANN, "USERS", False),
    (ANN, "users ", False),
    (ANN, "users:", False),
    (ANN, "channel:", False),
    (ANN, "channel", False),
    (ANN, CHANNEL + " ", False),
    (ANN, CHANNEL + "X", False),
    (ANN, CHANNEL.lower(), False),
    (ANN, " " + CHANNEL, False),
    (ANN, f"channel:%{TEAM[1:]}", False),
    (ANN, "channel:%", False),
    (ANN, "*chatgenius", False),
    (ANN, f"message:{MESSAGE}", False),
    (ANN, f"user:{ANN}' or true --", False),
]


async def test_may_read_is_true_for_the_right_users_only_and_never_null(world: Connection) -> None:
    assert MAY_READ == [
        (user, topic, await world.fetchval("select chatgenius.may_read($1, $2)", user, topic))
        for user, topic, _ in MAY_READ
    ]


@for_each("topic", ["users", f"user:{ANN}", CHANNEL])
async def test_a_deleted_user_may_read_nothing(world: Connection, topic: str) -> None:
    await set_deleted(world, "users", ANN)
    assert await world.fetchval("select chatgenius.may_read($1, $2)", ANN, topic) is False


async def test_nobody_may_read_a_deleted_channel(world: Connection) -> None:
    await set_deleted(world, "channels", TEAM)
    assert await world.fetchval("select chatgenius.may_read($1, $2)", ANN, CHANNEL) is False
    await set_deleted(world, "channels", TEAM, deleted=False)
    assert await world.fetchval("select chatgenius.may_read($1, $2)", ANN, CHANNEL) is True


async def test_a_member_who_left_may_no_longer_read_the_channel(world: Connection) -> None:
    await world.execute("delete from chatgenius.channel_members where user_id = $1", BEN)
    assert await world.fetchval("select chatgenius.may_read($1, $2)", BEN, CHANNEL) is False


async def test_only_grantees_may_call_may_read_which_reads_for_them(world: Connection) -> None:
    await world.execute("create role chatgenius_sample_daemon")
    await world.execute("grant usage on schema chatgenius to chatgenius_sample_daemon")
    await world.execute("set local role chatgenius_sample_daemon")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with world.transaction():
            await world.fetchval("select chatgenius.may_read($1, $2)", ANN, CHANNEL)
    await world.execute("reset role")
    await world.execute("grant execute on function chatgenius.may_read to chatgenius_sample_daemon")
    await world.execute("set local role chatgenius_sample_daemon")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with world.transaction():
            await world.fetch("select * from chatgenius.channel_members")
    assert await world.fetchval("select chatgenius.may_read($1, $2)", ANN, CHANNEL) is True


async def test_the_sample_users_have_visibly_different_rights(db: Connection) -> None:
    await db.execute((ROOT / "ddl/chatgenius/demo.sql").read_text())
    readable = await db.fetch(
        "select u.username, c.name from chatgenius.users u, chatgenius.channels c"
        " where chatgenius.may_read(u.id, 'channel:' || c.id)"
    )
    rights = {name: {r["name"] for r in readable if r["username"] == name} for name in ("alice", "bob", "eve")}
    assert {"alice": {"general", "random", "leads"}, "bob": {"general", "leads"}, "eve": {"random"}} == rights
    assert (5, 3) == (await count(db, "live_users"), await count(db, "live_channels"))


async def test_security_definer_functions_ignore_the_callers_search_path(db: Connection) -> None:
    functions = await db.fetch(
        "select proname, prosecdef, proconfig from pg_proc where pronamespace = 'chatgenius'::regnamespace"
    )
    definer = {"may_read", "release_message_children", "presence_changed", "acknowledged"}
    assert definer == {f["proname"] for f in functions if f["prosecdef"]}
    assert all("search_path=pg_catalog, pg_temp" in f["proconfig"] for f in functions)


# --- Speed -----------------------------------------------------------------------------------------------------


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for child in plan.get("Plans", []) for node in nodes(child)]


async def plan_of(db: Connection, statement: str) -> list[dict[str, Any]]:
    plan = json.loads(await db.fetchval(f"explain (format json) {statement}"))
    return nodes(plan[0]["Plan"])


async def many_messages(db: Connection) -> None:
    """500 users, 20 channels of 200 messages each, every tenth of them deleted."""
    await db.execute(
        "insert into chatgenius.users (auth0_id, email, username)"
        " select n, n || '@example.com', n from generate_series(1, 500) n"
    )
    await db.execute("insert into chatgenius.channels (name) select n from generate_series(1, 20) n")
    await db.execute(
        "insert into chatgenius.messages (channel_id, user_id, content, created_at, deleted_at)"
        " select c.id, (select min(id) from chatgenius.users), n, now() - make_interval(secs => n),"
        "        case when n % 10 = 0 then now() end"
        " from chatgenius.channels c, generate_series(1, 200) n"
    )
    await db.execute("analyze chatgenius.users, chatgenius.channels, chatgenius.messages")


@pytest.fixture
async def crowd(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "chatgenius-crowd", many_messages) as connection:
        yield connection


async def test_users_are_found_by_their_subjects_through_the_unique_index(crowd: Connection) -> None:
    await crowd.execute("update chatgenius.users set deleted_at = now() where auth0_id = '8'")
    statement = (ROOT / "ddl/chatgenius/identity.sql").read_text()
    found = await crowd.fetch(statement, ["7", "8", "nobody"])
    seven = await crowd.fetchval("select id from chatgenius.users where auth0_id = '7'")
    assert [("7", seven)] == [(row["subject"], row["user_id"]) for row in found]
    steps = await plan_of(crowd, statement.replace("$1", "array['7']"))
    assert {"users_auth0_id_key"} == {step["Index Name"] for step in steps if "Index Name" in step}
    assert not [step for step in steps if step["Node Type"] == "Seq Scan"]


@for_each("relation", ["messages", "live_messages"])
async def test_the_newest_messages_of_a_channel_come_from_the_index_in_its_order(
    crowd: Connection, relation: str
) -> None:
    channel = await crowd.fetchval("select min(id) from chatgenius.channels")
    steps = await plan_of(
        crowd,
        f"select * from chatgenius.{relation} where channel_id = '{channel}'"
        f"{'' if relation == 'live_messages' else ' and deleted_at is null'}"
        " order by created_at desc, id desc limit 50",
    )
    assert "messages_live_newest" in {step.get("Index Name") for step in steps}
    assert "Sort" not in {step["Node Type"] for step in steps}


async def test_a_user_is_found_by_address_in_any_case_through_an_index(crowd: Connection) -> None:
    statement = "select * from chatgenius.users where lower(email) = lower('77@Example.com')"
    assert "users_email_lower_key" in {step.get("Index Name") for step in await plan_of(crowd, statement)}
    assert await crowd.fetchval(statement) is not None


async def test_the_status_of_users_follows_their_presence_but_keeps_what_they_chose(world: Connection) -> None:
    async def status() -> dict[str, str]:
        found = await world.fetch("select user_id, status from chatgenius.user_status order by user_id")
        return {row["user_id"]: row["status"] for row in found}

    await world.execute("delete from chatgenius.user_status")
    await world.execute(
        "insert into chatgenius.user_status (user_id, status, last_seen) values ($1, 'busy', 'epoch')", BEN
    )
    call = "select chatgenius.presence_changed($1, $2)"
    await world.execute(call, [ANN, BEN, "nobody"], [])
    assert {ANN: "online", BEN: "busy"} == await status()
    await world.execute(call, [], [ANN, BEN, "nobody"])
    assert {ANN: "offline", BEN: "offline"} == await status()
    await world.execute(call, [BEN], [])
    assert {ANN: "offline", BEN: "online"} == await status()
    assert not await world.fetchval("select exists (select from chatgenius.user_status where last_seen = 'epoch')")
    await world.execute("update chatgenius.users set deleted_at = now() where id = $1", ANN)
    await world.execute(call, [ANN], [])
    assert {ANN: "offline", BEN: "online"} == await status()


async def test_each_device_has_one_sync_state_whose_time_moves_every_few_minutes(world: Connection) -> None:
    async def acknowledge() -> list[tuple[str, bool]]:
        await world.execute("select chatgenius.acknowledged($1, $2)", [ANN, ANN, "nobody"], ["desk", "phone", "desk"])
        found = await world.fetch(
            "select metadata ->> 'rowcast_device', last_sync = now() from chatgenius.sync_state"
            " where user_id = $1 and metadata ? 'rowcast_device' order by 1",
            ANN,
        )
        return [tuple(row) for row in found]

    both = [("desk", True), ("phone", True)]
    assert [both, both] == [await acknowledge(), await acknowledge()]
    for age, moves in (("4 minutes", False), ("6 minutes", True)):
        await world.execute(
            "update chatgenius.sync_state set last_sync = now() - $1::text::interval"
            " where metadata ->> 'rowcast_device' = 'desk'",
            age,
        )
        assert [("desk", moves), ("phone", True)] == await acknowledge()
