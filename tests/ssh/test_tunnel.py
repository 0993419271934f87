"""Rowcast through an SSH tunnel: every command uses it, and a daemon survives its loss."""

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from daemon import setup_database
from daemon.cli.root import cli
from daemon.postgres import ssh
from daemon.postgres.connect import Connection, connect
from daemon.postgres.errors import ConnectionRefused, SuperuserRefused
from daemon.postgres.tunnel import through_tunnel
from daemon.settings import Settings
from tests.acceptance.chat import Chat
from tests.faults.proxy import Proxy
from tests.support.daemon import Daemon, command, daemon_process, get
from tests.support.sshd import Sshd

COMMANDS = {
    "": (),
    "--apply-ddl": ("--apply-ddl",),
    "up": ("up", "--data-dir", "FILE"),
    "seed": ("seed",),
    "rollback": ("rollback", "chatgenius"),
    "check": ("check",),
    "migrate": ("migrate", "--no-backup"),
    "backup": ("backup", "FILE"),
    "reset": ("reset", "users"),
    "tail": ("tail", "users"),
    "dead-letters": ("dead-letters", "list"),
    "jobs": ("jobs",),
    "explain": ("explain", "--topic", "users", "--user", "ada"),
    "watch": ("watch", "public.orders", "--topic", "'orders'", "--public"),
    "unwatch": ("unwatch", "public.orders"),
    "watches": ("watches",),
    "types": ("types", "--json-schema"),
    "archive": ("archive", "antone", "--to", "FILE"),
    "rotate-token-keys": ("rotate-token-keys",),
}
WITHOUT_A_DATABASE = {"token", "config", "status", "gateway"}
AFTER_READING_A_FILE = {"restore"}
AS_A_FINDING = {"doctor"}


def settings(sshd: Sshd, dsn: str) -> Settings:
    given: dict[str, Any] = sshd.environment(DATABASE_URL=dsn)
    return Settings(**given)


