"""The sequencer: one leader per database numbers captured events; every other daemon reads the log it writes."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter, itemgetter
from typing import Final, NamedTuple, Self
from uuid import UUID, uuid4

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from daemon import metrics
from daemon.core.adaptive_polling import AdaptivePoller, State
from daemon.core.change import CONTENT, Change, Kind, Seq
from daemon.core.ports import LARGE_RECORD, MAX_READ_BYTES
from daemon.log.fine_sleep import fine_sleep
from daemon.log.queries import query
from daemon.log.reader import changes_of
from daemon.log.set_aside import may_blame_an_event, set_aside_events, undone
from daemon.log.wakeup_lock import WakeupLock
from daemon.logs import get_logger
from daemon.postgres.backoff import backoff_delay
from daemon.postgres.connect import Connect, Connection, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, cancellation_first, describe

log = get_logger()

FOLLOWER_LOCK = 0x526F7763617376  # an advisory lock, shared by the followers: while any holds it, the leader notifies
LEASE: Final = timedelta(seconds=8)  # how long a leader that does nothing keeps others from leading
RENEW_DELAY: Final = 3.0  # seconds from one renewal of the lease to the next
LOOK_DELAY: Final = 1.0  # seconds between two looks of a follower at the lease, at most
RELEASE_TIMEOUT: Final = 1.0  # seconds for the release of the lease when the daemon stops
ANSWER_TIMEOUT = 30.0  # seconds for one statement
NUMBER_TIMEOUT = 900.0  # seconds for numbering: one transaction may hold millions of events
KEPT_BATCHES = 1000  # old snapshots are deleted every so many batches
MAX_UNFLUSHED: Final = 2**16  # numbers that a crash may undo: fewer than the next term jumps over
_NUMBERING: Final = metrics.QUERY_SECONDS.labels(query="number_events")  # the driver reports no prepared ones

Sleep = Callable[[float], Awaitable[None]]
Offer = Callable[[Seq, Sequence[Change]], None]
"""Receives newly numbered changes, and the position that precedes them."""


def without_deleted_content(changes: Sequence[Change], event_ids: Sequence[int]) -> list[Change]:
    """Remove the content of rows that a deletion hides, as the tombstones of `number_events` do.

    A deletion hides everything before its transaction, and what its transaction tells of the row as well, unless the
    row was written again after it: the ids of the events follow the order of writing.
    """
    rows = [(change.schema, change.table, change.key) for change in changes]
    newest: dict[tuple[str, tuple[str, str, str]], tuple[int, Kind]] = {}  # by transaction and row
    for change, row, event_id in zip(changes, rows, event_ids, strict=True):
        if change.kind is Kind.DELETE or change.kind in CONTENT:
            newest[change.tx, row] = max(newest.get((change.tx, row), (-1, change.kind)), (event_id, change.kind))
    hidden: set[tuple[str, str, str]] = set()  # in the transactions before the one that is looked at
    deleted: set[tuple[str, str, str]] = set()  # in this transaction
    kept: list[Change] = []
    tx = ""
    for change, row in zip(reversed(changes), reversed(rows), strict=True):
        if change.tx != tx:
            hidden |= deleted
            deleted, tx = set(), change.tx
        if change.kind is Kind.DELETE:
            deleted.add(row)
        is_hidden = row in hidden or newest.get((change.tx, row), (0, None))[1] is Kind.DELETE
        kept.append(change._replace(record=None) if is_hidden else change)
    return kept[::-1]


def _limits(snapshot: str) -> tuple[str, list[str]]:
    """A snapshot's xmax, and its transactions in progress."""
    _, xmax, in_progress = snapshot.split(":")
    return xmax, [xid for xid in in_progress.split(",") if xid]


class Superseded(Exception):
    """The lease is no longer this leader's, or the log is not the one that it wrote: it must stop numbering."""


_seq, _tx = itemgetter("seq"), attrgetter("tx")


def _place(row: asyncpg.Record) -> int:
    return row["seq"] or 0


