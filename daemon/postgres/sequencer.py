"""Gives events their order. One leader per database; everybody else reads what it wrote."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import asyncpg

from daemon import metrics
from daemon.core.change import Change, Kind, Seq
from daemon.core.vigil import State, Vigil
from daemon.logs import get_logger
from daemon.postgres.connect import Connection, Pool, lent
from daemon.postgres.doorbell import LONGEST_PAUSE, Connect
from daemon.postgres.event_log import BROKEN, change_of, reason
from daemon.postgres.queries import query
from daemon.postgres.ring_lock import RingLock

log = get_logger()

LEADER_LOCK = 0x526F7763617374  # "Rowcast": an advisory lock of the database
FOLLOWER_LOCK = 0x526F7763617376  # another one, shared by all who are to be told that the log has grown
ANSWER_WITHIN = 30.0  # seconds for one statement: a link that is dead must not keep the leader's lock for ever
NUMBER_WITHIN = 900.0  # seconds for numbering: one transaction may hold millions of events, and has to end some day
KEPT_BATCHES = 1000  # the store of snapshots is cleared every so many

Hand = Callable[[Seq, Sequence[Change]], None]
"""Is given changes that have just got their numbers, and the place before them."""


def without_content_of_gone(changes: Sequence[Change]) -> list[Change]:
    """The same as `rowcast.changes` has them: a row that is deleted among them has no content before that."""
    gone: set[tuple[str, str, str]] = set()
    told: list[Change] = []
    for change in reversed(changes):
        row = change.schema, change.table, change.key
        if change.kind is Kind.DELETE:
            gone.add(row)
        told.append(change._replace(record=None) if row in gone else change)
    return told[::-1]


def _place(row: asyncpg.Record) -> int:
    return row["seq"] or 0


class Superseded(Exception):
    """A newer term has begun: this leader may not number any more."""


class Sequencer:
    """Numbers events while it leads, and waits for its turn while another does.

    `events` is the bell that writers ring while the leader is asleep (see Vigil). When the log has grown, `hand` is
    given what it has grown by, so that nobody here has to read it; where that is more than `most_handed` changes, the
    bell `numbers` is rung instead. Without a ring it looks every `poll_every` seconds. `sync` makes each batch wait
    for its flush: then nothing that a crash of Postgres could take back is ever shown.
    """

    def __init__(
        self,
        connect: Connect,
        pool: Pool,
        events: asyncio.Event,
        numbers: asyncio.Event,
        hand: Hand = lambda _, __: None,
        *,
        most_handed: int = 0,
        poll_every: float = 1.0,
        sync: bool = False,
    ) -> None:
        self._connect = connect
        self._pool = pool
        self._events = events
        self._numbers = numbers
        self._hand = hand
        self._most_handed = most_handed
        self._poll_every = poll_every
        self._sync = sync
        self._others = asyncio.Event()
        self.leading = asyncio.Event()  # set while this daemon leads and has numbered what it found
        self.settled = asyncio.Event()  # set once it is known who leads
        self.failure = ""  # why no event gets its number, once that has failed twice in a row
        self._next_segment = False
        self.gone = asyncio.Event()  # set when rows were deleted whose earlier content is still in the log
        self.backend_pid: int | None = None
        self._tells: int | None = None  # the backend that told the others last

    def told(self, pid: int) -> bool:
        """Did this backend tell the others for us?"""
        return pid == self._tells

    def open_next_segment(self) -> None:
        """Let the leader go on in the segment that is made ahead, under a new term."""
        self._next_segment = True
        self._events.set()

    async def run(self) -> None:
        """Lead, or wait to lead, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell_others())
            group.create_task(self._reign_for_ever())

    async def _reign_for_ever(self) -> None:
        attempt = 0
        while True:
            try:
                await self._reign()
            except Superseded:
                pass
            except BROKEN as error:
                attempt = 1 if self.leading.is_set() else attempt + 1
                if attempt == 1:
                    log.warning("leader_lost", reason=reason(error))
                self.failure = reason(error) if attempt > 1 else ""
            finally:
                self.leading.clear()
                self.backend_pid = self._tells = None
                metrics.LEADER.set(0)
                metrics.show_vigil(None)
            await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.2 * 2**attempt)))  # noqa: S311

    async def _reign(self) -> None:
        """One connection's life: wait for the lock, open a term, number until something breaks."""
        connection = await self._connect()
        lock = RingLock(self._connect, self._events.set)
        locking: asyncio.Task[None] | None = None
        try:
            self.backend_pid = connection.get_server_pid()
            following = False
            # Tried and not waited for: a waiting statement would hold a snapshot, and with it back the vacuum.
            while not await connection.fetchval(query("lead"), LEADER_LOCK, timeout=ANSWER_WITHIN):
                if not following:
                    await connection.execute(query("follow"), FOLLOWER_LOCK, timeout=NUMBER_WITHIN)
                    following = True
                    self._numbers.set()  # of what came before nobody has told us
                self.settled.set()
                await asyncio.sleep(self._poll_every * random.uniform(0.5, 1.0))  # noqa: S311
            self.gone.set()  # an earlier leader may have left some
            locking = asyncio.create_task(lock.run())
            while True:
                await self._number(connection, lock)
        finally:
            connection.terminate()
            if locking is not None:
                locking.cancel()
                await asyncio.wait({locking})

    async def _number(self, connection: Connection, lock: RingLock) -> None:
        """One term: number what comes, until it is time for the next segment."""
        await connection.execute("set synchronous_commit = on", timeout=ANSWER_WITHIN)
        opening, self._next_segment = self._next_segment, False
        if opening:
            await connection.execute(query("leave_segment"), timeout=ANSWER_WITHIN)
        opened = await connection.fetchrow(query("open_term"), opening, timeout=ANSWER_WITHIN)
        assert opened is not None
        term, last_seq, snapshot = opened["term"], opened["base"], opened["snapshot"]
        if not self._sync:
            await connection.execute("set synchronous_commit = off", timeout=ANSWER_WITHIN)
        log.info("leader_elected", term=term, base=last_seq)
        metrics.LEADER.set(1)
        self._events.set()
        number = await connection.prepare(query("number_events"), timeout=ANSWER_WITHIN)
        loop, batches = asyncio.get_running_loop(), 0
        vigil = Vigil(time.monotonic(), longest_sleep=self._poll_every)
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
                self._most_handed,
                FOLLOWER_LOCK,
                timeout=NUMBER_WITHIN,
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
                        changes = without_content_of_gone(changes)
                    loop.call_soon(self._hand, Seq(before), changes)  # while Postgres looks for the next
                else:
                    self._numbers.set()
                if row["followed"]:
                    self._others.set()
                batches += 1
                if batches % KEPT_BATCHES == 0:
                    await connection.execute(query("forget_batches"), last_seq, timeout=ANSWER_WITHIN)
            if row["gone"]:
                self.gone.set()
            self.leading.set()
            self.settled.set()
            vigil.looked(ended, row["transactions"], ended - began, held=lock.held)
            lock.want(vigil.wants_lock)
            metrics.show_vigil(vigil.state)
            if vigil.state is State.AWAKE:
                if vigil.pause:
                    await asyncio.sleep(vigil.pause)
                continue
            # Not wait_for: in Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(vigil.pause):
                    await self._events.wait()

    async def _tell_others(self) -> None:
        """Wake the daemons that only read. Its own connection, since NOTIFY may have to wait for its lock."""
        while True:
            await self._others.wait()
            self._others.clear()
            try:
                async with lent(self._pool, ANSWER_WITHIN) as connection:
                    self._tells = connection.get_server_pid()
                    await connection.execute(query("tell"))
            except BROKEN as error:
                log.debug("log_unavailable", reason=reason(error))  # they poll as well
