"""The daemon is killed under its clients: they resume, at it or at another, and miss nothing."""

import random
import signal

import pytest

from tests.faults.checker import CLEAN
from tests.faults.harness import (
    MUTANT_TIMEOUT,
    SEED,
    TIMEOUT,
    Scenario,
    Supervised,
    by_form,
    median,
    percentile,
    scenario,
)
from tests.faults.oracle import Style
from tests.faults.results import Results


async def test_clients_of_a_killed_daemon_reconnect_and_lose_nothing(durable: str, results: Results) -> None:
    chance = random.Random(SEED)
    recoveries: list[float] = []
    async with scenario(durable) as run:
        clients = by_form(24, 200)
        await run.follow(clients)
        run.write(3, Style(pause=by_form(0.02, 0.2)))
        for _ in range(kills := by_form(4, 200)):
            await run.received(chance.randint(1, 60))
            await run.kill()
            await run.daemons[0].start()
            recoveries.append(await run.recovered())
        assert CLEAN == await run.verdict()
        results.held(
            "1",
            "kill -9 of the daemon during fan-out",
            f"SIGKILL after a random number of frames, {kills} times, {clients} clients",
            "0 lost, 0 repeated, 0 out of order",
            f"start to all clients served: p50 {median(recoveries):.2f} s, p99 {percentile(recoveries):.2f} s",
            run.n,
        )


@pytest.mark.parametrize(("mutant", "wrong"), [("resume_from_head", "lost"), ("resume_too_early", "duplicate")])
async def test_without_an_exact_resume_killing_the_daemon_loses_or_repeats_changes(
    durable: str, results: Results, mutant: str, wrong: str
) -> None:
    async with scenario(durable, mutants=[mutant]) as run:
        await run.follow(4)
        run.write(3)
        for _ in range(2):
            await run.received(20)
            await run.kill()
            await run.committed(20)
            await run.daemons[0].start()
            await run.reconnected()
        verdict = await run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < getattr(verdict, wrong)
    results.caught("1", mutant, verdict)


@pytest.mark.parametrize("victim", ["leader", "follower"])
async def test_clients_of_a_killed_daemon_resume_at_another(durable: str, results: Results, victim: str) -> None:
    async with scenario(durable, daemons=2) as run:
        leading = next(number for number in (0, 1) if run.daemons[number].count("leader_elected"))
        dying = leading if victim == "leader" else 1 - leading
        staying = run.daemons[1 - dying]
        alive = [run.daemons[dying]]
        moved = await run.follow(by_form(8, 50), url=lambda: alive[0].url())  # noqa: PLW0108 - looked up at each call
        others = await run.follow(by_form(8, 50), url=staying.url)
        run.write(3)
        await run.received(100)
        await run.kill(dying)
        alive[0] = staying
        recovery = await run.recovered()
        await run.committed(50)
        assert CLEAN == await run.verdict()
        assert [1] * len(others) == [checker.connections for checker in others]
        assert [2] * len(moved) == [checker.connections for checker in moved if checker.resumes]
        results.held(
            f"2 ({victim})",
            f"one of two daemons dies: the {victim}",
            f"SIGKILL, {len(moved)} clients on it and {len(others)} on the other",
            "the other daemon's clients stay connected; the others resume there, with the same epoch and numbers",
            f"from the kill until all are served {recovery:.2f} s; resumed {len(moved)} of {len(moved)}",
            run.n,
        )


@pytest.mark.parametrize(
    ("victim", "mutant"),
    [
        ("leader", None),
        ("follower", None),
        ("leader", "no_stored_snapshot"),
        ("leader", "resume_from_head"),
        ("follower", "resume_from_head"),
    ],
)
async def test_writes_while_one_of_two_daemons_dies_are_numbered_and_replayed_by_the_other(
    durable: str, results: Results, victim: str, mutant: str | None
) -> None:
    async with scenario(durable, daemons=2, mutants=[mutant] if mutant else []) as run:
        leading = next(number for number in (0, 1) if run.daemons[number].count("leader_elected"))
        dying = leading if victim == "leader" else 1 - leading
        alive = [run.daemons[dying]]
        await run.follow(2, url=lambda: alive[0].url())  # noqa: PLW0108 - looked up at each call
        others = await run.follow(2, url=run.daemons[1 - dying].url)
        run.write(3)
        await run.received(20)
        daemon = run.daemons[dying].daemon
        assert daemon
        daemon.process.send_signal(signal.SIGSTOP)  # so that some writes exist that it has not read
        await run.committed(20)
        await run.kill(dying)
        await run.received(50, others[0])  # the disconnected clients miss these unless they are replayed
        alive[0] = run.daemons[1 - dying]
        await run.reconnected()
        verdict = await run.verdict(within=MUTANT_TIMEOUT if mutant else TIMEOUT)
    if mutant:
        assert 0 < verdict.lost
        results.caught(f"2 ({victim})", mutant, verdict)
    else:
        assert CLEAN == verdict


async def ahead_of_its_new_daemon(run: Scenario, moving: list[Supervised]) -> None:
    """A client receives from one daemon what the other has not read yet, and then connects to the other."""
    [checker] = await run.follow(1, url=lambda: moving[0].url())  # noqa: PLW0108 - looked up at each call
    run.write(2)
    for _ in range(5):
        await run.received(40, checker)
        moving.reverse()
        assert checker.connection is not None
        checker.connection.transport.abort()
        await run.received(1, checker)
        await checker.live.wait()


@pytest.mark.parametrize(
    ("mutants", "clean"), [(["slow_reader"], True), (["slow_reader", "no_wait_for_catch_up"], False)]
)
async def test_a_client_that_is_ahead_of_its_new_daemon_waits_until_it_catches_up(
    durable: str, results: Results, mutants: list[str], clean: bool
) -> None:
    async with scenario(durable) as run:
        slow = Supervised(durable, mutants)
        await slow.start()
        await ahead_of_its_new_daemon(run, [run.daemons[0], slow])
        verdict = await run.verdict(within=TIMEOUT if clean else MUTANT_TIMEOUT)
        await slow.stop(signal.SIGTERM)
        n = run.n
    assert clean == (verdict == CLEAN)
    if clean:
        results.held(
            "2 (lag)",
            "a client switches from one daemon to another that lags behind",
            "the other reads the log a second late; five switches",
            "it waits until that daemon has caught up; nothing lost or repeated",
            "",
            n,
        )
    else:
        results.caught("2 (lag)", "no_wait_for_catch_up", verdict)
