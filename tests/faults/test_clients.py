"""Clients that vanish without a word, or come back all at once."""

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

from tests.faults.checker import CLEAN, Checker
from tests.faults.harness import LONG, MUTANT_NET, NET, NOWHERE, Stage, late, middle, stage, times
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


async def metric(play: Stage, name: str) -> int:
    """What the daemon says."""
    assert play.daemons[0].daemon
    _, page = await get(f"{play.daemons[0].daemon.http}/metrics")
    [line] = [line for line in page.splitlines() if line.startswith(f"{name} ")]
    return int(float(line.split()[1]))


async def until_connected(play: Stage, count: int) -> None:
    while await metric(play, "rowcast_clients") != count:
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("mutants", [["quick_pings"], ["no_pings"]])
async def test_server_and_client_both_detect_a_dead_connection(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, mutants=mutants) as play:
        assert play.daemons[0].daemon
        async with Proxy(play.daemons[0].daemon.address).serving() as proxy:
            here = await play.follow(2)
            behind = await play.follow(2, url=lambda: f"ws://127.0.0.1:{proxy.port}/v1", silence=2.0)
            play.write(1)
            await play.heard(20)
            began = time.monotonic()
            proxy.hold()
            if "no_pings" in mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_NET):
                        await play.daemons[0].logged("client_aborted")
                results.caught("9", "no_pings", "the server keeps them")
                proxy.heal()
                return
            await play.daemons[0].logged("client_aborted", len(behind))
            freed = time.monotonic() - began
            while any(checker.line is not None and checker.live.is_set() for checker in behind):
                await asyncio.sleep(0.01)
            noticed = time.monotonic() - began
            proxy.heal()
            await play.back()
            await play.recovered()
            assert CLEAN == await play.verdict()
            assert [1] * len(here) == [checker.connections for checker in here]
        results.held(
            "9",
            "a client's connection is dead, both ways",
            "a proxy blocks everything; pings every second (default 20), 1 s to answer (default 10)",
            "the server drops it; the client notices by itself, reconnects and has missed nothing",
            f"freed after {freed:.1f} s; noticed by clients after {noticed:.1f} s, which tolerate 2 s of silence",
            play.n,
        )


SLOW = 5_000.0  # bytes a second
LITTLE = {"ROWCAST_QUEUE_BYTES": "20000"}


@pytest.mark.parametrize("mutants", [["quick_pings"], ["no_pings"]])
async def test_a_stopped_client_is_disconnected_although_its_kernel_acknowledges(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, mutants=mutants) as play:
        assert play.daemons[0].daemon
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", SLEEPER, play.daemons[0].url()),
            stdin=asyncio.subprocess.PIPE,
        )
        try:
            assert program.stdin
            program.stdin.write(json.dumps({"op": "hello", "token": token(play.oracle.users[0])}).encode() + b"\n")
            await until_connected(play, 1)
            began = time.monotonic()
            program.send_signal(signal.SIGSTOP)
            if "no_pings" in mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_NET):
                        await until_connected(play, 0)
                results.caught("9 (stopped)", "no_pings", "the server keeps it")
                return
            await until_connected(play, 0)
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
    print(json.loads(line.recv())["session"], json.loads(line.recv())["op"], flush=True)
    for _ in line:
        pass
