"""The way between a daemon and Postgres is cut, slow, silent, or forgotten by a box in the middle."""

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from daemon.postgres.connect import connect
from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_NET, NET, NO_POLL, QUICK, Stage, late, middle, socket_of, stage, times
from tests.faults.oracle import Style
from tests.faults.proxy import Proxy
from tests.faults.results import Results
from tests.support.daemon import get

CUT_LISTENER = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where application_name = 'rowcast listener' and datname = current_database()"
)


async def cut_listener(play: Stage, rounds: int) -> None:
    """End the listening backend again and again, each time as soon as it is back."""
    for round_ in range(rounds):
        await play.daemons[0].logged("listener_connected", round_ + 1)
        await play.oracle.execute(CUT_LISTENER)
        await play.daemons[0].logged("listener_lost", round_ + 1)


async def test_a_listener_that_is_terminated_again_and_again_misses_nothing(durable: str, results: Results) -> None:
    async with stage(durable, environment=NO_POLL) as play:
        await play.follow(4)
        play.write(2)
        began = time.monotonic()
        await cut_listener(play, rounds := times(8, 200))
        seconds = time.monotonic() - began
        assert CLEAN == await play.verdict()
        connected = play.daemons[0].count("listener_connected")
        assert rounds + 1 >= connected
        results.held(
            "5",
            "the listener's backend is terminated",
            f"`pg_terminate_backend` as soon as it listens, {rounds} times; polling is off",
            "nothing lost; it reconnects after a delay with jitter",
            f"{connected / seconds:.1f} connections a second",
            play.n,
        )


RINGS = "select pg_notify('rowcast', '') from generate_series(1, 20)"


async def missed_rings(play: Stage, rounds: int) -> int:
    """Write once while the listener is away, and count how often nobody has told of it."""
    missed = 0
    checker = play.checkers[0]
    for round_ in range(rounds):
        daemon = play.daemons[0]
        lost = daemon.count("listener_lost")
        await play.oracle.execute(CUT_LISTENER)
        await daemon.logged("listener_lost", lost + 1)
        token = await play.oracle.mark(play.oracle.channels[round_ % len(play.oracle.channels)])
        await daemon.logged("listener_connected", lost + 2)
        try:
            async with asyncio.timeout(1 if daemon.mutants else NET):
                await checker.has(token)
        except TimeoutError:
            missed += 1
    return missed


@pytest.mark.parametrize("mutants", [[], ["no_catch_up"]])
async def test_writes_without_a_listener_are_found_when_it_reconnects(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, mutants=mutants, environment=NO_POLL) as play:
        await play.follow(1)
        missed = await missed_rings(play, rounds := times(4, 100) if not mutants else 3)
        verdict = None if mutants else await play.verdict()
    if mutants:
        assert 0 < missed
        for number in ("5", "6"):
            results.caught(number, "no_catch_up", f"{missed} of {rounds} writes are never delivered")
    else:
        assert (0, CLEAN) == (missed, verdict)


async def test_notifications_that_the_driver_drops_during_listen_are_recovered(
    durable: str, results: Results
) -> None:
    async with stage(durable, environment=NO_POLL) as play:
        await play.follow(2)
        hammer = asyncio.Event()

        async def ring() -> None:
            connection = await connect(durable, application_name="hammer")
            while not hammer.is_set():
                await connection.execute(RINGS)
            await connection.close()

        ringing = [play.tasks.create_task(ring()) for _ in range(2)]
        play.write(2)
        await cut_listener(play, rounds := times(5, 100))
        hammer.set()
        await asyncio.gather(*ringing)
        assert CLEAN == await play.verdict()
        results.held(
            "6",
            "notifications while the listener starts to listen",
            f"two connections do nothing but NOTIFY while the listener reconnects, {rounds} times; polling is off",
            "the read after every LISTEN covers what the driver drops",
            "",
            play.n,
        )


def cut(proxy: Proxy) -> None:
    proxy.reset()


def late_by_a_tenth(proxy: Proxy) -> None:
    proxy.up.delay = proxy.down.delay = 0.1


def ten_kilobytes(proxy: Proxy) -> None:
    proxy.up.rate = proxy.down.rate = 10_000.0


@pytest.mark.parametrize(
    ("fault", "injected"),
    [
        (cut, "RST on all connections"),
        (late_by_a_tenth, "100 ms more each way"),
        (ten_kilobytes, "10 kB/s each way"),
    ],
    ids=["cut", "delay", "throttle"],
)
async def test_a_bad_connection_to_postgres_loses_nothing(
    durable: str, results: Results, fault: Callable[[Proxy], None], injected: str, request: pytest.FixtureRequest
) -> None:
    async with Proxy(socket_of(durable)).serving() as proxy, stage(durable, through=proxy) as play:
        await play.follow(3)
        served, healed = [], []
        for _ in range(rounds := times(2, 25)):
            play.write(2, Style(pause=0.1))
            fault(proxy)
            await play.committed(5)
            await play.quiet()
            play.stop.clear()
            served.append(await play.recovered())
            proxy.heal()
            healed.append(await play.recovered())
        assert CLEAN == await play.verdict()
        assert {} == dict(play.oracle.errors)
        results.held(
            f"7 ({request.node.callspec.id})",
            f"daemon to Postgres: {injected}",
            f"by a proxy, {rounds} times",
            "everything is delivered while it lasts; nothing lost; no write failed",
            f"a write in each channel, and everything queued before it, to all clients: p50 {middle(served):.2f} s "
            f"meanwhile, {middle(healed):.2f} s afterwards; commits p99 {late(play.oracle.waits) * 1e3:.0f} ms",
            play.n,
        )


