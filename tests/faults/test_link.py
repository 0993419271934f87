"""The connection between a daemon and Postgres is cut, slow, silent, or forgotten by a middlebox."""

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from daemon.postgres.connect import connect
from tests.faults.checker import CLEAN
from tests.faults.harness import (
    MUTANT_TIMEOUT,
    NO_POLL,
    QUICK,
    TIMEOUT,
    Scenario,
    by_form,
    median,
    percentile,
    scenario,
    socket_of,
)
from tests.faults.oracle import Style
from tests.faults.proxy import Proxy
from tests.faults.results import Results
from tests.support.daemon import get

CUT_LISTENER = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where application_name = 'rowcast listener' and datname = current_database()"
)


async def cut_listener(run: Scenario, rounds: int) -> None:
    """Terminate the listener's backend `rounds` times, each time as soon as it has reconnected."""
    for round_ in range(rounds):
        await run.daemons[0].logged("listener_connected", round_ + 1)
        await run.oracle.execute(CUT_LISTENER)
        await run.daemons[0].logged("listener_lost", round_ + 1)


async def test_a_listener_that_is_terminated_again_and_again_misses_nothing(durable: str, results: Results) -> None:
    async with scenario(durable, environment=NO_POLL) as run:
        await run.follow(4)
        run.write(2)
        began = time.monotonic()
        await cut_listener(run, rounds := by_form(8, 200))
        seconds = time.monotonic() - began
        assert CLEAN == await run.verdict()
        connected = run.daemons[0].count("listener_connected")
        assert rounds + 1 >= connected
        results.held(
            "5",
            "the listener's backend is terminated",
            f"`pg_terminate_backend` as soon as it listens, {rounds} times; polling is off",
            "nothing lost; it reconnects after a delay with jitter",
            f"{connected / seconds:.1f} connections a second",
            run.n,
        )


NOTIFY_BURST = "select pg_notify('rowcast', '') from generate_series(1, 20)"


async def missed_writes(run: Scenario, rounds: int) -> int:
    """Write once while the listener is disconnected, `rounds` times; how many of the writes are not delivered."""
    missed = 0
    checker = run.checkers[0]
    for round_ in range(rounds):
        daemon = run.daemons[0]
        lost = daemon.count("listener_lost")
        await run.oracle.execute(CUT_LISTENER)
        await daemon.logged("listener_lost", lost + 1)
        token = await run.oracle.mark(run.oracle.channels[round_ % len(run.oracle.channels)])
        await daemon.logged("listener_connected", lost + 2)
        try:
            async with asyncio.timeout(1 if daemon.mutants else TIMEOUT):
                await checker.received(token)
        except TimeoutError:
            missed += 1
    return missed


@pytest.mark.parametrize("mutants", [[], ["no_catch_up"]])
async def test_writes_without_a_listener_are_found_when_it_reconnects(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, mutants=mutants, environment=NO_POLL) as run:
        await run.follow(1)
        missed = await missed_writes(run, rounds := by_form(4, 100) if not mutants else 3)
        verdict = None if mutants else await run.verdict()
    if mutants:
        assert 0 < missed
        for number in ("5", "6"):
            results.caught(number, "no_catch_up", f"{missed} of {rounds} writes are never delivered")
    else:
        assert (0, CLEAN) == (missed, verdict)


async def test_notifications_that_the_driver_drops_during_listen_are_recovered(
    durable: str, results: Results
) -> None:
    async with scenario(durable, environment=NO_POLL) as run:
        await run.follow(2)
        stop = asyncio.Event()

        async def notify() -> None:
            connection = await connect(durable, application_name="notifier")
            while not stop.is_set():
                await connection.execute(NOTIFY_BURST)
            await connection.close()

        notifying = [run.tasks.create_task(notify()) for _ in range(2)]
        run.write(2)
        await cut_listener(run, rounds := by_form(5, 100))
        stop.set()
        await asyncio.gather(*notifying)
        assert CLEAN == await run.verdict()
        results.held(
            "6",
            "notifications while the listener starts to listen",
            f"two connections do nothing but NOTIFY while the listener reconnects, {rounds} times; polling is off",
            "the read after every LISTEN covers what the driver drops",
            "",
            run.n,
        )


