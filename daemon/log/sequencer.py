"""Gives events their order. One leader per database; everybody else reads what it wrote."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import asyncpg

from daemon import metrics
from daemon.core.adaptive_polling import AdaptivePoller, State
from daemon.core.change import Change, Kind, Seq
from daemon.log.queries import query
from daemon.log.reader import change_of
from daemon.log.wakeup_lock import WakeupLock
from daemon.logs import get_logger
from daemon.postgres.backoff import backoff_delay
from daemon.postgres.connect import Connect, Connection, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe

log = get_logger()

LEADER_LOCK = 0x526F7763617374  # "Rowcast": an advisory lock of the database
FOLLOWER_LOCK = 0x526F7763617376  # another one, shared by all who are to be told that the log has grown
ANSWER_TIMEOUT = 30.0  # seconds for one statement: a link that is dead must not keep the leader's lock for ever
NUMBER_TIMEOUT = 900.0  # seconds for numbering: one transaction may hold millions of events, and has to end some day
KEPT_BATCHES = 1000  # the store of snapshots is cleared every so many

Offer = Callable[[Seq, Sequence[Change]], None]
"""Is given changes that have just got their numbers, and the place before them."""


def without_deleted_content(changes: Sequence[Change]) -> list[Change]:
    """The same as `rowcast.changes` has them: a row that is deleted among them has no content before that."""
    deleted: set[tuple[str, str, str]] = set()
    kept: list[Change] = []
    for change in reversed(changes):
        row = change.schema, change.table, change.key
        if change.kind is Kind.DELETE:
            deleted.add(row)
        kept.append(change._replace(record=None) if row in deleted else change)
    return kept[::-1]


def _place(row: asyncpg.Record) -> int:
    return row["seq"] or 0


class Superseded(Exception):
    """A newer term has begun: this leader may not number any more."""


class Sequencer:
    """Numbers events while it leads, and waits for its turn while another does.

    `events` is set when a writer notifies, which happens only while the leader sleeps (see AdaptivePoller). `offer`
    is given what the log has grown by, so that nobody in this process has to read it; for more than `max_offered`
    changes `numbers` is set instead. Without a notification the leader polls every `poll_every` seconds. `sync` makes
    each batch wait for its flush: then nothing that a crash of Postgres could take back is ever shown.
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
        self.leading = asyncio.Event()  # set while this daemon leads and has numbered what it found
        self.settled = asyncio.Event()  # set once it is known who leads
        self.failure = ""  # why no event gets its number, once that has failed twice in a row
        self._next_segment = False
        self.deletions = asyncio.Event()  # set when rows were deleted whose earlier content is still in the log
        self.backend_pid: int | None = None
        self._notifying_pid: int | None = None  # the backend that told the others last

    def is_own_notification(self, pid: int) -> bool:
        """Did this backend tell the others for us?"""
        return pid == self._notifying_pid

    def open_next_segment(self) -> None:
        """Let the leader go on in the segment that is made ahead, under a new term."""
        self._next_segment = True
        self._events.set()

    async def run(self) -> None:
        """Lead, or wait to lead, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._notify_readers())
            group.create_task(self._lead())

    async def _lead(self) -> None:
        attempt = 0
        while True:
            try:
                await self._run_term()
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

    async def _run_term(self) -> None:
        """One connection's life: wait for the lock, open a term, number until something breaks."""
        connection = await self._connect()
        lock = WakeupLock(self._connect, self._events.set)
        locking: asyncio.Task[None] | None = None
        try:
            self.backend_pid = connection.get_server_pid()
            following = False
            # Tried and not waited for: a waiting statement would hold a snapshot, and with it back the vacuum.
            while not await connection.fetchval(query("try_lead"), LEADER_LOCK, timeout=ANSWER_TIMEOUT):
                if not following:
                    await connection.execute(query("share_follower_lock"), FOLLOWER_LOCK, timeout=NUMBER_TIMEOUT)
                    following = True
                    self._numbers.set()  # of what came before nobody has told us
                self.settled.set()
                await asyncio.sleep(self._poll_every * random.uniform(0.5, 1.0))  # noqa: S311
            self.deletions.set()  # an earlier leader may have left some
            locking = asyncio.create_task(lock.run())
            while True:
                await self._number(connection, lock)
        finally:
            connection.terminate()
            if locking is not None:
                locking.cancel()
                await asyncio.wait({locking})

    async def _number(self, connection: Connection, lock: WakeupLock) -> None:
        """One term: number what comes, until it is time for the next segment."""
        await connection.execute("set synchronous_commit = on", timeout=ANSWER_TIMEOUT)
        opening, self._next_segment = self._next_segment, False
        if opening:
            await connection.execute(query("leave_segment"), timeout=ANSWER_TIMEOUT)
        opened = await connection.fetchrow(query("open_term"), opening, timeout=ANSWER_TIMEOUT)
        assert opened is not None
        term, last_seq, snapshot = opened["term"], opened["base"], opened["snapshot"]
        if not self._sync:
            await connection.execute("set synchronous_commit = off", timeout=ANSWER_TIMEOUT)
        log.info("leader_elected", term=term, base=last_seq)
        metrics.LEADER.set(1)
        self._events.set()
        number = await connection.prepare(query("number_events"), timeout=ANSWER_TIMEOUT)
        loop, batches = asyncio.get_running_loop(), 0
        poller = AdaptivePoller(time.monotonic(), max_sleep=self._poll_every)
        while not self._next_segment:
            self._events.clear()
            began = time.monotonic()
            _, xmax, in_progress = snapshot.split(":")
            rows = await number.fetch(
                term,
                last_seq,
                xmax,
                [xid for xid in in_progress.split(",") if xid],
                opened["first_segment"],
                self._max_offered,
                FOLLOWER_LOCK,
                timeout=NUMBER_TIMEOUT,
            )
            ended = time.monotonic()
            row, *rows = sorted(rows, key=_place)
            if row["superseded"]:
                raise Superseded
            before, last_seq, snapshot = last_seq, row["last_seq"], row["snapshot"]
            if row["transactions"]:
                if rows:
                    changes = list(map(change_of, rows))
                    if row["gone"]:
                        changes = without_deleted_content(changes)
                    loop.call_soon(self._offer, Seq(before), changes)  # while Postgres looks for the next
                else:
                    self._numbers.set()
                if row["followed"]:
                    self._readers_due.set()
                batches += 1
                if batches % KEPT_BATCHES == 0:
                    await connection.execute(query("forget_batches"), last_seq, timeout=ANSWER_TIMEOUT)
            if row["gone"]:
                self.deletions.set()
            self.leading.set()
            self.settled.set()
            poller.record_poll(ended, row["transactions"], ended - began, held=lock.held)
            lock.want(poller.wants_sleep_lock)
            metrics.show_poller_state(poller.state)
            if poller.state is State.AWAKE:
                if poller.delay:
                    await asyncio.sleep(poller.delay)
                continue
            # Not wait_for: in Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(poller.delay):
                    await self._events.wait()

    async def _notify_readers(self) -> None:
        """Wake the daemons that only read. Its own connection, since NOTIFY may have to wait for its lock."""
        while True:
            await self._readers_due.wait()
            self._readers_due.clear()
            try:
                async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                    self._notifying_pid = connection.get_server_pid()
                    await connection.execute(query("notify_readers"))
            except DATABASE_ERRORS as error:
                log.debug("log_unavailable", reason=describe(error))  # they poll as well
