"""The disclosure schema against its specification, in a real Postgres.

Most tests run in a transaction that is rolled back; tests of concurrent jobs and of migrations have a database of
their own.
"""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import ValidationError

from daemon.packs.disclosure import Secret
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DatabaseFault
from daemon.schema import migrate
from tests.packs.databases import Events, session, undone
from tests.support.cases import for_each
from tests.support.catalog import catalog
from tests.support.postgres import Server

ROOT = Path(__file__).parents[2]

# Table, column, type, nullability and default.
SPECIFIED = """
users           id                     character varying(26)     not null  rowcast.ulid()
users           name                   character varying(255)    not null  -
users           created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
secrets         id                     bigint                    not null  -
secrets         user_id                character varying(26)     not null  -
secrets         title                  character varying(255)    not null  -
secrets         ciphertext             bytea                     not null  -
secrets         iv                     bytea                     not null  -
secrets         auth_tag               bytea                     not null  -
secrets         key_id                 character varying(64)     not null  -
secrets         algorithm              character varying(32)     not null  'aes-256-gcm'::character varying
secrets         check_in_days          integer                   not null  30
secrets         last_check_in          timestamp with time zone  not null  CURRENT_TIMESTAMP
secrets         next_check_in          timestamp with time zone  not null  -
secrets         status                 character varying(20)     not null  'active'::character varying
secrets         processing_started_at  timestamp with time zone  null      -
secrets         created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
secrets         retry_count            integer                   not null  0
secrets         last_retry_at          timestamp with time zone  null      -
recipients      id                     bigint                    not null  -
recipients      secret_id              bigint                    not null  -
recipients      email                  character varying(254)    not null  -
recipients      created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
disclosure_log  id                     bigint                    not null  -
disclosure_log  secret_id              bigint                    not null  -
disclosure_log  recipient_email        character varying(254)    not null  -
disclosure_log  status                 character varying(20)     not null  'pending'::character varying
disclosure_log  error                  text                      null      -
disclosure_log  created_at             timestamp with time zone  not null  CURRENT_TIMESTAMP
disclosure_log  sent_at                timestamp with time zone  null      -
"""
COLUMNS = [tuple(re.split(r"\s{2,}", line)) for line in SPECIFIED.strip().splitlines()]
TABLES = list(dict.fromkeys(column[0] for column in COLUMNS))

RETRY_COLUMNS = {"retry_count", "last_retry_at"}
NEW_INDEXES = {"idx_disclosure_log_unique", "idx_disclosure_log_batch_fetch"}

ANN = "01JH000000VSER00000000ANNA"
BEN = "01JH000000VSER000000000BEN"
NOBODY = "01JH000000N0B0DY0000000000"
TEST, SECOND = "test@example.com", "second@example.com"

# One row of each table, complete but for its defaults; they reference rows of `world`.
SAMPLES: Mapping[str, Mapping[str, object]] = {
    "users": {"name": "sample"},
    "secrets": {
        "user_id": ANN,
        "title": "sample",
        "ciphertext": b"a ciphertext",
        "iv": b"sample nonce",
        "auth_tag": b"the tag: 16 long",
        "key_id": "sample",
    },
    "recipients": {"secret_id": 123, "email": "sample@example.com"},
    "disclosure_log": {"secret_id": 123, "recipient_email": "sample@example.com"},
}

# Blanks and invisible characters that [[:space:]] does not find in every locale.
UNSEEN = ["\u00a0", "\u00ad", "\u200b", "\u2060", "\ufeff", "\x7f"]

# Enforced by triggers before any row gets there; they hold for rows that were written without triggers.
KEPT_BY_TRIGGERS = {
    "secrets_sixth_failure_is_final",
    "secrets_only_active_are_claimed",
    "disclosure_log_sent_at_fits_status",
}

# For every check constraint, values that violate it and no other.
VIOLATIONS: dict[str, tuple[str, str, list[object]]] = {
    "users_id_is_ulid": ("users", "id", ["", ANN.lower(), "8" + ANN[1:], ANN[:-1] + "I"]),
    "users_name_not_empty": ("users", "name", [""]),
    "users_name_visible": ("users", "name", [" ", "\u00a0\u200b", "\t"]),
    "secrets_id_positive": ("secrets", "id", [0, -1]),
    "secrets_title_not_empty": ("secrets", "title", [""]),
    "secrets_title_visible": ("secrets", "title", [" \n", "\ufeff"]),
    "secrets_ciphertext_not_empty": ("secrets", "ciphertext", [b""]),
    "secrets_iv_length": ("secrets", "iv", [b"", bytes(11), bytes(16)]),
    "secrets_auth_tag_length": ("secrets", "auth_tag", [b"", bytes(12), bytes(17)]),
    "secrets_key_id_not_empty": ("secrets", "key_id", [""]),
    "secrets_algorithm_known": ("secrets", "algorithm", ["", "aes-256-cbc", "none"]),
    "secrets_check_in_days_sensible": ("secrets", "check_in_days", [0, -1, 3651]),
    "secrets_status_known": ("secrets", "status", ["", "Active", "sent", "processing"]),
    "secrets_retry_count_not_negative": ("secrets", "retry_count", [-1]),
    "recipients_email_is_address": ("recipients", "email", ["", "nobody", "@", "a b@example.com", "a@b@c"]),
    "recipients_email_in_small_letters": ("recipients", "email", ["Test@example.com"]),
    "recipients_email_well_formed": ("recipients", "email", [f"a{blank}b@example.com" for blank in UNSEEN]),
    "disclosure_log_id_positive": ("disclosure_log", "id", [0]),
    "disclosure_log_recipient_email_not_empty": ("disclosure_log", "recipient_email", [""]),
    "disclosure_log_recipient_email_in_small_letters": ("disclosure_log", "recipient_email", ["Test@example.com"]),
    "disclosure_log_recipient_email_is_address": ("disclosure_log", "recipient_email", ["nobody", "@", "a@b@c"]),
    "disclosure_log_recipient_email_well_formed": (
        "disclosure_log",
        "recipient_email",
        [f"{blank}ada@example.com" for blank in (" ", *UNSEEN)],
    ),
    "disclosure_log_status_known": ("disclosure_log", "status", ["", "Sent", "triggered"]),
}

ENUMERATIONS: Mapping[tuple[str, str], list[str]] = {
    ("secrets", "status"): ["active", "paused", "triggered", "failed"],
    ("disclosure_log", "status"): ["pending", "sent", "failed"],
    ("secrets", "algorithm"): ["aes-256-gcm"],
}


async def insert(db: Connection, table: str, /, **values: object) -> asyncpg.Record:
    """Insert the sample row of a table, with `values` in place of its own."""
    row = {**SAMPLES[table], **values}
    places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    statement = f"insert into disclosure.{table} ({', '.join(row)}) values ({places}) returning *"
    inserted = await db.fetchrow(statement, *row.values())
    assert inserted is not None
    return inserted


async def small_world(db: Connection) -> None:
    """Ann has a secret that is due, with two recipients; Ben has no secret."""
    await insert(db, "users", id=ANN, name="Ann")
    await insert(db, "users", id=BEN, name="Ben")
    long_ago = await db.fetchval("select now() - interval '31 days'")
    await insert(db, "secrets", id=123, iv=b"nonce of 123", last_check_in=long_ago)
    for email in (TEST, SECOND):
        await insert(db, "recipients", email=email)


@pytest.fixture
async def world(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "disclosure-world", small_world) as connection:
        yield connection


