"""Bell -> read -> validate -> hub: the one task that moves the live end of the log to the clients."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from daemon import metrics
from daemon.core.change import Change, Kind, Position, Seq
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Hub
from daemon.core.ports import LogReader
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pack_router import Invalid, PackRouter
from daemon.logs import get_logger

log = get_logger()

MAX_PENDING_DEAD_LETTERS: Final = 1000  # that wait to be kept; of more the oldest are dropped

StoreDeadLetters = Callable[[Sequence[tuple[Change, str, str]]], Awaitable[None]]


class Pump:
    """Keeps the hub at the head of the log.

    `bell` is rung when the log has grown; without a ring the log is read every `poll_every` seconds. What it has been
    handed it need not read. `recent` is given what the hub is given, and at once.
    """

    def __init__(
        self,
        log_reader: LogReader,
        wakeup: asyncio.Event,
        hub: Hub,
        router: PackRouter,
        log_cache: LogCache,
        store_dead_letters: StoreDeadLetters,
        *,
        poll_every: float = 1.0,
        chunk: int = 1000,
    ) -> None:
        self._log = log_reader
        self._wakeup = wakeup
        self._hub = hub
        self._router = router
        self._log_cache = log_cache
        self._store_dead_letters = store_dead_letters
        self._poll_every = poll_every
        self._chunk = chunk
        self._offered: deque[tuple[Seq, Sequence[Change]]] = deque()
        self._free = False  # may the hub be moved by whoever hands over?
        self._retry_storing_at = float("-inf")  # when letters that could not be kept are tried again
        self._pending_dead_letters: list[Invalid] = []  # to be buried before anything behind them is delivered
        self._waiting: list[asyncio.Future[None]] = []  # for the next step of the hub
        self._read_at = float("-inf")
        self.started = asyncio.Event()
        self.failure = ""  # why the last attempt to read the log has failed
        self.reads = asyncio.Event()  # set unless the last attempt to read the log has failed

    @property
    def silence(self) -> float:
        """Seconds since the log was last read; infinite before the first time."""
        return time.monotonic() - self._read_at

    def offer(self, after: Seq, changes: Sequence[Change]) -> None:
        """All that the log holds between `after` and the last of these changes: delivered at once, if it can be."""
        if self._free and not self._pending_dead_letters and after == self._hub.position.seq:
            self._read_at = time.monotonic()
            self._publish(changes)
            if not self._pending_dead_letters:
                return
        else:
            if sum(len(changes) for _, changes in self._offered) > self._chunk:
                self._offered.clear()  # it will be read
            self._offered.append((after, changes))
        self._wakeup.set()

    async def reached(self, seq: Seq) -> None:
        """Wait until everything up to this place has been delivered to those who follow it live."""
        while self._hub.position.seq < seq:
            step = asyncio.get_running_loop().create_future()
            self._waiting.append(step)
            await step

    async def run(self) -> None:
        """Move the hub along the log until cancelled."""
        quiet = False
        while True:
            self._wakeup.clear()
            try:
                await self._catch_up()
                if quiet:
                    await self._look_for_term()
                self.failure = ""
                self.reads.set()
            except LogUnavailable as error:
                if not self.failure:
                    log.warning("log_unavailable", reason=error.reason)
                self.failure = error.reason
                self.reads.clear()
            # Not wait_for: in Python 3.11 it can swallow a cancellation.
            quiet, self._free = True, self.started.is_set()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_every):
                    await self._wakeup.wait()
                    quiet = False
            self._free = False

    async def _catch_up(self) -> None:
        if not self.started.is_set():
            head = await self._log.head()
            if head.epoch:
                self._move(head, "epoch")  # nobody follows yet
                self._read_at = time.monotonic()
                self.started.set()
        while self.started.is_set():
            await self._store_pending()
            before = self._hub.position.seq
            changes = self._taken(before) or await self._read(before)
            self._read_at = time.monotonic()
            if self._hub.position.seq != before:
                continue  # what was being read has been handed over
            if not changes:
                break
            if changes[-1].seq - before != len(changes):
                await self._begin_term(changes[0].seq)
            self._publish(changes)
            if changes[-1].seq - before < self._chunk and not self._offered:
                break  # that was all there is, since numbers are dense; whatever comes rings
        await self._store_pending()

    def _taken(self, before: Seq) -> Sequence[Change]:
        """What has been handed of the log behind this place; nothing if that has to be read."""
        taken: list[Change] = []
        while self._offered and self._offered[0][0] <= before:
            after, changes = self._offered.popleft()
            if after == before:
                taken += changes
                before = taken[-1].seq
        return taken

    async def _read(self, before: Seq) -> Sequence[Change]:
        began = time.monotonic()
        self._free = True  # a read that takes its time must not hold up what is handed over
        try:
            changes = await self._log.read(before, self._chunk)
        finally:
            self._free = False
        metrics.READ_SECONDS.observe(time.monotonic() - began)
        return changes

    async def _look_for_term(self) -> None:
        """A new term may have no numbers yet, and still have taken back some that were delivered."""
        if not self.started.is_set():
            return
        head = await self._log.head()
        if head.seq > self._hub.position.seq and not await self._log.read(self._hub.position.seq, 1):
            await self._begin_term(Seq(head.seq + 1))

    async def _begin_term(self, first: Seq) -> None:
        """Numbers are dense within a term: a jump, wherever, is a new one. Was what we delivered last kept on record?

        A transaction that is told as `limit` is a jump too, and asks in vain.
        """
        reason = await self._log.continuity(self._hub.position)
        if reason is not None:
            head = await self._log.head()
            self._move(Position(head.epoch, Seq(first - 1)), reason)
            metrics.RESETS.labels(reason=reason).inc()

    def _move(self, position: Position, reason: str) -> None:
        self._hub.move(position, reason)
        self._log_cache.restart(position)

    def _publish(self, changes: Sequence[Change]) -> None:
        valid, invalid = self._router.validate(changes)
        position = Position(self._hub.position.epoch, changes[-1].seq)
        built, delivered = self._hub.publish(
            valid,
            position,
            lambda change: self._router.topics_to_reset(change, self._hub.topics),
            self._router.ends(changes),
        )
        self._log_cache.add(changes, valid)
        metrics.FRAMES.inc(built)
        metrics.DELIVERIES.inc(delivered)
        metrics.BATCH_CHANGES.observe(len(changes))
        for kind, count in Counter(change.kind for change in valid).items():
            metrics.CHANGES.labels(kind=kind.value).inc(count)
        for change in valid:
            if change.kind is Kind.LOST:
                log.error("trigger_error", seq=change.seq, table=change.table)
        for tx in {change.tx for change in changes if change.kind is Kind.LIMIT}:
            log.warning("transaction_too_large", transaction=tx)
        for letter in invalid:
            change = letter.change
            metrics.DEAD_LETTERS.labels(pack=letter.pack, table=change.table).inc()
            log.error("change_invalid", seq=change.seq, pack=letter.pack, table=change.table, reason=letter.reason)
        self._pending_dead_letters += invalid
        waiting, self._waiting = self._waiting, []
        for step in waiting:
            if not step.done():
                step.set_result(None)

    async def _store_pending(self) -> None:
        """Keep what was refused. What cannot be kept now is tried again, and takes a tenth of the time at most."""
        began = time.monotonic()
        if not self._pending_dead_letters or began < self._retry_storing_at:
            return
        letters = self._pending_dead_letters[-MAX_PENDING_DEAD_LETTERS:]
        dropped = len(self._pending_dead_letters) - len(letters)
        try:
            await self._store_dead_letters(letters)
            self._pending_dead_letters = []
        except LogUnavailable as error:
            first, count = letters[0].change.seq, len(letters)
            log.error("dead_letter_failed", first=first, count=count, dropped=dropped, reason=error.reason)
            self._pending_dead_letters = letters
            failed = time.monotonic()
            self._retry_storing_at = failed + max(self._poll_every, 10 * (failed - began))