"""
LONG_MESSAGE = "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, repeat('x', 100000))"


@pytest.mark.parametrize("mutants", [["quick_drain"], ["no_drain_limit"]])
async def test_a_stopped_client_with_full_buffers_is_disconnected_and_learns_why(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, mutants=mutants) as play:
        daemon, [user, *_], [first, second, *_] = play.daemons[0].daemon, play.oracle.users, play.oracle.channels
        assert daemon
        reading = await play.follow(2, topics=[f"channel:{first}"])
        play.write(1)
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
            while not await metric(play, "rowcast_clients_behind"):
                await play.oracle.execute(LONG_MESSAGE, second, user)
            began = time.monotonic()
            if "no_drain_limit" in mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_NET):
                        await until_connected(play, len(reading))
                results.caught("11", "no_drain_limit", "the server keeps it")
                return
            await until_connected(play, len(reading))
            cut = time.monotonic() - began
            async with daemon.raw() as client:
                await client.say(op="hello", token=token(user), session=session)
                assert {"code": 4408, "reason": "too_slow"} == (await client.next())["last_close"]
            await play.recovered()
            assert CLEAN == await play.verdict()
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
        play.n,
    )


async def test_slow_clients_are_served_at_their_pace_without_delaying_fast_ones(
    durable: str, results: Results
) -> None:
    async with stage(durable, environment=LITTLE) as play:
        assert play.daemons[0].daemon
        async with Proxy(play.daemons[0].daemon.address, buffer=4096).serving() as proxy:
            fast = await play.follow(times(10, 100))
            slow = await play.follow(times(3, 20), url=lambda: f"ws://127.0.0.1:{proxy.port}/v1", silence=60)
            play.write(2)
            before = [await play.recovered(fast) for _ in range(times(10, 20))]
            fell_behind = await metric(play, "rowcast_behind_total")
            proxy.down.rate = SLOW
            # Not how many are behind now: who is so slow that it is cut counts as resuming when it is back.
            while await metric(play, "rowcast_behind_total") < fell_behind + len(slow):
                await asyncio.sleep(0.05)
            during = [await play.recovered(fast) for _ in range(times(10, 20))]
            behind = [len(fast[0].history) - len(checker.history) for checker in slow]
            proxy.heal()
            await play.quiet()
            assert CLEAN == await play.verdict()
            assert 0 < min(behind)
            assert [1] * len(fast) == [checker.connections for checker in fast]
            cut = aborted(play)
            assert {"too_slow"} >= cut.keys()
            peak = peak_memory(play.daemons[0].daemon.process.pid)
        results.held(
            "10",
            "slow clients beside fast ones",
            f"{len(slow)} of {len(play.checkers)} clients read at most 5 kB/s each, through a proxy that throttles",
            "fast clients are served meanwhile; slow ones lose nothing and get nothing twice",
            f"delivery to all fast ones, measured three times: p50 {middle(before) * 1e3:.0f} ms before, "
            f"{middle(during) * 1e3:.0f} "
            f"ms during; slow ones were up to {max(behind)} changes behind, {cut.total()} of them so slow that they "
            f"were cut, and resumed; peak memory of the daemon {peak} MB",
            play.n,
        )


async def test_in_lockstep_a_slow_client_stops_the_fast_ones(durable: str, results: Results) -> None:
    async with stage(durable, mutants=["everybody_in_step"], environment=LITTLE) as play:
        assert play.daemons[0].daemon
        async with Proxy(play.daemons[0].daemon.address, buffer=4096).serving() as proxy:
            fast = await play.follow(2)
            await play.follow(1, url=lambda: f"ws://127.0.0.1:{proxy.port}/v1", silence=60)
            play.write(2)
            proxy.down.rate = SLOW
            with pytest.raises(TimeoutError):
                while True:
                    await play.recovered(fast, within=MUTANT_NET)
            proxy.heal()
    results.caught("10", "everybody_in_step", f"fast ones receive nothing for {MUTANT_NET:g} s")


def rst(checker: Checker) -> None:
    """End a client's line with RST."""
    assert checker.line is not None
    peer = checker.line.transport.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    checker.line.transport.abort()


def aborted(play: Stage) -> Counter[str]:
    """How many clients the daemon has cut, by reason."""
    daemon = play.daemons[0].daemon
    assert daemon
    return Counter(line["data"]["reason"] for line in daemon.events() if line["event"] == "client_aborted")


def most_clients() -> int:
    """As many as the open files of this process allow, and 10,000 at most."""
    return min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)


