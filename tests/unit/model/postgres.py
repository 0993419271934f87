"""A Postgres of a few hundred lines: what matters to delivery of transactions, snapshots, crashes and failovers.

Transactions take their id at their first write or before, lock the rows that they write until they end, and become
visible when they commit. What a crash keeps is a prefix of the commits that holds at least all that were flushed.
The numbering follows `number_events`, `open_term` and `continuity` word for word.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from daemon.core.change import Change, Kind, Position, Right, Seq, Topic

CONTENT = (Kind.INSERT, Kind.UPDATE, Kind.RESTORE)
EVERYTHING = Topic("*app")  # the topic of what puts the whole pack in doubt


@dataclass(frozen=True)
class Event:
    """One row of `rowcast.events`. `uid` tells it from all others, whatever a crash does to ids.

    `right` counts the rights: the one that begins with this event, or the last of those that end with it.
    """

    uid: int
    id: int
    xid: int
    topic: Topic
    kind: Kind
    table: str
    key: int | str | None
    version: int = 0
    right: int = 0
    ends: Right | None = None


@dataclass(frozen=True)
class Entry:
    """One row of `rowcast.log`. `at` is when it was written, in steps of the world."""

    seq: int
    tx_end: int
    event: Event
    at: int


@dataclass(frozen=True)
class Snapshot:
    """As `pg_current_snapshot` has it."""

    xmin: int
    xmax: int
    xip: frozenset[int]


@dataclass(frozen=True)
class Term:
    term: int
    base: int
    epoch: str


@dataclass(frozen=True)
class Stored:
    """A row of the application's table. A row that is gone keeps its version, so that versions never repeat."""

    topic: Topic
    version: int = 0
    there: bool = False
    deleted: bool = False


@dataclass
class State:
    """What is committed."""

    rows: dict[int, Stored] = field(default_factory=dict)
    rights: dict[tuple[str, Topic], int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    log: list[Entry] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    snapshot: Snapshot | None = None
    prepared: list["Transaction"] = field(default_factory=list)
    floor: int = 0
    next_xid: int = 3
    next_id: int = 1

    def copy(self) -> "State":
        return replace(
            self,
            rows=dict(self.rows),
            rights=dict(self.rights),
            events=list(self.events),
            log=list(self.log),
            terms=list(self.terms),
            prepared=list(self.prepared),
        )


@dataclass(eq=False)
class Transaction:
    """An open transaction: what it has written is nobody else's affair yet."""

    xid: int = 0
    events: list[Event] = field(default_factory=list)
    rows: dict[int, Stored] = field(default_factory=dict)
    rights: dict[tuple[str, Topic], int] = field(default_factory=dict)


@dataclass
class Leader:
    """What the sequencer keeps in memory."""

    term: int
    last_seq: int
    snapshot: Snapshot


Fresh = Callable[[Iterable[Event], Snapshot, Snapshot, Sequence[Entry]], list[Event]]
"""Which of the visible events are new, in their order: of the last snapshot, the present one, and the log."""


def by_snapshot_difference(
    visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]
) -> list[Event]:
    """What became visible between two snapshots: transactions by their largest event id, topics together."""
    fresh = [event for event in visible if event.xid >= last.xmax or event.xid in last.xip]
    tx: defaultdict[int, int] = defaultdict(int)
    tx_topic: dict[tuple[int, Topic], int] = {}
    for event in fresh:
        tx[event.xid] = max(tx[event.xid], event.id)
        tx_topic[event.xid, event.topic] = min(tx_topic.get((event.xid, event.topic), event.id), event.id)
    return sorted(fresh, key=lambda event: (tx[event.xid], tx_topic[event.xid, event.topic], event.id))


