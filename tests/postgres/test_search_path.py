"""No role can put an object of its own in the place of one that a statement of ours means."""

import ast
import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from urllib.parse import quote, urlsplit

import asyncpg
import pytest

from daemon.postgres.connect import PINNED, Connection, connect, open_pool
from daemon.schema import migrate
from tests.postgres.shadows import cast_shadows
from tests.support.daemon import command, daemon_process
from tests.support.log import leader, until_numbered
from tests.support.postgres import CAPTURE_ROLE, Server, ignore

ROOT = Path(__file__).parents[2]
PASSWORD = "p"
HOSTILE_PATH = "public, pg_catalog"

_numbers = count(1)


class Database:
    """A database of the ordinary role `owner`, in which the role `mallory` may create in `public`, as by default
    before PostgreSQL 15. `admin` is a superuser's connection.
    """

    def __init__(self, admin: Connection, dsn: str, owner: str, mallory: str) -> None:
        self.admin, self._dsn, self.owner, self.mallory = admin, dsn, owner, mallory

    def dsn(self, role: str) -> str:
        url = urlsplit(self._dsn)
        return url._replace(netloc=f"{quote(role)}:{PASSWORD}@").geturl()

    @asynccontextmanager
    async def session(self, role: str) -> AsyncIterator[Connection]:
        """A session of an application: with the settings of its role and its database."""
        connection = await asyncpg.connect(self.dsn(role))
        yield connection
        await connection.close()


@pytest.fixture
async def shared_database(postgres: Server) -> AsyncIterator[Database]:
    number = next(_numbers)
    owner, mallory = f"owner_{number}", f"mallory_{number}"
    async with postgres.database() as dsn:
        admin = await asyncpg.connect(dsn, server_settings={"search_path": "pg_catalog"})
        name = await admin.fetchval("select quote_ident(current_database())")
        await admin.execute(CAPTURE_ROLE)
        await admin.execute(f"""
            create role {owner} login password '{PASSWORD}' createrole;
            grant rowcast_capture to {owner};
            create role {mallory} login password '{PASSWORD}';
            alter database {name} owner to {owner};
            alter schema public owner to {owner};
            grant create on schema public to public;
        """)
        yield Database(admin, dsn, owner, mallory)
        await admin.close()
    async with asyncpg.create_pool(postgres.embedded.dsn_for("postgres"), min_size=1, max_size=1) as pool:
        await pool.execute(f"drop role {owner}; drop role {mallory}")


@pytest.mark.parametrize("path", ["default", HOSTILE_PATH])
async def test_numbering_never_calls_a_function_that_an_application_role_made(
    shared_database: Database, path: str
) -> None:
    owner, mallory = shared_database.owner, shared_database.mallory
    await shared_database.admin.execute(f"alter role {owner} set search_path = {path}")
    await migrate.apply(shared_database.dsn(owner), [], report=ignore)
    async with shared_database.session(owner) as session:
        await session.execute(f"""
            create schema app;
            create table app.rows (id integer primary key);
            grant usage on schema app to {mallory};
            grant insert on app.rows to {mallory};
            select rowcast.watch('app.rows', $$'row:' || r.id$$, '{{id}}');
        """)
    async with shared_database.session(mallory) as session:
        # A better match for (text, integer) than pg_catalog's hashtextextended(text, bigint).
        await session.execute(f"""
            create function public.hashtextextended(text, integer) returns bigint language plpgsql as $$
            begin
                execute 'grant {owner} to {mallory}';
                return 0;
            end $$;
            insert into app.rows values (1);
        """)
    pool = await open_pool(shared_database.dsn(owner), application_name="test")
    async with leader(shared_database.dsn(owner), pool):
        await until_numbered(pool)
    await pool.close()
    assert 1 == await shared_database.admin.fetchval("select count(*) from rowcast.log")
    assert not await shared_database.admin.fetchval("select pg_has_role($1, $2, 'member')", mallory, owner)