@pytest.fixture
async def committed(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database of its own, with the rows of `small_world`."""

    async def build(dsn: str) -> None:
        await migrate.apply(dsn, ["disclosure"], report=lambda _: None)
        async with session(dsn) as connection:
            await small_world(connection)

    template = await postgres.template("disclosure-committed", build)
    async with postgres.database(template) as dsn:
        yield dsn


@pytest.fixture
async def jobs(committed: str) -> AsyncIterator[tuple[Connection, Connection]]:
    """Two sessions of one database."""
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(session(committed)),
            await stack.enter_async_context(session(committed)),
        )


async def secret(db: Connection, id_: int = 123) -> asyncpg.Record:
    row = await db.fetchrow("select * from disclosure.secrets where id = $1", id_)
    assert row is not None
    return row


async def claimed(db: Connection, **arguments: object) -> dict[int, datetime]:
    """Claim due secrets, with no delay after failures; the time of the claim by secret."""
    arguments = {"retry_after": timedelta(0), **arguments}
    named = ", ".join(f"{name} => ${n}" for n, name in enumerate(arguments, 1))
    rows = await db.fetch(f"select * from disclosure.claim_due({named})", *arguments.values())
    return {row["secret_id"]: row["claimed_at"] for row in rows}


async def call(db: Connection, function: str, *values: object) -> Any:
    places = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    return await db.fetchval(f"select disclosure.{function}({places})", *values)


async def fail(db: Connection) -> Any:
    """Claim secret 123 and fail; the status after that."""
    return await call(db, "record_failure", 123, (await claimed(db))[123])


async def send(db: Connection, stamp: datetime, email: str) -> int:
    """Record an attempt that reached a recipient; the id of its log entry."""
    attempt: int = await call(db, "begin_attempt", 123, stamp, email)
    assert await call(db, "record_sent", attempt) is True
    return attempt


async def log_of(db: Connection, *emails: str) -> list[tuple[str, str]]:
    """(address, status) of the log entries for these addresses, oldest first."""
    rows = await db.fetch(
        "select recipient_email, status from disclosure.disclosure_log where recipient_email = any ($1) order by id",
        emails,
    )
    return [(row["recipient_email"], row["status"]) for row in rows]


# --- Structure -------------------------------------------------------------------------------------------------


@for_each("table", TABLES)
async def test_a_table_has_exactly_the_documented_columns(db: Connection, table: str) -> None:
    columns = await db.fetch(
        "select a.attname, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull,"
        "       coalesce(pg_get_expr(d.adbin, d.adrelid), '-') as default"
        " from pg_attribute a left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)"
        " where a.attrelid = $1::text::regclass and a.attnum > 0 and not a.attisdropped order by a.attnum",
        f"disclosure.{table}",
    )
    assert [column for column in COLUMNS if column[0] == table] == [
        (table, c["attname"], c["type"], "not null" if c["attnotnull"] else "null", c["default"]) for c in columns
    ]


async def test_the_tables_are_those_that_are_documented(db: Connection) -> None:
    tables = await db.fetch(
        "select tablename from pg_tables where schemaname = 'disclosure' and tablename <> 'alembic_version'"
    )
    assert sorted(TABLES) == sorted(table["tablename"] for table in tables)


@for_each("table", TABLES)
async def test_a_required_column_refuses_null(world: Connection, table: str) -> None:
    # What next_check_in is given does not matter: it is computed.
    needed = [c[1] for c in COLUMNS if c[0] == table and c[3] == "not null" and c[1] != "next_check_in"]
    for column in needed:
        with pytest.raises(asyncpg.NotNullViolationError) as caught:
            async with world.transaction():
                await insert(world, table, **{column: None})
        if column not in ("last_check_in", "check_in_days"):  # from which next_check_in is computed
            assert (table, column) == (caught.value.table_name, caught.value.column_name)


@for_each("constraint", VIOLATIONS)
async def test_every_check_constraint_refuses_its_violations(world: Connection, constraint: str) -> None:
    table, column, values = VIOLATIONS[constraint]
    for value in values:
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            async with world.transaction():
                await insert(world, table, **{column: value})
        assert constraint == caught.value.constraint_name


@for_each("end", ["infinity", "-infinity"])
async def test_a_check_in_at_infinity_is_refused(world: Connection, end: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await world.execute("update disclosure.secrets set last_check_in = $1::text::timestamptz", end)
    assert "secrets_last_check_in_finite" == caught.value.constraint_name


async def test_every_check_constraint_is_tested(db: Connection) -> None:
    checks = await db.fetch(
        "select conname from pg_constraint where connamespace = 'disclosure'::regnamespace and contype = 'c'"
    )
    assert {*VIOLATIONS, *KEPT_BY_TRIGGERS, "secrets_last_check_in_finite"} == {check["conname"] for check in checks}


@for_each(("table", "column"), ENUMERATIONS)
async def test_every_value_of_an_enumeration_is_accepted(world: Connection, table: str, column: str) -> None:
    for word in ENUMERATIONS[table, column]:
        undone = world.transaction()
        await undone.start()
        assert word == (await insert(world, table, **{column: word}))[column]
        await undone.rollback()


async def test_every_foreign_key_has_an_index_and_cascades(db: Connection) -> None:
    keys = await db.fetch(
        "select c.conname, pg_get_constraintdef(c.oid) as definition, exists ("
        "   select from pg_index i where i.indrelid = c.conrelid and i.indkey[0] = c.conkey[1]"
        "   and i.indisvalid and i.indpred is null) as indexed"
        " from pg_constraint c where c.connamespace = 'disclosure'::regnamespace and c.contype = 'f'"
    )
    assert {
        f"{table}_{column}_fkey": (
            f"FOREIGN KEY ({column}) REFERENCES disclosure.{other}(id) ON DELETE CASCADE",
            True,
        )
        for table, column, other in (
            ("secrets", "user_id", "users"),
            ("recipients", "secret_id", "secrets"),
            ("disclosure_log", "secret_id", "secrets"),
        )
    } == {key["conname"]: (key["definition"], key["indexed"]) for key in keys}


async def test_no_index_is_a_prefix_of_another(db: Connection) -> None:
    repeated = await db.fetch(
        "select a.indexrelid::regclass::text as name from pg_index a join pg_index b"
        " on b.indrelid = a.indrelid and b.indexrelid <> a.indexrelid and b.indpred is null"
        " and a.indpred is null and a.indexprs is null and not a.indisunique"
        " and (b.indkey::text || ' ') like (a.indkey::text || ' %')"
        " join pg_class c on c.oid = a.indrelid where c.relnamespace = 'disclosure'::regnamespace"
    )
    assert [] == [index["name"] for index in repeated]


@for_each(
    ("constraint", "table", "values"),
    [
        ("users_pkey", "users", {"id": ANN}),
        ("secrets_pkey", "secrets", {"id": 123}),
        ("secrets_key_id_iv_key", "secrets", {"iv": b"nonce of 123"}),
        ("recipients_secret_id_email_key", "recipients", {"email": TEST}),
    ],
)
async def test_a_duplicate_of_a_unique_value_is_refused(
    world: Connection, constraint: str, table: str, values: dict[str, object]
) -> None:
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(world, table, **values)
    assert constraint == caught.value.constraint_name


async def test_a_nonce_may_repeat_under_another_key(world: Connection) -> None:
    assert "rotated" == (await insert(world, "secrets", iv=b"nonce of 123", key_id="rotated"))["key_id"]


async def test_deleting_a_user_deletes_secrets_recipients_and_log(world: Connection) -> None:
    await insert(world, "disclosure_log")
    await world.execute("delete from disclosure.users where id = $1", ANN)
    for table in ("secrets", "recipients", "disclosure_log"):
        assert 0 == await world.fetchval(f"select count(*) from disclosure.{table}")


# --- Secrets table schema --------------------------------------------------------------------------------------


async def test_a_new_secret_has_zero_retry_count(world: Connection) -> None:
    new = await insert(world, "secrets")
    assert (0, None) == (new["retry_count"], new["last_retry_at"])
    assert ("active", None) == (new["status"], new["processing_started_at"])


async def test_a_secret_record_includes_encryption_metadata(world: Connection) -> None:
    """Each secret stores everything that decryption needs except the key, and a job receives it."""
    row = (await world.fetch("select * from disclosure.claim_due()"))[0]
    assert (
        "aes-256-gcm",
        "sample",
        SAMPLES["secrets"]["ciphertext"],
        b"nonce of 123",
        SAMPLES["secrets"]["auth_tag"],
    ) == (row["algorithm"], row["key_id"], row["ciphertext"], row["iv"], row["auth_tag"])


async def test_a_secret_record_includes_retry_tracking(world: Connection) -> None:
    before = await world.fetchval("select clock_timestamp()")
    assert "active" == await fail(world)
    after = await world.fetchval("select clock_timestamp()")
    failed = await secret(world)
    assert 1 == failed["retry_count"]
    assert before <= failed["last_retry_at"] <= after


async def test_a_secret_record_includes_processing_state(world: Connection) -> None:
    before = await world.fetchval("select date_trunc('milliseconds', clock_timestamp())")
    stamp = (await claimed(world))[123]
    after = await world.fetchval("select clock_timestamp()")
    assert before <= stamp <= after
    assert stamp == (await secret(world))["processing_started_at"]
    await call(world, "record_failure", 123, stamp)
    assert (await secret(world))["processing_started_at"] is None
    stamp = (await claimed(world))[123]
    for email in (TEST, SECOND):
        await send(world, stamp, email)
    assert stamp == (await secret(world))["processing_started_at"]
    assert await call(world, "record_success", 123, stamp) is True
    assert (await secret(world))["processing_started_at"] is None


async def test_a_claim_comes_back_unchanged_from_languages_without_microseconds(world: Connection) -> None:
    assert 0 == (await claimed(world))[123].microsecond % 1000


async def test_secret_status_transitions_when_disclosure_is_attempted(world: Connection) -> None:
    """The sixth failed attempt makes it failed; a successful attempt triggers it."""
    assert ["active"] * 5 + ["failed"] == [await fail(world) for _ in range(6)]
    await world.execute("update disclosure.secrets set status = 'active'")
    stamp = (await claimed(world))[123]
    for email in (TEST, SECOND):
        await send(world, stamp, email)
    assert await call(world, "record_success", 123, stamp) is True
    assert "triggered" == (await secret(world))["status"]
    assert {} == await claimed(world)


# --- Disclosure log: unique constraint -------------------------------------------------------------------------


async def test_a_duplicate_sent_disclosure_is_prevented(world: Connection) -> None:
    await insert(world, "disclosure_log", recipient_email=TEST, status="sent")
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        async with world.transaction():
            await insert(world, "disclosure_log", recipient_email=TEST, status="sent")
    assert "idx_disclosure_log_unique" == caught.value.constraint_name
    assert [(TEST, "sent")] == await log_of(world, TEST)


async def test_multiple_pending_disclosures_are_allowed(world: Connection) -> None:
    for _ in range(2):
        await insert(world, "disclosure_log", recipient_email=TEST, status="pending")
    assert [(TEST, "pending")] * 2 == await log_of(world, TEST)


async def test_sent_and_failed_disclosures_can_coexist(world: Connection) -> None:
    for status in ("sent", "failed"):
        await insert(world, "disclosure_log", recipient_email=TEST, status=status)
    assert [(TEST, "sent"), (TEST, "failed")] == await log_of(world, TEST)


async def test_a_pending_disclosure_cannot_become_a_second_sent_one(world: Connection) -> None:
    stamp = (await claimed(world))[123]
    both = [await call(world, "begin_attempt", 123, stamp, TEST) for _ in range(2)]
    assert await call(world, "record_sent", both[0]) is True
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        async with world.transaction():
            await call(world, "record_sent", both[1])
    assert "idx_disclosure_log_unique" == caught.value.constraint_name
    assert [(TEST, "sent"), (TEST, "pending")] == await log_of(world, TEST)


async def test_two_concurrent_jobs_leave_one_sent_entry_per_recipient(
    jobs: tuple[Connection, Connection],
) -> None:
    one, other = jobs
    stamp = (await claimed(one))[123]
    first, second = [await call(one, "begin_attempt", 123, stamp, TEST) for _ in range(2)]
    transaction = one.transaction()
    await transaction.start()
    await call(one, "record_sent", first)
    waiting = asyncio.create_task(call(other, "record_sent", second))
    await until_waiting(one, other)
    await transaction.commit()
    with pytest.raises(asyncpg.UniqueViolationError):
        await waiting
    assert [(TEST, "sent"), (TEST, "pending")] == await log_of(one, TEST)


async def until_waiting(watcher: Connection, waiter: Connection) -> None:
    """Wait until the server reports that `waiter` waits for a lock."""
    while not await watcher.fetchval("select pg_backend_pid() = any (pg_blocking_pids($1))", waiter.get_server_pid()):
        await asyncio.sleep(0)


# --- Disclosure log: batch query index -------------------------------------------------------------------------

THOUSAND = {
    "ten secrets": "select 123 + n % 10, n / 10, n % 2 from generate_series(0, 999) as n",
    "one secret": "select 123, n, n % 2 from generate_series(0, 999) as n",
}


async def thousand(db: Connection, entries: str) -> None:
    """1,000 entries, half of them sent, half failed, in a table whose pages are all-visible."""
    await insert(db, "users", id=ANN)
    for id_ in range(123, 133):
        await insert(db, "secrets", id=id_, iv=id_.to_bytes(12, "big"))
    await db.execute(
        "insert into disclosure.disclosure_log (secret_id, recipient_email, status)"
        " select e.secret, e.recipient || '@example.com', (array['sent', 'failed'])[e.state + 1]"
        f" from ({entries}) as e (secret, recipient, state)"
    )
    await db.execute("vacuum (analyze) disclosure.disclosure_log")


@pytest.fixture(params=THOUSAND)
async def a_thousand(postgres: Server, request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    name = f"disclosure-thousand-{request.param.replace(' ', '-')}"
    async with undone(postgres, name, partial(thousand, entries=THOUSAND[request.param])) as connection:
        yield connection


@pytest.fixture
async def ten_secrets(postgres: Server) -> AsyncIterator[Connection]:
    fill = partial(thousand, entries=THOUSAND["ten secrets"])
    async with undone(postgres, "disclosure-thousand-ten-secrets", fill) as connection:
        yield connection


FIFTY = [f"{n}@example.com" for n in range(25, 75)]
BATCH = (
    "select secret_id, recipient_email, status, created_at from disclosure.disclosure_log"
    " where secret_id = 123 and recipient_email in ({}) and status = 'sent'"
).format(", ".join(f"'{email}'" for email in FIFTY))


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for child in plan.get("Plans", []) for node in nodes(child)]


async def plan_of(db: Connection, statement: str) -> list[dict[str, Any]]:
    """The nodes of the executed plan."""
    plan = json.loads(await db.fetchval(f"explain (analyze, format json) {statement}"))
    return nodes(plan[0]["Plan"])


async def test_a_batch_query_uses_the_index_for_performance(ten_secrets: Connection) -> None:
    """Instead of timing 10 ms, this checks the plan: it reads one index, and not the table."""
    steps = await plan_of(ten_secrets, BATCH)
    assert ["idx_disclosure_log_batch_fetch"] == [step["Index Name"] for step in steps if "Index Name" in step]
    assert "Seq Scan" not in {step["Node Type"] for step in steps}
    assert 1000 == await ten_secrets.fetchval("select count(*) from disclosure.disclosure_log")
    assert len(FIFTY) == len(await ten_secrets.fetch(BATCH))


async def test_the_index_covers_common_query_patterns(ten_secrets: Connection) -> None:
    one = BATCH.replace(BATCH[BATCH.index(" in (") : BATCH.index(" and status")], " = '50@example.com'")
    for statement in (BATCH, one, BATCH.replace("'sent'", "'failed'"), one.replace("'sent'", "'failed'")):
        [step] = await plan_of(ten_secrets, statement)
        assert ("Index Only Scan", "idx_disclosure_log_batch_fetch") == (step["Node Type"], step["Index Name"])
        assert 0 == step["Heap Fetches"]
        assert "secret_id" in step["Index Cond"]


async def test_the_function_that_jobs_call_reads_only_the_index(a_thousand: Connection) -> None:
    """The function's own text, with a generic plan."""
    source = await a_thousand.fetchval("select prosrc from pg_proc where proname = 'existing_disclosures'")
    for place, name in enumerate(("secret_id", "recipient_emails", "status"), 1):
        source = source.replace(f"existing_disclosures.{name}", f"${place}")
    assert "existing_disclosures" not in source
    await a_thousand.execute("set local plan_cache_mode = force_generic_plan")
    await a_thousand.execute(f"prepare batch (bigint, text[], text) as {source}")
    emails = ", ".join(f"'{email}'" for email in FIFTY)
    [step] = await plan_of(a_thousand, f"execute batch (123, array[{emails}], 'sent')")
    assert ("Index Only Scan", "idx_disclosure_log_batch_fetch") == (step["Node Type"], step["Index Name"])
    assert 0 == step["Heap Fetches"]


async def test_a_batch_query_returns_the_addresses_already_sent_to(world: Connection) -> None:
    await insert(world, "secrets", id=124)
    for secret_id, email, status in (
        (123, TEST, "failed"),
        (123, TEST, "sent"),
        (123, SECOND, "pending"),
        (123, "third@example.com", "sent"),
        (124, SECOND, "sent"),
    ):
        await insert(world, "disclosure_log", secret_id=secret_id, recipient_email=email, status=status)

    async def found(*more: object) -> list[str]:
        rows = await world.fetch(
            f"select * from disclosure.existing_disclosures(123, $1{', $2' if more else ''})", [TEST, SECOND], *more
        )
        assert all(isinstance(row["created_at"], datetime) for row in rows)
        return [row["recipient_email"] for row in rows]

    assert [TEST] == await found()
    assert [SECOND] == await found("pending")
    assert [TEST] == await found("failed")


async def test_due_secrets_are_found_through_their_index(world: Connection) -> None:
    await world.execute(
        "insert into disclosure.secrets (id, user_id, title, ciphertext, iv, auth_tag, key_id)"
        " select n, $1, 't', 'c', decode(lpad(n::text, 24, '0'), 'hex'), decode(repeat('00', 16), 'hex'), 'many'"
        " from generate_series(1001, 3000) as n",
        ANN,
    )
    await world.execute("analyze disclosure.secrets, disclosure.recipients")
    source = await world.fetchval("select prosrc from pg_proc where proname = 'claim_due'")
    found = re.search(r"select d\.id.*?limit", source, re.DOTALL)
    assert found is not None
    statement = found[0].removesuffix("limit") + "limit 10 for no key update of d skip locked"
    for variable, value in (("clock", "now()"), ("expiry", "interval '1 hour'"), ("retry_after", "interval '0'")):
        statement = re.sub(rf"\b{variable}\b", value, statement)
    steps = await plan_of(world, statement)
    assert "secrets_due" in {step.get("Index Name") for step in steps}
    assert "secrets" not in {step.get("Relation Name") for step in steps if step["Node Type"] == "Seq Scan"}


# --- Retry limit -----------------------------------------------------------------------------------------------


async def with_failures(db: Connection, count: int) -> None:
    await db.execute("update disclosure.secrets set retry_count = $1 where id = 123", count)


async def test_a_failed_disclosure_increments_the_retry_count(world: Connection) -> None:
    await with_failures(world, 2)
    before = await world.fetchval("select clock_timestamp()")
    assert "active" == await fail(world)
    failed = await secret(world)
    assert (3, "active") == (failed["retry_count"], failed["status"])
    assert before <= failed["last_retry_at"]


@for_each(("failures", "then"), [(3, "active"), (4, "active"), (5, "failed")])
async def test_five_failures_leave_a_secret_active_and_the_sixth_does_not(
    world: Connection, failures: int, then: str
) -> None:
    await with_failures(world, failures)
    assert then == await fail(world)
    assert (failures + 1, then) == ((await secret(world))["retry_count"], (await secret(world))["status"])
    assert ({123} if then == "active" else set()) == set(await claimed(world))


async def test_max_retries_sets_failed_status(world: Connection) -> None:
    await with_failures(world, 5)
    before = await world.fetchval("select clock_timestamp()")
    assert "failed" == await fail(world)
    failed = await secret(world)
    assert (6, "failed", None) == (failed["retry_count"], failed["status"], failed["processing_started_at"])
    assert before <= failed["last_retry_at"]
    assert {} == await claimed(world)
    await world.execute("update disclosure.secrets set last_retry_at = now() - interval '1 year'")
    assert {} == await claimed(world)


async def test_a_failed_attempt_waits_before_it_is_repeated(world: Connection) -> None:
    await fail(world)
    assert {} == await claimed(world, retry_after=timedelta(minutes=5))
    await world.execute("update disclosure.secrets set last_retry_at = now() - interval '5 minutes 1 second'")
    assert {123} == set(await claimed(world, retry_after=timedelta(minutes=5)))


async def test_reactivating_a_failed_secret_restores_all_its_attempts(world: Connection) -> None:
    for revived in ("active", "paused"):
        await world.execute("update disclosure.secrets set retry_count = 6, last_retry_at = now(), status = 'failed'")
        await world.execute("update disclosure.secrets set status = $1", revived)
        row = await secret(world)
        assert (revived, 0, None) == (row["status"], row["retry_count"], row["last_retry_at"])


@for_each("status", ["active", "paused"])
async def test_the_sixth_failure_is_final_however_it_is_counted(world: Connection, status: str) -> None:
    await claimed(world)
    await world.execute("update disclosure.secrets set retry_count = 5, status = $1", status)
    assert status == (await secret(world))["status"]
    await world.execute("update disclosure.secrets set retry_count = 6")
    failed = await secret(world)
    assert ("failed", 6, None) == (failed["status"], failed["retry_count"], failed["processing_started_at"])
    assert failed["last_retry_at"] is not None
    await world.execute("update disclosure.secrets set retry_count = 7, status = 'active'")
    again = await secret(world)
    assert ("active", 0) == (again["status"], again["retry_count"])
    assert "failed" == (await insert(world, "secrets", retry_count=6))["status"]


async def test_a_failure_that_is_counted_by_hand_ends_the_attempt_and_has_a_time(world: Connection) -> None:
    await claimed(world)
    await world.execute("update disclosure.secrets set retry_count = retry_count + 1")
    counted = await secret(world)
    assert ("active", 1, None) == (counted["status"], counted["retry_count"], counted["processing_started_at"])
    assert counted["last_retry_at"] is not None


async def test_a_check_in_on_a_failed_secret_puts_it_back_in_service(world: Connection) -> None:
    while "failed" != await fail(world):
        pass
    await world.execute("update disclosure.secrets set last_check_in = now()")
    again = await secret(world)
    assert ("active", 0, None) == (again["status"], again["retry_count"], again["last_retry_at"])
    await world.execute("update disclosure.secrets set last_check_in = now() - interval '31 days'")
    assert {123} == set(await claimed(world))


@for_each("status", ["paused", "triggered"])
async def test_a_check_in_changes_no_other_status(world: Connection, status: str) -> None:
    await world.execute("update disclosure.secrets set status = $1", status)
    await world.execute("update disclosure.secrets set last_check_in = now()")
    assert status == (await secret(world))["status"]


async def test_a_check_in_of_the_future_is_refused(world: Connection) -> None:
    """It would put the disclosure off for as long."""
    for statement in (
        "update disclosure.secrets set last_check_in = now() + interval '1 day'",
        "insert into disclosure.secrets select (s).* from (select jsonb_populate_record(s, jsonb_build_object("
        "'id', 9, 'iv', '\\x000000000000000000000009', 'last_check_in', now() + interval '9 years')) as s"
        " from disclosure.secrets as s) as s",
    ):
        with pytest.raises(asyncpg.CheckViolationError, match="in the future"):
            async with world.transaction():
                await world.execute(statement)
    await world.execute("update disclosure.secrets set last_check_in = now() + interval '1 minute'")


async def test_only_an_active_secret_is_ever_claimed(world: Connection) -> None:
    new = await insert(world, "secrets", status="paused", processing_started_at=datetime.now().astimezone())
    assert new["processing_started_at"] is None


async def test_a_disclosure_that_was_sent_stays_sent(world: Connection) -> None:
    sent = await insert(world, "disclosure_log", status="sent")
    assert sent["sent_at"] is not None
    for change in ("status = 'pending'", "status = 'failed'", f"recipient_email = '{SECOND}'"):
        with pytest.raises(asyncpg.RestrictViolationError, match="cannot be undone"):
            async with world.transaction():
                await world.execute(f"update disclosure.disclosure_log set {change}")
    await world.execute("update disclosure.disclosure_log set sent_at = null")
    assert sent["sent_at"] == await world.fetchval("select sent_at from disclosure.disclosure_log")


async def test_a_disclosure_that_was_not_sent_has_no_time_of_sending(world: Connection) -> None:
    now = datetime.now().astimezone()
    assert [None, None] == [
        (await insert(world, "disclosure_log", status=status, sent_at=now))["sent_at"]
        for status in ("pending", "failed")
    ]


# --- Claims ----------------------------------------------------------------------------------------------------


@for_each("status", ["paused", "triggered", "failed"])
async def test_only_active_secrets_are_claimed(world: Connection, status: str) -> None:
    await world.execute("update disclosure.secrets set status = $1", status)
    assert {} == await claimed(world)


async def test_a_secret_is_due_once_its_owner_has_been_silent_for_its_days(world: Connection) -> None:
    await world.execute("update disclosure.secrets set last_check_in = now() - interval '29 days 12 hours'")
    assert {} == await claimed(world)
    await world.execute("update disclosure.secrets set last_check_in = now() - interval '720 hours'")
    assert {123} == set(await claimed(world))


@for_each("zone", ["UTC", "Europe/Berlin", "America/New_York"])
async def test_a_day_of_silence_is_24_hours_whatever_the_zone(world: Connection, zone: str) -> None:
    """Daylight saving time begins within these days."""
    await world.execute(f"set local timezone = '{zone}'")
    row = await insert(world, "secrets", last_check_in=datetime.fromisoformat("2026-03-01T12:00:00+00:00"))
    assert timedelta(days=30) == row["next_check_in"] - row["last_check_in"]


async def test_the_next_check_in_is_always_computed_by_the_rule(world: Connection) -> None:
    await world.execute("update disclosure.secrets set next_check_in = 'infinity'")
    row = await secret(world)
    assert timedelta(days=30) == row["next_check_in"] - row["last_check_in"]
    await world.execute("update disclosure.secrets set check_in_days = 7")
    row = await secret(world)
    assert timedelta(days=7) == row["next_check_in"] - row["last_check_in"]


async def test_a_secret_without_recipients_waits_for_one(world: Connection) -> None:
    await world.execute("delete from disclosure.recipients")
    assert {} == await claimed(world)
    await insert(world, "recipients")
    assert {123} == set(await claimed(world))


async def test_the_longest_overdue_secrets_are_claimed_first_up_to_the_limit(world: Connection) -> None:
    for id_, days in ((201, 40), (202, 60), (203, 50)):
        overdue = await world.fetchval("select now() - make_interval(days => $1)", days)
        await insert(world, "secrets", id=id_, iv=id_.to_bytes(12, "big"), last_check_in=overdue)
        await insert(world, "recipients", secret_id=id_)
    assert {202, 203} == set(await claimed(world, max_secrets=2))
    assert {201} == set(await claimed(world, max_secrets=1))
    assert {123} == set(await claimed(world, max_secrets=1000))


@for_each(
    "wrong",
    [
        {"max_secrets": 0},
        {"max_secrets": 1001},
        {"max_secrets": None},
        {"expiry": timedelta(seconds=59)},
        {"expiry": None},
        {"retry_after": timedelta(seconds=-1)},
        {"retry_after": None},
    ],
)
async def test_bad_arguments_of_a_claim_are_refused(world: Connection, wrong: dict[str, object]) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match=next(iter(wrong))):
        await claimed(world, **wrong)


