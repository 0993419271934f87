"""Several worker processes behind one socket, as clients and operators see them."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.acceptance.chat import Chat
from tests.faults.checker import CLEAN
from tests.faults.harness import scenario
from tests.support.daemon import SECRET, Client, Daemon, Frame, clean_environment, command, daemon_process, get, token
from tests.support.processes import until_it_ends


@pytest.fixture
async def daemon(database: str, chat: Chat) -> AsyncIterator[Daemon]:
    """A daemon with two workers."""
    async with daemon_process(database, "--workers", "2") as daemon:
        yield daemon


def lines(daemon: Daemon, event: str) -> list[Frame]:
    """The data of each log line of this event."""
    return [line["data"] for line in daemon.events() if line["event"] == event]


async def logged(daemon: Daemon, event: str, times: int = 1) -> None:
    while len(lines(daemon, event)) < times:
        await asyncio.sleep(0.01)


def pids(daemon: Daemon) -> dict[int, int]:
    """The process of each worker, by its number."""
    return {line["worker"]: line["pid"] for line in lines(daemon, "worker_started")}


async def worker_of(daemon: Daemon, client: Client) -> int:
    """The number of the worker that serves this client."""
    while True:
        for line in daemon.events():
            if line["event"] == "client_connected" and line["correlationId"] == client.welcome["session"]:
                return int(line["data"]["worker"])
        await asyncio.sleep(0)


@asynccontextmanager
async def one_on_each(daemon: Daemon, user: str) -> AsyncIterator[dict[int, Client]]:
    """Two clients, one on each of two workers, by the worker's number."""
    async with AsyncExitStack() as stack:
        found: dict[int, Client] = {}
        while len(found) < 2:
            client = await stack.enter_async_context(daemon.client(user))
            found[await worker_of(daemon, client)] = client
        yield found


async def test_clients_of_two_workers_receive_the_same_changes_in_the_same_order(daemon: Daemon, chat: Chat) -> None:
    async with one_on_each(daemon, chat.ada) as clients:
        for client in clients.values():
            await client.subscribe(chat.topic)
        for number in range(40):
            await chat.say(str(number))
        one, other = [await client.changes(40) for client in clients.values()]
        assert one == other
        assert [str(number) for number in range(40)] == [change["record"]["content"] for change in one]
        assert sorted({change["seq"] for change in one}) == [change["seq"] for change in one]
    assert 1 == len(lines(daemon, "leader_elected"))


async def test_a_hundred_connections_are_distributed_among_the_workers(daemon: Daemon, chat: Chat) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(daemon.client(chat.ada)) for _ in range(100)]
        shares = Counter([await worker_of(daemon, client) for client in clients])
    assert {0, 1} == shares.keys()
    assert 20 <= min(shares.values()), shares


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("leads", [True, False])
async def test_a_worker_that_dies_or_hangs_disconnects_only_its_own_clients_and_they_miss_nothing(
    database: str, how: signal.Signals, leads: bool
) -> None:
    soon = {"ROWCAST_WORKER_SILENCE": "4"} if how == signal.SIGSTOP else {}
    async with scenario(database, environment={"ROWCAST_WORKERS": "2", **soon}) as run:
        daemon = run.daemons[0].daemon
        assert daemon
        clients = await run.follow(16)
        while (
            len({line["worker"] for line in lines(daemon, "client_connected")}) < 2
        ):  # one worker may be slow to accept
            clients += await run.follow(4)
        leader = lines(daemon, "leader_elected")[-1]["worker"]
        victim = leader if leads else 1 - leader
        theirs = [line["worker"] for line in lines(daemon, "client_connected")].count(victim)
        run.write(3)
        await run.received(50)
        first = pids(daemon)[victim]
        with until_it_ends(first):
            os.kill(first, how)
            await logged(daemon, "worker_ended")
        await logged(daemon, "worker_started", 3)
        await run.recovered()
        await logged(daemon, "serving", 3)
        await run.committed(50)
        assert CLEAN == await run.verdict()
        assert {1: len(clients) - theirs, 2: theirs} == Counter(client.connections for client in clients)
        assert (how == signal.SIGSTOP) == bool(lines(daemon, "worker_hung"))
        [ended] = lines(daemon, "worker_ended")
        assert (victim, first, "Killed") == (ended["worker"], ended["pid"], ended["reason"])
        assert first != pids(daemon)[victim]
        leaders = [line["worker"] for line in lines(daemon, "leader_elected")]
        assert ([leader, 1 - leader] if leads else [leader]) == leaders