async def test_no_setting_of_a_role_or_a_caller_changes_what_a_statement_means(shared_database: Database) -> None:
    others = {
        "search_path": "public",
        "default_transaction_isolation": "serializable",
        "timezone": "Asia/Tokyo",
        "datestyle": "German",
        "intervalstyle": "iso_8601",
        "extra_float_digits": "-15",
        "bytea_output": "escape",
        "xmloption": "document",
    }
    settings = {name: others.get(name) or {"on": "off", "off": "on"}[value] for name, value in PINNED.items()}
    owner = shared_database.owner
    for name, value in settings.items():
        await shared_database.admin.execute(f"alter role {owner} set {name} = '{value}'")
    session = await connect(shared_database.dsn(owner), application_name="test", server_settings=settings)
    pool = await open_pool(shared_database.dsn(owner), application_name="test", server_settings=settings)
    for connection in (session, pool):
        assert PINNED == {name: await connection.fetchval(f"show {name}") for name in PINNED}
    await pool.close()
    await session.close()


KEY = base64.urlsafe_b64encode(bytes(32)).decode()
PACKS = ("antone", "chatgenius", "email_unsubscribe")

# Names that stand before all others in this session, for whatever runs in it.
IN_PG_TEMP = """
set search_path = pg_temp, public, pg_catalog;
create temp table events (); create temp table log (); create temp table watched ();
create temp table pg_class (); create temp table pg_proc (); create temp table pg_roles ();
create type pg_temp.text as enum ('shadow');
create type pg_temp.json as enum ('shadow');
create type pg_temp.name as enum ('shadow');
"""


class Shadowed:
    """A database whose `public` holds a shadow of whatever Rowcast uses of pg_catalog, first on every path."""

    def __init__(self, database: Database, shadows: Sequence[str]) -> None:
        self.database, self._shadows = database, shadows
        self.dsn = database.dsn(database.owner)

    async def run(self, *arguments: object, **environment: str) -> str:
        """Run a command, which must succeed; its output."""
        code, output, errors = await command(
            *map(str, arguments),
            DATABASE_URL=self.dsn,
            ROWCAST_PACKS=",".join(PACKS),
            ROWCAST_TOKEN_KEYS=KEY,
            **environment,
        )
        await self.check()
        assert 0 == code, f"{arguments}: {errors}"
        return output

    async def check(self) -> None:
        """Fails if a shadow was used."""
        used = await self.database.admin.fetchrow("select is_called, last_value from public.called")
        assert used is not None
        assert not used["is_called"], self._shadows[used["last_value"]]


@pytest.fixture
async def shadowed(shared_database: Database) -> Shadowed:
    async with shared_database.session(shared_database.mallory) as session:
        shadows = await cast_shadows(session)
    name = await shared_database.admin.fetchval("select quote_ident(current_database())")
    await shared_database.admin.execute(f"""
        alter database {name} set search_path = {HOSTILE_PATH};
        alter role {shared_database.owner} set search_path = {HOSTILE_PATH};
    """)
    return Shadowed(shared_database, shadows)


async def test_the_shadows_stand_in_the_way_of_a_session_that_is_not_pinned(shadowed: Shadowed) -> None:
    async with shadowed.database.session(shadowed.database.owner) as session:
        with pytest.raises(asyncpg.PostgresError, match="shadow"):
            await session.execute("select 'a'::pg_catalog.text || 'b'::pg_catalog.text")
    with pytest.raises(AssertionError, match=r"create (operator|function)"):
        await shadowed.check()