async def test_one_of_two_concurrent_jobs_gets_the_claim_and_neither_waits(
    jobs: tuple[Connection, Connection],
) -> None:
    one, other = jobs
    transaction = one.transaction()
    await transaction.start()
    assert {123} == set(await claimed(one))
    await other.execute("set lock_timeout = '1ms'")  # so that waiting fails
    assert {} == await claimed(other)
    await transaction.commit()
    assert {} == await claimed(other)


async def test_concurrent_jobs_claim_different_secrets(committed: str) -> None:
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(session(committed)) for _ in range(6)]
        await sessions[0].execute(
            "insert into disclosure.secrets (user_id, title, ciphertext, iv, auth_tag, key_id, last_check_in)"
            " select $1, 't', 'c', decode(lpad(n::text, 24, '0'), 'hex'), decode(repeat('00', 16), 'hex'), 'many',"
            "        now() - interval '1 year' from generate_series(1, 99) as n",
            ANN,
        )
        await sessions[0].execute(
            "insert into disclosure.recipients (secret_id, email)"
            " select id, 'many@example.com' from disclosure.secrets"
        )

        async def work(db: Connection) -> list[int]:
            mine: list[int] = []
            while claims := await claimed(db, max_secrets=5):
                mine += claims
            return mine

        found = await asyncio.gather(*(work(db) for db in sessions))
        everything = [row["id"] for row in await sessions[0].fetch("select id from disclosure.secrets")]
    assert 100 == len(everything)
    assert sorted(everything) == sorted(id_ for mine in found for id_ in mine)