@pytest.mark.parametrize("mutants", [[], ["begins_with_what_is_new"]])
async def test_writes_during_a_cut_connection_are_numbered_by_the_next_leader(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with Proxy(socket_of(durable)).serving() as proxy, stage(durable, through=proxy, mutants=mutants) as play:
        await play.follow(2)
        await play.recovered()
        proxy.hold()  # so that there is something which no leader has seen
        play.write(2)
        await play.committed(20)
        cut(proxy)
        await play.quiet()
        proxy.heal()
        await play.daemons[0].logged("leader_elected", 2)
        verdict = await play.verdict(within=MUTANT_NET if mutants else NET)
    if mutants:
        assert 0 < verdict.lost
        results.caught("7 (cut)", mutants[0], verdict)
    else:
        assert CLEAN == verdict


@pytest.mark.parametrize("fault", [late_by_a_tenth, ten_kilobytes], ids=["delay", "throttle"])
async def test_with_too_short_timeouts_nothing_passes_a_bad_connection(
    durable: str, results: Results, fault: Callable[[Proxy], None], request: pytest.FixtureRequest
) -> None:
    async with (
        Proxy(socket_of(durable)).serving() as proxy,
        stage(durable, through=proxy, mutants=["no_patience"]) as play,
    ):
        await play.follow(1)
        play.write(2, Style(pause=0.1))
        fault(proxy)
        await play.committed(20)
        await play.quiet()
        with pytest.raises(TimeoutError):
            await play.recovered(within=2 * MUTANT_NET)
        proxy.heal()
    results.caught(f"7 ({request.node.callspec.id})", "no_patience", "nothing is delivered while it lasts")


@pytest.mark.parametrize("mutants", [[], ["no_beat_limit"]])
async def test_a_connection_that_a_middlebox_forgot_is_detected_by_the_heartbeat(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with (
        Proxy(socket_of(durable)).serving() as proxy,
        stage(durable, through=proxy, mutants=mutants, environment=NO_POLL) as play,
    ):
        await play.follow(2)
        await play.recovered()
        began = time.monotonic()
        proxy.forget()
        try:
            if mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_NET):
                        await play.daemons[0].logged("listener_lost")
                results.caught("7 (forgotten)", "no_beat_limit", "nobody notices")
                return
            await play.daemons[0].logged("listener_lost")
        finally:
            proxy.reset()  # as the keepalives of both kernels do, which here are answered by the proxy's
        noticed = time.monotonic() - began
        recovery = await play.recovered()
        assert CLEAN == await play.verdict()
        results.held(
            "7 (forgotten)",
            "daemon to Postgres: a middlebox forgets all connections",
            "nothing passes on old connections, and nothing reports their end until kernel keepalives would; new "
            "ones pass",
            "the heartbeat notices, and everything is reconnected",
            f"noticed after {noticed:.1f} s (beat {QUICK['ROWCAST_BEAT_EVERY']} s, limit "
            f"{QUICK['ROWCAST_BEAT_LIMIT']} "
            f"s); served again {recovery:.1f} s after the end",
            play.n,
        )


async def test_a_daemon_with_a_silent_database_stops_on_sigterm(durable: str, results: Results) -> None:
    async with Proxy(socket_of(durable)).serving() as proxy, stage(durable, through=proxy) as play:
        await play.follow(2)
        daemon = play.daemons[0]
        proxy.hold()
        await play.oracle.mark(play.oracle.channels[0])
        await daemon.logged("listener_lost")
        assert daemon.daemon
        async with asyncio.timeout(NET):
            assert 0 == await daemon.daemon.stop(signal.SIGTERM)


async def until_ready(play: Stage, ready: bool) -> str:
    """Wait until /readyz says so; what it says."""
    status, page = 0, ""
    while (status == 200) != ready or not status:
        assert play.daemons[0].daemon
        status, page = await get(f"{play.daemons[0].daemon.http}/readyz")
        await asyncio.sleep(0.02)
    return page


@pytest.mark.parametrize("mutants", [[], ["no_beat_limit"]])
async def test_a_silent_connection_to_postgres_is_reported_and_nothing_is_lost(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with (
        Proxy(socket_of(durable)).serving() as proxy,
        stage(durable, through=proxy, mutants=mutants, environment=NO_POLL) as play,
    ):
        await play.follow(3)
        play.write(2, Style(pause=0.1))
        await play.heard(10)
        began = time.monotonic()
        proxy.hold()
        if mutants:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(MUTANT_NET):
                    await until_ready(play, ready=False)
            results.caught("8", "no_beat_limit", "/readyz still says ready")
            proxy.heal()
            return
        reasons = await until_ready(play, ready=False)
        noticed = time.monotonic() - began
        for checker in play.checkers:
            while not checker.stale:
                await asyncio.sleep(0.01)
        told = time.monotonic() - began
        await play.committed(times(20, 600))
        assert [1] * 3 == [checker.connections for checker in play.checkers]
        proxy.heal()
        began = time.monotonic()
        await play.recovered()
        healed = time.monotonic() - began
        await until_ready(play, ready=True)
        assert CLEAN == await play.verdict()
        assert "heartbeat" in reasons
        results.held(
            "8",
            "daemon to Postgres: a silent connection",
            "a proxy blocks everything, both ways, and then lets it through",
            "/readyz says 503 and why; clients stay connected and receive `stale`; writes continue; nothing lost",
            f"/readyz after {noticed:.1f} s, every client after {told:.1f} s; all served "
            f"{healed:.2f} s after it healed",
            play.n,
        )
