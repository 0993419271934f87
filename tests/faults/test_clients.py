"""Clients that vanish silently, read slowly, or reconnect all at once."""

import asyncio
import json
import resource
import signal
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from daemon.app.build import POOL_SIZE
from tests.faults.checker import CLEAN, Checker
from tests.faults.harness import (
    LONG,
    MUTANT_TIMEOUT,
    NOWHERE,
    TIMEOUT,
    Scenario,
    by_form,
    median,
    percentile,
    scenario,
)
from tests.faults.oracle import Style
from tests.faults.proxy import Proxy
from tests.faults.results import Results
from tests.support.daemon import get, token

SLEEPER = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], subprotocols=["rowcast.v1"], ping_interval=None) as line:
    line.send(sys.stdin.readline())
    for _ in line:
        pass
"""


async def metric(run: Scenario, name: str) -> int:
    """The value of a metric of the daemon."""
    assert run.daemons[0].daemon
    _, page = await get(f"{run.daemons[0].daemon.http}/metrics")
    [line] = [line for line in page.splitlines() if line.startswith(f"{name} ")]
    return int(float(line.split()[1]))


async def until_connected(run: Scenario, count: int) -> None:
    while await metric(run, "rowcast_clients") != count:
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("mutants", [["quick_pings"], ["no_pings"]])
async def test_server_and_client_both_detect_a_dead_connection(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, mutants=mutants) as run:
        assert run.daemons[0].daemon
        async with Proxy(run.daemons[0].daemon.address).serving() as proxy:
            here = await run.follow(2)
            behind = await run.follow(2, url=lambda: f"ws://127.0.0.1:{proxy.port}/v1", silence=2.0)
            run.write(1)
            await run.received(20)
            began = time.monotonic()
            proxy.hold()
            if "no_pings" in mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_TIMEOUT):
                        await run.daemons[0].logged("client_aborted")
                results.caught("9", "no_pings", "the server keeps them")
                proxy.heal()
                return
            await run.daemons[0].logged("client_aborted", len(behind))
            freed = time.monotonic() - began
            while any(checker.connection is not None and checker.live.is_set() for checker in behind):
                await asyncio.sleep(0.01)
            noticed = time.monotonic() - began
            proxy.heal()
            await run.reconnected()
            await run.recovered()
            assert CLEAN == await run.verdict()
            assert [1] * len(here) == [checker.connections for checker in here]
        results.held(
            "9",
            "a client's connection is dead, both ways",
            "a proxy blocks everything; pings every second (default 20), 1 s to answer (default 10)",
            "the server drops it; the client notices by itself, reconnects and has missed nothing",
            f"freed after {freed:.1f} s; noticed by clients after {noticed:.1f} s, which tolerate 2 s of silence",
            run.n,
        )


SLOW = 5_000.0  # bytes a second
LITTLE = {"ROWCAST_QUEUE_BYTES": "20000"}


@pytest.mark.parametrize("mutants", [["quick_pings"], ["no_pings"]])
async def test_a_stopped_client_is_disconnected_although_its_kernel_acknowledges(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, mutants=mutants) as run:
        assert run.daemons[0].daemon
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", SLEEPER, run.daemons[0].url()),
            stdin=asyncio.subprocess.PIPE,
        )
        try:
            assert program.stdin
            program.stdin.write(json.dumps({"op": "hello", "token": token(run.oracle.users[0])}).encode() + b"\n")
            await until_connected(run, 1)
            began = time.monotonic()
            program.send_signal(signal.SIGSTOP)
            if "no_pings" in mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_TIMEOUT):
                        await until_connected(run, 0)
                results.caught("9 (stopped)", "no_pings", "the server keeps it")
                return
            await until_connected(run, 0)
            results.held(
                "9 (stopped)",
                "a client's process is stopped",
                "SIGSTOP; its kernel keeps acknowledging; pings as in row 9",
                "the server drops it",
                f"freed after {time.monotonic() - began:.1f} s",
                "1 client",
            )
        finally:
            program.kill()
            await program.wait()
            assert program.stdin
            program.stdin.close()


STOPPED = """
import json, sys
from websockets.sync.client import connect
with connect(sys.argv[1], subprotocols=["rowcast.v1"], ping_interval=None, max_size=None) as line:
    line.send(json.dumps({"op": "hello", "token": sys.argv[2]}))
    line.send(json.dumps({"op": "subscribe", "topic": sys.argv[3]}))
    session = json.loads(line.recv())["session"]
    while (op := json.loads(line.recv())["op"]) == "head":
        pass
    print(session, op, flush=True)
    for _ in line:
        pass
