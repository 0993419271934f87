"""A daemon runs as a role that owns nothing, and no role has more than it needs."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from daemon.postgres.connect import Connection, connect
from daemon.schema import migrate
from daemon.schema.queries import query
from tests.acceptance.chat import Chat
from tests.support.daemon import SECRET, Daemon, command, daemon_process, get, token
from tests.support.postgres import Server

ROLE = "roles_daemon"
APPLICATION = "roles_application"
PASSWORD = "canary-of-a-password"  # pragma: allowlist secret
SETTINGS = {
    "ROWCAST_CANARY_EVERY": "0.2",
    "ROWCAST_METRICS_LISTEN": "127.0.0.1:0",
    "ROWCAST_RETENTION": "1m",
    "ROWCAST_OWNER": "roles_nobody",  # a daemon takes on no role
}

ORDERS = """
create table public.orders (id bigint generated always as identity primary key, customer_id bigint not null);
create index on public.orders (customer_id)"""


def as_role(dsn: str, role: str) -> str:
    return urlsplit(dsn)._replace(netloc=f"{role}:{PASSWORD}@").geturl()


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    """ChatGenius, a daemon's role as `--grant-to` makes it, and an application's role that writes the pack's rows."""
    async with postgres.chatgenius() as dsn:
        admin = await asyncpg.connect(dsn)
        await admin.execute(f"""
            create role {ROLE} login password '{PASSWORD}';
            create role {APPLICATION} login password '{PASSWORD}';
            grant usage on schema chatgenius to {APPLICATION};
            grant select, insert, update, delete on all tables in schema chatgenius to {APPLICATION};
            {ORDERS}
        """)
        code, output, errors = await command("--apply-ddl", "--grant-to", ROLE, DATABASE_URL=dsn)
        assert (0, True) == (code, f"{ROLE} may run daemons" in output + errors), errors
        yield dsn
        await admin.execute(f"drop owned by {ROLE}, {APPLICATION}; drop role {ROLE}, {APPLICATION}")
        await admin.close()