async def test_a_claim_that_is_rolled_back_has_no_effect(jobs: tuple[Connection, Connection]) -> None:
    one, other = jobs
    transaction = one.transaction()
    await transaction.start()
    stamp = (await claimed(one))[123]
    await transaction.rollback()
    assert await call(one, "record_failure", 123, stamp) is None
    assert {123} == set(await claimed(other))


async def test_the_claim_of_a_crashed_job_lasts_until_it_expires(world: Connection) -> None:
    crashed = (await claimed(world))[123]
    age = "update disclosure.secrets set processing_started_at = clock_timestamp() - $1::interval"
    await world.execute(age, timedelta(minutes=5))
    assert {} == await claimed(world)
    await world.execute(age, timedelta(minutes=15, seconds=1))
    again = (await claimed(world))[123]
    assert crashed < again
    assert 0 == (await secret(world))["retry_count"]


async def test_a_job_that_has_lost_its_claim_cannot_change_the_secret(world: Connection) -> None:
    mine = (await claimed(world))[123] - timedelta(minutes=16)
    await world.execute("update disclosure.secrets set processing_started_at = $1", mine)
    attempt = await call(world, "begin_attempt", 123, mine, TEST)
    theirs = (await claimed(world))[123]
    before = await secret(world)
    assert await call(world, "begin_attempt", 123, mine, SECOND) is None
    assert [] == await world.fetch("select disclosure.recipients_due(123, $1)", mine)
    assert await call(world, "record_failure", 123, mine) is None
    assert await call(world, "record_success", 123, mine) is False
    assert before == await secret(world)
    # The send did happen, so it is recorded, and the other job skips that recipient.
    assert await call(world, "record_sent", attempt) is True
    assert [SECOND] == [row[0] for row in await world.fetch("select disclosure.recipients_due(123, $1)", theirs)]
    assert await call(world, "begin_attempt", 123, theirs, TEST) is None


