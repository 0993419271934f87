"""A replay of many changes takes short steps: what is live goes between them."""

import asyncio
from collections.abc import Collection
from itertools import count

import pytest

from daemon.core.change import Change, Numbers, Position, Seq, Topic
from daemon.core.hub import Hub
from daemon.core.ports import Batch
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.replay import SLICE, Replay
from tests.delivery.test_log_cache import HERE, SERVED, THERE, UnreadableLog, a_change
from tests.delivery.test_replay import Recorder

CHANGES = 10 * SLICE


class Follower:
    """It is live, and counts what is delivered to it."""

    user = "ada"
    numbers = Numbers.JSON
    outlet = None
    delivered = 0

    def deliver(self, frames: bytes) -> None:
        self.delivered += frames.count(b'"seq":')

    def signal(self, frame: bytes) -> None:
        """Does not happen here."""

    def revoked(self, topic: Topic) -> None:
        """Does not happen here."""

    def discontinued(self) -> None:
        """Does not happen here."""


class CountingRecorder(Recorder):
    """It counts the changes that it is sent."""

    changes = 0

    def send(self, payload: bytes) -> None:
        super().send(payload)
        self.changes += payload.count(b'"seq":')


class UnvalidatedCache(LogCache):
    """What it reads has to be validated, as what a database reads."""

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        found = await super().read_topics(topics, after, upto, limit)
        return Batch(found, more=found.more)


@pytest.mark.parametrize("cache_type", [LogCache, UnvalidatedCache], ids=["from memory", "from the database"])
async def test_live_changes_are_delivered_between_the_short_steps_of_a_replay(cache_type: type[LogCache]) -> None:
    hub = Hub(lambda payload: payload + b"\n", SERVED.with_exact_numbers)
    live = Live(hub, SERVED, cache_type(UnreadableLog(), 2**20))
    live.move(Position("e", Seq(0)), "epoch")
    seqs = count(1)

    def publish(*changes: Change) -> None:
        live.publish(SERVED.batch_of(hub.position, changes)[0])

    publish(*(a_change(next(seqs)) for _ in range(CHANGES)))
    follower, recorder, published, steps = Follower(), CountingRecorder(), 0, list[int]()
    hub.follow(THERE, follower)
    replay = Replay(recorder, live.log_cache, hub, SERVED, discontinuity=hub.discontinuity)
    replay.add(HERE, Seq(0))
    replaying = asyncio.create_task(replay.run())
    while not replaying.done():
        before = recorder.changes
        await asyncio.sleep(0)
        steps.append(recorder.changes - before)
        if recorder.changes < CHANGES:
            publish(a_change(next(seqs), THERE))
            published += 1
            assert published == follower.delivered
    assert (CHANGES, SLICE, [HERE]) == (recorder.changes, max(steps), recorder.joined)
    assert published >= CHANGES / SLICE - 1