@pytest.mark.timeout(300)  # it runs every command
async def test_no_command_uses_a_shadow(shadowed: Shadowed, tmp_path: Path) -> None:
    database, mallory = shadowed.database, shadowed.database.mallory
    await shadowed.run("--apply-ddl")
    await shadowed.run("--apply-ddl")
    await shadowed.run("seed")
    assert "nothing has drifted" in await shadowed.run("check")
    await database.admin.execute(f"""
        alter table chatgenius.files drop constraint files_size_not_negative;
        grant usage on schema chatgenius to {mallory};
        grant select, insert, update, delete on all tables in schema chatgenius to {mallory};
    """)
    [[user, channel]] = await database.admin.fetch(
        "select user_id, channel_id from chatgenius.channel_members limit 1"
    )
    environment = {"ROWCAST_PACKS": ",".join(PACKS)}
    async with (
        daemon_process(shadowed.dsn, environment=environment) as daemon,
        database.session(mallory) as session,
        daemon.client(user) as client,
    ):
        follower = await client.subscribe(f"channel:{channel}")
        assert "subscribed" == follower["op"]
        await session.execute(IN_PG_TEMP)
        await session.execute(f"""
            insert into chatgenius.messages (id, channel_id, user_id, content)
            values ('01JH0000000000000000SHADED', '{channel}', '{user}', 'hello');
            insert into chatgenius.messages (channel_id, user_id, content) values ('{channel}', '{user}', 'hello');
            insert into chatgenius.files (message_id, name, type, size, url)
            values ('01JH0000000000000000SHADED', 'n', 't', -1, 'u');
            update chatgenius.messages set content = 'edited';
            delete from chatgenius.reactions;
        """)
        while not any("edited" in str(frame) for frame in await client.until("changes")):
            pass
        await shadowed.check()
        while not await database.admin.fetchval("select count(*) from rowcast.dead_letters"):
            await asyncio.sleep(0)
        await shadowed.run("dead-letters", "list")
        seq = await database.admin.fetchval("select seq from rowcast.dead_letters")
        await shadowed.run("dead-letters", "show", seq)
        await shadowed.run("dead-letters", "replay", seq)
        while not await database.admin.fetchval("select count(*) from rowcast.dead_letters where seq <> $1", seq):
            await asyncio.sleep(0)
        await shadowed.run("dead-letters", "drop", "--all", "--yes")
        assert [] == [event for event in daemon.warnings() if event["event"] != "change_invalid"]
    await shadowed.run("backup", tmp_path / "backup.sql")
    await shadowed.run("--pack", "antone", "archive", "antone", "--to", tmp_path / "archive")
    await shadowed.run("rotate-token-keys")
    for pack in PACKS:
        await shadowed.run("rollback", pack)
    await shadowed.run("rollback", "rowcast")


def test_only_one_function_opens_sessions() -> None:
    opening = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "daemon").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "asyncpg"
        and node.attr in {"connect", "create_pool"}
    }
    assert {"daemon/postgres/connect.py"} == opening


# They run in sessions of applications, often. Their names and operators are qualified instead.
WITHOUT_A_PATH = {"rowcast.must_ring()", "rowcast.ulid()"}


async def test_every_function_of_ours_sets_its_search_path(empty_database: str) -> None:
    await migrate.apply(empty_database, migrate.bundled(), report=ignore)
    connection = await connect(empty_database, application_name="test")
    functions = await connection.fetch(
        """select p.oid::regprocedure::text as name, p.proconfig from pg_proc as p
           where p.pronamespace <> 'information_schema'::regnamespace and p.oid >= 16384
             and not exists (select from pg_depend as d where d.objid = p.oid and d.deptype = 'e')"""
    )
    await connection.close()
    assert functions
    unsafe = {
        row["name"]
        for row in functions
        if not any(setting.startswith("search_path=pg_catalog, pg_temp") for setting in row["proconfig"] or ())
    }
    assert WITHOUT_A_PATH == unsafe


async def test_an_ordinary_role_can_serve_a_table_of_its_own(shared_database: Database) -> None:
    owner = shared_database.owner
    await migrate.apply(shared_database.dsn(owner), [], report=ignore)
    async with shared_database.session(owner) as session:
        await session.execute("""
            create schema app;
            create table app.rows (id integer primary key, owner text);
            create table app.members (row_id integer, user_id text);
            insert into app.rows values (1, 'ada');
            insert into app.members values (1, 'bob');
        """)
        for readable, readers in (
            ("user_id = r.owner", ["ada"]),
            ("exists (select from app.members as m where m.row_id = r.id and m.user_id = given.user_id)", ["bob"]),
        ):
            if "members" in readable:
                with pytest.raises(
                    asyncpg.InsufficientPrivilegeError, match="grant that right to the role rowcast_ca"
                ):
                    await session.execute("select rowcast.serve('app.rows', $$'row:' || r.id$$, $1)", readable)
                await session.execute("grant select on app.members to rowcast_capture")
            await session.execute("select rowcast.serve('app.rows', $$'row:' || r.id$$, $1)", readable)
            allowed = (
                "select u.name from unnest('{ada,bob}'::text[]) as u (name) where rowcast.may_read(u.name, 'row:1')"
            )
            assert readers == [row["name"] for row in await session.fetch(allowed)]
        await session.execute("select rowcast.unwatch('app.rows')")
    async with shared_database.session(shared_database.mallory) as session:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await session.execute("select rowcast.may_read('ada', 'row:1')")
