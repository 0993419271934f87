"""Postgres dies, forgets, or is followed by a standby, under clients: what they were told is true, or taken back."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator

import pytest

from tests.faults.checker import CLEAN, Reset, Told, Verdict
from tests.faults.harness import MUTANT_NET, SEED, Server, Stage, late, middle, own_server, stage, times
from tests.faults.oracle import Style
from tests.faults.results import Results

FORGETFUL = Style(pause=0.005, settings={"synchronous_commit": "off"})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with own_server() as server:
        yield server


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT], ids=["kill -9", "immediate"])
async def test_what_committed_is_delivered_although_postgres_is_killed(
    server: Server, results: Results, how: signal.Signals
) -> None:
    chance = random.Random(SEED)
    recoveries: list[float] = []
    async with stage(server) as play:
        await play.follow(times(8, 100))
        play.write(3)
        for _ in range(kills := times(3, 100)):
            await play.heard(chance.randint(10, 100))
            began = time.monotonic()
            await server.crash(how)
            await server.embedded.start()
            await play.recovered()
            recoveries.append(time.monotonic() - began)
        verdict = await play.verdict(resets={"crash"})
        truth = await play.oracle.truth()
    assert CLEAN == verdict
    assert set() == play.oracle.acknowledged - truth.keys()
    resets = sum(isinstance(event, Reset) for checker in play.checkers for event in checker.history)
    name = "kill -9" if how == signal.SIGKILL else "SIGQUIT (`-m immediate`)"
    results.held(
        f"3 ({how.name})",
        f"{name} of Postgres",
        f"{kills} times after a random number of frames; writers commit synchronously, the order asynchronously",
        f"committed = delivered; {resets} resets, all `crash`; no number used twice",
        f"from the kill until all are served: p50 {middle(recoveries):.2f} s, max {max(recoveries):.2f} s",
        play.n,
    )


async def forgotten(server: Server, play: Stage, rounds: int) -> None:
    """Crashes that take back what the last moments committed asynchronously; clients were told of it."""
    for _ in range(rounds):
        play.write(2, FORGETFUL)
        await play.heard(20)
        await server.suspend("walwriter")
        await play.heard(60)
        await server.crash()
        await server.embedded.start()
        await play.recovered()
    await play.recovered()


def taken_back(play: Stage, truth: dict[str, object]) -> int:
    return sum(
        isinstance(event, Told) and event.token not in truth for checker in play.checkers for event in checker.history
    )


async def test_what_a_crash_takes_back_is_followed_by_a_reset_that_every_client_sees(
    server: Server, results: Results
) -> None:
    async with stage(server) as play:
        await play.follow(4)
        await forgotten(server, play, rounds := times(2, 50))
        verdict = await play.verdict(resets={"crash"})
        gone = taken_back(play, dict(await play.oracle.truth()))
    assert CLEAN == verdict
    assert 0 < gone
    results.held(
        "4 (async)",
        "kill -9 of Postgres, writers with `synchronous_commit = off`",
        f"the WAL writer is stopped before the crash, {rounds} times",
        "whoever was told what did not survive got `reset` with `crash` behind it; no number named two changes",
        f"{gone} changes told and taken back",
        play.n,
    )


@pytest.mark.parametrize(
    ("mutant", "far"), [("no_continuity", True), ("terms without a jump", False)]
)
async def test_without_terms_a_crash_leaves_clients_with_what_never_was(
    server: Server, results: Results, mutant: str, far: bool
) -> None:
    if not far:
        await server.weaken("rowcast.open_term", "10000000", "0")
    async with stage(server, mutants=[mutant] if far else []) as play:
        await play.follow(2)
        play.write(2, FORGETFUL)
        await play.heard(20)
        await server.suspend("walwriter")
        await play.heard(60)
        await server.crash()
        await server.embedded.start()
        await play.committed(100)
        verdict = await play.verdict(resets={"crash"}, within=MUTANT_NET)
    assert 0 < verdict.phantom
    results.caught("4 (async)", mutant, verdict)


async def test_with_synchronous_order_nothing_told_is_taken_back_whoever_wrote_it(
    server: Server, results: Results
) -> None:
    async with stage(server, environment={"ROWCAST_ORDER_COMMIT": "sync"}) as play:
        await play.follow(4)
        await forgotten(server, play, rounds := times(2, 50))
        verdict = await play.verdict()
        gone = taken_back(play, dict(await play.oracle.truth()))
    assert (CLEAN, 0) == (verdict, gone)
    results.held(
        "4 (sync)",
        "the same with `ROWCAST_ORDER_COMMIT=sync`",
        f"likewise, {rounds} times",
        "neither a phantom nor a reset",
        "",
        play.n,
    )
    results.caught("4 (sync)", "ROWCAST_ORDER_COMMIT=async", "row 4 (async): the clients are reset")