class _Numbered(NamedTuple):
    """What one numbering statement did. `snapshot` is as Postgres writes it."""

    snapshot: str
    last_seq: int
    changes: list[Change]  # what is new; empty as well if it is too much to be offered
    transactions: int = 0
    has_deletes: bool = False
    has_followers: bool = False
    is_flushed: bool = False

    @classmethod
    def from_full(cls, rows: Sequence[asyncpg.Record]) -> Self:
        """From the rows of `number_events`. Raises Superseded."""
        totals, *rows = sorted(rows, key=_place)
        if totals["superseded"]:
            raise Superseded
        changes = changes_of(rows)
        if totals["has_deletes"]:
            changes = without_deleted_content(changes, [row["event_id"] for row in rows])
        return cls(
            totals["snapshot"],
            totals["last_seq"],
            changes,
            totals["transactions"],
            totals["has_deletes"],
            totals["has_followers"],
            bool(totals["flushed"]),
        )

    @classmethod
    def from_few(cls, rows: Sequence[asyncpg.Record], last_seq: int) -> Self | None:
        """From the rows of `number_few`; None if the batch is not an ordinary one. Raises Superseded."""
        if len(rows) > 1:
            rows = sorted(rows, key=_seq)
        first = rows[0]
        if not first["is_ordinary"]:
            return None
        if not first["changes"]:
            return cls(first["snapshot"], last_seq, [])
        if first["seq"] is None:
            raise Superseded
        changes = changes_of(rows)
        transactions = len(set(map(_tx, changes)))
        return cls(first["snapshot"], changes[-1].seq, changes, transactions, has_followers=first["has_followers"])


@dataclass
class _Term:
    """How far one term's numbering has come.

    A number up to `flushed` cannot be undone by a crash. `on_record` was the newest number at the last renewal of the
    lease, which is due at `renew_at`, by the monotonic clock.
    """

    nonce: UUID
    number: int
    first_segment: int  # the events of earlier segments are all numbered
    last_seq: int
    snapshot: str  # the one that the last batch was read in, as Postgres writes it: xmin:xmax:xip
    flushed: int
    on_record: int
    renew_at: float
    batches: int = 0
    has_set_aside: bool = True  # dead letters may wait to be stored; an earlier leader may have left some
    is_ordinary: bool = False  # the last batch was: the next one likely is, too


class _Statements(NamedTuple):
    """The statements that number, prepared."""

    full: "PreparedStatement[asyncpg.Record]"
    few: "PreparedStatement[asyncpg.Record] | None"  # for ordinary batches; none if the full one has to check more