@for_each(
    "sign",
    [
        "last_check_in = now()",
        "status = 'paused'",
        "status = 'triggered'",
        "check_in_days = 60",
    ],
)
async def test_an_action_of_the_owner_cancels_the_claim(world: Connection, sign: str) -> None:
    stamp = (await claimed(world))[123]
    await world.execute(f"update disclosure.secrets set {sign}")
    assert (await secret(world))["processing_started_at"] is None
    assert await call(world, "begin_attempt", 123, stamp, TEST) is None
    assert await call(world, "record_failure", 123, stamp) is None
    assert await call(world, "record_success", 123, stamp) is False
    assert [] == await log_of(world, TEST)


async def test_an_unrelated_change_keeps_the_claim(world: Connection) -> None:
    stamp = (await claimed(world))[123]
    await world.execute("update disclosure.secrets set title = 'renamed', last_check_in = last_check_in")
    assert stamp == (await secret(world))["processing_started_at"]


async def test_a_check_in_resets_the_count_of_failures(world: Connection) -> None:
    await fail(world)
    await world.execute("update disclosure.secrets set last_check_in = now()")
    row = await secret(world)
    assert (0, None, "active") == (row["retry_count"], row["last_retry_at"], row["status"])


@for_each("function", ["record_failure", "record_success"])
@for_each("id_", [123, 999, None])
async def test_a_result_without_a_claim_is_refused(world: Connection, function: str, id_: int | None) -> None:
    before = await secret(world)
    for stamp in (before["created_at"], None):
        assert not await call(world, function, id_, stamp)
    assert before == await secret(world)


# --- Sending to the recipients ---------------------------------------------------------------------------------


async def test_a_job_sends_to_all_recipients_and_triggers_the_secret(world: Connection) -> None:
    stamp = (await claimed(world))[123]
    recipients = []
    for email in [row[0] for row in await world.fetch("select disclosure.recipients_due(123, $1)", stamp)]:
        await send(world, stamp, email)
        recipients.append(email)
    assert [TEST, SECOND] == recipients
    assert await call(world, "record_success", 123, stamp) is True
    assert [(TEST, "sent"), (SECOND, "sent")] == await log_of(world, TEST, SECOND)
    assert "triggered" == (await secret(world))["status"]
    sent = await world.fetch("select sent_at >= created_at as later from disclosure.disclosure_log")
    assert [True, True] == [row["later"] for row in sent]


async def test_a_recipient_already_sent_to_is_skipped_at_the_next_attempt(world: Connection) -> None:
    stamp = (await claimed(world))[123]
    await send(world, stamp, TEST)
    attempt = await call(world, "begin_attempt", 123, stamp, SECOND)
    assert await call(world, "record_unsent", attempt, "451 mailbox busy") is True
    assert "active" == await call(world, "record_failure", 123, stamp)
    stamp = (await claimed(world))[123]
    assert [SECOND] == [row[0] for row in await world.fetch("select disclosure.recipients_due(123, $1)", stamp)]
    assert await call(world, "begin_attempt", 123, stamp, TEST) is None
    await send(world, stamp, SECOND)
    assert await call(world, "record_success", 123, stamp) is True
    assert [(TEST, "sent"), (SECOND, "failed"), (SECOND, "sent")] == await log_of(world, TEST, SECOND)
    assert "451 mailbox busy" == await world.fetchval(
        "select error from disclosure.disclosure_log where status = 'failed'"
    )


async def test_attempts_that_a_crashed_job_began_are_retried(world: Connection) -> None:
    stamp = (await claimed(world))[123]
    await call(world, "begin_attempt", 123, stamp, TEST)
    await world.execute("update disclosure.secrets set processing_started_at = now() - interval '1 hour'")
    stamp = (await claimed(world))[123]
    await send(world, stamp, TEST)
    assert [(TEST, "pending"), (TEST, "sent")] == await log_of(world, TEST)


async def test_an_attempt_for_an_address_that_is_no_recipient_is_refused(world: Connection) -> None:
    await insert(world, "secrets", id=124)
    await insert(world, "recipients", secret_id=124, email="other@example.com")
    stamp = (await claimed(world))[123]
    for email in ("other@example.com", "stranger@example.com", TEST.upper(), "", None):
        assert await call(world, "begin_attempt", 123, stamp, email) is None
    await world.execute("delete from disclosure.recipients where email = $1", SECOND)
    assert await call(world, "begin_attempt", 123, stamp, SECOND) is None


