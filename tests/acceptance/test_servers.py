"""Servers and roles that Rowcast cannot use are named in one line, by every command."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import asyncpg
import pytest

from daemon.core.change import Topic
from daemon.embedded.server import EmbeddedPostgres
from daemon.log.grants import PgGrants
from daemon.postgres.connect import Connection, connect, open_pool
from daemon.postgres.errors import ReadOnlyDatabase, UnsupportedPostgres
from daemon.schema import migrate
from tests.acceptance.chat import Chat
from tests.support.daemon import command, daemon_process
from tests.support.postgres import FAST, Server, chosen_binaries, ignore, passable_directory

WRITING = {
    "serve": (),
    "apply": ("--apply-ddl",),
    "rollback": ("rollback", "chatgenius"),
    "check": ("check",),
    "seed": ("seed",),
    "dead-letters list": ("dead-letters", "list"),
    "dead-letters replay": ("dead-letters", "replay", "--all"),
    "archive": ("archive", "antone", "--to", "FILE"),
}
COMMANDS = {**WRITING, "tail": ("tail", "users"), "backup": ("backup", "FILE")}


async def run(name: str, folder: Path, **environment: str) -> tuple[int, str]:
    """The exit code of a command, and its error output."""
    arguments = [str(folder / "file") if argument == "FILE" else argument for argument in COMMANDS[name]]
    code, _, errors = await command(*arguments, **environment)
    return code, errors


@pytest.fixture(scope="module")
async def standby(postgres: Server) -> AsyncIterator[str]:
    """The DSN of ChatGenius on a physical standby."""
    with passable_directory() as directory:
        async with postgres.chatgenius() as dsn:
            options = parse_qs(urlsplit(dsn).query)
            binaries, password = chosen_binaries(), urlsplit(dsn).password or ""
            process = await asyncio.create_subprocess_exec(
                binaries.bindir / "pg_basebackup",
                *("--pgdata", directory / "postgres", "--write-recovery-conf", "--checkpoint=fast"),
                *("--host", options["host"][0], "--username", "rowcast"),
                env=binaries.environment() | {"PGPASSWORD": password},
            )
            assert 0 == await process.wait()
            owner = (postgres.embedded.data_dir / "postgres").stat()
            (directory / "postgres.password").write_text(password)
            for path in (
                directory / "postgres.password",
                directory / "postgres",
                *(directory / "postgres").rglob("*"),
            ):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
            (directory / "postgres.password").chmod(0o600)
            async with EmbeddedPostgres(directory, binaries=binaries, settings=FAST) as embedded:
                yield embedded.dsn_for(urlsplit(dsn).path.strip("/"))
            shutil.rmtree(directory / "postgres")


@pytest.mark.parametrize("name", [*WRITING, "tail"])
async def test_a_standby_is_refused_with_exit_code_31(standby: str, tmp_path: Path, name: str) -> None:
    assert (31, "daemon: This database is a read-only standby: connect to the primary.\n") == await run(
        name, tmp_path, DATABASE_URL=standby
    )


async def test_a_standby_can_be_backed_up(standby: str, tmp_path: Path) -> None:
    assert (0, "") == await run("backup", tmp_path, DATABASE_URL=standby)


class Owner:
    """An ordinary role that owns a database with ChatGenius."""

    def __init__(self, admin: Connection, dsn: str, name: str) -> None:
        self.admin, self.dsn, self.name = admin, dsn, name


@pytest.fixture
async def owner(postgres: Server, empty_database: str) -> AsyncIterator[Owner]:
    admin = await asyncpg.connect(empty_database)
    name = f"servers_owner_{os.getpid()}"
    database = await admin.fetchval("select quote_ident(current_database())")
    await admin.execute(
        f"create role {name} login password 'p' createrole; alter database {database} owner to {name}"
    )
    dsn = urlsplit(empty_database)._replace(netloc=f"{quote(name)}:p@").geturl()
    await migrate.apply(dsn, ["chatgenius"], report=ignore)
    yield Owner(admin, dsn, name)
    await admin.execute(f"drop owned by {name} cascade; alter database {database} owner to rowcast; drop role {name}")
    await admin.close()


@pytest.mark.parametrize("of", ["role", "database"])
async def test_a_read_only_role_or_database_is_named_with_the_remedy(owner: Owner, tmp_path: Path, of: str) -> None:
    database = await owner.admin.fetchval("select current_database()")
    target = f"role {owner.name}" if of == "role" else f"database {database}"
    await owner.admin.execute(f"alter {target} set default_transaction_read_only = on")
    for name in WRITING:
        assert (28, f"daemon: {ReadOnlyDatabase()}\n") == await run(name, tmp_path, DATABASE_URL=owner.dsn)
    assert (0, "") == await run("backup", tmp_path, DATABASE_URL=owner.dsn)


@pytest.mark.parametrize("name", COMMANDS)
async def test_production_refuses_a_superuser_in_one_line(database: str, tmp_path: Path, name: str) -> None:
    code, errors = await run(name, tmp_path, DATABASE_URL=database, ROWCAST_ENVIRONMENT="production")
    if name == "seed":
        assert 35 == code
    else:
        assert (29, 1, True) == (code, errors.count("\n"), errors.startswith("daemon: This role is a superuser"))


async def test_production_refuses_a_superuser_in_every_worker(database: str) -> None:
    code, _, errors = await command(
        "--workers", "2", DATABASE_URL=database, ROWCAST_ENVIRONMENT="production", ROWCAST_LISTEN="127.0.0.1:0"
    )
    assert (29, True) == (code, "This role is a superuser" in errors)


async def test_production_accepts_the_owner_of_the_database(owner: Owner) -> None:
    async with daemon_process(owner.dsn, environment={"ROWCAST_ENVIRONMENT": "production"}) as daemon:
        assert [] == daemon.warnings()


@asynccontextmanager
async def encoded(postgres: Server, encoding: str) -> AsyncIterator[str]:
    """The DSN of an empty database with this encoding."""
    admin, name = await asyncpg.connect(postgres.embedded.dsn_for("postgres")), f"in_{encoding.lower()}"
    await admin.execute(f"create database {name} template template0 encoding '{encoding}' locale 'C'")
    yield postgres.embedded.dsn_for(name)
    await admin.execute(f"drop database {name} with (force)")
    await admin.close()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "MULE_INTERNAL"])
async def test_a_database_without_a_usable_encoding_is_refused(
    postgres: Server, tmp_path: Path, encoding: str
) -> None:
    async with encoded(postgres, encoding) as dsn:
        for name in WRITING:
            code, errors = await run(name, tmp_path, DATABASE_URL=dsn)
            assert (27, 1) == (code, errors.count("\n"))
            assert errors.startswith("daemon: The encoding of this database is ")


async def test_a_pack_with_characters_that_a_database_cannot_hold_is_refused_with_the_encoding_as_the_reason(
    postgres: Server, tmp_path: Path
) -> None:
    async with encoded(postgres, "LATIN1") as dsn:
        code, errors = await run("apply", tmp_path, DATABASE_URL=dsn, ROWCAST_PACKS="antone")
        assert 27 == code
        assert "one that lacks a character which is needed in antone/0003_tables.up.sql: restore" in errors


async def test_a_user_id_that_a_latin1_database_cannot_hold_has_no_topic(postgres: Server) -> None:
    async with encoded(postgres, "LATIN1") as dsn:
        await migrate.apply(dsn, ["chatgenius"], report=ignore)
        sql = await connect(dsn, application_name="test")
        chat = await Chat.begin(sql)
        async with daemon_process(dsn) as daemon:
            async with daemon.client("日本") as client:
                answer = await client.subscribe(chat.topic)
                assert ("error", "no_such_topic", False) == (answer["op"], answer["code"], answer["retry"])
            async with daemon.client(chat.ada) as client:
                assert "no_such_topic" == (await client.subscribe("channel:日本"))["code"]
                assert "subscribed" == (await client.subscribe(chat.topic))["op"]
                await chat.say("voilà")
                [change] = await client.changes()
                assert "voilà" == change["record"]["content"]
        await sql.close()


async def test_users_who_ask_together_with_one_that_cannot_exist_get_their_answers(database: str) -> None:
    sql = await connect(database, application_name="test")
    chat = await Chat.begin(sql)
    pool = await open_pool(database, application_name="test")
    grants = PgGrants(pool, lambda _: "chatgenius")
    users = [chat.ada, "nobody\0"] * 10
    answers = await asyncio.gather(*(grants.readable_from(user, Topic("users")) for user in users))
    assert [answer is not None for answer in answers] == [user == chat.ada for user in users]
    await pool.close()
    await sql.close()


@asynccontextmanager
async def claiming(dsn: str, major: bytes) -> AsyncIterator[str]:
    """The DSN of the same database through a proxy that claims another major version of the server."""
    socket = Path(parse_qs(urlsplit(dsn).query)["host"][0]) / ".s.PGSQL.5432"
    tasks: list[asyncio.Task[None] | None] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(re.sub(rb"(server_version\0)\d\d", rb"\g<1>" + major, data))
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(socket)
        tasks.append(asyncio.current_task())
        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = urlsplit(dsn)
    yield url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{port}", query="sslmode=disable").geturl()
    server.close()
    await asyncio.gather(*filter(None, tasks), return_exceptions=True)


@pytest.mark.parametrize("name", COMMANDS)
async def test_postgres_13_is_refused_in_one_line(database: str, tmp_path: Path, name: str) -> None:
    async with claiming(database, b"13") as dsn:
        address = urlsplit(dsn).netloc.rpartition("@")[2]
        assert (26, f"daemon: {UnsupportedPostgres('13', address=address)}\n") == await run(
            name, tmp_path, DATABASE_URL=dsn
        )


async def test_a_role_without_rights_is_named_with_what_it_lacks(postgres: Server, database: str) -> None:
    admin = await asyncpg.connect(database)
    await admin.execute("create role servers_nobody login password 'p'")
    dsn = urlsplit(database)._replace(netloc="servers_nobody:p@").geturl()
    code, _, errors = await command(DATABASE_URL=dsn)
    assert (14, 1) == (code, errors.count("\n")), errors
    await admin.execute("drop role servers_nobody")
    await admin.close()
