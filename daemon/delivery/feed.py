"""The feed: what a gateway, which has no database, publishes of the log, as members tell it."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from daemon import metrics
from daemon.core.batch import Beat, Contents, LogBatch, hash_of
from daemon.core.change import Change, Position, Seq
from daemon.core.epochs import LISTEN, Epochs
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.ports import BatchReader
from daemon.delivery.contents import AtHand, Interest
from daemon.delivery.live import Live
from daemon.health import Progress
from daemon.logs import get_logger

log = get_logger()

MAX_QUEUED: Final = 1000  # batches that wait for an earlier one; beyond that, members are asked for all of them
GRACE: Final = 0.05  # seconds for a batch to arrive after a beat from behind it: they come from different members
PAUSE: Final = 0.2  # seconds until members are asked again after they could not tell what is missing
MAX_SILENCE: Final = 2.5  # seconds without a batch or a beat after which members are asked
MAX_ASKED: Final = 2**20  # bytes of contents that are asked for at once, unless the first one has more
MAX_HASHES: Final = 2000  # contents in one question
MAX_AGE: Final = 9.0  # seconds without proof that nothing is missing after which this gateway is not ready


class Feed:
    """Keeps the live end of a gateway at the head of the log.

    Batches and beats may be lost, repeated, late and out of order: only their numbers decide. A batch is published
    if it continues from the hub's position, and waits otherwise, while members are asked for what lies in between.
    The position never passes anything that nobody has shown to be all there is. `refresh` is called first where other
    tables are served from there on. What comes of another epoch than that of `epochs` does not count.

    A batch may come without its contents, which travel by topic. It is published once those are at hand that
    `interest` wants at that moment. What is missing is asked for, and after the answer the feed looks again: more may
    be wanted by then.
    """

    def __init__(
        self,
        reader: BatchReader,
        live: Live,
        refresh: Callable[[], Awaitable[None]],
        interest: Interest,
        epochs: Epochs,
    ) -> None:
        self.started = asyncio.Event()
        self.readable = asyncio.Event()  # set unless the last attempt to ask a member failed
        self.contract = ""  # of the members
        self.epochs = epochs
        self._reader = reader
        self._live = live
        self._refresh = refresh
        self._interest = interest
        self._at_hand = AtHand()
        self._queue: deque[LogBatch] = deque()
        self._wakeup = asyncio.Event()
        self._is_behind = True  # whether something may be missing that no batch in the queue shows
        self._is_outdated = True  # whether the router has to be refreshed
        self._proven_at = float("-inf")  # when it was last known that nothing follows the position
        self._received_at = float("-inf")
        self._asking = Progress()

    @property
    def age(self) -> float:
        """Seconds since everything that was in the log had been published; infinite before the first time."""
        return time.monotonic() - self._proven_at

    @property
    def failure(self) -> str:
        """Why the last attempt to ask a member failed; empty if it did not."""
        return self._asking.failure

    def problems(self) -> list[str]:
        """Why this gateway is not ready, as far as the feed knows."""
        if self.age <= MAX_AGE:
            return []
        return [f"no member tells what is in the log ({self.failure or 'nothing arrives from members'})"]

    def receive(self, batch: LogBatch | None) -> None:
        """A batch has arrived; None for one whose contents have to be asked for."""
        if batch is not None and not self.epochs.follows(batch.epoch):
            return
        self._received_at = time.monotonic()
        position = self._live.position
        if batch is None:
            self._ask_soon()
            return
        if batch.epoch == position.epoch and batch.upto <= position.seq:
            return
        self._interest.record(batch)
        if not self._queue and self._fits(batch):
            self._publish(batch)
            self._proven_at = time.monotonic()
        else:
            if len(self._queue) >= MAX_QUEUED:
                self._queue.clear()
                self._is_behind = True
            self._queue.append(batch)
            self._wakeup.set()

    def receive_contents(self, contents: Contents) -> None:
        """Contents have arrived that travel by topic, usually before their batch."""
        position = self._live.position
        is_old = contents.epoch == position.epoch and contents.upto <= position.seq
        if is_old or not self.epochs.follows(contents.epoch):
            return
        if self._at_hand.arrive(contents) and self._queue:
            self._wakeup.set()

    def record_beat(self, beat: Beat) -> None:
        """A beat has arrived."""
        now = time.monotonic()
        self.epochs.record(beat, now)
        if not beat.has_tx:  # also of a member that is not followed yet: clients may get its changes first
            self._live.hub.has_tx = False
        if not self.epochs.follows(beat.epoch):
            asyncio.get_running_loop().call_later(LISTEN + GRACE, self._choose)
            return
        self._received_at = now
        if beat.contract != self.contract:
            self.contract, self._is_outdated = beat.contract, True
            self._wakeup.set()
        position = self._live.position
        if beat.epoch == position.epoch and beat.floor > self._live.floor:
            self._live.forget(beat.floor)
        if (beat.epoch, beat.seq) == position:
            self._proven_at = max(self._proven_at, now - beat.age)
        elif beat.epoch != position.epoch or beat.seq > position.seq:
            asyncio.get_running_loop().call_later(GRACE, self._expect, Position(beat.epoch, beat.seq))

    async def run(self) -> None:
        """Move the hub along the log until cancelled."""
        pause = PAUSE
        await self._wakeup.wait()  # for the first beat: before it, there is nobody to ask
        while True:
            self._wakeup.clear()
            if time.monotonic() - self._received_at > MAX_SILENCE or self.age > MAX_SILENCE:
                self._is_behind = True  # also if all beats are from before the position: it may have been taken back
            try:
                await self._catch_up()
                self._asking.end()
                self.readable.set()
                pause = PAUSE if self._queue else MAX_SILENCE
            except LogUnavailable as error:
                self._is_behind, pause = True, PAUSE
                if self._asking.fail(error.reason):
                    log.warning("log_unavailable", reason=error.reason)
                self.readable.clear()
            # Not wait_for: in Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wakeup.wait()

    async def _catch_up(self) -> None:
        """Publish what is known to come next, until nothing is or nobody can tell. Raises LogUnavailable."""
        if not self.started.is_set():
            self._move(await self._head(), "epoch")  # nobody follows yet
            await self._refresh_router()
            self._proven_at = time.monotonic()
            self.started.set()
        elif self._is_outdated:
            await self._refresh_router()
        while True:
            await self._publish_queued()
            before = self._live.position
            if not self._queue and not self._is_behind:
                return
            self._is_behind = False
            await self._ask(before)
            if self._live.position == before:
                return

    async def _publish_queued(self) -> None:
        while self._queue:
            batch, position = self._queue[0], self._live.position
            if batch.epoch != position.epoch:
                self._queue.clear()  # a member says whether it is this one's epoch that has ended
                self._is_behind = True
            elif batch.upto <= position.seq:
                self._queue.popleft()
            elif batch.after > position.seq:
                return
            elif missing := self._missing(batch):
                if not await self._fetch(batch, missing):
                    return
            else:
                await self._take(batch)

    async def _fetch(self, batch: LogBatch, missing: Sequence[int]) -> bool:
        """Have contents of a batch at hand, as many as one answer holds.

        False if the member has no such batch: it may be behind, or of another epoch, or read the log for whole ones.
        """
        position = self._live.position
        asked, size = list[int](), 0
        for topic_hash in missing[:MAX_HASHES]:
            asked.append(topic_hash)
            size += batch.absent[topic_hash]
            if size > MAX_ASKED:
                break
        self._asking.begin()
        after = Position(position.epoch, max(batch.after, position.seq))
        try:
            changes = await self._reader.contents(after, batch.upto, asked)
        except (LogTruncated, LogUnavailable):
            return False
        metrics.RELAY_CONTENTS.labels(result="asked").inc(len(asked))
        found: dict[int, list[Change]] = {topic_hash: [] for topic_hash in asked}
        for change in changes:
            found.setdefault(hash_of(change.topic), []).append(change)
        self._at_hand.put(batch, found)
        return True

    async def _ask(self, position: Position) -> None:
        """Publish what a member says that follows the position."""
        began = time.monotonic()
        self._asking.begin()
        try:
            head, batches = await self._reader.batches(position)
        except LogTruncated:
            await self._check_continuity(position)
            return
        metrics.READ_SECONDS.observe(time.monotonic() - began)
        for batch in batches:
            now = self._live.position  # what was missing may have arrived in the meantime
            if batch.epoch != now.epoch or batch.after > now.seq:
                return
            if batch.upto > now.seq:
                await self._take(batch)
        if batches:
            self._is_behind = True  # more may follow
        elif head != position:
            await self._check_continuity(head)

    async def _take(self, batch: LogBatch) -> None:
        """Publish a batch that continues from the position, unless it turns out that the position is not valid."""
        position = self._live.position
        if batch.since(position.seq).jumps and await self._check_continuity(Position(batch.epoch, batch.upto)):
            return
        if self._needs_refresh(batch):
            await self._refresh_router()
        if self._live.position == position and not self._missing(batch):
            self._publish(batch)

    async def _check_continuity(self, upto: Position) -> bool:
        """Continue from the head if the stream cannot be continued from the position. Returns whether it did.

        A member that has not come as far as `upto` may not know yet.
        """
        position = self._live.position
        reason = await self._reader.continuity(position, upto)
        if reason is None:
            return False
        head = await self._head()
        if self._live.position != position:  # what was missing has arrived in the meantime
            self._is_behind = True
            return False
        self._queue.clear()
        self._move(head, reason)
        metrics.RESETS.labels(reason=reason).inc()
        await self._refresh_router()
        return True

    async def _head(self) -> Position:
        """The head of the log. Raises LogUnavailable if the member that was asked is in another epoch."""
        head = await self._reader.head()
        if not self.epochs.follows(head.epoch):
            raise LogUnavailable("the log of the member has another epoch")
        return head

    def _fits(self, batch: LogBatch) -> bool:
        """Whether this batch can be published at once."""
        position = self._live.position
        return (
            self.started.is_set()
            and batch.epoch == position.epoch
            and batch.after <= position.seq
            and not batch.jumps
            and not self._needs_refresh(batch)
            and not self._missing(batch)
        )

    def _missing(self, batch: LogBatch) -> Sequence[int]:
        """The contents without which this batch must not be published."""
        return self._interest.missing(batch.absent, self._at_hand.of(batch)) if batch.absent else ()

    def _needs_refresh(self, batch: LogBatch) -> bool:
        return self._is_outdated or self._live.router.is_outdated(batch.changes, ())

    async def _refresh_router(self) -> None:
        self._is_outdated = False
        try:
            await self._refresh()
        except LogUnavailable:
            self._is_outdated = True
            raise

    def _publish(self, batch: LogBatch) -> None:
        batch = self._at_hand.complete(batch).since(self._live.position.seq)
        self._interest.publish(batch)
        self._live.publish(batch)
        self._at_hand.forget(self._live.position)
        metrics.BATCH_CHANGES.observe(len(batch.changes))

    def _move(self, position: Position, reason: str) -> None:
        self._at_hand.forget(Position("", Seq(0)))
        self._interest.restart(position)
        self._live.move(position, reason)

    def _choose(self) -> None:
        """By now everybody who is there has sent a beat."""
        before = self.epochs.followed
        self.epochs.decide(time.monotonic())
        if self.epochs.followed != before:
            self._ask_soon()

    def _expect(self, position: Position) -> None:
        """By now everything up to this position should have arrived."""
        mine = self._live.position
        if position.epoch != mine.epoch or position.seq > mine.seq:
            self._ask_soon()

    def _ask_soon(self) -> None:
        self._is_behind = True
        self._wakeup.set()
