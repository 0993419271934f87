"""A Postgres of a few hundred lines: what matters to delivery of transactions, snapshots, crashes and failovers.

Transactions take their id at their first write or before, lock the rows that they write until they end, and become
visible when they commit. What a crash keeps is a prefix of the commits that holds at least all that were flushed.
The numbering follows `number_events`, `open_term` and `continuity` word for word.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from daemon.core.change import CONTENT, Change, Kind, Position, Right, Seq, Topic

FAR_ID, FAR_SEQ = 10_000, 100_000  # how many ids, and how many numbers, a segment has
ALL_TOPICS = Topic("*app")  # the topic of what puts the whole pack in doubt


@dataclass(frozen=True)
class Event:
    """One row of `rowcast.events`. `uid` tells it from all others, whatever a crash does to ids.

    `right` counts the rights: the one that begins with this event, or the last that there was when one ended with it.
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
    begins: Right | None = None
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
class Segment:
    """A segment of log and events, once it is opened. `last_seq` and `closed_xid` are there once it is closed."""

    number: int
    closed_xid: int | None = None
    last_seq: int = 0
    dropped: bool = False


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
    log: list[Entry] = field(default_factory=list)  # what is dropped stays here, behind the floor
    grants: list[tuple[int, Right]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=lambda: [Segment(0)])
    snapshot: Snapshot | None = None
    prepared: list["Transaction"] = field(default_factory=list)
    next_xid: int = 3
    next_id: int = 1

    @property
    def floor(self) -> int:
        return max((segment.last_seq for segment in self.segments if segment.dropped), default=0)

    def copy(self) -> "State":
        return replace(
            self,
            rows=dict(self.rows),
            rights=dict(self.rights),
            events=list(self.events),
            log=list(self.log),
            grants=list(self.grants),
            segments=list(self.segments),
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

    last_seq: int
    snapshot: Snapshot
    first_segment: int


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
        begins: Right | None = None,
        ends: Right | None = None,
    ) -> None:
        self.uids += 1
        xid = self._assign(tx)
        event = Event(self.uids, self.next_id, xid, topic, kind, table, key, version, right, begins, ends)
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

    def truncate(self, table: str) -> bool:
        """Truncate a table, in a transaction of its own. False if somebody has written to it."""
        kind = "row" if table == "rows" else "user"
        if any(isinstance(thing, tuple) and thing[0] == kind for thing in self._locks):
            return False
        tx = self.begin()
        if table == "rows":
            self._capture(tx, ALL_TOPICS, Kind.TRUNCATE, table, None)
            for row, stored in self.state.rows.items():
                tx.rows[row] = Stored(stored.topic, stored.version)
        else:
            self._capture(tx, ALL_TOPICS, Kind.TRUNCATE, table, None, right=self.rights, ends=Right(None, None))
            tx.rights = dict.fromkeys(self.state.rights, 0)
        self.commit(tx)
        return True

    def grant(self, tx: Transaction, user: str, topic: Topic) -> bool:
        """Make the user a member of the topic. False if that is locked, or so already."""
        if self._right(tx, user, topic) or not self.lock(tx, ("user", user)):
            return False
        self.rights += 1
        tx.rights[user, topic] = self.rights
        begins = Right(user, topic)
        self._capture(tx, topic, Kind.INSERT, "members", f"{user} {topic}", right=self.rights, begins=begins)
        return True

    def revoke(self, tx: Transaction, user: str, topic: Topic | None) -> bool:
        """End the user's membership in the topic, or in all. False if that is locked, or there is none."""
        mine = [one for one in self.state.rights.keys() | tx.rights.keys() if one[0] == user]
        ending = [one for one in mine if topic in (None, one[1]) and self._right(tx, *one)]
        if not ending or not self.lock(tx, ("user", user)):
            return False
        tx.rights.update(dict.fromkeys(ending, 0))
        right, ends = self.rights, Right(user, topic)
        if topic is None:
            self._capture(tx, Topic(f"u:{user}"), Kind.DELETE, "users", user, right=right, ends=ends)
        else:
            self._capture(tx, topic, Kind.DELETE, "members", f"{user} {topic}", right=right, ends=ends)
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
        """Go on with a standby that never got the last `lost` commits, flushed or not, but knows of every term."""
        opened = next(place for place, state in enumerate(self.history) if state.terms == self.state.terms)
        self._begin_from(max(len(self.history) - 1 - lost, opened))
        self.timeline += 1

    def _begin_from(self, place: int) -> None:
        del self.history[place + 1 :]
        self.state = self.history[place]
        self.flushed = place
        self.open = list(self.state.prepared)
        self._locks = {thing: tx for thing, tx in self._locks.items() if tx in self.open}
        # What was never recorded may be given out again, ids of transactions and events alike.
        self.next_xid, self.next_id = self.state.next_xid, self.state.next_id

    def drop_segments(self) -> None:
        """Drop the log of every closed segment."""
        if not any(one.closed_xid is not None and not one.dropped for one in self.state.segments):
            return
        after = self._next()
        after.segments = [replace(one, dropped=one.closed_xid is not None) for one in after.segments]
        floor = after.floor
        after.grants = [grant for grant in after.grants if grant[0] > floor]
        bases = [term.term for term in after.terms if term.base <= floor]
        after.terms = [term for term in after.terms if not bases or term.term >= max(bases)]
        self._log_commit(after, flush=True)

    # What the sequencer does.

    def snapshot(self) -> Snapshot:
        running = {tx.xid for tx in self.open if tx.xid}
        # Everything below is known to have ended or to be running: nothing above the last that ended has ended.
        xmax = max((xid + 1 for xid in range(3, self.next_xid) if xid not in running), default=3)
        xip = frozenset(xid for xid in running if xid < xmax)
        return Snapshot(min(xip, default=xmax), xmax, xip)

    def open_term(self, *, next_segment: bool = False) -> Leader:
        """Begin a reign, on record before anything is numbered; maybe in the next segment."""
        if next_segment:
            self.next_id = max(self.next_id, (self.state.segments[-1].number + 1) * FAR_ID)
        after = self._next()
        snapshot = after.snapshot or Snapshot(3, 3, frozenset())
        previous = after.terms[-1] if after.terms else None
        newest = max(previous.base if previous else 0, self._newest())
        base = newest + self._far if previous else 0
        self.next_xid += 1
        if next_segment:
            last = after.segments[-1]
            after.segments[-1] = replace(last, closed_xid=self.next_xid - 1, last_seq=newest)
            after.segments.append(Segment(last.number + 1))
            base = max(base, (last.number + 1) * FAR_SEQ)
        after.terms.append(Term(previous.term + 1 if previous else 1, base, f"e{self.timeline}"))
        after.snapshot = snapshot
        self._log_commit(after, flush=True)
        open_ = [one.number for one in after.segments if one.closed_xid is None or one.closed_xid > snapshot.xmin]
        return Leader(base, snapshot, min(open_))

    def _newest(self) -> int:
        return max((entry.seq for entry in self._kept()), default=0)

    def _kept(self) -> list[Entry]:
        floor = self.state.floor
        return [entry for entry in self.state.log if entry.seq > floor]

    def number(self, leader: Leader) -> list[Change]:
        """Give what is new its numbers; returns it as the log has it now."""
        now = self.snapshot()
        visible = [event for event in self.state.events if event.id // FAR_ID >= leader.first_segment]
        fresh = self._fresh(visible, leader.snapshot, now, self.state.log)
        leader.snapshot = now
        if fresh:
            after = self._next()
            numbers = list(enumerate(fresh, leader.last_seq + 1))
            begins = {event.xid: seq for seq, event in reversed(numbers)}
            ends = {event.xid: seq for seq, event in numbers}
            entries = [Entry(seq, ends[event.xid], event, self.step) for seq, event in numbers]
            after.log += entries
            for seq, event in numbers:
                self.numbered[Position(after.terms[-1].epoch, Seq(seq))] = event
                if event.begins:
                    after.grants.append((begins[event.xid], event.begins))
            after.snapshot = now
            leader.last_seq += len(fresh)
            self.next_xid += 1
            self._log_commit(after, flush=any(event.begins for event in fresh))
            return list(map(self.change, entries))
        return []

    # What the daemons ask.

    def head(self) -> Position:
        last = self.state.terms[-1]
        return Position(last.epoch, Seq(max(last.base, self._newest())))

    def reasons(self, since: Position) -> list[str]:
        """Every reason why a stream cannot go on from there."""
        terms, found = self.state.terms, []
        if since.epoch != terms[-1].epoch:
            found.append("epoch")
        if since.seq < self.state.floor:
            found.append("retention")
        mine = [term for term in terms if term.base <= since.seq]
        if not mine:
            return [*found, "crash"]
        bound = next((term.base for term in terms if term.term > mine[-1].term), float("inf"))
        logged = [entry.seq for entry in self._kept() if entry.seq < bound]
        closed = [one.last_seq for one in self.state.segments if mine[-1].base <= one.last_seq < bound]
        if since.seq > max([mine[-1].base, *logged, *closed]):
            found.append("crash")
        return found

    def entries(self, after: int, upto: int | None = None, topics: Collection[Topic] | None = None) -> list[Entry]:
        return [
            entry
            for entry in self._kept()
            if entry.seq > after
            and (upto is None or entry.seq <= upto)
            and (topics is None or entry.event.topic in topics)
        ]

    def may_read(self, user: str, topic: Topic) -> int:
        """The number of the right by which the user may read the topic; 0 if there is none."""
        return self.state.rights.get((user, topic), 0)

    def readable_from(self, user: str, topic: Topic) -> tuple[int, bool]:
        """Where the right to the topic began, and whether a beginning waits for its number."""
        right = Right(user, topic)
        seen = self.state.snapshot
        assert seen is not None
        pending = any(
            event.begins == right and (event.xid >= seen.xmax or event.xid in seen.xip) for event in self.state.events
        )
        return max((seq for seq, begun in self.state.grants if begun == right), default=0), pending

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
        return entry.event.kind in CONTENT and self.tombstone(entry) is not None

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
