"""What has to be forgotten: content of deleted rows, and all that is old. Nobody waits for it."""

import asyncio
import json
import random
import re
from dataclasses import dataclass, field

import pytest

from tests.faults.checker import CLEAN
from tests.faults.harness import NET, SEED, Stage, late, stage, times
from tests.faults.oracle import Oracle, Style
from tests.faults.results import Results
from tests.support.daemon import Client

NOBODY = "nobody may read this"
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
    """Messages, each with all that it ever said; `gone` are those that are deleted now."""

    oracle: Oracle
    said: dict[str, list[str]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    async def happen(self, count: int) -> None:
        """So many messages are written, edited, moved, deleted, some of them restored, and then perhaps deleted."""
        chance = random.Random(SEED)
        sql = await self.oracle.connect()
        for number in range(count):
            content = f"secret {number}.0"
            row = await sql.fetchval(SAY, chance.choice(self.oracle.channels), self.oracle.users[0], content)
            self.said[row] = [content]
            for step in chance.choices(("edit", "move", "delete", "undelete"), k=4):
                content = f"secret {number}.{len(self.said[row])}"
                target = [chance.choice(self.oracle.channels)] if step == "move" else []
                await sql.execute(STEPS[step], row, content, *target)
                self.said[row].append(content)
            if chance.random() < 0.7:
                await sql.execute(STEPS[chance.choice(("delete", "remove"))], row, NOBODY)
                self.gone.add(row)
        self.gone |= {
            row["id"] for row in await sql.fetch("select id from chatgenius.messages where deleted_at is not null")
        }
        await sql.close()

    def leaked(self, frames: list[str]) -> int:
        """Frames that hold something of a message that is gone."""
        gone = {content.split(".")[0] for row in self.gone for content in self.said[row]}
        return sum(NOBODY in frame or not gone.isdisjoint(re.findall(r"secret \d+", frame)) for frame in frames)


async def replayed(client: Client, topics: list[str]) -> list[str]:
    """Everything that is told of these topics up to the head."""
    frames: list[str] = []
    for topic in topics:
        await client.say(op="subscribe", topic=topic)
        resumed = False
        while not resumed:
            frame = await client.next()
            resumed = frame["op"] == "resumed"
            frames.append(json.dumps(frame))
    return frames


async def told_of_the_past(play: Stage, secrets: Secrets, count: int) -> int:
    """How many frames with something deleted a client is told that was away for all of it."""
    [supervised] = play.daemons
    assert supervised.daemon
    await play.recovered()
    async with supervised.daemon.client(play.oracle.users[0]) as client:
        since = client.welcome["pos"]
    await secrets.happen(count)
    await play.recovered()
    async with supervised.daemon.client(play.oracle.users[0], since=since) as client:
        return secrets.leaked(await replayed(client, play.oracle.topics))


@pytest.mark.parametrize("memory", ["0", "32000000"], ids=["from the log", "from memory"])
async def test_replays_never_contain_content_of_deleted_rows(
    durable: str, results: Results, memory: str, request: pytest.FixtureRequest
) -> None:
    async with stage(durable, environment={"ROWCAST_RECENT_BYTES": memory}) as play:
        await play.follow(1)
        secrets = Secrets(play.oracle)
        count = times(100, 2000)
        assert 0 == await told_of_the_past(play, secrets, count)
        assert 0 < len(secrets.gone) < count
    where = request.node.callspec.id
    results.held(
        f"30 ({where})",
        f"rows are edited, moved, soft-deleted, restored, deleted; then a client replays them, {where}",
        "five or six changes of each row, at random",
        "0 frames with content of a deleted row",
        f"{len(secrets.gone)} of {count} rows deleted",
        f"{sum(map(len, secrets.said.values())):,} versions",
    )


@pytest.mark.parametrize(
    ("mutant", "memory", "where"),
    [("no_tombstones", "0", "from the log"), ("memory_keeps_content", "32000000", "from memory")],
)
async def test_without_tombstones_content_of_deleted_rows_is_replayed(
    durable: str, results: Results, mutant: str, memory: str, where: str
) -> None:
    async with stage(durable, mutants=[mutant], environment={"ROWCAST_RECENT_BYTES": memory}) as play:
        await play.follow(1)
        secrets = Secrets(play.oracle)
        leaked = await told_of_the_past(play, secrets, 20)
    assert 0 < leaked
    results.caught(f"30 ({where})", mutant, f"leaked {leaked}")


@pytest.mark.parametrize("mutants", [[], ["plain_detach"]])
async def test_old_segments_are_dropped_despite_an_open_reader_and_no_writer_waits(
    durable: str, results: Results, mutants: list[str]
) -> None:
    async with stage(durable, mutants=["short_retention", *mutants]) as play:
        await play.follow(3)
        # One writer waits for no other writer's rows. In the short form there is more patience, for busy machines.
        play.write(1, Style(pause=0.02, settings={"lock_timeout": f"{times(1000, 100)}ms"}))
        reader = await play.oracle.connect()
        # Reading the log as well would hold up its detaching, which comes first and which no writer needs.
        await reader.execute("begin; select count(*) from rowcast.events")
        looking = await play.oracle.connect()
        detaching = (
            "select count(*) from pg_stat_activity where application_name = 'rowcast retention' "
            "and datname = current_database() and wait_event_type = 'Lock'"
        )
        while not await looking.fetchval(detaching):
            await asyncio.sleep(0.02)
        if mutants:
            async with asyncio.timeout(NET):
                while not play.oracle.errors["55P03"]:
                    await asyncio.sleep(0.02)
            results.caught("19", mutants[0], "writers wait behind the reader, and fail with 55P03")
        else:
            await play.committed(times(100, 5000))
        await reader.execute("commit")
        if not mutants:
            await play.daemons[0].logged("segments_dropped")
            assert CLEAN == await play.verdict()
            assert {} == dict(play.oracle.errors)
            results.held(
                "19",
                "old segments are dropped while they are read",
                "a reader's transaction that has read all events stays open; segments older than 2 s are dropped",
                f"no write waited {times(1000, 100)} ms for a lock; the live stream went on; the segments went when "
                "the reader had ended",
                f"commits p99 {late(play.oracle.waits) * 1e3:.0f} ms, max {max(play.oracle.waits) * 1e3:.0f} ms",
                play.n,
            )
        await reader.close()
        await looking.close()