async def test_a_client_that_connects_while_no_worker_runs_waits_for_the_next_one(daemon: Daemon, chat: Chat) -> None:
    for pid in pids(daemon).values():
        with until_it_ends(pid):
            os.kill(pid, signal.SIGKILL)
    async with daemon.raw(open_timeout=None) as client:
        await client.say(op="hello", token=token(chat.ada))
        assert "welcome" == (await client.next())["op"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_to_the_parent_drains_all_workers(daemon: Daemon, chat: Chat, how: signal.Signals) -> None:
    async with one_on_each(daemon, chat.ada) as clients:
        ended = asyncio.create_task(daemon.stop(how))
        for client in clients.values():
            bye = await client.next()
            assert ("bye", "restart") == (bye["op"], bye["reason"])
            assert (1012, "restart") == await client.closed()
        assert 0 == await ended
    assert [0, 1] == sorted(line["worker"] for line in lines(daemon, "stopped"))
    assert [] == lines(daemon, "worker_ended")
    await daemon.notices.wait_for("STOPPING=1")
    for pid in pids(daemon).values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("terminal", [False, True])
async def test_a_signal_during_worker_startup_ends_all_workers_cleanly(
    database: str, chat: Chat, terminal: bool
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "daemon", "--workers", "2"),
        env=clean_environment(DATABASE_URL=database, ROWCAST_SECRET=SECRET, ROWCAST_LISTEN="127.0.0.1:0"),
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr
    errors = await process.stderr.readline()  # the first worker has just been forked
    try:
        if terminal:
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of the terminal
        else:
            process.terminate()
        errors += await process.stderr.read()
        assert 0 == await process.wait(), errors
    finally:
        if process.returncode is None:
            process.kill()
    assert not {"worker_ended", "internal_error"} & {json.loads(line)["event"] for line in errors.splitlines()}


async def test_a_worker_that_hangs_during_shutdown_is_killed_and_sets_the_exit_code(
    database: str, chat: Chat
) -> None:
    async with daemon_process(database, "--workers", "2", environment={"ROWCAST_WORKER_SILENCE": "1"}) as daemon:
        os.kill(pids(daemon)[1], signal.SIGSTOP)
        assert 128 + signal.SIGKILL == await daemon.stop()


async def test_a_reload_is_over_for_systemd_once_a_worker_that_hangs_has_ended(database: str, chat: Chat) -> None:
    async with daemon_process(database, "--workers", "2", environment={"ROWCAST_WORKER_SILENCE": "1"}) as daemon:
        hanging = pids(daemon)[1]
        os.kill(hanging, signal.SIGSTOP)
        daemon.process.send_signal(signal.SIGHUP)
        await daemon.notices.wait_for("RELOADING=1")
        await daemon.notices.wait_for("READY=1")
        with pytest.raises(ProcessLookupError):
            os.kill(hanging, 0)
        await logged(daemon, "reloaded")


async def test_workers_end_when_their_parent_is_killed(daemon: Daemon) -> None:
    one, other = pids(daemon).values()
    os.kill(one, signal.SIGSTOP)  # a stopped process cannot notice that its parent is gone
    with until_it_ends(one), until_it_ends(other):
        assert -signal.SIGKILL == await daemon.stop(signal.SIGKILL)


async def test_a_startup_fault_is_one_line_and_one_exit_code(empty_database: str) -> None:
    quiet = {"DATABASE_URL": empty_database, "ROWCAST_LOG_LEVEL": "error", "ROWCAST_LISTEN": "127.0.0.1:0"}
    code, output, errors = await command("--workers", "3", **quiet)
    assert (32, "") == (code, output)
    assert re.fullmatch(r"daemon: The schema is not current \(.*\): run `daemon --apply-ddl` first\.\n", errors)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _, errors = await command("--workers", "3", **quiet | {"ROWCAST_LISTEN": place})
    assert (69, 1) == (code, errors.count("\n")), errors
    code, _, errors = await command("--workers", "0", **quiet)
    assert (78, 1) == (code, errors.count("\n")), errors


async def test_the_daemon_is_ready_when_all_workers_are_and_reports_to_systemd(database: str, chat: Chat) -> None:
    async with daemon_process(database, "--workers", "2", environment={"WATCHDOG_USEC": "400000"}) as daemon:
        assert [0, 1] == sorted(line["worker"] for line in lines(daemon, "serving"))
        for _ in range(3):
            await daemon.notices.wait_for("WATCHDOG=1")
        await daemon.notices.wait_for("STATUS=ready")
        await chat.sql.execute("alter table chatgenius.messages disable trigger rowcast_update")
        for pid in pids(daemon).values():
            os.kill(pid, signal.SIGKILL)
        await logged(daemon, "serving", 4)
        status, page = await get(f"{daemon.http}/readyz")
        assert 503 == status
        [reason] = json.loads(page)["reasons"]
        await daemon.notices.wait_for(f"STATUS=worker 0: {reason}; worker 1: {reason}")


async def test_workers_accept_from_a_socket_passed_by_systemd(database: str, chat: Chat) -> None:
    elsewhere = {"ROWCAST_METRICS_LISTEN": "127.0.0.1:0"}
    socket_activated = "tests.acceptance.socket_activated"
    async with daemon_process(database, "--workers", "2", module=socket_activated, environment=elsewhere) as daemon:
        places = {line["listen"] for line in lines(daemon, "serving")}
        assert 1 == len(places)
        async with one_on_each(daemon, chat.ada) as clients:
            assert {0, 1} == clients.keys()


def workers_in(page: str) -> set[str | None]:
    """The values of the label `worker` on a page of metrics; None for samples without it."""
    samples = [line for line in page.splitlines() if not line.startswith("#")]
    return {found[1] if (found := re.search(r'[{,]worker="(\d+)"', sample)) else None for sample in samples}


async def test_every_metric_names_its_worker_and_each_worker_has_a_metrics_port(database: str, chat: Chat) -> None:
    own = {"ROWCAST_METRICS_LISTEN": "127.0.0.1:0"}
    async with daemon_process(database, "--workers", "2", environment=own) as daemon:
        for line in lines(daemon, "serving"):
            assert {str(line["worker"])} == workers_in((await get(line["metrics"]))[1])
        assert 404 == (await get(f"{daemon.http}/metrics"))[0]


async def test_a_single_process_has_metrics_without_a_worker_and_an_optional_metrics_port(
    database: str, chat: Chat
) -> None:
    async with daemon_process(database, environment={"ROWCAST_METRICS_LISTEN": "127.0.0.1:0"}) as daemon:
        [serving] = lines(daemon, "serving")
        assert "worker" not in serving
        assert {None} == workers_in((await get(serving["metrics"]))[1])