async def test_success_is_refused_while_a_recipient_is_outstanding(world: Connection) -> None:
    stamp = (await claimed(world))[123]
    await send(world, stamp, TEST)
    before = await secret(world)
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError) as caught:
        async with world.transaction():
            await call(world, "record_success", 123, stamp)
    assert "@" not in str(caught.value)
    assert before == await secret(world)
    await world.execute("delete from disclosure.recipients")
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
        await call(world, "record_success", 123, stamp)


async def test_an_attempt_can_be_closed_only_once(world: Connection) -> None:
    stamp = (await claimed(world))[123]
    sent = await send(world, stamp, TEST)
    unsent = await call(world, "begin_attempt", 123, stamp, SECOND)
    assert await call(world, "record_unsent", unsent, "refused") is True
    for attempt in (sent, unsent, 999, None):
        assert await call(world, "record_sent", attempt) is False
        assert await call(world, "record_unsent", attempt, "again") is False
    assert [(TEST, "sent"), (SECOND, "failed")] == await log_of(world, TEST, SECOND)


# --- The role of a job -----------------------------------------------------------------------------------------

JOB_FUNCTIONS = {
    "claim_due(integer, interval, interval)",
    "existing_disclosures(bigint, text[], text)",
    "recipients_due(bigint, timestamptz)",
    "begin_attempt(bigint, timestamptz, text)",
    "record_sent(bigint)",
    "record_unsent(bigint, text)",
    "record_success(bigint, timestamptz)",
    "record_failure(bigint, timestamptz)",
}


def documented_grants() -> str:
    """The guide's statements for the operator, for a role that cannot log in."""
    guide = (ROOT / "docs/packs/disclosure/README.md").read_text()
    [block] = re.findall(r"```sql\n(create role disclosure_job.*?)```", guide, re.DOTALL)
    return str(block)


