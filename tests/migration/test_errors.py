"""The faults that errors of a real server become: one line, its own exit code, no secrets."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from daemon.core.errors import OperatorFault
from daemon.postgres.connect import connect, open_pool
from daemon.postgres.errors import (
    AuthenticationFailed,
    ConnectionRefused,
    DatabaseExists,
    DatabaseTimeout,
    DuplicateRows,
    ForeignKeyViolated,
    InsufficientPrivilege,
    NoSuchDatabase,
    TemporarilyUnavailable,
    UnknownHost,
    explain,
)
from tests.support.folders import Folders, execute, value


async def refusal(folders: Folders, dsn: str, exit_code: int) -> OperatorFault:
    """The fault that `apply` raises, after the checks that are common to all faults."""
    with pytest.raises(OperatorFault) as caught:
        await folders.apply(dsn, "shop", attempts=2)
    fault = caught.value
    assert exit_code == fault.exit_code
    assert "\n" not in str(fault)
    for line in [str(fault), *folders.reported]:
        assert dsn not in line
        assert (urlsplit(dsn).password or dsn) not in line
    return fault


@pytest.fixture
async def stranger(empty_database: str) -> AsyncIterator[str]:
    """The DSN of a role that may only connect."""
    await execute(empty_database, "create role stranger login password 'open sesame'")
    yield re.sub("//[^@]+@", "//stranger:open%20sesame@", empty_database)
    await execute(empty_database, "drop owned by stranger; drop role stranger")


async def test_a_wrong_password_is_reported_and_not_retried(folders: Folders, empty_database: str) -> None:
    folders.shop()
    wrong = re.sub("//([^:]+):[^@]+@", r"//\1:guessed@", empty_database)
    fault = await refusal(folders, wrong, 11)
    assert isinstance(fault, AuthenticationFailed)
    assert 'password authentication failed for user "rowcast": correct user and password' in str(fault)
    assert [] == folders.reported  # it was not retried


async def test_an_unknown_user_is_refused_like_a_wrong_password(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await refusal(folders, re.sub("//[^@]+@", "//nobody:guessed@", empty_database), 11)


async def test_an_unknown_database_is_reported_with_a_remedy(folders: Folders, empty_database: str) -> None:
    folders.shop()
    fault = await refusal(folders, re.sub(r"@/\w+", "@/nowhere", empty_database), 13)
    assert isinstance(fault, NoSuchDatabase)
    assert 'database "nowhere" does not exist: create it (createdb), or correct the database URL.' == str(fault)


async def test_a_closed_port_is_a_refused_connection(folders: Folders) -> None:
    folders.shop()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        port = bound.getsockname()[1]
        fault = await refusal(folders, f"postgresql://app:hunter2@127.0.0.1:{port}/app", 10)
    assert isinstance(fault, ConnectionRefused)
    assert str(fault).startswith(f"Nothing answers at 127.0.0.1:{port} (ECONNREFUSED): ")
    assert [f"{fault} (attempt 1 failed)"] == folders.reported


async def test_a_missing_socket_is_a_refused_connection(folders: Folders, tmp_path: Path) -> None:
    folders.shop()
    fault = await refusal(folders, f"postgresql://app:hunter2@/app?host={tmp_path}", 10)
    assert f"Nothing answers at {tmp_path}/.s.PGSQL.5432 (ENOENT)" in str(fault)


async def test_an_unknown_host_is_not_retried(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)  # a real name service may take long to answer
    folders.shop()
    fault = await refusal(folders, "postgresql://app:hunter2@nowhere.invalid/app", 12)
    assert isinstance(fault, UnknownHost)
    assert str(fault).startswith("The host of nowhere.invalid:5432 is not known (Name or service not known): ")
    assert [] == folders.reported


async def test_a_server_that_does_not_answer_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(DatabaseTimeout) as caught:
            await connect(f"postgresql://app:hunter2@127.0.0.1:{port}/app", application_name="test", time_limit=0.2)
    assert 19 == caught.value.exit_code
    assert f"No answer from 127.0.0.1:{port} in time" in str(caught.value)


async def test_a_role_that_may_not_create_a_schema_is_reported(
    folders: Folders, empty_database: str, stranger: str
) -> None:
    folders.shop()
    fault = await refusal(folders, stranger, 14)
    assert isinstance(fault, InsufficientPrivilege)
    assert str(fault).startswith("permission denied for database ")
    assert await value(empty_database, "select to_regnamespace('rowcast') is null")


async def test_a_role_that_may_not_create_tables_is_reported(
    folders: Folders, empty_database: str, stranger: str
) -> None:
    folders.shop()
    await execute(empty_database, "create schema rowcast")
    assert "permission denied for schema rowcast" in str(await refusal(folders, stranger, 14))


async def test_a_role_that_may_not_read_a_table_is_reported(
    folders: Folders, empty_database: str, stranger: str
) -> None:
    await execute(empty_database, "create table public.secret (); create schema rowcast authorization stranger")
    folders.revision("shop", 1, up="select 1")
    folders.revision("rowcast", 2, up="select 1;\nselect * from public.secret;")
    fault = await refusal(folders, stranger, 14)
    assert "permission denied for table secret in rowcast/0002_part.up.sql" in str(fault)


async def test_a_database_that_exists_already_is_reported(empty_database: str) -> None:
    with pytest.raises(asyncpg.DuplicateDatabaseError) as caught:
        await execute(empty_database, "create database postgres")
    fault = explain(caught.value)
    assert isinstance(fault, DatabaseExists)
    assert 15 == fault.exit_code
    assert 'database "postgres" already exists: use it as it is, or choose another name.' == str(fault)


async def test_duplicate_rows_are_reported_without_their_values(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "insert into shop.goods values (1, 'tea of ada'), (2, 'tea of ada')")
    folders.revision("shop", 3, up="create unique index goods_name_key on shop.goods (name);")
    fault = await refusal(folders, empty_database, 17)
    assert isinstance(fault, DuplicateRows)
    assert 'could not create unique index "goods_name_key" in shop/0003_part.up.sql: ' in str(fault)
    assert "ada" not in str(fault)


async def test_dangling_references_are_reported_without_their_values(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "insert into shop.goods values (4711, 'tea')")
    folders.revision(
        "shop",
        3,
        up="create table shop.shelves (id int primary key);\n"
        "alter table shop.goods add constraint goods_on_shelf foreign key (id) references shop.shelves;",
    )
    fault = await refusal(folders, empty_database, 18)
    assert isinstance(fault, ForeignKeyViolated)
    assert "goods_on_shelf" in str(fault)
    assert "4711" not in str(fault)


async def test_a_role_without_free_connections_is_retried(
    folders: Folders, empty_database: str, stranger: str
) -> None:
    folders.shop()
    await execute(empty_database, "alter role stranger connection limit 0")
    fault = await refusal(folders, stranger, 19)
    assert isinstance(fault, TemporarilyUnavailable)
    assert [f"{fault} (attempt 1 failed)"] == folders.reported


async def test_a_connection_that_is_lost_halfway_leaves_nothing(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="create table shop.goods (); select pg_terminate_backend(pg_backend_pid());")
    await refusal(folders, empty_database, 19)
    assert await value(empty_database, "select to_regnamespace('shop') is null")
    folders.shop()
    await folders.apply(empty_database, "shop")


# Connecting


@asynccontextmanager
async def over_tcp(dsn: str) -> AsyncIterator[str]:
    """The DSN of a TCP port that forwards to the server's unix socket."""
    options = parse_qs(urlsplit(dsn).query)
    path = f"{options['host'][0]}/.s.PGSQL.{options['port'][0]}"

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(forward(reader, server_writer), forward(server_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield re.sub(r"@/(\w+)\?.*", rf"@127.0.0.1:{port}/\1", dsn)
    server.close()
    await server.wait_closed()


async def test_tcp_connections_have_keepalives_and_a_timeout(empty_database: str) -> None:
    async with over_tcp(empty_database) as dsn:
        connection = await connect(dsn, application_name="test")
        pool = await open_pool(dsn, application_name="test", min_size=1, max_size=1)
        async with pool.acquire() as pooled:
            for each in (connection, pooled):
                peer = each._transport.get_extra_info("socket")  # type: ignore[union-attr]
                assert 1 == peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert 10 == peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                assert 19_000 == peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        await pool.close()
        await connection.close()


async def test_a_connection_has_the_given_name_and_settings(empty_database: str) -> None:
    connection = await connect(
        empty_database, application_name="rowcast test", server_settings={"lock_timeout": "123"}
    )
    shown = await connection.fetchrow(
        "select current_setting('application_name'), current_setting('lock_timeout'), current_database()"
    )
    assert shown is not None
    assert ("rowcast test", "123ms") == tuple(shown)[:2]
    await connection.close()


async def test_a_pool_that_cannot_be_opened_raises_the_reason(empty_database: str) -> None:
    with pytest.raises(NoSuchDatabase):
        await open_pool(re.sub(r"@/\w+", "@/nowhere", empty_database), application_name="test")
