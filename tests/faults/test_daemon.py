"""The daemon is killed under its clients: they come back, to it or to another, and have missed nothing."""

import random

import pytest

from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_NET, SEED, late, middle, stage, times
from tests.faults.results import Results


async def test_clients_of_a_killed_daemon_come_back_and_have_lost_nothing(
    durable: str, results: Results
) -> None:
    chance = random.Random(SEED)
    recoveries: list[float] = []
    async with stage(durable) as play:
        clients = times(24, 1000)
        await play.follow(clients)
        play.write(3)
        for _ in range(kills := times(4, 200)):
            await play.heard(chance.randint(1, 60))
            await play.kill()
            await play.daemons[0].start()
            recoveries.append(await play.recovered())
        assert CLEAN == await play.verdict()
        results.held(
            "1",
            "kill -9 of the daemon in mid-fan-out",
            f"SIGKILL after a random number of frames, {kills} times, {clients} clients",
            "0 lost, 0 repeated, 0 out of order",
            f"start to all clients served: p50 {middle(recoveries):.2f} s, p99 {late(recoveries):.2f} s",
            play.n,
        )


@pytest.mark.parametrize(("mutant", "wrong"), [("resume_from_head", "lost"), ("resume_too_early", "duplicate")])
async def test_without_a_true_resume_a_killed_daemon_is_a_loss_or_a_repeat(
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