class Sequencer:
    """Numbers events while it leads, and waits for its turn while another daemon does.

    Who leads is a row, `rowcast.lease`: a leader renews it, and numbers only under its nonce. A leader that cannot
    number gives the lease up, so that another daemon may try.

    `events` is set when a writer notifies, which happens only while the leader sleeps (see AdaptivePoller). Without
    a notification the leader polls every `poll_every` seconds.

    `offer` receives what the log has grown by, so that this process need not read it back. `numbers` is set instead
    for more than `max_offered` changes or MAX_READ_BYTES of records, or more than LARGE_RECORD in one of them, and
    when this daemon begins to follow another.

    While `is_notify_blocked()`, it does not let writers notify: their commits would wait. It polls every
    LOCK_WAIT_DELAY of AdaptivePoller instead.

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
        is_notify_blocked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._connect = connect
        self._pool = pool
        self._events = events
        self._numbers = numbers
        self._offer = offer
        self._max_offered = max_offered
        self._poll_every = poll_every
        self._sync = sync
        self._is_notify_blocked = is_notify_blocked
        self._readers_due = asyncio.Event()
        self.leading = asyncio.Event()  # set while this daemon leads and has numbered its first batch
        self.settled = asyncio.Event()  # set once it is known who leads
        self.failure = ""  # why this daemon cannot lead; empty while it can, or another daemon does
        self.numbered_at = float("-inf")  # when this daemon last found that no event waits for its number
        self.leader_seen_at = time.monotonic()  # when it was last known that some daemon leads
        self._known: UUID | None = None  # the newest term that this daemon has seen ...
        self._known_seq = 0  # ... and a number of it that cannot have been lost
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
                with cancellation_first():
                    await self._lead_on_one_connection()
            except Superseded:
                log.warning("leader_lost", reason="superseded")
            except DATABASE_ERRORS as error:
                attempt = 0 if self.leading.is_set() else attempt + 1
                if self.failure != (reason := describe(error)):
                    log.warning("leader_lost", reason=reason)
                self.failure = reason
            finally:
                self.leading.clear()
                self.backend_pid = self._notifying_pid = None
                metrics.LEADER.set(0)
                metrics.show_poller_state(None)
            await asyncio.sleep(backoff_delay(attempt))

    async def _lead_on_one_connection(self) -> None:
        """Wait for the lease, then run terms. Ends by raising Superseded or one of DATABASE_ERRORS."""
        connection = await self._connect()
        lock = WakeupLock(self._connect, self._events.set)
        locking: asyncio.Task[None] | None = None
        term: _Term | None = None
        try:
            self.backend_pid = connection.get_server_pid()
            term = await self._wait_for_leadership(connection)
            self.deletions.set()  # an earlier leader may have left some
            locking = asyncio.create_task(lock.run())
            while True:
                await self._run_term(connection, term, lock)
                term = await self._open_term(connection, term.nonce)
                if term is None:
                    raise Superseded
        finally:
            if term is not None:
                await self._release(connection, term)
            connection.terminate()
            if locking is not None:
                locking.cancel()
                await asyncio.wait({locking})

    async def _release(self, connection: Connection, term: _Term) -> None:
        """Let another daemon lead at once. A closed connection ends the lease too, unless a pooler keeps it open."""
        with suppress(*DATABASE_ERRORS):
            async with asyncio.timeout(RELEASE_TIMEOUT):
                await connection.execute(query("release_lease"), term.nonce)

    async def _wait_for_leadership(self, connection: Connection) -> _Term:
        """Follow until nobody holds the lease, and take it."""
        following = False
        while True:
            holder = await connection.fetchval(query("lease_holder"), timeout=ANSWER_TIMEOUT)
            if holder is None:
                term = await self._open_term(connection, None)
                if term is not None:
                    return term
            elif holder != self._known:
                self._known, self._known_seq = holder, 0
            self.leader_seen_at, self.failure = time.monotonic(), ""
            if not following:
                following = await connection.fetchval(
                    query("share_follower_lock"), FOLLOWER_LOCK, timeout=ANSWER_TIMEOUT
                )
                self._numbers.set()  # the leader did not notify us of anything before this
            self.settled.set()
            # Polled, since a statement that waits for the lease would hold a snapshot, and hold back vacuum.
            await asyncio.sleep(min(self._poll_every, LOOK_DELAY) * random.uniform(0.5, 1.0))  # noqa: S311

    async def _run_term(self, connection: Connection, term: _Term, lock: WakeupLock) -> None:
        """Number events until the next segment is due."""
        for row in await connection.fetch(query("reset_emptied"), timeout=ANSWER_TIMEOUT):
            log.warning("table_emptied", table=row["table_name"])
        statements = await self._prepare(connection)
        poller, shown = AdaptivePoller(time.monotonic(), max_sleep=self._poll_every), None
        with fine_sleep() as sleep:
            while not self._next_segment:
                self._events.clear()
                began = time.monotonic()
                numbered = await self._number_batch(connection, statements, term)
                ended = time.monotonic()
                self._record_batch(term, numbered)
                await self._tidy(connection, term, numbered)
                self.numbered_at = self.leader_seen_at = ended
                self.failure = ""
                self.leading.set()
                self.settled.set()
                poller.record_poll(ended, numbered.transactions, ended - began, held=lock.held)
                lock.want(poller.wants_sleep_lock and not self._is_notify_blocked())
                if poller.state is not shown:
                    shown = poller.state
                    metrics.show_poller_state(shown)
                await self._pause(connection, term, poller, sleep)

    async def _prepare(self, connection: Connection) -> _Statements:
        """The statements that number. The short one does not look for text that cannot be read: UTF8 has none."""
        full = await connection.prepare(query("number_events"), timeout=ANSWER_TIMEOUT)
        is_utf8 = getattr(connection.get_settings(), "server_encoding", "") == "UTF8"  # some poolers do not say
        return _Statements(
            full, await connection.prepare(query("number_few"), timeout=ANSWER_TIMEOUT) if is_utf8 else None
        )

    def _record_batch(self, term: _Term, numbered: _Numbered) -> None:
        """Remember how far the term has come, and pass on what is new."""
        before, term.last_seq, term.snapshot = term.last_seq, numbered.last_seq, numbered.snapshot
        if numbered.transactions:
            if self._sync or numbered.is_flushed:
                term.flushed = self._known_seq = term.last_seq
            self._deliver(Seq(before), numbered)
            if not term.batches:
                term.on_record = term.last_seq  # what the term began with was on record before anything was numbered
            term.batches += 1
        if numbered.has_deletes:
            self.deletions.set()

    async def _tidy(self, connection: Connection, term: _Term, numbered: _Numbered) -> None:
        """What is due after a batch: old snapshots, dead letters, the lease."""
        if numbered.transactions and term.batches % KEPT_BATCHES == 0:
            await connection.execute(query("forget_batches"), term.last_seq, timeout=ANSWER_TIMEOUT)
        if term.has_set_aside:
            term.has_set_aside = False
            for letter in await connection.fetch(query("store_set_aside"), timeout=ANSWER_TIMEOUT):
                table, reason = letter["table_name"], letter["reason"]
                metrics.SET_ASIDE.labels(table=table).inc()
                log.error("event_set_aside", seq=letter["seq"], table=table, reason=reason)
        await self._renew_if_due(connection, term)

    async def _renew_if_due(self, connection: Connection, term: _Term) -> None:
        """Renew the lease. Raises Superseded if it is another's, or if the log was replaced or truncated."""
        if time.monotonic() < term.renew_at:
            return
        renewed = await connection.fetchrow(
            query("renew_lease"), term.nonce, LEASE, term.on_record, timeout=ANSWER_TIMEOUT
        )
        assert renewed is not None
        if not renewed["leads"] or not renewed["intact"]:
            self._known_seq = term.on_record
            raise Superseded
        term.on_record = term.last_seq
        term.renew_at = time.monotonic() + RENEW_DELAY

    async def _open_term(self, connection: Connection, held: UUID | None) -> _Term | None:
        """Open a new term, in the next segment if that is due. None if another daemon leads."""
        await connection.execute("set synchronous_commit = on", timeout=ANSWER_TIMEOUT)
        opening = self._next_segment or await connection.fetchval(query("segment_due"), None, timeout=ANSWER_TIMEOUT)
        self._next_segment = False
        if opening:
            await connection.execute(query("make_segment"), timeout=ANSWER_TIMEOUT)
            await connection.execute(query("leave_segment"), timeout=ANSWER_TIMEOUT)
        nonce, began = uuid4(), time.monotonic()
        opened = await connection.fetchrow(
            query("open_term"),
            nonce,
            held,
            LEASE,
            bool(opening),
            self._known,
            self._known_seq,
            timeout=ANSWER_TIMEOUT,
        )
        assert opened is not None
        if opened["term"] is None:
            return None
        base = opened["base"]
        self._known, self._known_seq = nonce, base
        if not self._sync:
            await connection.execute("set synchronous_commit = off", timeout=ANSWER_TIMEOUT)
        log.info("leader_elected", term=opened["term"], base=base)
        metrics.LEADER.set(1)
        self._events.set()
        return _Term(
            nonce, opened["term"], opened["first_segment"], base, opened["snapshot"], base, base, began + RENEW_DELAY
        )

    async def _number_batch(self, connection: Connection, statements: _Statements, term: _Term) -> _Numbered:
        """Number the events that have become visible. One that cannot be numbered is set aside. Raises Superseded."""
        full = statements.full
        try:
            if term.is_ordinary and statements.few is not None and self._max_offered:
                if (numbered := await self._number_few(statements.few, term)) is not None:
                    return numbered
                term.is_ordinary = False
            numbered = await self._number(full, term, offered=self._max_offered)
        except asyncpg.PostgresError as error:
            if not may_blame_an_event(error):
                raise
        else:
            is_small = len(numbered.changes) > 0 or not numbered.transactions
            term.is_ordinary = is_small and not numbered.has_deletes and not numbered.is_flushed
            return numbered
        try:
            return await self._number(full, term)  # what cannot be read is left to the reader of the log
        except asyncpg.PostgresError as error:
            if not may_blame_an_event(error):
                raise
            events = await connection.fetch(
                query("fresh_events"), *_limits(term.snapshot), term.first_segment, timeout=NUMBER_TIMEOUT
            )

            async def attempt(ids: Sequence[int]) -> None:
                await self._renew_if_due(connection, term)
                async with undone(connection):
                    await self._number(full, term, ids=ids)

            term.has_set_aside = True
            await set_aside_events(connection, events, attempt, term.nonce, term.last_seq, error)
            return await self._number(full, term)

    async def _number(
        self,
        statement: "PreparedStatement[asyncpg.Record]",
        term: _Term,
        *,
        offered: int = 0,
        ids: Sequence[int] | None = None,
    ) -> _Numbered:
        """Number the events that have become visible since the term's last snapshot; only those of `ids` if given.

        The first batch of a term is flushed, and so is one with which more than MAX_UNFLUSHED numbers could be lost.
        """
        with _NUMBERING.time():
            rows = await statement.fetch(
                *self._arguments(term, offered), ids, MAX_READ_BYTES, LARGE_RECORD, timeout=NUMBER_TIMEOUT
            )
        return _Numbered.from_full(rows)

    async def _number_few(self, statement: "PreparedStatement[asyncpg.Record]", term: _Term) -> _Numbered | None:
        """The same by the shorter statement; None, and nothing is written, if the batch is not an ordinary one."""
        with _NUMBERING.time():
            rows = await statement.fetch(
                *self._arguments(term, self._max_offered), MAX_READ_BYTES, LARGE_RECORD, timeout=NUMBER_TIMEOUT
            )
        return _Numbered.from_few(rows, term.last_seq)

    @staticmethod
    def _arguments(term: _Term, offered: int) -> tuple[object, ...]:
        """The first nine arguments of both statements."""
        may_be_lost = MAX_UNFLUSHED if term.batches else 0
        return (
            term.nonce,
            term.last_seq,
            *_limits(term.snapshot),
            term.first_segment,
            offered,
            FOLLOWER_LOCK,
            term.number,
            term.flushed + may_be_lost,
        )

    def _deliver(self, before: Seq, numbered: _Numbered) -> None:
        """Have the followers notified if there are any, and offer the changes to this process."""
        if numbered.has_followers:
            self._readers_due.set()  # first, so that they work while this process delivers to its own clients
        if numbered.changes:
            # Later, so that it overlaps with Postgres working on the next batch.
            asyncio.get_running_loop().call_soon(self._offer, before, numbered.changes)
        else:
            self._numbers.set()

    async def _pause(self, connection: Connection, term: _Term, poller: AdaptivePoller, sleep: Sleep) -> None:
        """Wait until the next poll is due or, unless awake, until something sets `events`. Renews the lease."""
        if poller.state is State.AWAKE:
            if poller.delay:
                await sleep(poller.delay)
            return
        due = time.monotonic() + poller.delay
        while not self._events.is_set() and time.monotonic() < due:
            # Not wait_for: in Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(due, term.renew_at) - time.monotonic()):
                    await self._events.wait()
            await self._renew_if_due(connection, term)

    async def _notify_readers(self) -> None:
        """Notify the followers, on a connection of its own: NOTIFY can block on a lock of the whole cluster.

        It is kept for a moment: what is due next is then sent in one step, before anything is offered.
        """
        while True:
            await self._readers_due.wait()
            self._readers_due.clear()
            try:
                async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                    self._notifying_pid = connection.get_server_pid()
                    kept_until = time.monotonic() + ANSWER_TIMEOUT / 2
                    await connection.execute(query("notify_readers"))
                    while await self._are_readers_due(kept_until):
                        await connection.execute(query("notify_readers"))
            except DATABASE_ERRORS as error:
                log.debug("log_unavailable", reason=describe(error))  # they poll as well

    async def _are_readers_due(self, until: float) -> bool:
        """Wait for that, at most until then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic()):
                await self._readers_due.wait()
                self._readers_due.clear()
                return True
        return False