def cut(proxy: Proxy) -> None:
    proxy.reset()


def delay(proxy: Proxy) -> None:
    proxy.up.delay = proxy.down.delay = 0.1


def throttle(proxy: Proxy) -> None:
    proxy.up.rate = proxy.down.rate = 10_000.0


@pytest.mark.parametrize(
    ("fault", "injected"),
    [
        (cut, "RST on all connections"),
        (delay, "100 ms more each way"),
        (throttle, "10 kB/s each way"),
    ],
    ids=["cut", "delay", "throttle"],
)
async def test_a_bad_connection_to_postgres_loses_nothing(
    durable: str, results: Results, fault: Callable[[Proxy], None], injected: str, request: pytest.FixtureRequest
) -> None:
    async with Proxy(socket_of(durable)).serving() as proxy, scenario(durable, through=proxy) as run:
        await run.follow(3)
        served, healed = [], []
        for _ in range(rounds := by_form(2, 25)):
            run.write(2, Style(pause=0.1))
            fault(proxy)
            await run.committed(5)
            await run.stop_writers()
            run.stop.clear()
            served.append(await run.recovered())
            proxy.heal()
            healed.append(await run.recovered())
        assert CLEAN == await run.verdict()
        assert {} == dict(run.oracle.errors)
        results.held(
            f"7 ({request.node.callspec.id})",
            f"daemon to Postgres: {injected}",
            f"by a proxy, {rounds} times",
            "everything is delivered while it lasts; nothing lost; no write failed",
            f"a write in each channel, and everything queued before it, to all clients: p50 {median(served):.2f} s "
            f"meanwhile, {median(healed):.2f} s afterwards; commits p99 {percentile(run.oracle.waits) * 1e3:.0f} ms",
            run.n,
        )


