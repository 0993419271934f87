"""Rows that are edited, moved, deleted and restored, and what a replay shows of those that are deleted."""

import json
import random
import re
from dataclasses import dataclass, field

from tests.faults.harness import SEED, Scenario, Supervised
from tests.faults.oracle import Oracle
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


async def leaks_of_a_replay(run: Scenario, secrets: Secrets, count: int, supervised: Supervised | None = None) -> int:
    """How many frames with deleted content a client receives that was offline while all of it was written.

    It connects to this process, or else to the only daemon.
    """
    if supervised is None:
        [supervised] = run.daemons
    assert supervised.daemon
    await run.recovered()
    async with supervised.daemon.client(run.oracle.users[0]) as client:
        since = client.welcome["pos"]
    await secrets.write(count)
    await run.recovered()
    async with supervised.daemon.client(run.oracle.users[0], since=since) as client:
        return secrets.leaked(await replayed(client, run.oracle.topics))
