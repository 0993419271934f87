"""Data that must go: content of deleted rows, and old segments. No writer waits for their removal."""

import asyncio
import json
import random
import re
from dataclasses import dataclass, field

import pytest

from tests.faults.checker import CLEAN
from tests.faults.harness import SEED, TIMEOUT, Scenario, by_form, percentile, scenario
from tests.faults.oracle import Oracle, Style
from tests.faults.results import Results
from tests.support.daemon import Client

DELETED = "nobody may read this"
SAY = "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, $3) returning id"
STEPS = {
    "edit": "update chatgenius.messages set content = $2 where id = $1",
    "delete": "update chatgenius.messages set deleted_at = now(), content = $2 where id = $1",
    "undelete": "update chatgenius.messages set deleted_at = null, content = $2 where id = $1",
    "move": "update chatgenius.messages set channel_id = $3, content = $2 where id = $1",
    "remove": "delete from chatgenius.messages where id = $1 and $2::text is not null",
}


@dataclass
class Secrets:
    """Messages, each with every content that it ever had; `gone` are those that are deleted now."""

    oracle: Oracle
    contents: dict[str, list[str]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    async def write(self, count: int) -> None:
        """Write `count` messages; edit, move, delete and restore them at random; then delete most of them."""
        chance = random.Random(SEED)
        sql = await self.oracle.connect()
        for number in range(count):
            content = f"secret {number}.0"
            row = await sql.fetchval(SAY, chance.choice(self.oracle.channels), self.oracle.users[0], content)
            self.contents[row] = [content]
            for step in chance.choices(("edit", "move", "delete", "undelete"), k=4):
                content = f"secret {number}.{len(self.contents[row])}"
                target = [chance.choice(self.oracle.channels)] if step == "move" else []
                await sql.execute(STEPS[step], row, content, *target)
                self.contents[row].append(content)
            if chance.random() < 0.7:
                await sql.execute(STEPS[chance.choice(("delete", "remove"))], row, DELETED)
                self.gone.add(row)
        self.gone |= {
            row["id"] for row in await sql.fetch("select id from chatgenius.messages where deleted_at is not null")
        }
        await sql.close()

    def leaked(self, frames: list[str]) -> int:
        """How many of these frames contain content of a deleted message."""
        gone = {content.split(".")[0] for row in self.gone for content in self.contents[row]}
        return sum(DELETED in frame or not gone.isdisjoint(re.findall(r"secret \d+", frame)) for frame in frames)


async def replayed(client: Client, topics: list[str]) -> list[str]:
    """All frames that a client receives when it replays these topics."""
    frames: list[str] = []
    for topic in topics:
        await client.say(op="subscribe", topic=topic)
        resumed = False
        while not resumed:
            frame = await client.next()
            resumed = frame["op"] == "resumed"
            frames.append(json.dumps(frame))
    return frames


async def leaks_of_a_replay(run: Scenario, secrets: Secrets, count: int) -> int:
    """How many frames with deleted content a client receives that was offline while all of it was written."""
    [supervised] = run.daemons
    assert supervised.daemon
    await run.recovered()
    async with supervised.daemon.client(run.oracle.users[0]) as client:
        since = client.welcome["pos"]
    await secrets.write(count)
    await run.recovered()
    async with supervised.daemon.client(run.oracle.users[0], since=since) as client:
        return secrets.leaked(await replayed(client, run.oracle.topics))


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
