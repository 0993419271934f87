"""The pump: reads what is new in the log, validates it, and publishes it through the hub."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from daemon import metrics
from daemon.core.batch import LogBatch
from daemon.core.change import Change, Kind, Position, Seq
from daemon.core.errors import LogUnavailable
from daemon.core.ports import MAX_READ_BYTES, Batch, LogReader
from daemon.delivery.live import Live
from daemon.delivery.pack_router import Invalid
from daemon.health import Progress
from daemon.logs import get_logger

log = get_logger()

MAX_PENDING_DEAD_LETTERS: Final = 1000  # that wait to be stored; beyond that, the oldest are dropped
MAX_OFFERED_BYTES: Final = 4 * MAX_READ_BYTES  # of records that wait; beyond that, the log is read instead
MAX_AGE: Final = 9.0  # seconds without progress after which this daemon is not ready

StoreDeadLetters = Callable[[Sequence[tuple[Change, str, str]]], Awaitable[None]]
"""Stores each (change, pack, reason). Raises LogUnavailable."""

Refresh = Callable[[], Awaitable[None]]
"""Tells the router what is served at the moment. Raises LogUnavailable."""


class Pump:
    """Keeps the live end of this process at the head of the log.

    It reads the log when `wakeup` is set, and every `poll_every` seconds without that. Changes that the sequencer
    offers need not be read. The log reader may leave records that `live` does not want. `refresh` is called first
    where the log says that other tables are served from there on, or that they are served otherwise.
    """

    def __init__(
        self,
        log_reader: LogReader,
        wakeup: asyncio.Event,
        live: Live,
        store_dead_letters: StoreDeadLetters,
        *,
        refresh: Refresh | None = None,
        poll_every: float = 1.0,
        chunk: int = 1000,
    ) -> None:
        self._log = log_reader
        self._refresh = refresh
        self._wakeup = wakeup
        self._live = live
        self._router = live.router
        self._store_dead_letters = store_dead_letters
        self._poll_every = poll_every
        self._chunk = chunk
        self._offered: deque[tuple[Seq, Sequence[Change]]] = deque()
        self._offered_bytes = 0
        self._accepts_offers = False  # true while `offer` may publish by itself
        self._retry_storing_at = float("-inf")  # when to try again after storing dead letters failed
        self._storing = Progress()
        self._reading = Progress()
        self._pending_dead_letters: list[Invalid] = []  # stored before anything behind them is delivered
        self._read_at = float("-inf")
        self.started = asyncio.Event()
        self.readable = asyncio.Event()  # set unless the last attempt to read the log failed

    @property
    def read_age(self) -> float:
        """Seconds since everything that was read was last published; infinite before the first time."""
        return time.monotonic() - self._read_at

    @property
    def failure(self) -> str:
        """Why the last attempt to read the log failed; empty if it did not."""
        return self._reading.failure

    def problems(self) -> list[str]:
        """Why this daemon is not ready, as far as the pump knows."""
        problems = []
        if self.read_age > MAX_AGE:
            problems.append(f"the log is not being read ({self.failure or 'no answer'})")
        if self._storing.age > MAX_AGE:
            problems.append(f"dead letters are not being stored ({self._storing.failure or 'no answer'})")
        return problems

    def offer(self, after: Seq, changes: Sequence[Change]) -> None:
        """Take everything that the log holds between `after` and the last of these changes.

        It is published at once if the hub is at `after`, and kept for the next step otherwise.
        """
        validated = None
        if self._accepts_offers and not self._pending_dead_letters and after == self._live.position.seq:
            validated = self._router.batch_of(self._live.position, changes)
        if validated is not None and not self._is_outdated(changes, validated[1]):
            self._publish(changes, *validated)
            if not self._pending_dead_letters:
                return
        else:
            size = sum(len(change.record or "") for change in changes)
            waiting = sum(len(changes) for _, changes in self._offered)
            if waiting > self._chunk or self._offered_bytes + size > MAX_OFFERED_BYTES:
                self._offered.clear()  # the log will be read instead
                self._offered_bytes = 0
            self._offered.append((after, changes))
            self._offered_bytes += size
        self._wakeup.set()

    async def run(self) -> None:
        """Move the hub along the log until cancelled."""
        timed_out = False
        while True:
            self._wakeup.clear()
            try:
                await self._catch_up()
                if timed_out or time.monotonic() - self._live.moved_at > self._poll_every:
                    await self._check_for_new_term()
                self._reading.end()
                self.readable.set()
            except LogUnavailable as error:
                if self._reading.fail(error.reason):
                    log.warning("log_unavailable", reason=error.reason)
                self.readable.clear()
            # Not wait_for: in Python 3.11 it can swallow a cancellation.
            timed_out, self._accepts_offers = True, self.started.is_set()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_every):
                    await self._wakeup.wait()
                    timed_out = False
            self._accepts_offers = False

    async def _catch_up(self) -> None:
        """Publish what is new, until nothing is."""
        if not self.started.is_set():
            head = await self._log.head()
            if head.epoch:
                self._live.move(head, "epoch")  # nobody follows yet
                await self._refresh_router()
                self._read_at = time.monotonic()
                self.started.set()
        while self.started.is_set():
            await self._store_pending()
            before = self._live.position.seq
            batch = self._take_offered(before) or await self._read(before)
            if self._live.position.seq != before:
                continue  # the same changes were offered while they were being read
            if not batch:
                self._read_at = time.monotonic()
                break
            if batch[-1].seq - before != len(batch):
                await self._check_gap(batch[0].seq)
            validated, invalid = self._router.batch_of(self._live.position, batch)
            if self._is_outdated(batch, invalid):
                await self._refresh_router()
                validated, invalid = self._router.batch_of(self._live.position, batch)
            if any(change.is_left and self._live.wants(change) for change in batch):
                continue  # it has been wanted only since it was read
            self._publish(batch, validated, invalid)
            if not batch.more and not self._offered:
                break  # what comes next sets `wakeup`
        await self._store_pending()

    def _take_offered(self, before: Seq) -> Batch:
        """The offered changes that continue from this position; empty if the log has to be read."""
        taken = Batch()
        while self._offered and self._offered[0][0] <= before:
            after, changes = self._offered.popleft()
            if after == before:
                taken.extend(changes)
                before = taken[-1].seq
        if not self._offered:
            self._offered_bytes = 0
        return taken

    async def _read(self, before: Seq) -> Batch:
        began = time.monotonic()
        self._accepts_offers = True  # a slow read must not delay what is offered
        try:
            batch = await self._log.read(before, self._chunk)
        finally:
            self._accepts_offers = False
        metrics.READ_SECONDS.observe(time.monotonic() - began)
        return batch

    async def _check_for_new_term(self) -> None:
        """A new term may have no numbers yet, or lower ones, and still have taken back some that were delivered."""
        if not self.started.is_set():
            return
        head = await self._log.head()
        if head != self._live.position and not await self._log.read(self._live.position.seq, 1):
            await self._check_gap(Seq(head.seq + 1))

    async def _check_gap(self, first: Seq) -> None:
        """Numbers are dense within a term, so a gap before `first` means a new term: is our position still valid?

        A transaction that is replaced by `limit` changes leaves a gap too; there the position is valid.
        """
        reason = await self._log.continuity(self._live.position)
        if reason is not None:
            head = await self._log.head()
            self._live.move(Position(head.epoch, Seq(first - 1)), reason)
            metrics.RESETS.labels(reason=reason).inc()
            await self._refresh_router()  # the log may have said so in what was skipped

    def _is_outdated(self, changes: Sequence[Change], invalid: Sequence[Invalid]) -> bool:
        return self._refresh is not None and self._router.is_outdated(changes, invalid)

    async def _refresh_router(self) -> None:
        if self._refresh is not None:
            await self._refresh()

    def _publish(self, changes: Sequence[Change], batch: LogBatch, invalid: list[Invalid]) -> None:
        """Publish what was made of these changes."""
        unsendable = self._live.publish(batch)
        invalid += [
            Invalid(change, pack.name, "frame: cannot_be_built")
            for change in unsendable
            if (pack := self._router.pack_of(change))
        ]
        metrics.BATCH_CHANGES.observe(len(changes))
        for tx in {change.tx for change in changes if change.kind is Kind.LIMIT and not change.unreadable}:
            log.warning("transaction_too_large", transaction=tx)
        for change, pack_name, reason in invalid:
            metrics.DEAD_LETTERS.labels(pack=pack_name, table=change.table).inc()
            log.error("change_invalid", seq=change.seq, pack=pack_name, table=change.table, reason=reason)
        self._pending_dead_letters += invalid
        self._read_at = time.monotonic()

    async def _store_pending(self) -> None:
        """Store the pending dead letters. Retries after a failure take at most a tenth of the time."""
        began = time.monotonic()
        if not self._pending_dead_letters or began < self._retry_storing_at:
            return
        dead_letters = self._pending_dead_letters[-MAX_PENDING_DEAD_LETTERS:]
        dropped = len(self._pending_dead_letters) - len(dead_letters)
        self._storing.begin()
        try:
            await self._store_dead_letters(dead_letters)
            self._pending_dead_letters = []
            self._storing.end()
        except LogUnavailable as error:
            first, count = dead_letters[0].change.seq, len(dead_letters)
            if self._storing.fail(error.reason) or dropped:
                log.error("dead_letter_failed", first=first, count=count, dropped=dropped, reason=error.reason)
            self._pending_dead_letters = dead_letters
            failed = time.monotonic()
            self._retry_storing_at = failed + max(self._poll_every, 10 * (failed - began))