"""
LONG_MESSAGE = "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, repeat('x', 100000))"


@pytest.mark.parametrize("mutants", [["quick_drain"], ["no_drain_limit"]])
async def test_a_stopped_client_with_full_buffers_is_disconnected_and_learns_why(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, mutants=mutants) as run:
        daemon, [user, *_], [first, second, *_] = run.daemons[0].daemon, run.oracle.users, run.oracle.channels
        assert daemon
        reading = await run.follow(2, topics=[f"channel:{first}"])
        run.write(1)
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", STOPPED, daemon.url, token(user), f"channel:{second}"),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert program.stdout
            session, followed = (await program.stdout.readline()).decode().split()
            assert "subscribed" == followed
            program.send_signal(signal.SIGSTOP)
            while not await metric(run, "rowcast_clients_behind"):
                await run.oracle.execute(LONG_MESSAGE, second, user)
            began = time.monotonic()
            if "no_drain_limit" in mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_TIMEOUT):
                        await until_connected(run, len(reading))
                results.caught("11", "no_drain_limit", "the server keeps it")
                return
            await until_connected(run, len(reading))
            cut = time.monotonic() - began
            async with daemon.raw() as client:
                await client.say(op="hello", token=token(user), session=session)
                assert {"code": 4408, "reason": "too_slow"} == (await client.next())["last_close"]
            await run.recovered()
            assert CLEAN == await run.verdict()
            assert [1] * len(reading) == [checker.connections for checker in reading]
        finally:
            program.kill()
            await program.communicate()
    results.held(
        "11",
        "a client's process is stopped while much is sent to it, and all buffers are full",
        "SIGSTOP; pings are off; 2 s for each 64 KiB queued (default 30)",
        "the server disconnects it, and says why when it returns; others stay connected and miss nothing",
        f"cut after {cut:.1f} s",
        run.n,
    )


async def test_slow_clients_are_served_at_their_pace_without_delaying_fast_ones(
    durable: str, results: Results
) -> None:
    async with scenario(durable, environment=LITTLE) as run:
        assert run.daemons[0].daemon
        async with Proxy(run.daemons[0].daemon.address, buffer=4096).serving() as proxy:
            fast = await run.follow(by_form(10, 100))
            slow = await run.follow(by_form(3, 20), url=lambda: f"ws://127.0.0.1:{proxy.port}/v1", silence=60)
            run.write(2)
            before = [await run.recovered(fast) for _ in range(by_form(10, 20))]
            fell_behind = await metric(run, "rowcast_behind_total")
            proxy.down.rate = SLOW
            # Not how many are behind now: a client that is cut for being slow counts as resuming when it returns.
            while await metric(run, "rowcast_behind_total") < fell_behind + len(slow):
                await asyncio.sleep(0.05)
            during = [await run.recovered(fast) for _ in range(by_form(10, 20))]
            behind = [len(fast[0].history) - len(checker.history) for checker in slow]
            proxy.heal()
            await run.stop_writers()
            assert CLEAN == await run.verdict()
            assert 0 < min(behind)
            assert [1] * len(fast) == [checker.connections for checker in fast]
            cut = aborted(run)
            assert {"too_slow"} >= cut.keys()
            peak = peak_memory(run.daemons[0].daemon.process.pid)
        results.held(
            "10",
            "slow clients beside fast ones",
            f"{len(slow)} of {len(run.checkers)} clients read at most 5 kB/s each, through a proxy that throttles",
            "fast clients are served meanwhile; slow ones lose nothing and get nothing twice",
            f"delivery to all fast ones, measured three times: p50 {median(before) * 1e3:.0f} ms before, "
            f"{median(during) * 1e3:.0f} "
            f"ms during; slow ones were up to {max(behind)} changes behind, {cut.total()} of them so slow that they "
            f"were cut, and resumed; peak memory of the daemon {peak} MB",
            run.n,
        )


async def test_in_lockstep_a_slow_client_stops_the_fast_ones(durable: str, results: Results) -> None:
    async with scenario(durable, mutants=["lockstep_delivery"], environment=LITTLE) as run:
        assert run.daemons[0].daemon
        async with Proxy(run.daemons[0].daemon.address, buffer=4096).serving() as proxy:
            fast = await run.follow(2)
            await run.follow(1, url=lambda: f"ws://127.0.0.1:{proxy.port}/v1", silence=60)
            run.write(2)
            proxy.down.rate = SLOW
            with pytest.raises(TimeoutError):
                while True:
                    await run.recovered(fast, within=MUTANT_TIMEOUT)
            proxy.heal()
    results.caught("10", "lockstep_delivery", f"fast ones receive nothing for {MUTANT_TIMEOUT:g} s")


def rst(checker: Checker) -> None:
    """End a client's connection with RST."""
    assert checker.connection is not None
    peer = checker.connection.transport.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    checker.connection.transport.abort()


def aborted(run: Scenario) -> Counter[str]:
    """How many clients the daemon has disconnected, by reason."""
    daemon = run.daemons[0].daemon
    assert daemon
    return Counter(line["data"]["reason"] for line in daemon.events() if line["event"] == "client_aborted")


def max_clients() -> int:
    """As many clients as the limit on open files allows, at most 10,000."""
    return min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)


