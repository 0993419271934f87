"""Data that must go: content of deleted rows, and old segments. No writer waits for their removal."""

import asyncio

import pytest

from tests.faults.checker import CLEAN
from tests.faults.deleted_rows import Secrets, leaks_of_a_replay
from tests.faults.harness import TIMEOUT, by_form, percentile, scenario
from tests.faults.oracle import Style
from tests.faults.results import Results


@pytest.mark.parametrize("memory", ["0", "32000000"], ids=["from the log", "from memory"])
async def test_replays_never_contain_content_of_deleted_rows(
    durable: str, results: Results, memory: str, request: pytest.FixtureRequest
) -> None:
    async with scenario(durable, environment={"ROWCAST_RECENT_BYTES": memory}) as run:
        await run.follow(1)
        secrets = Secrets(run.oracle)
        count = by_form(100, 2000)
        assert 0 == await leaks_of_a_replay(run, secrets, count)
        assert 0 < len(secrets.gone) < count
    where = request.node.callspec.id
    results.held(
        f"30 ({where})",
        f"rows are edited, moved, soft-deleted, restored, deleted; then a client replays them, {where}",
        "five or six changes of each row, at random",
        "0 frames with content of a deleted row",
        f"{len(secrets.gone)} of {count} rows deleted",
        f"{sum(map(len, secrets.contents.values())):,} versions",
    )


@pytest.mark.parametrize(
    ("mutant", "memory", "where"),
    [("no_tombstones", "0", "from the log"), ("memory_keeps_content", "32000000", "from memory")],
)
async def test_without_tombstones_content_of_deleted_rows_is_replayed(
    durable: str, results: Results, mutant: str, memory: str, where: str
) -> None:
    async with scenario(durable, mutants=[mutant], environment={"ROWCAST_RECENT_BYTES": memory}) as run:
        await run.follow(1)
        secrets = Secrets(run.oracle)
        leaked = await leaks_of_a_replay(run, secrets, 20)
    assert 0 < leaked
    results.caught(f"30 ({where})", mutant, f"leaked {leaked}")


@pytest.mark.parametrize("mutants", [[], ["plain_detach"]])
async def test_old_segments_are_dropped_despite_an_open_reader_and_no_writer_waits(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with scenario(durable, mutants=["short_retention", *mutants]) as run:
        await run.follow(3)
        # A single writer never waits for another's rows. The short form allows longer waits, for busy machines.
        run.write(1, Style(pause=0.02, settings={"lock_timeout": f"{by_form(1000, 100)}ms"}))
        reader = await run.oracle.connect()
        # Reading the log too would block its own detach, which comes first and which no writer waits for.
        await reader.execute("begin; select count(*) from rowcast.events")
        observer = await run.oracle.connect()
        detaching = (
            "select count(*) from pg_stat_activity where application_name = 'rowcast retention' "
            "and datname = current_database() and wait_event_type = 'Lock'"
        )
        while not await observer.fetchval(detaching):
            await asyncio.sleep(0.02)
        if mutants:
            async with asyncio.timeout(TIMEOUT):
                while not run.oracle.errors["55P03"]:
                    await asyncio.sleep(0.02)
            results.caught("19", mutants[0], "writers wait behind the reader, and fail with 55P03")
        else:
            await run.committed(by_form(100, 5000))
        await reader.execute("commit")
        if not mutants:
            await run.daemons[0].logged("segments_dropped")
            assert CLEAN == await run.verdict()
            assert {} == dict(run.oracle.errors)
            results.held(
                "19",
                "old segments are dropped while they are read",
                "a reader's transaction that has read all events stays open; segments older than 2 s are dropped",
                f"no write waited {by_form(1000, 100)} ms for a lock; the live stream went on; "
                "the segments went when the reader had ended",
                f"commits p99 {percentile(run.oracle.waits) * 1e3:.0f} ms, max {max(run.oracle.waits) * 1e3:.0f} ms",
                run.n,
            )
        await reader.close()
        await observer.close()
