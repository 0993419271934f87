"""Transactions that commit in any order: each row's versions arrive in order, and an open one delays no other."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from daemon.postgres.connect import connect
from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_TIMEOUT, Scenario, by_form, median, percentile, scenario
from tests.faults.oracle import Style
from tests.faults.results import Results

WILD = Style(pause=0.01, linger=0.05, rollback=0.1, savepoint=0.2, prepare=0.1, early_xid=0.3)
WRITERS = 16


async def test_commits_in_any_order_lose_nothing_and_keep_the_order_of_each_row(
    durable: str, results: Results
) -> None:
    async with scenario(durable) as run:
        await run.follow(6)
        run.write(WRITERS, WILD)
        await run.committed(by_form(1000, 20_000))
        assert CLEAN == await run.verdict()
        assert {"40P01"} >= set(run.oracle.errors)
        results.held(
            "15",
            "commits out of order",
            f"{WRITERS} writers; transactions stay open 0 to 50 ms, 10 % roll back, 20 % of statements behind a "
            "savepoint that is rolled back, 10 % in two phases, 30 % take their id before their row locks",
            "0 lost, 0 versions of a row out of order, one order for all clients",
            "",
            run.n,
        )


@pytest.mark.parametrize(
    ("mutant", "wrong"),
    [("naive_cursor", "lost"), ("xmin_watermark", "reordered_row"), ("order_by_time", "reordered_row")],
)
async def test_simpler_cursors_lose_or_reorder_changes(
    durable: str, results: Results, mutant: str, wrong: str
) -> None:
    async with scenario(durable, mutants=[mutant], rows=1) as run:
        await run.follow(1)
        # Without notifications a poll finds many transactions: times can mislead only within one poll.
        run.write(WRITERS, replace(WILD, settings={"rowcast.ring": "off"}) if mutant == "order_by_time" else WILD)
        await run.committed(600)
        verdict = await run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < getattr(verdict, wrong)
    results.caught("15", mutant, verdict)


@asynccontextmanager
async def open_transaction(run: Scenario, dsn: str, where: str) -> AsyncIterator[None]:
    """A transaction that has written, here or in another database, and stays open while the block lasts."""
    database = dsn if where == "here" else urlsplit(dsn)._replace(path="/postgres").geturl()
    holder = await connect(database, application_name="holder")
    try:
        await holder.execute("begin; select pg_current_xact_id()")
        if where == "here":
            rename = "update chatgenius.channels set description = 'open' where id = $1"
            await holder.execute(rename, run.oracle.channels[0])
        yield
        await holder.execute("commit")
    finally:
        await holder.close()


@pytest.mark.parametrize("where", ["here", "in another database"])
async def test_a_transaction_that_stays_open_delays_no_other_write(
    durable: str, results: Results, where: str
) -> None:
    async with scenario(durable) as run:
        await run.follow(3)
        run.write(2)
        before = [await run.recovered() for _ in range(by_form(10, 300))]
        async with open_transaction(run, durable, where):
            during = [await run.recovered() for _ in range(by_form(10, 300))]
        assert CLEAN == await run.verdict()
        results.held(
            f"16 ({where})",
            f"a write transaction that stays open, {where}",
            "it holds a transaction id (and, in this database, a row lock) while others write",
            "every write of others is delivered while it is open",
            f"a write and its delivery, measured three times: p50 {median(before) * 1e3:.0f} ms before, "
            f"{median(during) * 1e3:.0f} ms during; p99 {percentile(before) * 1e3:.0f} ms and "
            f"{percentile(during) * 1e3:.0f} ms",
            run.n,
        )


@pytest.mark.parametrize("where", ["here", "in another database"])
async def test_with_a_watermark_an_open_transaction_blocks_all_delivery(
    durable: str, results: Results, where: str
) -> None:
    async with scenario(durable, mutants=["xmin_watermark"]) as run:
        await run.follow(1)
        await run.recovered()
        async with open_transaction(run, durable, where):
            with pytest.raises(TimeoutError):
                await run.recovered(within=MUTANT_TIMEOUT)
    results.caught(f"16 ({where})", "xmin_watermark", "nothing is delivered while it is open")
