"""The daemon is killed under its clients: they come back, to it or to another, and have missed nothing."""

import random
import signal

import pytest

from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_NET, NET, SEED, Stage, Supervised, late, middle, stage, times
from tests.faults.oracle import Style
from tests.faults.results import Results


async def test_clients_of_a_killed_daemon_reconnect_and_lose_nothing(durable: str, results: Results) -> None:
    chance = random.Random(SEED)
    recoveries: list[float] = []
    async with stage(durable) as play:
        clients = times(24, 200)
        await play.follow(clients)
        play.write(3, Style(pause=times(0.02, 0.2)))
        for _ in range(kills := times(4, 200)):
            await play.heard(chance.randint(1, 60))
            await play.kill()
            await play.daemons[0].start()
            recoveries.append(await play.recovered())
        assert CLEAN == await play.verdict()
        results.held(
            "1",
            "kill -9 of the daemon during fan-out",
            f"SIGKILL after a random number of frames, {kills} times, {clients} clients",
            "0 lost, 0 repeated, 0 out of order",
            f"start to all clients served: p50 {middle(recoveries):.2f} s, p99 {late(recoveries):.2f} s",
            play.n,
        )


@pytest.mark.parametrize(("mutant", "wrong"), [("resume_from_head", "lost"), ("resume_too_early", "duplicate")])
async def test_without_an_exact_resume_killing_the_daemon_loses_or_repeats_changes(
    durable: str, results: Results, mutant: str, wrong: str
) -> None:
    async with stage(durable, mutants=[mutant]) as play:
        await play.follow(4)
        play.write(3)
        for _ in range(2):
            await play.heard(20)
            await play.kill()
            await play.committed(20)
            await play.daemons[0].start()
            await play.back()
        verdict = await play.verdict(within=MUTANT_NET)
    assert 0 < getattr(verdict, wrong)
    results.caught("1", mutant, verdict)


@pytest.mark.parametrize("victim", ["leader", "follower"])
async def test_clients_of_a_killed_daemon_resume_at_another(durable: str, results: Results, victim: str) -> None:
    async with stage(durable, daemons=2) as play:
        leading = next(number for number in (0, 1) if play.daemons[number].count("leader_elected"))
        dying = leading if victim == "leader" else 1 - leading
        staying = play.daemons[1 - dying]
        alive = [play.daemons[dying]]
        moved = await play.follow(times(8, 50), url=lambda: alive[0].url())  # noqa: PLW0108 - whichever lives then
        others = await play.follow(times(8, 50), url=staying.url)
        play.write(3)
        await play.heard(100)
        await play.kill(dying)
        alive[0] = staying
        recovery = await play.recovered()
        await play.committed(50)
        assert CLEAN == await play.verdict()
        assert [1] * len(others) == [checker.connections for checker in others]
        assert [2] * len(moved) == [checker.connections for checker in moved if checker.resumes]
        results.held(
            f"2 ({victim})",
            f"one of two daemons dies: the {victim}",
            f"SIGKILL, {len(moved)} clients on it and {len(others)} on the other",
            "the other daemon's clients stay connected; the others resume there, with the same epoch and numbers",
            f"from the kill until all are served {recovery:.2f} s; resumed {len(moved)} of {len(moved)}",
            play.n,
        )


@pytest.mark.parametrize(
    ("victim", "mutant"),
    [
        ("leader", None),
        ("follower", None),
        ("leader", "begins_with_what_is_new"),
        ("leader", "resume_from_head"),
        ("follower", "resume_from_head"),
    ],
)
async def test_writes_while_one_of_two_daemons_dies_are_numbered_and_replayed_by_the_other(
    durable: str, results: Results, victim: str, mutant: str | None
) -> None:
    async with stage(durable, daemons=2, mutants=[mutant] if mutant else []) as play:
        leading = next(number for number in (0, 1) if play.daemons[number].count("leader_elected"))
        dying = leading if victim == "leader" else 1 - leading
        alive = [play.daemons[dying]]
        await play.follow(2, url=lambda: alive[0].url())  # noqa: PLW0108 - whichever lives then
        others = await play.follow(2, url=play.daemons[1 - dying].url)
        play.write(3)
        await play.heard(20)
        daemon = play.daemons[dying].daemon
        assert daemon
        daemon.process.send_signal(signal.SIGSTOP)  # so that there is something which it has not seen
        await play.committed(20)
        await play.kill(dying)
        await play.heard(50, others[0])  # which those who are away miss, unless it is replayed
        alive[0] = play.daemons[1 - dying]
        await play.back()
        verdict = await play.verdict(within=MUTANT_NET if mutant else NET)
    if mutant:
        assert 0 < verdict.lost
        results.caught(f"2 ({victim})", mutant, verdict)
    else:
        assert CLEAN == verdict


async def ahead_of_its_new_daemon(play: Stage, moving: list[Supervised]) -> None:
    """A client hears at one daemon what the other has not read yet, and then goes there."""
    [checker] = await play.follow(1, url=lambda: moving[0].url())  # noqa: PLW0108 - wherever it is then
    play.write(2)
    for _ in range(5):
        await play.heard(40, checker)
        moving.reverse()
        assert checker.line is not None
        checker.line.transport.abort()
        await play.heard(1, checker)
        await checker.live.wait()


@pytest.mark.parametrize(
    ("mutants", "clean"), [(["slow_reader"], True), (["slow_reader", "no_wait_for_the_hub"], False)]
)
async def test_a_client_that_is_ahead_of_its_new_daemon_waits_until_it_catches_up(
    durable: str, results: Results, mutants: list[str], clean: bool
) -> None:
    async with stage(durable) as play:
        slow = Supervised(durable, mutants)
        await slow.start()
        await ahead_of_its_new_daemon(play, [play.daemons[0], slow])
        verdict = await play.verdict(within=NET if clean else MUTANT_NET)
        await slow.stop(signal.SIGTERM)
        n = play.n
    assert clean == (verdict == CLEAN)
    if clean:
        results.held(
            "2 (lag)",
            "a client switches from one daemon to another that lags behind",
            "the other reads the log half a second late; five switches",
            "it waits until that daemon has caught up; nothing lost or repeated",
            "",
            n,
        )
    else:
        results.caught("2 (lag)", "no_wait_for_the_hub", verdict)