class Postgres:
    """The database. `far` is how far the numbers of a new term lie above all others."""

    def __init__(self, fresh: Fresh, far: int, *, purges: bool) -> None:
        self._fresh = fresh
        self._far = far
        self._purges = purges
        self.step = 0
        self.state = State()
        self.history = [self.state]  # the state after each commit
        self.flushed = 0  # where in the history a crash cannot go behind
        self.timeline = 1
        self.open: list[Transaction] = []
        self.next_xid = self.state.next_xid
        self.next_id = self.state.next_id
        self.uids = 0
        self.rights = 0
        self.ever_committed: set[int] = set()
        self.numbered: dict[Position, Event] = {}  # every number that was ever given
        self._locks: dict[object, Transaction] = {}

    # What applications do.

    def begin(self, *, early: bool = False) -> Transaction:
        tx = Transaction()
        self.open.append(tx)
        if early:
            self._assign(tx)
        return tx

    def _assign(self, tx: Transaction) -> int:
        if not tx.xid:
            tx.xid = self.next_xid
            self.next_xid += 1
        return tx.xid

    def lock(self, tx: Transaction, *things: object) -> bool:
        """Take these locks; False, and none of them, where another transaction would have to be waited for."""
        if any(self._locks.get(thing, tx) is not tx for thing in things):
            return False
        self._locks.update(dict.fromkeys(things, tx))
        return True

    def _capture(
        self,
        tx: Transaction,
        topic: Topic,
        kind: Kind,
        table: str,
        key: int | str | None,
        *,
        version: int = 0,
        right: int = 0,
        ends: Right | None = None,
    ) -> None:
        self.uids += 1
        event = Event(self.uids, self.next_id, self._assign(tx), topic, kind, table, key, version, right, ends)
        self.next_id += 1
        tx.events.append(event)

    def write(self, tx: Transaction, row: int, topic: Topic) -> bool:
        """Insert the row, update it, move it to this topic, or take its deletion back. False if it is locked."""
        if not self.lock(tx, ("row", row)):
            return False
        old = tx.rows.get(row) or self.state.rows.get(row) or Stored(topic)
        version = old.version + 1
        tx.rows[row] = Stored(topic, version, there=True)
        if not old.there:
            self._capture(tx, topic, Kind.INSERT, "rows", row, version=version)
        elif old.deleted:
            self._capture(tx, topic, Kind.RESTORE, "rows", row, version=version)
        elif old.topic == topic:
            self._capture(tx, topic, Kind.UPDATE, "rows", row, version=version)
        else:
            self._capture(tx, old.topic, Kind.LEAVE, "rows", row, version=version)
            self._capture(tx, topic, Kind.INSERT, "rows", row, version=version)
        return True

    def delete(self, tx: Transaction, row: int) -> bool:
        """Delete the row softly. False if it is locked, or there is none."""
        old = tx.rows.get(row) or self.state.rows.get(row)
        if old is None or not old.there or old.deleted or not self.lock(tx, ("row", row)):
            return False
        tx.rows[row] = replace(old, version=old.version + 1, deleted=True)
        self._capture(tx, old.topic, Kind.DELETE, "rows", row, version=old.version + 1)
        return True

    def truncate(self) -> bool:
        """Truncate the table, in a transaction of its own. False if somebody has written to it."""
        if any(isinstance(thing, tuple) and thing[0] == "row" for thing in self._locks):
            return False
        tx = self.begin()
        self._capture(tx, EVERYTHING, Kind.TRUNCATE, "rows", None)
        for row, stored in self.state.rows.items():
            tx.rows[row] = Stored(stored.topic, stored.version)
        self.commit(tx)
        return True

    def grant(self, tx: Transaction, user: str, topic: Topic) -> bool:
        """Make the user a member of the topic. False if that is locked, or so already."""
        if self._right(tx, user, topic) or not self.lock(tx, ("user", user)):
            return False
        self.rights += 1
        tx.rights[user, topic] = self.rights
        self._capture(tx, topic, Kind.INSERT, "members", user, right=self.rights)
        return True

    def revoke(self, tx: Transaction, user: str, topic: Topic | None) -> bool:
        """End the user's membership in the topic, or in all. False if that is locked, or there is none."""
        mine = [one for one in self.state.rights.keys() | tx.rights.keys() if one[0] == user]
        ending = [one for one in mine if topic in (None, one[1]) and self._right(tx, *one)]
        if not ending or not self.lock(tx, ("user", user)):
            return False
        tx.rights.update(dict.fromkeys(ending, 0))
        where, table = (Topic(f"u:{user}"), "users") if topic is None else (topic, "members")
        self._capture(tx, where, Kind.DELETE, table, user, right=self.rights, ends=Right(user, topic))
        return True

    def _right(self, tx: Transaction, user: str, topic: Topic) -> int:
        return tx.rights.get((user, topic), self.state.rights.get((user, topic), 0))

    def savepoint_rollback(self, tx: Transaction, row: int) -> None:
        """Write within a savepoint and take it back: an event id and a transaction id are used up."""
        if self.lock(tx, ("row", row)):
            self._assign(tx)
            self.next_id += 1

    def commit(self, tx: Transaction, *, flush: bool = True) -> None:
        """End a transaction; without `flush` a crash may take it back."""
        after = self._next()
        after.rows |= tx.rows
        after.rights |= tx.rights
        after.events += tx.events
        if tx in after.prepared:
            after.prepared.remove(tx)
        self.ever_committed.update(event.uid for event in tx.events)
        self._end(tx)
        self._log_commit(after, flush=flush)

    def rollback(self, tx: Transaction) -> None:
        """End a transaction as if it had never been."""
        if tx in self.state.prepared:
            after = self._next()
            after.prepared.remove(tx)
            self._log_commit(after, flush=True)
        self._end(tx)

    def prepare(self, tx: Transaction) -> None:
        """Make a transaction survive crashes, without making it visible."""
        if tx.xid and tx not in self.state.prepared:
            after = self._next()
            after.prepared.append(tx)
            self._log_commit(after, flush=True)

    def _end(self, tx: Transaction) -> None:
        self.open.remove(tx)
        for thing in [thing for thing, owner in self._locks.items() if owner is tx]:
            del self._locks[thing]

    def _next(self) -> State:
        return self.state.copy()

    def _log_commit(self, after: State, *, flush: bool) -> None:
        after.next_xid, after.next_id = self.next_xid, self.next_id
        self.state = after
        self.history.append(after)
        if flush:
            self.flushed = len(self.history) - 1

    # What befalls a database.

    def crash(self, lost: int) -> None:
        """Start anew without the last `lost` commits, or as many of them as were not flushed."""
        self._begin_from(max(len(self.history) - 1 - lost, self.flushed))

    def fail_over(self, lost: int) -> None:
        """Go on with a standby that never got the last `lost` commits, flushed or not."""
        self._begin_from(max(len(self.history) - 1 - lost, 1))
        self.timeline += 1

    def _begin_from(self, place: int) -> None:
        del self.history[place + 1 :]
        self.state = self.history[place]
        self.flushed = place
        self.open = list(self.state.prepared)
        self._locks = {thing: tx for thing, tx in self._locks.items() if tx in self.open}
        # What was never recorded may be given out again, ids of transactions and events alike.
        self.next_xid, self.next_id = self.state.next_xid, self.state.next_id

    def retain_above(self, floor: int) -> None:
        """Drop the oldest part of the log, up to and including this number, where a transaction ends."""
        ends = [entry.tx_end for entry in self.state.log if entry.tx_end <= floor]
        if ends:
            after = self._next()
            after.floor = max(ends)
            after.log = [entry for entry in after.log if entry.seq > after.floor]
            self._log_commit(after, flush=True)

    # What the sequencer does.

    def snapshot(self) -> Snapshot:
        running = {tx.xid for tx in self.open if tx.xid}
        # Everything below is known to have ended or to be running: nothing above the last that ended has ended.
        xmax = max((xid + 1 for xid in range(3, self.next_xid) if xid not in running), default=3)
        xip = frozenset(xid for xid in running if xid < xmax)
        return Snapshot(min(xip, default=xmax), xmax, xip)

    def open_term(self) -> Leader:
        """Begin a reign, on record before anything is numbered."""
        after = self._next()
        previous = after.terms[-1] if after.terms else None
        top = max((after.log[-1].seq if after.log else 0), previous.base if previous else 0)
        base = top + self._far if previous else 0
        term = Term(previous.term + 1 if previous else 1, base, f"e{self.timeline}")
        after.terms.append(term)
        after.snapshot = after.snapshot or Snapshot(3, 3, frozenset())
        self.next_xid += 1
        self._log_commit(after, flush=True)
        return Leader(term.term, base, after.snapshot)

    def number(self, leader: Leader) -> None:
        """Give what is new its numbers."""
        now = self.snapshot()
        fresh = self._fresh(self.state.events, leader.snapshot, now, self.state.log)
        leader.snapshot = now
        if fresh:
            after = self._next()
            ends = {event.xid: seq for seq, event in enumerate(fresh, leader.last_seq + 1)}
            for seq, event in enumerate(fresh, leader.last_seq + 1):
                after.log.append(Entry(seq, ends[event.xid], event, self.step))
                self.numbered[Position(after.terms[-1].epoch, Seq(seq))] = event
            after.snapshot = now
            leader.last_seq += len(fresh)
            self.next_xid += 1
            self._log_commit(after, flush=False)

    # What the daemons ask.

    def head(self) -> Position:
        terms, log = self.state.terms, self.state.log
        return Position(terms[-1].epoch, Seq(max(terms[-1].base, log[-1].seq if log else 0)))

    def reasons(self, since: Position) -> list[str]:
        """Every reason why a stream cannot go on from there."""
        terms, found = self.state.terms, []
        if since.epoch != terms[-1].epoch:
            found.append("epoch")
        mine = [term for term in terms if term.base <= since.seq]
        if not mine:
            found.append("crash")
        else:
            bound = min((term.base for term in terms if term.term > mine[-1].term), default=None)
            numbers = [self.state.floor, *(entry.seq for entry in self.state.log)]
            recorded = max((number for number in numbers if bound is None or number < bound), default=0)
            if since.seq > max(mine[-1].base, recorded):
                found.append("crash")
        if since.seq < self.state.floor:
            found.append("retention")
        return found

    def entries(self, after: int, upto: int | None = None, topics: Iterable[Topic] | None = None) -> list[Entry]:
        return [
            entry
            for entry in self.state.log
            if entry.seq > after
            and (upto is None or entry.seq <= upto)
            and (topics is None or entry.event.topic in topics)
        ]

    def tombstone(self, entry: Entry) -> Entry | None:
        """The first deletion of the row that the log has behind this entry."""
        return next(
            (
                later
                for later in self.state.log
                if later.seq > entry.seq
                and later.event.kind is Kind.DELETE
                and (later.event.table, later.event.key) == (entry.event.table, entry.event.key)
            ),
            None,
        )

    def purged(self, entry: Entry) -> bool:
        """Is the content of this entry gone, since its row is?"""
        return entry.event.table == "rows" and entry.event.kind in CONTENT and self.tombstone(entry) is not None

    def change(self, entry: Entry) -> Change:
        """What the log says of one entry."""
        event = entry.event
        record = None
        if event.kind in CONTENT and not (self._purges and self.purged(entry)):
            columns = f',"version":{event.version}' if event.table == "rows" else ""
            record = f'{{"id":{_json(event.key)}{columns}}}'
        return Change(
            seq=Seq(entry.seq),
            tx=str(event.xid),
            at=str(event.uid),  # no time, but the one thing by which a frame tells which event it shows
            schema="app",
            table=event.table,
            topic=event.topic,
            kind=event.kind,
            key="{}" if event.key is None else f'{{"id":{_json(event.key)}}}',
            record=record,
            ends=event.ends,
        )


def _json(key: int | str | None) -> str:
    return str(key) if isinstance(key, int) else f'"{key}"'
