"""The sequencer: one leader per database numbers captured events; every other daemon reads the log it writes."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from daemon import metrics
from daemon.core.adaptive_polling import AdaptivePoller, State
from daemon.core.change import Change, Kind, Seq
from daemon.core.ports import MAX_READ_BYTES
from daemon.log.queries import query
from daemon.log.reader import change_of
from daemon.log.wakeup_lock import WakeupLock
from daemon.logs import get_logger
from daemon.postgres.backoff import backoff_delay
from daemon.postgres.connect import Connect, Connection, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe

log = get_logger()

LEADER_LOCK = 0x526F7763617374  # "Rowcast": an advisory lock of the database, held by the leader
FOLLOWER_LOCK = 0x526F7763617376  # another one, shared by the followers: while any holds it, the leader notifies
ANSWER_TIMEOUT = 30.0  # seconds for one statement: a dead link must not keep the leader lock forever
NUMBER_TIMEOUT = 900.0  # seconds for numbering: one transaction may hold millions of events
KEPT_BATCHES = 1000  # old snapshots are deleted every so many batches

Offer = Callable[[Seq, Sequence[Change]], None]
"""Receives newly numbered changes, and the position that precedes them."""


def without_deleted_content(changes: Sequence[Change]) -> list[Change]:
    """Remove the content of rows that a later change deletes, as `rowcast.changes` does."""
    deleted: set[tuple[str, str, str]] = set()
    kept: list[Change] = []
    for change in reversed(changes):
        row = change.schema, change.table, change.key
        if change.kind is Kind.DELETE:
            deleted.add(row)
        kept.append(change._replace(record=None) if row in deleted else change)
    return kept[::-1]


def _seq_of(row: asyncpg.Record) -> int:
    return row["seq"] or 0


class Superseded(Exception):
    """A newer term has begun: this leader must stop numbering."""


@dataclass
class _Term:
    """How far one term's numbering has come."""

    number: int
    first_segment: int  # the events of earlier segments are all numbered
    last_seq: int
    snapshot: str  # the one that the last batch was read in, as Postgres writes it: xmin:xmax:xip
    batches: int = 0


