"""Two versions of Rowcast on one log: the older serves while the newer is applied, started, and takes over."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import pytest
from rowcast_client import Rowcast

from daemon.postgres.connect import connect
from tests.acceptance.chat import Chat
from tests.support.daemon import (
    SECRET,
    Daemon,
    Notices,
    clean_environment,
    command,
    daemon_process,
    get,
    token,
)
from tests.support.folders import value
from tests.support.packages import ROOT, build_wheel, new_environment, run
from tests.support.preloaded import Process

# While nothing has been released: a commit whose newest revisions are rowcast_0011 and chatgenius_0005.
BEFORE_RELEASES = "cee866169d70"  # pragma: allowlist secret


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `daemon` of the newest release, or of an older commit, in an environment of its own."""
    released = git("describe", "--tags", "--abbrev=0", "--match=v*").stdout.decode().strip()
    archive = git("archive", "--format=tar", released or BEFORE_RELEASES)
    if archive.returncode:
        pytest.skip("The history of this checkout has no older version: fetch all of it.")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    wheel = build_wheel(source, tmp_path_factory.mktemp("wheel"))
    return new_environment(tmp_path_factory.mktemp("older"), wheel) / "daemon"


@asynccontextmanager
async def running(program: Path, dsn: str, folder: Path) -> AsyncIterator[Daemon]:
    """A daemon of the older version, which is ready. `folder` is made for it."""
    folder.mkdir()
    log = folder / "log"
    environment = clean_environment(
        DATABASE_URL=dsn,
        NOTIFY_SOCKET=str(folder / "notify"),
        ROWCAST_SECRET=SECRET,
        ROWCAST_LISTEN="127.0.0.1:0",
        ROWCAST_LOG_FORMAT="json",
    )
    environment.pop("PYTHONPATH", None)  # it has a Rowcast of its own
    with Notices(folder / "notify") as notices, log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(program, env=environment, cwd=folder, stderr=stderr)
        ended, started = asyncio.create_task(process.wait()), asyncio.create_task(notices.wait_for("READY=1"))
        await asyncio.wait({ended, started}, return_when=asyncio.FIRST_COMPLETED)
        assert started.done(), log.read_text()
        daemon = Daemon(cast("Process", process), ("127.0.0.1", 0), log, notices)
        serving = next(line for line in daemon.events() if line["event"] == "serving")
        daemon.address = ("127.0.0.1", urlsplit(serving["data"]["listen"]).port or 0)
        try:
            yield daemon
        finally:
            if process.returncode is None:
                process.terminate()
            assert 0 == await ended, log.read_text()


class Writer:
    """Writes numbered messages, one after the other, until it is stopped. If that fails, so does the group."""

    def __init__(self, chat: Chat, group: asyncio.TaskGroup) -> None:
        self._chat = chat
        self.written = 0
        self._stop = False
        self._task = group.create_task(self._write())

    async def _write(self) -> None:
        while not self._stop:
            await self._chat.say(str(self.written))
            self.written += 1
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._stop = True
        await self._task


class Balancer:
    """One address before several daemons: a connection goes to the first of them that accepts it."""

    def __init__(self) -> None:
        self.daemons: list[Daemon] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """The URL for clients."""
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for daemon in self.daemons:
            with suppress(ConnectionError):
                there = await asyncio.open_connection(*daemon.address)
                await asyncio.gather(_pass_on(reader, there[1]), _pass_on(there[0], writer))
                return
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError), closing(writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


class Application:
    """A program with the Python client, which follows a topic as long as it runs."""

    def __init__(self, url: str, chat: Chat) -> None:
        self.received: list[str] = []
        self.live = asyncio.Event()
        self._chat = chat
        self._client = Rowcast(url, token=token(chat.ada))
        self._client.on("status", lambda status: self.live.set() if status == "live" else None)
        self._more = asyncio.Condition()

    async def run(self) -> None:
        """Follow the topic. Fails if its stream begins anew, which would be a change without a record."""
        async with self._client:
            async for change in self._client.changes(self._chat.topic):
                async with self._more:
                    self.received.append(change["record"]["content"])
                    self._more.notify_all()

    async def gets(self, content: str) -> None:
        """Wait for this message."""
        async with self._more:
            await self._more.wait_for(lambda: content in self.received)


async def ready(daemon: Daemon) -> bool:
    return 200 == (await get(f"{daemon.http}/readyz"))[0]


async def done(*arguments: str, dsn: str) -> None:
    """Run a command of the newer version, which must succeed."""
    code, _, errors = await command(*arguments, DATABASE_URL=dsn)
    assert 0 == code, errors


async def revisions(dsn: str) -> dict[str, str]:
    """Where each schema is."""
    of = "select version_num from {}.alembic_version"
    return {pack: await value(dsn, of.format(pack)) for pack in ("chatgenius", "rowcast")}


@pytest.fixture
async def chat(older: Path, empty_database: str) -> AsyncIterator[Chat]:
    """A ChatGenius as the older version has applied it."""
    await asyncio.to_thread(run, older, "--apply-ddl", "--database-url", empty_database)
    sql = await connect(empty_database, application_name="test")
    yield await Chat.begin(sql)
    await sql.close()


@pytest.mark.timeout(300)  # three daemons, one after the other, and everything that is between two versions
async def test_a_newer_version_takes_over_and_gives_back_while_clients_lose_nothing(
    older: Path, empty_database: str, chat: Chat, tmp_path: Path
) -> None:
    before, balancer = await revisions(empty_database), Balancer()
    async with balancer.listening() as url, asyncio.TaskGroup() as group:
        applications = [Application(url, chat) for _ in range(3)]
        async with running(older, empty_database, tmp_path / "old") as old:
            balancer.daemons = [old]
            following = [group.create_task(application.run()) for application in applications]
            for application in applications:
                await application.live.wait()
            writer = Writer(chat, group)

            async def some_more_arrive(more: int = 10) -> None:
                for application in applications:
                    await application.gets(str(writer.written + more))

            await some_more_arrive()
            await done("--apply-ddl", dsn=empty_database)
            assert before != await revisions(empty_database)
            await some_more_arrive()
            async with daemon_process(empty_database) as new:
                assert await ready(old)
                assert await ready(new)
                await some_more_arrive()
                balancer.daemons = [new]
                assert 0 == await old.stop()
                await some_more_arrive()
                assert "leader_elected" in [line["event"] for line in new.events()]

                async with running(older, empty_database, tmp_path / "back") as back:
                    assert await ready(back)
                    assert "schema_newer" in [line["event"] for line in back.events()]
                    balancer.daemons = [back]
                    assert 0 == await new.stop()
                    await some_more_arrive()
                    for pack, revision in before.items():
                        await done("rollback", pack, "--to", revision, dsn=empty_database)
                    await some_more_arrive()
                    assert before == await revisions(empty_database)
                    await writer.stop()
                    await some_more_arrive(-1)
                    for task in following:
                        task.cancel()
    for application in applications:
        assert [str(number) for number in range(writer.written)] == application.received