@pytest.mark.parametrize("jitter", [1.0, 0.0] if not LONG else [30.0, 0.0], ids=["with jitter", "without"])
@pytest.mark.timeout(1800 if LONG else 120)
async def test_all_clients_reconnect_and_none_is_refused(durable: str, results: Results, jitter: float) -> None:
    clients = times(300, most_clients())
    async with stage(durable, channels=1, environment={"ROWCAST_HEARTBEAT": "20"}) as play:
        for number in range(0, clients, 250):
            await play.follow(
                min(250, clients - number), pause=jitter, silence=300, local=f"127.0.0.{1 + number // 250 % 4}"
            )
        play.write(1, Style(pause=times(0.5, 5.0)))
        await play.committed(10)
        alone = len(play.oracle.waits)
        began = asyncio.get_running_loop().time()
        for checker in play.checkers:
            checker.live.clear()
            rst(checker)
        await play.back()
        back = sorted(checker.live_at - began for checker in play.checkers)
        before, during = play.oracle.waits[:alone], play.oracle.waits[alone:]
        await play.recovered()
        assert CLEAN == await play.verdict()
        assert 0 == play.daemons[0].count("client_refused")
        again = sum(checker.connections > 2 for checker in play.checkers)
        cut = aborted(play)
        assert play.daemons[0].daemon
        peak = peak_memory(play.daemons[0].daemon.process.pid)
        results.held(
            f"22 ({'jitter' if jitter else 'no jitter'})",
            f"{clients:,} clients lose their connection and reconnect"
            + (f" within {jitter:g} s at random" if jitter else " at once"),
            "RST on all; the clients, from four addresses, are one process that shares the two cores",
            "all reconnected, 0 refused, 0 lost",
            f"{again} of them more than once; disconnected by the daemon: {dict(cut) or 'none'}; "
            f"50 % were back after {middle(back):.1f} s, 95 % after {late(back, 0.95):.1f} s, all "
            f"after {back[-1]:.1f} s; peak memory of the daemon {peak} MB; commits, seen from that busy process, p99 "
            f"{late(before) * 1e3:.0f} ms before, {late(during) * 1e3:.0f} ms during",
            play.n,
        )


@pytest.mark.parametrize("mutants", [[], ["resume_from_head"]])
async def test_writes_while_many_clients_are_offline_are_replayed_when_they_return(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, channels=1, mutants=mutants) as play:
        here = [play.daemons[0].url]
        away = await play.follow(50, url=lambda: here[0]())  # noqa: PLW0108 - wherever it is then
        [stays] = await play.follow(1)
        play.write(1)
        here[0] = lambda: NOWHERE
        for checker in away:
            checker.live.clear()
            rst(checker)
        await play.heard(20, stays)
        here[0] = play.daemons[0].url
        await play.back()
        verdict = await play.verdict(within=MUTANT_NET if mutants else NET)
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


FOLLOWS = "nothing_is_handed_over"  # the daemon reads the log, as one does that follows a leader
AT_ONCE = "everybody_asks_at_once"


@pytest.mark.parametrize(("mutants", "asking"), [([], 4), ([FOLLOWS], 4), ([FOLLOWS, AT_ONCE], 10)])
async def test_connected_clients_are_served_while_many_others_wait_for_permission_checks(
    durable: str, results: Results, mutants: list[str], asking: int
) -> None:
    async with stage(durable, channels=1, mutants=mutants) as play:
        stayed = await play.follow(2)
        crowd = await play.follow(times(50, 1000), silence=300)
        looking = await play.oracle.connect()
        holder = await play.oracle.connect()
        await holder.execute("begin; lock table chatgenius.channel_members in access exclusive mode")
        for checker in crowd:
            checker.live.clear()
            rst(checker)
        while await looking.fetchval(WAITING) < asking:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        if AT_ONCE in mutants:
            with pytest.raises(TimeoutError):
                await play.recovered(stayed, within=MUTANT_NET)
        else:
            await play.recovered(stayed)
            assert asking >= await looking.fetchval(WAITING)
        served = time.monotonic() - began
        await holder.execute("rollback")
        await holder.close()
        await looking.close()
        if AT_ONCE in mutants:
            results.caught(
                "22 (rights)", AT_ONCE, f"they receive nothing for {MUTANT_NET:g} s from a daemon that follows"
            )
            return
        await play.back()
        assert CLEAN == await play.verdict()
        assert [1] * len(stayed) == [checker.connections for checker in stayed]
        results.held(
            "22 (rights)",
            f"{len(crowd):,} clients reconnect to a daemon that {'follows' if mutants else 'leads'}, and the "
            "database does not answer the permission checks",
            "RST on all; the table of members is locked until others have been served",
            "only four checks run at once; clients still connected are served meanwhile; all reconnected, 0 lost",
            f"a write and its delivery to those that stayed {served * 1e3:.0f} ms",
            play.n,
        )


def peak_memory(pid: int) -> int:
    """In megabytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024