@pytest.mark.parametrize("mutants", [[], ["no_stored_snapshot"]])
async def test_writes_during_a_cut_connection_are_numbered_by_the_next_leader(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with Proxy(socket_of(durable)).serving() as proxy, scenario(durable, through=proxy, mutants=mutants) as run:
        await run.follow(2)
        await run.recovered()
        proxy.hold()  # so that some writes exist that no leader has seen
        run.write(2)
        await run.committed(20)
        cut(proxy)
        await run.stop_writers()
        proxy.heal()
        await run.daemons[0].logged("leader_elected", 2)
        verdict = await run.verdict(within=MUTANT_TIMEOUT if mutants else TIMEOUT)
    if mutants:
        assert 0 < verdict.lost
        results.caught("7 (cut)", mutants[0], verdict)
    else:
        assert CLEAN == verdict


@pytest.mark.parametrize("fault", [delay, throttle], ids=["delay", "throttle"])
async def test_with_too_short_timeouts_nothing_passes_a_bad_connection(
    durable: str, results: Results, fault: Callable[[Proxy], None], request: pytest.FixtureRequest
) -> None:
    async with (
        Proxy(socket_of(durable)).serving() as proxy,
        scenario(durable, through=proxy, mutants=["short_timeouts"]) as run,
    ):
        await run.follow(1)
        run.write(2, Style(pause=0.1))
        fault(proxy)
        await run.committed(20)
        await run.stop_writers()
        with pytest.raises(TimeoutError):
            await run.recovered(within=2 * MUTANT_TIMEOUT)
        proxy.heal()
    results.caught(f"7 ({request.node.callspec.id})", "short_timeouts", "nothing is delivered while it lasts")


@pytest.mark.parametrize("mutants", [[], ["no_beat_limit"]])
async def test_a_connection_that_a_middlebox_forgot_is_detected_by_the_heartbeat(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with (
        Proxy(socket_of(durable)).serving() as proxy,
        scenario(durable, through=proxy, mutants=mutants, environment=NO_POLL) as run,
    ):
        await run.follow(2)
        await run.recovered()
        began = time.monotonic()
        proxy.forget()
        try:
            if mutants:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(MUTANT_TIMEOUT):
                        await run.daemons[0].logged("listener_lost")
                results.caught("7 (forgotten)", "no_beat_limit", "it is not noticed")
                return
            await run.daemons[0].logged("listener_lost")
        finally:
            proxy.reset()  # in the place of kernel keepalives, which the proxy's kernel answers here
        noticed = time.monotonic() - began
        recovery = await run.recovered()
        assert CLEAN == await run.verdict()
        results.held(
            "7 (forgotten)",
            "daemon to Postgres: a middlebox forgets all connections",
            "nothing passes on old connections, and nothing reports their end until kernel keepalives would; new "
            "ones pass",
            "the heartbeat notices, and everything is reconnected",
            f"noticed after {noticed:.1f} s (beat {QUICK['ROWCAST_BEAT_EVERY']} s, limit "
            f"{QUICK['ROWCAST_BEAT_LIMIT']} "
            f"s); served again {recovery:.1f} s after the end",
            run.n,
        )


async def test_a_daemon_with_a_silent_database_stops_on_sigterm(durable: str, results: Results) -> None:
    async with Proxy(socket_of(durable)).serving() as proxy, scenario(durable, through=proxy) as run:
        await run.follow(2)
        daemon = run.daemons[0]
        proxy.hold()
        await run.oracle.mark(run.oracle.channels[0])
        await daemon.logged("listener_lost")
        assert daemon.daemon
        async with asyncio.timeout(TIMEOUT):
            assert 0 == await daemon.daemon.stop(signal.SIGTERM)


async def until_ready(run: Scenario, ready: bool) -> str:
    """Wait until /readyz says that the daemon is ready, or is not; the page."""
    status, page = 0, ""
    while (status == 200) != ready or not status:
        assert run.daemons[0].daemon
        status, page = await get(f"{run.daemons[0].daemon.http}/readyz")
        await asyncio.sleep(0.02)
    return page


@pytest.mark.parametrize("mutants", [[], ["no_beat_limit"]])
async def test_a_silent_connection_to_postgres_is_reported_and_nothing_is_lost(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with (
        Proxy(socket_of(durable)).serving() as proxy,
        scenario(durable, through=proxy, mutants=mutants, environment=NO_POLL) as run,
    ):
        await run.follow(3)
        run.write(2, Style(pause=0.1))
        await run.received(10)
        began = time.monotonic()
        proxy.hold()
        if mutants:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(MUTANT_TIMEOUT):
                    await until_ready(run, ready=False)
            results.caught("8", "no_beat_limit", "/readyz still says ready")
            proxy.heal()
            return
        reasons = await until_ready(run, ready=False)
        noticed = time.monotonic() - began
        for checker in run.checkers:
            while not checker.stale:
                await asyncio.sleep(0.01)
        informed = time.monotonic() - began
        await run.committed(by_form(20, 600))
        assert [1] * 3 == [checker.connections for checker in run.checkers]
        proxy.heal()
        began = time.monotonic()
        await run.recovered()
        healed = time.monotonic() - began
        await until_ready(run, ready=True)
        assert CLEAN == await run.verdict()
        assert "heartbeat" in reasons
        results.held(
            "8",
            "daemon to Postgres: a silent connection",
            "a proxy blocks everything, both ways, and then lets it through",
            "/readyz says 503 and why; clients stay connected and receive `stale`; writes continue; nothing lost",
            f"/readyz after {noticed:.1f} s, every client after {informed:.1f} s; all served "
            f"{healed:.2f} s after it healed",
            run.n,
        )