async def test_the_documented_role_can_do_a_jobs_work_and_nothing_else(world: Connection) -> None:
    await world.execute(documented_grants())
    await world.execute("set local role disclosure_job")
    stamp = (await claimed(world))[123]
    for row in await world.fetch("select disclosure.recipients_due(123, $1)", stamp):
        await send(world, stamp, row[0])
    assert [TEST, SECOND] == [
        row["recipient_email"]
        for row in await world.fetch(
            "select * from disclosure.existing_disclosures(123, $1) order by recipient_email desc", [TEST, SECOND]
        )
    ]
    attempt = await call(world, "begin_attempt", 123, stamp, TEST)
    assert await call(world, "record_unsent", attempt, "x") is False
    assert await call(world, "record_success", 123, stamp) is True
    assert await call(world, "record_failure", 123, stamp) is None
    for statement in (
        *(f"select from disclosure.{table}" for table in TABLES),
        "update disclosure.secrets set status = 'active'",
        "delete from disclosure.disclosure_log",
        f"select disclosure.may_read('{ANN}', 'secret:123')",
        "select disclosure.is_claimed(123, now())",
        "create table disclosure.mine ()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with world.transaction():
                await world.execute(statement)


async def test_functions_can_be_called_by_grantees_only(world: Connection) -> None:
    functions = await world.fetch(
        "select p.oid::regprocedure::text as name, p.proname from pg_proc as p"
        " where p.pronamespace = 'disclosure'::regnamespace and has_function_privilege('public', p.oid, 'execute')"
    )
    assert [] == [function["name"] for function in functions]
    for function in JOB_FUNCTIONS:
        assert await world.fetchval("select to_regprocedure($1) is not null", f"disclosure.{function}"), function


async def test_security_definer_functions_ignore_the_callers_search_path(db: Connection) -> None:
    functions = await db.fetch(
        "select proname, prosecdef, proconfig from pg_proc where pronamespace = 'disclosure'::regnamespace"
    )
    calls = {function.partition("(")[0] for function in JOB_FUNCTIONS}
    assert {*calls, "may_read"} == {f["proname"] for f in functions if f["prosecdef"]}
    assert all("search_path=pg_catalog, pg_temp" in f["proconfig"] for f in functions)


# --- Migration and rollback ------------------------------------------------------------------------------------

OLD_CAPTURE = re.sub(r"retry_count, last_retry_at,", "", (ROOT / "triggers/disclosure.sql").read_text())


@pytest.fixture
def before(tmp_path: Path) -> dict[str, Path]:
    """Folders with the first revision only, and its captures."""
    shutil.copytree(ROOT / "ddl/rowcast", tmp_path / "ddl/rowcast")
    (tmp_path / "ddl/disclosure").mkdir()
    for path in (ROOT / "ddl/disclosure").glob("0001_*"):
        shutil.copy(path, tmp_path / "ddl/disclosure")
    (tmp_path / "triggers").mkdir()
    shutil.copy(ROOT / "triggers/rowcast.sql", tmp_path / "triggers")
    (tmp_path / "triggers/disclosure.sql").write_text(OLD_CAPTURE)
    return {"ddl_folder": tmp_path / "ddl", "triggers_folder": tmp_path / "triggers"}


async def run_migrations(dsn: str, *, ddl_folder: Path | None = None, triggers_folder: Path | None = None) -> None:
    await migrate.apply(
        dsn, ["disclosure"], report=lambda _: None, ddl_folder=ddl_folder, triggers_folder=triggers_folder
    )


async def roll_back(dsn: str) -> None:
    await migrate.rollback(dsn, "disclosure", to="disclosure_0001", report=lambda _: None)


async def old_world(dsn: str) -> None:
    """Three secrets in the old tables; one was sent three times to one recipient, and twice to another."""
    async with session(dsn) as db:
        await insert(db, "users", id=ANN)
        for id_ in (123, 124, 125):
            due = datetime.fromisoformat("2026-01-31T12:00:00+00:00")
            await insert(db, "secrets", id=id_, iv=id_.to_bytes(12, "big"), next_check_in=due)
        for id_, secret_id, email, status, day in (
            (1, 123, TEST, "sent", 1),
            (2, 123, TEST, "sent", 3),
            (3, 123, TEST, "sent", 2),
            (4, 123, TEST, "failed", 1),
            (5, 123, TEST, "failed", 1),
            (6, 123, SECOND, "sent", 2),
            (7, 123, SECOND, "sent", 2),
            (8, 124, TEST, "sent", 1),
            (9, 124, SECOND, "pending", 1),
            (10, 124, SECOND, "pending", 1),
        ):
            at = datetime.fromisoformat(f"2026-01-{day:02}T12:00:00+00:00")
            values = {"id": id_, "secret_id": secret_id, "recipient_email": email, "status": status, "created_at": at}
            await insert(db, "disclosure_log", **values)


async def fetch(dsn: str, statement: str, *values: object) -> list[asyncpg.Record]:
    async with session(dsn) as db:
        rows: list[asyncpg.Record] = await db.fetch(statement, *values)
        return rows


COLUMN = (
    "select data_type, is_nullable, column_default from information_schema.columns"
    " where (table_schema, table_name, column_name) = ('disclosure', 'secrets', $1)"
)
INDEX = "select pg_get_indexdef(to_regclass('disclosure.' || $1::text)) as definition"


async def test_the_migration_adds_retry_columns(empty_database: str, before: dict[str, Path]) -> None:
    await run_migrations(empty_database, **before)
    await old_world(empty_database)
    for column in RETRY_COLUMNS:
        assert [] == await fetch(empty_database, COLUMN, column)
    await run_migrations(empty_database)
    assert [("integer", "NO", "0")] == [tuple(row) for row in await fetch(empty_database, COLUMN, "retry_count")]
    assert [("timestamp with time zone", "YES", None)] == [
        tuple(row) for row in await fetch(empty_database, COLUMN, "last_retry_at")
    ]
    secrets = await fetch(empty_database, "select retry_count, last_retry_at from disclosure.secrets")
    assert [(0, None)] * 3 == [tuple(row) for row in secrets]


async def test_the_migration_applies_the_rules_to_existing_rows(empty_database: str) -> None:
    await run_migrations(empty_database)
    await migrate.rollback(empty_database, "disclosure", to="disclosure_0004", report=lambda _: None)
    async with session(empty_database) as db:
        await small_world(db)
        await db.execute(
            "update disclosure.secrets set retry_count = 9, last_retry_at = now(), processing_started_at = now()"
        )
        await insert(db, "disclosure_log", status="sent")
        await insert(db, "recipients", email="eve@\u200bexample.com")
    with pytest.raises(DatabaseFault, match="recipients_email_well_formed") as refused:
        await run_migrations(empty_database)
    assert "eve" not in str(refused.value)
    async with session(empty_database) as db:
        with pytest.raises(asyncpg.CheckViolationError):  # new rows follow the rules already
            await insert(db, "recipients", email="\u00a0mallory@example.com")
        await db.execute("delete from disclosure.recipients where email like 'eve%'")
    await run_migrations(empty_database)
    async with session(empty_database) as db:
        failed = await secret(db)
        assert ("failed", None) == (failed["status"], failed["processing_started_at"])
        assert 0 == await db.fetchval("select count(*) from disclosure.disclosure_log where sent_at is null")


async def test_the_migration_adds_the_unique_constraint(empty_database: str, before: dict[str, Path]) -> None:
    await run_migrations(empty_database, **before)
    assert [None] == [row[0] for row in await fetch(empty_database, INDEX, "idx_disclosure_log_unique")]
    await run_migrations(empty_database)
    [row] = await fetch(empty_database, INDEX, "idx_disclosure_log_unique")
    assert (
        "CREATE UNIQUE INDEX idx_disclosure_log_unique ON disclosure.disclosure_log USING btree"
        " (secret_id, recipient_email) WHERE ((status)::text = 'sent'::text)"
    ) == row["definition"]


async def test_the_migration_adds_the_batch_query_index(empty_database: str, before: dict[str, Path]) -> None:
    await run_migrations(empty_database, **before)
    assert [None] == [row[0] for row in await fetch(empty_database, INDEX, "idx_disclosure_log_batch_fetch")]
    await run_migrations(empty_database)
    [row] = await fetch(empty_database, INDEX, "idx_disclosure_log_batch_fetch")
    assert (
        "CREATE INDEX idx_disclosure_log_batch_fetch ON disclosure.disclosure_log USING btree"
        " (secret_id, recipient_email, status, created_at)"
    ) == row["definition"]


async def test_the_migration_handles_existing_duplicates(empty_database: str, before: dict[str, Path]) -> None:
    await run_migrations(empty_database, **before)
    await old_world(empty_database)
    await run_migrations(empty_database)
    # Of the sent entries, the newest stays, or at the same time the one with the higher id. Others stay too.
    rows = await fetch(empty_database, "select id from disclosure.disclosure_log order by id")
    assert [2, 4, 5, 7, 8, 9, 10] == [row["id"] for row in rows]
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await fetch(
            empty_database,
            "insert into disclosure.disclosure_log (id, secret_id, recipient_email, status)"
            " values (11, 123, $1, 'sent')",
            TEST,
        )
    assert "idx_disclosure_log_unique" == caught.value.constraint_name


async def test_followers_of_a_secret_receive_the_deletion_of_duplicates(
    empty_database: str, before: dict[str, Path]
) -> None:
    await run_migrations(empty_database, **before)
    await old_world(empty_database)
    await run_migrations(empty_database)
    deletions = await fetch(
        empty_database, "select topic, key ->> 'id' as id from rowcast.events where kind = 'delete' order by id"
    )
    assert [("secret:123", "1"), ("secret:123", "3"), ("secret:123", "6")] == sorted(tuple(row) for row in deletions)


async def until_blocked(watcher: Connection, sessions: int) -> None:
    """Wait until `sessions` sessions wait for a lock on the disclosure log."""
    waiting = "select count(*) from pg_locks where not granted and relation = 'disclosure.disclosure_log'::regclass"
    while sessions > await watcher.fetchval(waiting):
        await asyncio.sleep(0)


async def test_no_duplicate_can_be_added_while_the_migration_runs(
    empty_database: str, before: dict[str, Path]
) -> None:
    """The migration waits for an earlier writer; a later writer waits for the migration, and is refused."""
    await run_migrations(empty_database, **before)
    await old_world(empty_database)
    add = (
        "insert into disclosure.disclosure_log (id, secret_id, recipient_email, status) values ($1, 125, $2, 'sent')"
    )
    async with session(empty_database) as first, session(empty_database) as second:
        transaction = first.transaction()
        await transaction.start()
        await first.execute(add, 11, TEST)
        migration = asyncio.create_task(run_migrations(empty_database))
        await until_blocked(first, 1)
        late = asyncio.create_task(second.execute(add, 12, TEST))
        await until_blocked(first, 2)
        await transaction.commit()
        await migration
        with pytest.raises(asyncpg.UniqueViolationError) as caught:
            await late
    assert "idx_disclosure_log_unique" == caught.value.constraint_name
    rows = await fetch(empty_database, "select id from disclosure.disclosure_log where secret_id = 125")
    assert [11] == [row["id"] for row in rows]


async def test_an_existing_secret_becomes_due_by_the_rule(empty_database: str, before: dict[str, Path]) -> None:
    """Otherwise a job would lose its claim when the rule corrects the time of the row."""
    await run_migrations(empty_database, **before)
    await old_world(empty_database)
    await run_migrations(empty_database)
    rows = await fetch(empty_database, "select next_check_in - last_check_in as silence from disclosure.secrets")
    assert [timedelta(days=30)] * 3 == [row["silence"] for row in rows]


async def test_a_rollback_removes_the_new_columns(empty_database: str, before: dict[str, Path]) -> None:
    await run_migrations(empty_database, **before)
    await old_world(empty_database)
    await run_migrations(empty_database)
    await roll_back(empty_database)
    for column in RETRY_COLUMNS:
        assert [] == await fetch(empty_database, COLUMN, column)
    assert 3 == len(await fetch(empty_database, "select from disclosure.secrets"))


async def test_a_rollback_removes_the_indexes_and_leaves_the_original_state(
    empty_database: str, before: dict[str, Path]
) -> None:
    """Tables, constraints, indexes, captures, functions and privileges are as before the migration.

    Only how the rows of a snapshot are found is forgotten, as the files of that revision do not say it.
    """
    schemas = ["disclosure", "rowcast"]

    async def found() -> dict[str, Any]:
        facts = await catalog(empty_database, schemas)
        return {name: fact for name, fact in facts.items() if not name.startswith("function rowcast.snapshot_")}

    await run_migrations(empty_database, **before)
    original = await found()
    await run_migrations(empty_database)
    migrated = await found()
    assert {f"index disclosure.{name}" for name in NEW_INDEXES} <= set(migrated) - set(original)
    await roll_back(empty_database)
    assert original == await found()
    await run_migrations(empty_database)
    assert migrated == await found()


async def test_a_rollback_does_not_watch_tables_that_were_not_watched(
    empty_database: str, before: dict[str, Path]
) -> None:
    (before["triggers_folder"] / "disclosure.sql").unlink()
    schemas = ["disclosure", "rowcast"]
    await run_migrations(empty_database, **before)
    original = await catalog(empty_database, schemas)
    await run_migrations(empty_database, triggers_folder=before["triggers_folder"])
    await roll_back(empty_database)
    assert original == await catalog(empty_database, schemas)


async def test_capture_continues_through_a_rollback_and_a_new_migration(empty_database: str) -> None:
    """Rows written at the old revision are published with the old columns, which the model accepts."""
    await run_migrations(empty_database)
    await fetch(empty_database, "insert into disclosure.users (id, name) values ($1, 'Ann')", ANN)
    await roll_back(empty_database)
    async with session(empty_database) as db:
        due = datetime.fromisoformat("2026-01-31T12:00:00+00:00")
        await insert(db, "secrets", id=123, next_check_in=due)
        await db.execute("update disclosure.secrets set status = 'paused'")
    await run_migrations(empty_database)
    await fetch(empty_database, "update disclosure.secrets set status = 'active'")
    published = await fetch(
        empty_database, "select kind::text, record::text from rowcast.events where topic = 'secret:123' order by id"
    )
    # The third event: the migration restores the rule about the next check-in, which corrects the row.
    assert ["insert", "update", "update", "update"] == [row["kind"] for row in published]
    records = [Secret.model_validate_json(row["record"]) for row in published]
    assert ["active", "paused", "paused", "active"] == [record.status for record in records]
    assert records[1].next_check_in != records[2].next_check_in
    assert [False, False, False, True] == ["retry_count" in row["record"] for row in published]


async def test_after_a_rollback_tables_are_writable_in_another_schema_too(empty_database: str) -> None:
    elsewhere = {"disclosure": "elsewhere"}
    await migrate.apply(empty_database, ["disclosure"], report=lambda _: None, schemas=elsewhere)
    await migrate.rollback(
        empty_database, "disclosure", to="disclosure_0001", schema="elsewhere", report=lambda _: None
    )
    async with session(empty_database) as db:
        await db.execute("insert into elsewhere.users (id, name) values ($1, 'Ann')", ANN)
        await db.execute(
            "insert into elsewhere.secrets (user_id, title, ciphertext, iv, auth_tag, key_id, next_check_in)"
            " values ($1, 't', 'c', 'twelve bytes', 'sixteen bytes it', 'k', now())",
            ANN,
        )
        published = await db.fetch("select kind::text, topic from rowcast.events where topic like 'secret:%'")
    assert [("insert", "secret:1")] == [tuple(row) for row in published]


async def test_a_failed_secret_stays_failed_through_a_rollback(committed: str) -> None:
    await fetch(committed, "update disclosure.secrets set status = 'failed', retry_count = 6")
    await roll_back(committed)
    assert ["failed"] == [row["status"] for row in await fetch(committed, "select status from disclosure.secrets")]


# --- Capture ---------------------------------------------------------------------------------------------------


async def test_a_new_row_is_published_in_its_topics(world: Connection) -> None:
    events = await Events.from_now(world)
    user = (await insert(world, "users"))["id"]
    await insert(world, "secrets", id=124)
    await insert(world, "recipients")
    await insert(world, "disclosure_log")
    assert [
        ("users", f"owner:{user}", "insert"),
        ("secrets", f"owner:{ANN}", "insert"),
        ("secrets", "secret:124", "insert"),
        ("disclosure_log", "secret:123", "insert"),
    ] == await events.seen()


async def test_nothing_that_is_secret_or_personal_is_ever_published(world: Connection) -> None:
    """Rows of all tables, with recognizable values in every column that must not be published."""
    published = await world.fetch("select table_name, columns from rowcast.watched where pack = 'disclosure'")
    assert {
        "users": {"id", "created_at"},
        "secrets": {column[1] for column in COLUMNS if column[0] == "secrets"}
        - {"title", "ciphertext", "iv", "auth_tag", "key_id", "algorithm"},
        "disclosure_log": {"id", "secret_id", "status", "created_at", "sent_at"},
    } == {row["table_name"]: set(row["columns"]) for row in published}
    events = await Events.from_now(world)
    marked = {
        "ciphertext": b"MARKED ciphertext",
        "iv": b"MARKED nonce",
        "auth_tag": b"MARKED tag of 16",
        "key_id": "MARKED key",
        "title": "MARKED title",
    }
    await world.execute("update disclosure.users set name = 'MARKED name'")
    await insert(world, "secrets", id=124, last_check_in=(await secret(world))["last_check_in"], **marked)
    await insert(world, "recipients", secret_id=124, email="marked@example.com")
    stamp = (await claimed(world))[124]
    for record in ("record_unsent", "record_sent"):
        attempt = await call(world, "begin_attempt", 124, stamp, "marked@example.com")
        await call(world, record, attempt, *(["550 MARKED error"] if record == "record_unsent" else []))
    assert await call(world, "record_success", 124, stamp) is True
    await world.execute("update disclosure.secrets set title = 'MARKED again', ciphertext = 'MARKED' where id = 124")
    await world.execute("delete from disclosure.users")
    rows = await events.rows()
    assert {"users", "secrets", "disclosure_log"} == {row["table_name"] for row in rows}
    everything = " ".join(row["all"] for row in rows)
    assert "marked" not in everything.lower()
    assert b"MARKED".hex() not in everything.lower()
    assert "example.com" not in everything


async def test_the_owner_receives_each_step_of_a_disclosure(world: Connection) -> None:
    events = await Events.from_now(world)
    stamp = (await claimed(world))[123]
    for email in (TEST, SECOND):
        await send(world, stamp, email)
    await call(world, "record_success", 123, stamp)
    published = [row for row in await events.rows() if row["topic"] == "secret:123"]
    assert [
        ("secrets", ["processing_started_at"], "active"),
        ("disclosure_log", None, "pending"),
        ("disclosure_log", ["status", "sent_at"], "sent"),
        ("disclosure_log", None, "pending"),
        ("disclosure_log", ["status", "sent_at"], "sent"),
        ("secrets", ["status", "processing_started_at"], "triggered"),
    ] == [(row["table_name"], row["changed"], json.loads(row["record"])["status"]) for row in published]


async def test_rights_end_with_the_secret_its_owner_and_a_change_of_owner(world: Connection) -> None:
    async def revoked_by(statement: str) -> list[Any]:
        undone = world.transaction()
        await undone.start()
        events = await Events.from_now(world)
        await world.execute(statement)
        rows = [row for row in await events.rows() if row["revokes"]]
        await undone.rollback()
        return [json.loads(row["revokes"]) for row in rows]

    ends = {"user": ANN, "topic": "secret:123"}
    # The revocation is in both topics of the secret, so followers of either apply it at its place in the log.
    assert [ends, ends] == await revoked_by("delete from disclosure.secrets")
    assert {"user": ANN} in await revoked_by(f"delete from disclosure.users where id = '{ANN}'")
    handed_on = await revoked_by(f"update disclosure.secrets set user_id = '{BEN}'")
    assert handed_on
    assert all(ends == right for right in handed_on)
    assert [] == await revoked_by("update disclosure.secrets set status = 'paused'")


# --- Rights ----------------------------------------------------------------------------------------------------

MAY_READ: list[tuple[str | None, str | None, bool]] = [
    (ANN, f"owner:{ANN}", True),
    (ANN, f"owner:{BEN}", False),
    (BEN, f"owner:{BEN}", True),
    (ANN, "secret:123", True),
    (BEN, "secret:123", False),
    (NOBODY, "secret:123", False),
    (NOBODY, f"owner:{NOBODY}", False),
    (ANN, "secret:124", False),
    (ANN, "secret:0123", False),
    (ANN, "secret:+123", False),
    (ANN, "secret: 123", False),
    (ANN, "secret:123 ", False),
    (ANN, "secret:123\n", False),
    (ANN, "secret:-123", False),
    (ANN, "secret:1e2", False),
    (ANN, "secret:999999999999999999", False),
    (ANN, "secret:9999999999999999999999999", False),
    (ANN, "secret:", False),
    (ANN, "secret", False),
    (ANN, "SECRET:123", False),
    (ANN, "secret:123:log", False),
    (ANN, "secret:%", False),
    (ANN, "*disclosure", False),
    (ANN, "", False),
    (ANN, None, False),
    (None, None, False),
    (None, "secret:123", False),
    ("", "owner:", False),
    (ANN, "owner:", False),
    (ANN, f"owner:{ANN}' or true --", False),
]


async def test_may_read_is_true_for_the_owner_alone_and_never_null(world: Connection) -> None:
    assert MAY_READ == [
        (user, topic, await world.fetchval("select disclosure.may_read($1, $2)", user, topic))
        for user, topic, _ in MAY_READ
    ]


async def test_only_grantees_may_call_may_read_which_reads_for_them(world: Connection) -> None:
    await world.execute("create role disclosure_sample_daemon")
    await world.execute("grant usage on schema disclosure to disclosure_sample_daemon")
    await world.execute("grant execute on function disclosure.may_read to disclosure_sample_daemon")
    await world.execute("set local role disclosure_sample_daemon")
    assert await world.fetchval("select disclosure.may_read($1, 'secret:123')", ANN) is True
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await world.fetch("select * from disclosure.secrets")


# --- Models and sample data ------------------------------------------------------------------------------------

RECORD: Mapping[str, object] = {
    "id": 123,
    "user_id": ANN,
    "status": "active",
    "check_in_days": 30,
    "last_check_in": "2026-01-01T12:00:00+00:00",
    "next_check_in": "2026-01-31T12:00:00+00:00",
    "retry_count": 0,
    "last_retry_at": None,
    "processing_started_at": None,
    "created_at": "2026-01-01T12:00:00+00:00",
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "sent"},
        {"retry_count": -1},
        {"retry_count": None},
        {"id": 0},
        {"id": "123"},
        {"check_in_days": 0},
        {"processing_started_at": "Infinity"},
        {"ciphertext": "00"},
        {"recipient_email": TEST},
    ],
    ids=str,
)
def test_a_record_with_extra_or_invalid_columns_is_refused(wrong: dict[str, object]) -> None:
    assert 123 == Secret.model_validate_json(json.dumps(RECORD)).id
    with pytest.raises(ValidationError):
        Secret.model_validate_json(json.dumps({**RECORD, **wrong}))


async def test_the_sample_secrets_open_with_the_sample_key(db: Connection) -> None:
    await db.execute((ROOT / "ddl/disclosure/demo.sql").read_text())
    rows = await db.fetch("select * from disclosure.secrets order by iv")
    opened = [AESGCM(bytes(32)).decrypt(row["iv"], row["ciphertext"] + row["auth_tag"], None) for row in rows]
    assert b"The key to the safe deposit box lies in the blue vase." == opened[0]
    assert 4 == len(opened)
    assert {"active", "paused", "triggered", "failed"} == {row["status"] for row in rows}


async def test_no_sample_secret_is_due_and_users_see_only_their_own(db: Connection) -> None:
    await db.execute((ROOT / "ddl/disclosure/demo.sql").read_text())
    assert {} == await claimed(db)
    people = await db.fetch((ROOT / "ddl/disclosure/demo_users.sql").read_text())
    assert ["Alice Archer", "Bob Baker"] == [person["name"] for person in people]
    for person in people:
        readable = await db.fetch(
            "select title from disclosure.secrets where disclosure.may_read($1, 'secret:' || id)", person["id"]
        )
        assert 2 == len(readable)
