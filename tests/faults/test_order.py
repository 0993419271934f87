"""Transactions that commit in any order: each row's versions arrive in theirs, and nobody waits for a long one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from daemon.postgres.connect import connect
from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_NET, Stage, late, middle, stage, times
from tests.faults.oracle import Style
from tests.faults.results import Results

WILD = Style(pause=0.01, linger=0.05, rollback=0.1, savepoint=0.2, prepare=0.1, early_xid=0.3)
WRITERS = 16


async def test_commits_in_any_order_lose_nothing_and_keep_the_order_of_each_row(
    durable: str, results: Results
) -> None:
    async with stage(durable) as play:
        await play.follow(6)
        play.write(WRITERS, WILD)
        await play.committed(times(1000, 20_000))
        assert CLEAN == await play.verdict()
        assert {"40P01"} >= set(play.oracle.errors)
        results.held(
            "15",
            "commits out of order",
            f"{WRITERS} writers; transactions stay open 0 to 50 ms, 10 % roll back, 20 % of statements behind a "
            "savepoint that is rolled back, 10 % in two phases, 30 % take their id before their row locks",
            "0 lost, 0 versions of a row out of order, one order for all clients",
            "",
            play.n,
        )


@pytest.mark.parametrize(
    ("mutant", "wrong"),
    [("naive_cursor", "lost"), ("xmin_watermark", "reordered_row"), ("order_by_time", "reordered_row")],
)
async def test_simpler_cursors_lose_or_reorder_changes(
    durable: str, results: Results, mutant: str, wrong: str
) -> None:
    async with stage(durable, mutants=[mutant], rows=1) as play:
        await play.follow(1)
        # Nobody rings, so that a read finds many transactions: only within one read can time mislead.
        play.write(WRITERS, replace(WILD, settings={"rowcast.ring": "off"}) if mutant == "order_by_time" else WILD)
        await play.committed(600)
        verdict = await play.verdict(within=MUTANT_NET)
    assert 0 < getattr(verdict, wrong)
    results.caught("15", mutant, verdict)


@asynccontextmanager
async def open_transaction(play: Stage, dsn: str, where: str) -> AsyncIterator[None]:
    """A transaction that has written, here or in another database, and does not end while the block lasts."""
    database = dsn if where == "here" else urlsplit(dsn)._replace(path="/postgres").geturl()
    holder = await connect(database, application_name="holder")
    try:
        await holder.execute("begin; select pg_current_xact_id()")
        if where == "here":
            rename = "update chatgenius.channels set description = 'open' where id = $1"
            await holder.execute(rename, play.oracle.channels[0])
        yield
        await holder.execute("commit")
    finally:
        await holder.close()


@pytest.mark.parametrize("where", ["here", "in another database"])
async def test_a_transaction_that_stays_open_delays_no_other_write(
    durable: str, results: Results, where: str
) -> None:
    async with stage(durable) as play:
        await play.follow(3)
        play.write(2)
        before = [await play.recovered() for _ in range(times(10, 300))]
        async with open_transaction(play, durable, where):
            during = [await play.recovered() for _ in range(times(10, 300))]
        assert CLEAN == await play.verdict()
        results.held(
            f"16 ({where})",
            f"a write transaction that stays open, {where}",
            "it holds a transaction id (and, in this database, a row lock) while others write",
            "every write of others is delivered while it is open",
            f"a write and its delivery, measured three times: p50 {middle(before) * 1e3:.0f} ms before, "
            f"{middle(during) * 1e3:.0f} ms during; p99 {late(before) * 1e3:.0f} ms and {late(during) * 1e3:.0f} ms",
            play.n,
        )


@pytest.mark.parametrize("where", ["here", "in another database"])
async def test_with_a_watermark_an_open_transaction_blocks_all_delivery(
    durable: str, results: Results, where: str
) -> None:
    async with stage(durable, mutants=["xmin_watermark"]) as play:
        await play.follow(1)
        await play.recovered()
        async with open_transaction(play, durable, where):
            with pytest.raises(TimeoutError):
                await play.recovered(within=MUTANT_NET)
    results.caught(f"16 ({where})", "xmin_watermark", "nothing is delivered while it is open")