@pytest.fixture(scope="module")
async def sql(database: str) -> AsyncIterator[Connection]:
    connection = await connect(database, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture(scope="module")
async def daemon(database: str) -> AsyncIterator[Daemon]:
    async with daemon_process(as_role(database, ROLE), environment=SETTINGS) as process:
        yield process


@pytest.fixture(scope="module")
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin(sql)


async def test_a_daemon_serves_everything_as_a_role_that_owns_nothing(
    daemon: Daemon, chat: Chat, database: str, sql: Connection
) -> None:
    watching = ("watch", "public.orders", "--topic", "'orders:' || r.customer_id", "--read", "r.customer_id > 0")
    code, _, errors = await command(*watching, DATABASE_URL=database)
    assert 0 == code, errors
    await sql.execute("insert into public.orders (customer_id) values (7)")
    async with daemon.client(chat.ada, device="laptop") as ada:
        await ada.subscribe(chat.topic, snapshot=True, presence={"data": {"mood": "good"}})
        await ada.until("presence")
        message = await chat.say("hello")
        frame = (await ada.until("changes"))[-1]
        assert [message] == [change["record"]["id"] for change in frame["changes"]]
        await ada.say(op="ack", pos=frame["pos"])
        async with asyncio.timeout(10):
            while (answer := await ada.subscribe("orders:7", snapshot=True))["op"] != "subscribed":
                await asyncio.sleep(0.05)
        assert "orders:7" == answer["topic"]
        await sql.execute("delete from chatgenius.messages where id = $1", message)
        await ada.until("changes")
        done = """select exists (select from chatgenius.user_status where user_id = $1 and status = 'online')
            and exists (select from rowcast.acks where user_id = $1)
            and not exists (select from rowcast.tombstones)"""
        async with asyncio.timeout(10):
            while not await sql.fetchval(done, chat.ada):
                await asyncio.sleep(0.05)
    assert 200 == (await get(f"{pages_for_operators(daemon)}/console"))[0]
    status, text = await get(f"{daemon.http}/readyz")
    assert 200 == status, text
    assert [] == daemon.warnings()


def pages_for_operators(daemon: Daemon) -> str:
    """The URL of the address in ROWCAST_METRICS_LISTEN."""
    [url] = [str(line["data"]["metrics"]) for line in daemon.events() if line["event"] == "serving"]
    return url.removesuffix("/metrics")


async def test_the_retention_drops_segments_that_belong_to_another_role(
    daemon: Daemon, chat: Chat, sql: Connection
) -> None:
    count = "select count(*) from pg_class where relnamespace = 'rowcast'::regnamespace and relname ~ '^log_[0-9]+$'"
    oldest = await sql.fetchval("select min(segment) from rowcast.segments")
    async with asyncio.timeout(60):
        while await sql.fetchval("select to_regclass('rowcast.log_' || $1) is not null", str(oldest)):
            await sql.execute("update rowcast.segments set opened_at = opened_at - interval '1 hour'")
            await asyncio.sleep(0.2)
    assert await sql.fetchval(count) >= 1
    await chat.settled(daemon)
    assert [] == daemon.warnings()


async def test_the_doctor_finds_the_role_of_a_daemon_in_order(daemon: Daemon, database: str) -> None:
    code, output, errors = await command("doctor", DATABASE_URL=as_role(database, ROLE), ROWCAST_OWNER="roles_nobody")
    assert (0, "") == (code, errors), output
    found = {line[6:17].strip(): line[:4].strip() for line in output.splitlines()}
    assert "`daemon check` compares the rest, as the owner" in output
    found.pop("retention")  # another test makes segments grow old faster than any daemon can make new ones
    assert {"ok"} == set(found.values()), output


async def test_a_daemons_role_reaches_no_table_of_applications_and_makes_nothing(
    daemon: Daemon, chat: Chat, sql: Connection, database: str
) -> None:
    reachable = await sql.fetch(
        """select c.oid::regclass::text as name from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
           where c.relkind in ('r', 'p', 'v', 'm', 'S') and n.nspname in ('chatgenius', 'public')
             and c.relname <> 'alembic_version' and (
               c.relkind <> 'S' and has_any_column_privilege($1, c.oid, 'select, insert, update, references')
               or c.relkind <> 'S' and has_table_privilege($1, c.oid, 'delete, truncate, trigger')
               or c.relkind = 'S' and has_sequence_privilege($1, c.oid, 'usage, select, update'))""",
        ROLE,
    )
    assert [] == [row["name"] for row in reachable]
    assert not await sql.fetchval(
        "select has_schema_privilege($1, 'rowcast', 'create') or has_schema_privilege($1, 'chatgenius', 'create')"
        " or has_database_privilege($1, current_database(), 'create')",
        ROLE,
    )
    owned = "select count(*) from pg_shdepend where refobjid = $1::text::regrole and deptype = 'o'"
    assert 0 == await sql.fetchval(owned, ROLE)
    newest = await sql.fetchval("select 'rowcast.log_' || max(segment) from rowcast.segments")
    session = await asyncpg.connect(as_role(database, ROLE))
    try:
        for statement in (
            "select from chatgenius.messages",
            "delete from chatgenius.messages",
            "create table rowcast.mine ()",
            "truncate rowcast.log",
            "update rowcast.events set topic = ''",
            "delete from rowcast.log",
            "update rowcast.watched set topic = ''",
            "update rowcast.segments set log_dropped = true",
            f"drop table {newest}",
            "select rowcast.make_segment()",
            "select rowcast.unwatch('public.orders')",
            "set role rowcast_capture",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await session.execute(statement)
        await session.execute(
            "select rowcast.drop_retired('log', segment) from rowcast.segments where not log_dropped"
        )
        assert await session.fetchval("select to_regclass($1) is not null", newest)
    finally:
        await session.close()


async def test_a_role_that_writes_rows_cannot_read_what_others_wrote(
    daemon: Daemon, chat: Chat, sql: Connection, database: str
) -> None:
    session = await asyncpg.connect(as_role(database, APPLICATION))
    try:
        await session.execute("insert into chatgenius.channels (name) values ('mine')")
        await session.fetchval("select rowcast.ulid()")
        names = await sql.fetch(
            """select c.oid::regclass::text as name from pg_class as c
               where c.relnamespace = 'rowcast'::regnamespace and c.relkind in ('r', 'p', 'v', 'm')"""
        )
        assert {"rowcast.events", "rowcast.log", "rowcast.changes"} <= {row["name"] for row in names}
        for row in names:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await session.execute(f"select from {row['name']}")
            rights = "select has_table_privilege($1, 'insert, update, delete, truncate')"
            assert not await session.fetchval(rights, row["name"])
    finally:
        await session.close()


async def test_everybody_may_make_ids_in_the_schema_of_rowcast_and_nothing_else(
    daemon: Daemon, sql: Connection
) -> None:
    functions = await sql.fetch(
        """select p.proname from pg_proc as p where p.pronamespace = 'rowcast'::regnamespace
           and has_function_privilege('public', p.oid, 'execute')"""
    )
    assert ["ulid"] == [row["proname"] for row in functions]
    relations = """select c.relname from pg_class as c where c.relnamespace = 'rowcast'::regnamespace and (
        c.relkind in ('r', 'p', 'v', 'm') and (
            has_any_column_privilege('public', c.oid, 'select, insert, update, references')
            or has_table_privilege('public', c.oid, 'delete, truncate, trigger'))
        or c.relkind = 'S' and has_sequence_privilege('public', c.oid, 'usage, select, update'))"""
    assert [] == await sql.fetch(relations)
    assert not await sql.fetchval("select has_schema_privilege('public', 'rowcast', 'create')")


async def test_a_later_apply_renews_what_daemons_need(daemon: Daemon, sql: Connection, database: str) -> None:
    await sql.execute(f"revoke insert on rowcast.log from {ROLE}")
    code, output, _ = await command("doctor", DATABASE_URL=as_role(database, ROLE))
    assert (1, True) == (code, "lacks insert on rowcast.log" in output), output
    await command("--apply-ddl", DATABASE_URL=database)
    assert await sql.fetchval("select has_table_privilege($1, 'rowcast.log', 'insert')", ROLE)


async def test_no_secret_is_in_anything_that_a_daemon_or_a_command_says(
    daemon: Daemon, chat: Chat, database: str, sql: Connection, tmp_path: Path
) -> None:
    def canary(name: str) -> str:
        return f"canary-of-the-{name}-canary"

    bearer = token(chat.ada)
    async with daemon.client(chat.ada) as ada:
        await ada.say(op="subscribe", topic=chat.topic, token=canary("frame"))
        await sql.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = $1", ROLE)
        async with asyncio.timeout(30):
            while not daemon.warnings() or (await get(f"{daemon.http}/readyz"))[0] != 200:
                await asyncio.sleep(0.05)
    async with daemon.raw() as stranger:
        await stranger.say(op="hello", token=bearer + canary("token"))
        await stranger.closed()
    pages = ("console", "console/state", "readyz", "metrics", "schema.json", f"console?token={bearer}")
    places = daemon.http, pages_for_operators(daemon)
    said = [daemon.log.read_text(), *[(await get(f"{place}/{page}"))[1] for place in places for page in pages]]
    file = tmp_path / "url"
    file.write_text(as_role(database, ROLE))
    good = {"DATABASE_URL_FILE": str(file)}
    bad = {"DATABASE_URL": f"postgresql://{ROLE}:{canary('password')}@127.0.0.1:1/none"}
    wrong = {"DATABASE_URL": f"postgresql://{ROLE}:{canary('password')}@/none?what={canary('parameter')}"}
    more = {"ROWCAST_SECRET": canary("secret") * 2, "ROWCAST_LOG_LEVEL": "debug", "ROWCAST_CONNECT_ATTEMPTS": "1"}
    for arguments, environment in (
        *((name, good) for name in ("doctor", "config")),
        *((name, wrong) for name in ("--apply-ddl", "config")),
        ("--apply-ddl", bad),
    ):
        said += map(str, await command(arguments, **more, **environment))
    text = "\n".join(said)
    assert "DATABASE_URL_FILE" in text
    for secret in ("canary-of", PASSWORD, SECRET, bearer):
        assert secret not in text, [line for line in text.splitlines() if secret in line]


@pytest.mark.parametrize(("role", "what"), [("roles_nobody", "no role"), ("roles_mighty", "a superuser")])
async def test_no_rights_are_granted_to_a_role_that_cannot_be_a_daemons(
    sql: Connection, database: str, role: str, what: str
) -> None:
    if what == "a superuser":
        await sql.execute(f"create role {role} superuser")
    try:
        code, _, errors = await command("--apply-ddl", "--grant-to", role, DATABASE_URL=database)
    finally:
        await sql.execute(f"drop role if exists {role}")
    assert (64, True) == (code, f"daemon: {role} is {what}, so" in errors), errors


async def test_replaying_as_a_role_that_owns_nothing_says_what_it_needs(
    daemon: Daemon, chat: Chat, sql: Connection, database: str
) -> None:
    await sql.execute("alter table chatgenius.files drop constraint if exists files_size_not_negative")
    message = await chat.say("a message with a file")
    await sql.execute(
        "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'n', 't', -1, 'u')", message
    )
    async with asyncio.timeout(10):
        while not await sql.fetchval("select exists (select from rowcast.dead_letters)"):
            await asyncio.sleep(0.05)
    url = as_role(database, ROLE)
    code, output, errors = await command("dead-letters", "replay", "--all", DATABASE_URL=url)
    owner = await sql.fetchval("select current_user")
    assert (14, "") == (code, output)
    assert "daemon: Replaying locks the row in chatgenius.files, which this role may not (permission denied" in errors
    assert f"use {owner}, or grant usage on the schema, and select and update on the table, to this role." in errors
    assert await sql.fetchval("select exists (select from rowcast.dead_letters)")
    await sql.execute(f"grant select, update on chatgenius.files to {ROLE}")
    code, output, errors = await command("dead-letters", "replay", "--all", DATABASE_URL=url)
    assert (0, "replayed 1 dead letter\n", "") == (code, output, errors)
    await sql.execute(f"revoke select, update on chatgenius.files from {ROLE}")


MIGRATOR, OWNER = "roles_migrator", "roles_owner"


@pytest.fixture
async def owned(empty_database: str) -> AsyncIterator[Connection]:
    """A database whose owner cannot log in, and a migrator that has no rights but that to take on the owner."""
    admin = await connect(empty_database, application_name="test")
    name = await admin.fetchval("select quote_ident(current_database())")
    await admin.execute(f"""
        create role {OWNER};
        create role {MIGRATOR} login noinherit password '{PASSWORD}';
        grant {OWNER} to {MIGRATOR};
        grant rowcast_capture to {OWNER};
        alter database {name} owner to {OWNER};
        {ORDERS};
        alter table public.orders owner to {OWNER}
    """)
    yield admin
    await admin.execute(f"drop owned by {MIGRATOR}, {OWNER} cascade; alter database {name} owner to current_user")
    await admin.execute(f"drop role {MIGRATOR}; drop role {OWNER}")
    await admin.close()


async def test_what_a_migrator_does_belongs_to_an_owner_that_cannot_log_in(
    database: str, owned: Connection, empty_database: str, tmp_path: Path
) -> None:
    environment = {"DATABASE_URL": as_role(empty_database, MIGRATOR), "ROWCAST_OWNER": OWNER}
    of_the_migrator = "select count(*) from pg_shdepend where refobjid = $1::text::regrole"
    backup = str(tmp_path / "backup")
    watching = ("watch", "public.orders", "--topic", "'orders:' || r.customer_id", "--public")
    for arguments in (
        ("--apply-ddl", "--dry-run"),
        ("--apply-ddl", "--grant-to", ROLE),
        watching,
        ("migrate", "--no-backup"),
        ("check",),
        ("dead-letters", "list"),
        ("reset", "orders:1"),
        ("backup", backup),
        ("unwatch", "public.orders"),
        ("rollback", "chatgenius"),
    ):
        code, _, errors = await command(*arguments, **environment)
        assert 0 == code, (arguments, errors)
        assert 0 == await owned.fetchval(of_the_migrator, MIGRATOR), arguments
    assert {OWNER} == {
        row["owner"]
        for row in await owned.fetch(
            "select relowner::regrole::text as owner from pg_class where relnamespace = 'rowcast'::regnamespace"
        )
    }
    migrator = await asyncpg.connect(environment["DATABASE_URL"])
    await migrator.execute(f"select pg_advisory_lock({migrate.LOCK})")
    [holder] = await owned.fetch(query("lock_holder"), migrate.LOCK)
    assert (MIGRATOR, True) == (holder["user_name"], holder["may_change_schemas"])
    await migrator.close()
    for owner, code, line in (
        (ROLE, 14, f"This role cannot take on {ROLE}, which is in ROWCAST_OWNER (permission denied"),
        ("roles_nobody", 14, "This role cannot take on roles_nobody, which is in ROWCAST_OWNER"),
        ("Nobody", 78, "owner (option): a name consists of at most 63 characters"),
    ):
        found, _, errors = await command("--owner", owner, "--apply-ddl", **environment)
        assert (code, True) == (found, line in errors), errors
        assert 1 == errors.count("\n")


async def test_daemon_up_does_as_the_owner_what_it_does_and_serves_what_that_made(
    database: str, owned: Connection, empty_database: str, tmp_path: Path
) -> None:
    environment = {"ROWCAST_OWNER": OWNER}
    up = "up", "--data-dir", str(tmp_path)
    async with (
        daemon_process(as_role(empty_database, MIGRATOR), *up, environment=environment) as daemon,
        daemon.client("01JH000000VSER0000000A11CE") as client,  # a sample user
    ):
        await client.subscribe("users")
        await owned.execute("update chatgenius.users set username = username || '2'")
        assert {"update"} == {change["kind"] for change in await client.changes(5)}
    owners = await owned.fetch(
        "select distinct relowner::regrole::text as owner from pg_class"
        " where relnamespace in ('rowcast'::regnamespace, 'chatgenius'::regnamespace)"
    )
    assert [OWNER] == [row["owner"] for row in owners]
    assert 0 == await owned.fetchval("select count(*) from pg_shdepend where refobjid = $1::text::regrole", MIGRATOR)
    code, output, errors = await command(
        *up, DATABASE_URL=as_role(empty_database, MIGRATOR), ROWCAST_OWNER="roles_nobody"
    )
    assert (14, "") == (code, output)
    assert "This role cannot take on roles_nobody, which is in ROWCAST_OWNER" in errors


async def test_a_dry_run_of_the_ddl_says_what_is_pending_and_changes_nothing(
    empty_database: str,
) -> None:
    code, output, errors = await command("--apply-ddl", "--dry-run", DATABASE_URL=empty_database)
    assert 0 == code, errors
    assert "pending: rowcast: nothing -> " in output + errors
    assert "dry run: passed" in output + errors
    session = await asyncpg.connect(empty_database)
    assert not await session.fetchval(
        "select exists (select from pg_namespace where nspname in ('rowcast', 'chatgenius'))"
    )
    await session.close()