@pytest.mark.parametrize("jitter", [1.0, 0.0] if not LONG else [30.0, 0.0], ids=["with jitter", "without"])
@pytest.mark.timeout(1800 if LONG else 120)
async def test_all_clients_reconnect_and_none_is_refused(durable: str, results: Results, jitter: float) -> None:
    clients = by_form(300, max_clients())
    async with scenario(durable, channels=1, environment={"ROWCAST_HEARTBEAT": "20"}) as run:
        for number in range(0, clients, 250):
            await run.follow(
                min(250, clients - number), pause=jitter, silence=300, local=f"127.0.0.{1 + number // 250 % 4}"
            )
        run.write(1, Style(pause=by_form(0.5, 5.0)))
        await run.committed(10)
        alone = len(run.oracle.waits)
        began = asyncio.get_running_loop().time()
        for checker in run.checkers:
            checker.live.clear()
            rst(checker)
        await run.reconnected()
        back = sorted(checker.live_at - began for checker in run.checkers)
        before, during = run.oracle.waits[:alone], run.oracle.waits[alone:]
        await run.recovered()
        assert CLEAN == await run.verdict()
        assert 0 == run.daemons[0].count("client_refused")
        again = sum(checker.connections > 2 for checker in run.checkers)
        cut = aborted(run)
        assert run.daemons[0].daemon
        peak = peak_memory(run.daemons[0].daemon.process.pid)
        results.held(
            f"22 ({'jitter' if jitter else 'no jitter'})",
            f"{clients:,} clients lose their connection and reconnect"
            + (f" within {jitter:g} s at random" if jitter else " at once"),
            "RST on all; the clients, from four addresses, are one process that shares the two cores",
            "all reconnected, 0 refused, 0 lost",
            f"{again} of them more than once; disconnected by the daemon: {dict(cut) or 'none'}; "
            f"50 % were back after {median(back):.1f} s, 95 % after {percentile(back, 0.95):.1f} s, all "
            f"after {back[-1]:.1f} s; peak memory of the daemon {peak} MB; commits, seen from that busy process, p99 "
            f"{percentile(before) * 1e3:.0f} ms before, {percentile(during) * 1e3:.0f} ms during",
            run.n,
        )


@pytest.mark.parametrize("mutants", [[], ["resume_from_head"]])
async def test_writes_while_many_clients_are_offline_are_replayed_when_they_return(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, channels=1, mutants=mutants) as run:
        here = [run.daemons[0].url]
        away = await run.follow(50, url=lambda: here[0]())  # noqa: PLW0108 - looked up at each call
        [stays] = await run.follow(1)
        run.write(1)
        here[0] = lambda: NOWHERE
        for checker in away:
            checker.live.clear()
            rst(checker)
        await run.received(20, stays)
        here[0] = run.daemons[0].url
        await run.reconnected()
        verdict = await run.verdict(within=MUTANT_TIMEOUT if mutants else TIMEOUT)
    if mutants:
        assert 0 < verdict.lost
        for kind in ("jitter", "no jitter"):
            results.caught(f"22 ({kind})", mutants[0], verdict)
    else:
        assert CLEAN == verdict


WAITING = (
    "select count(*) from pg_stat_activity where application_name = 'rowcast' "
    "and datname = current_database() and wait_event_type = 'Lock'"
)


FOLLOWS = "leader_reads_the_log"  # the daemon reads the log, as one that follows a leader does
UNLIMITED = "unlimited_permission_checks"


@pytest.mark.parametrize(("mutants", "checks"), [([], 3), ([FOLLOWS], 3), ([FOLLOWS, UNLIMITED], POOL_SIZE)])
async def test_connected_clients_are_served_while_many_others_wait_for_permission_checks(
    durable: str, results: Results, mutants: list[str], checks: int
) -> None:
    async with scenario(durable, channels=1, mutants=mutants) as run:
        connected = await run.follow(2)
        crowd = await run.follow(by_form(50, 1000), silence=300)
        observer = await run.oracle.connect()
        holder = await run.oracle.connect()
        await holder.execute("begin; lock table chatgenius.channel_members in access exclusive mode")
        for checker in crowd:
            checker.live.clear()
            rst(checker)
        while await observer.fetchval(WAITING) < checks:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        if UNLIMITED in mutants:
            with pytest.raises(TimeoutError):
                await run.recovered(connected, within=MUTANT_TIMEOUT)
        else:
            await run.recovered(connected)
            assert checks >= await observer.fetchval(WAITING)
        served = time.monotonic() - began
        await holder.execute("rollback")
        await holder.close()
        await observer.close()
        if UNLIMITED in mutants:
            results.caught(
                "22 (rights)", UNLIMITED, f"they receive nothing for {MUTANT_TIMEOUT:g} s from a daemon that follows"
            )
            return
        await run.reconnected()
        assert CLEAN == await run.verdict()
        assert [1] * len(connected) == [checker.connections for checker in connected]
        results.held(
            "22 (rights)",
            f"{len(crowd):,} clients reconnect to a daemon that {'follows' if mutants else 'leads'}, and the "
            "database does not answer the permission checks",
            "RST on all; the table of members is locked until others have been served",
            "only three of them run at once; clients still connected are served meanwhile; all reconnected, 0 lost",
            f"a write and its delivery to those that stayed {served * 1e3:.0f} ms",
            run.n,
        )


def peak_memory(pid: int) -> int:
    """The peak resident memory of a process, in megabytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024