def lines(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    """The data of each log line of this event."""
    return [line["data"] for line in daemon.events() if line["event"] == event]


async def logged(daemon: Daemon, event: str, times: int = 1) -> None:
    while len(lines(daemon, event)) < times:
        await asyncio.sleep(0.01)


def sockets(*pids: int) -> list[Path]:
    """The sockets of the tunnels of these processes."""
    return [path for pid in pids for path in Path(tempfile.gettempdir()).glob(f"rowcast-{pid}-*/.s.PGSQL.*")]


def test_every_command_of_the_command_line_is_in_one_of_these_lists() -> None:
    others = WITHOUT_A_DATABASE | AFTER_READING_A_FILE | AS_A_FINDING
    assert set(cli.commands) == set(COMMANDS) - {"", "--apply-ddl"} | others


async def test_no_command_reaches_the_database_past_the_tunnel(database: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    environment = {
        "DATABASE_URL": database,
        "SSH_HOST": "127.0.0.1",
        "SSH_USER": "nobody",
        "SSH_KEY_PATH": str(key),
        "ROWCAST_LISTEN": "127.0.0.1:0",
        "ROWCAST_TOKEN_KEYS": "A" * 43 + "=",
    }
    found = {}
    for name, given in COMMANDS.items():
        arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in given]
        found[name] = await command(*arguments, **environment)
    message = f"SSH key file not found. Check SSH_KEY_PATH. There is no file {key}.\n"
    assert dict.fromkeys(COMMANDS, (78, "", f"daemon: {message}")) == found
    assert (1, f"fail  database     {message}", "") == await command("doctor", **environment)


async def test_the_schema_a_check_and_a_backup_pass_through_the_tunnel(
    sshd: Sshd, empty_database: str, tmp_path: Path
) -> None:
    file, environment = tmp_path / "backup.sql", sshd.environment(DATABASE_URL=empty_database)
    code, _, errors = await command("--apply-ddl", **environment)
    assert 0 == code, errors
    assert (0, "") == (await command("check", **environment))[::2]
    assert (0, "") == (await command("backup", str(file), **environment))[::2]
    backups = {"ROWCAST_BACKUP_DIR": str(tmp_path / "backups")}
    assert (0, "") == (await command("jobs", "run", "backup", **environment, **backups))[::2]
    assert (0, "") == (await command("restore", "--replace", str(file), **environment))[::2]
    assert sshd.connections() >= 4


async def test_an_application_sets_its_database_up_through_the_tunnel(
    sshd: Sshd, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sshd.environment(DATABASE_URL=empty_database).items():
        monkeypatch.setenv(name, value)
    before = sshd.connections()
    async with setup_database(test=True) as pool:
        assert 0 == await pool.fetchval("select count(*) from messages")
        assert 1 == len(sockets(os.getpid()))
    assert before + 1 == sshd.connections()
    assert [] == sockets(os.getpid())


@pytest.fixture
async def over_tcp(database: str, sql: Connection) -> AsyncIterator[str]:
    """The URL of the database at a port of localhost."""
    directory, port = await sql.fetchval("show unix_socket_directories"), await sql.fetchval("show port")
    async with Proxy(Path(directory, f".s.PGSQL.{port}")).serving() as proxy:
        account, _, rest = database.partition("@")
        yield f"{account}@localhost:{proxy.port}{rest.partition('?')[0]}"


async def test_a_database_is_reached_over_tcp_by_all_who_use_the_tunnel(sshd: Sshd, over_tcp: str) -> None:
    chosen = settings(sshd, over_tcp)
    async with through_tunnel(chosen):
        async with through_tunnel(chosen):
            pass
        connection = await connect(chosen.require_dsn(), application_name="test", attempts=1)
        assert 1 == await connection.fetchval("select 1")
        await connection.close()


async def test_production_allows_localhost_through_the_tunnel_but_no_superuser(sshd: Sshd, over_tcp: str) -> None:
    environment = sshd.environment(DATABASE_URL=over_tcp, ROWCAST_ENVIRONMENT="production")
    assert (29, "", f"daemon: {SuperuserRefused()}\n") == await command("check", **environment)


async def test_a_row_is_delivered_before_during_and_after_the_loss_of_the_tunnel(
    sshd: Sshd, database: str, sql: Connection
) -> None:
    chat = await Chat.begin(sql)
    environment = {**sshd.environment(), "ROWCAST_BEAT_EVERY": "0.2", "ROWCAST_BEAT_LIMIT": "2"}
    async with daemon_process(database, environment=environment) as daemon, daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        sent = [await chat.say("before")]
        received = await client.changes()
        sshd.signal_sessions(signal.SIGKILL)
        await logged(daemon, "tunnel_connected", 2)
        sent.append(await chat.say("after the session was killed"))
        received += await client.changes()

        await sshd.stop()
        await logged(daemon, "tunnel_retry")
        sent.append(await chat.say("while the server is down"))
        status, page = await get(f"{daemon.http}/readyz")
        reasons = json.loads(page)["reasons"]
        assert (503, True) == (status, reasons[0].startswith(f"the SSH tunnel to {sshd.address} is down: SSH conn"))
        await sshd.start()
        received += await client.changes()
        sent.append(await chat.say("after the server is back"))
        received += await client.changes()
        assert sent == [change["key"]["id"] for change in received]
        while (await get(f"{daemon.http}/readyz"))[0] != 200:
            await asyncio.sleep(0.01)
        assert lines(daemon, "tunnel_lost")[0]["through"] == sshd.address
        assert 1 == len(sockets(daemon.process.pid))
        assert 0 == await daemon.stop()
        assert [] == sockets(daemon.process.pid)


async def test_each_of_several_workers_has_a_tunnel_of_its_own(sshd: Sshd, database: str, sql: Connection) -> None:
    chat = await Chat.begin(sql)
    async with daemon_process(database, "--workers", "2", environment=sshd.environment()) as daemon:
        assert {0, 1} == {line["worker"] for line in lines(daemon, "tunnel_connected")}
        assert 2 == len(sockets(*(line["pid"] for line in lines(daemon, "worker_started"))))
        async with daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            message = await chat.say("hello")
            assert [message] == [change["key"]["id"] for change in await client.changes()]


async def test_a_host_that_no_longer_answers_is_noticed_and_left(
    sshd: Sshd, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "OPTIONS", {**ssh.OPTIONS, "keepalive_interval": 0.1, "keepalive_count_max": 1})
    chosen = settings(sshd, database)
    async with through_tunnel(chosen) as problems:
        sshd.signal_sessions(signal.SIGSTOP)
        while not problems():
            await asyncio.sleep(0.01)
        assert f"the SSH tunnel to {sshd.address} is down: " in str(problems())
        while problems():
            await asyncio.sleep(0.01)
        connection = await connect(chosen.require_dsn(), application_name="test", attempts=1)
        await connection.close()
    sshd.signal_sessions(signal.SIGKILL)


async def test_a_new_connection_while_the_tunnel_is_down_names_the_database(sshd: Sshd, database: str) -> None:
    chosen = settings(sshd, database)
    async with through_tunnel(chosen) as problems:
        await sshd.stop()
        try:
            while not problems():
                await asyncio.sleep(0.01)
            with pytest.raises(ConnectionRefused, match=rf"Nothing answers at /.* through {sshd.address} "):
                await connect(chosen.require_dsn(), application_name="test", attempts=1)
        finally:
            await sshd.start()


async def test_the_socket_can_be_reached_by_its_owner_only(sshd: Sshd, database: str) -> None:
    chosen = settings(sshd, database)
    assert chosen.ssh_route
    async with through_tunnel(chosen):
        assert 0o700 == chosen.ssh_route.directory.stat().st_mode & 0o777
    assert not chosen.ssh_route.directory.exists()