class Sequencer:
    """Numbers events while it leads, and waits for its turn while another daemon does.

    `events` is set when a writer notifies, which happens only while the leader sleeps (see AdaptivePoller). Without
    a notification the leader polls every `poll_every` seconds.

    `offer` receives what the log has grown by, so that this process need not read it back. `numbers` is set instead
    for more than `max_offered` changes or MAX_READ_BYTES of records, and when this daemon begins to follow another.

    With `sync` each batch waits for its flush: nothing that a crash of Postgres could undo is ever delivered.
    """

    def __init__(
        self,
        connect: Connect,
        pool: Pool,
        events: asyncio.Event,
        numbers: asyncio.Event,
        offer: Offer = lambda _, __: None,
        *,
        max_offered: int = 0,
        poll_every: float = 1.0,
        sync: bool = False,
    ) -> None:
        self._connect = connect
        self._pool = pool
        self._events = events
        self._numbers = numbers
        self._offer = offer
        self._max_offered = max_offered
        self._poll_every = poll_every
        self._sync = sync
        self._readers_due = asyncio.Event()
        self.leading = asyncio.Event()  # set while this daemon leads and has numbered its first batch
        self.settled = asyncio.Event()  # set once it is known who leads
        self.failure = ""  # why events are not numbered, once that has failed twice in a row
        self._next_segment = False
        self.deletions = asyncio.Event()  # set when rows were deleted whose earlier content is still in the log
        self.backend_pid: int | None = None
        self._notifying_pid: int | None = None  # the backend that last notified the other daemons

    def is_own_notification(self, pid: int) -> bool:
        """Did this sequencer send the notification that came from backend `pid`?"""
        return pid == self._notifying_pid

    def open_next_segment(self) -> None:
        """Make the leader continue in the next segment, under a new term."""
        self._next_segment = True
        self._events.set()

    async def run(self) -> None:
        """Lead, or wait to lead, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._notify_readers())
            group.create_task(self._lead())

    async def _lead(self) -> None:
        """Lead, or wait to lead, on one connection after another."""
        attempt = 0
        while True:
            try:
                await self._lead_on_one_connection()
            except Superseded:
                pass
            except DATABASE_ERRORS as error:
                attempt = 1 if self.leading.is_set() else attempt + 1
                if attempt == 1:
                    log.warning("leader_lost", reason=describe(error))
                self.failure = describe(error) if attempt > 1 else ""
            finally:
                self.leading.clear()
                self.backend_pid = self._notifying_pid = None
                metrics.LEADER.set(0)
                metrics.show_poller_state(None)
            await asyncio.sleep(backoff_delay(attempt))

    async def _lead_on_one_connection(self) -> None:
        """Wait for the leader lock, then run terms. Ends by raising Superseded or one of DATABASE_ERRORS."""
        connection = await self._connect()
        lock = WakeupLock(self._connect, self._events.set)
        locking: asyncio.Task[None] | None = None
        try:
            self.backend_pid = connection.get_server_pid()
            await self._wait_for_leadership(connection)
            self.deletions.set()  # an earlier leader may have left some
            locking = asyncio.create_task(lock.run())
            while True:
                await self._run_term(connection, lock)
        finally:
            connection.terminate()
            if locking is not None:
                locking.cancel()
                await asyncio.wait({locking})

    async def _wait_for_leadership(self, connection: Connection) -> None:
        """Follow until the leader lock is free, and take it."""
        following = False
        # Polled, since a statement that waits for the lock would hold a snapshot, and hold back vacuum.
        while not await connection.fetchval(query("try_lead"), LEADER_LOCK, timeout=ANSWER_TIMEOUT):
            if not following:
                await connection.execute(query("share_follower_lock"), FOLLOWER_LOCK, timeout=NUMBER_TIMEOUT)
                following = True
                self._numbers.set()  # the leader did not notify us of anything before this
            self.settled.set()
            await asyncio.sleep(self._poll_every * random.uniform(0.5, 1.0))  # noqa: S311

    async def _run_term(self, connection: Connection, lock: WakeupLock) -> None:
        """Open a term and number events until the next segment is due."""
        term = await self._open_term(connection)
        statement = await connection.prepare(query("number_events"), timeout=ANSWER_TIMEOUT)
        poller = AdaptivePoller(time.monotonic(), max_sleep=self._poll_every)
        while not self._next_segment:
            self._events.clear()
            began = time.monotonic()
            rows = await self._number(statement, term)
            ended = time.monotonic()
            totals, *rows = sorted(rows, key=_seq_of)
            if totals["superseded"]:
                raise Superseded
            before, term.last_seq, term.snapshot = term.last_seq, totals["last_seq"], totals["snapshot"]
            if totals["transactions"]:
                self._deliver(Seq(before), totals, rows)
                term.batches += 1
                if term.batches % KEPT_BATCHES == 0:
                    await connection.execute(query("forget_batches"), term.last_seq, timeout=ANSWER_TIMEOUT)
            if totals["has_deletes"]:
                self.deletions.set()
            self.leading.set()
            self.settled.set()
            poller.record_poll(ended, totals["transactions"], ended - began, held=lock.held)
            lock.want(poller.wants_sleep_lock)
            metrics.show_poller_state(poller.state)
            await self._pause(poller)

    async def _open_term(self, connection: Connection) -> _Term:
        """Record a new term, in the next segment if that is due."""
        await connection.execute("set synchronous_commit = on", timeout=ANSWER_TIMEOUT)
        opening, self._next_segment = self._next_segment, False
        if opening:
            await connection.execute(query("leave_segment"), timeout=ANSWER_TIMEOUT)
        opened = await connection.fetchrow(query("open_term"), opening, timeout=ANSWER_TIMEOUT)
        assert opened is not None
        term = _Term(opened["term"], opened["first_segment"], opened["base"], opened["snapshot"])
        if not self._sync:
            await connection.execute("set synchronous_commit = off", timeout=ANSWER_TIMEOUT)
        log.info("leader_elected", term=term.number, base=term.last_seq)
        metrics.LEADER.set(1)
        self._events.set()
        return term

    async def _number(self, statement: "PreparedStatement[asyncpg.Record]", term: _Term) -> list[asyncpg.Record]:
        """Number the events that have become visible since the term's last snapshot."""
        _, xmax, in_progress = term.snapshot.split(":")
        return await statement.fetch(
            term.number,
            term.last_seq,
            xmax,
            [xid for xid in in_progress.split(",") if xid],
            term.first_segment,
            self._max_offered,
            FOLLOWER_LOCK,
            MAX_READ_BYTES,
            timeout=NUMBER_TIMEOUT,
        )

    def _deliver(self, before: Seq, totals: asyncpg.Record, rows: Sequence[asyncpg.Record]) -> None:
        """Offer the changes to this process, and have the followers notified if there are any."""
        if rows:
            changes = list(map(change_of, rows))
            if totals["has_deletes"]:
                changes = without_deleted_content(changes)
            # Later, so that it overlaps with Postgres working on the next batch.
            asyncio.get_running_loop().call_soon(self._offer, before, changes)
        else:
            self._numbers.set()
        if totals["has_followers"]:
            self._readers_due.set()

    async def _pause(self, poller: AdaptivePoller) -> None:
        """Wait until the next poll is due or, unless awake, until something sets `events`."""
        if poller.state is State.AWAKE:
            if poller.delay:
                await asyncio.sleep(poller.delay)
            return
        # Not wait_for: in Python 3.11 it can swallow a cancellation.
        with suppress(TimeoutError):
            async with asyncio.timeout(poller.delay):
                await self._events.wait()

    async def _notify_readers(self) -> None:
        """Notify the followers, on a connection of its own: NOTIFY can block on a lock of the whole cluster."""
        while True:
            await self._readers_due.wait()
            self._readers_due.clear()
            try:
                async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                    self._notifying_pid = connection.get_server_pid()
                    await connection.execute(query("notify_readers"))
            except DATABASE_ERRORS as error:
                log.debug("log_unavailable", reason=describe(error))  # they poll as well
