"""A model of Postgres: the transactions, snapshots, crashes and failovers that matter to delivery.

A transaction gets its id at its first write or before, locks the rows that it writes until it ends, and becomes
visible when it commits. A crash keeps a prefix of the commits, which contains at least all that were flushed.
Numbering follows the SQL of `number_events`, `open_term` and `continuity` statement by statement.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from daemon.core.change import CONTENT, Change, Kind, Position, Right, Seq, Topic

SEGMENT_IDS, SEGMENT_SEQS = 10_000, 100_000  # how many event ids, and how many numbers, a segment has
ALL_TOPICS = Topic("*app")  # of a change that resets every topic of the pack


def is_refused(version: int) -> bool:
    """Whether the row model refuses a row of this version, which the table accepts."""
    return version % 4 == 0


@dataclass(frozen=True)
class Event:
    """One row of `rowcast.events`. `uid` is unique; an `id` may be reused after a crash.

    `right` is the number of the right that begins with this event, or of the newest right if one ends with it.
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

    @property
    def is_invalid(self) -> bool:
        """Whether the row model refuses the event."""
        return self.table == "rows" and self.kind in CONTENT and is_refused(self.version)


@dataclass(frozen=True)
class Entry:
    """One row of `rowcast.log`. `at` is the step of the world at which it was written."""

    seq: int
    tx_end: int
    event: Event
    at: int


@dataclass(frozen=True)
class Snapshot:
    """A snapshot, as `pg_current_snapshot()` returns it."""

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
    """A segment of log and events. `last_seq` and `closed_xid` are set when it is closed."""

    number: int
    closed_xid: int | None = None
    last_seq: int = 0
    dropped: bool = False


@dataclass(frozen=True)
class StoredRow:
    """A row of the application's table. It keeps its version when it no longer exists, so that no version repeats."""

    topic: Topic
    version: int = 0
    exists: bool = False
    deleted: bool = False


@dataclass
class State:
    """The committed state."""

    rows: dict[int, StoredRow] = field(default_factory=dict)
    rights: dict[tuple[str, Topic], int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    log: list[Entry] = field(default_factory=list)  # dropped entries stay here, up to the floor
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
    """An open transaction, whose writes are not visible to others."""

    xid: int = 0
    events: list[Event] = field(default_factory=list)
    rows: dict[int, StoredRow] = field(default_factory=dict)
    rights: dict[tuple[str, Topic], int] = field(default_factory=dict)


@dataclass
class Leader:
    """What the leading sequencer keeps in memory."""

    last_seq: int
    snapshot: Snapshot
    first_segment: int


SelectNew = Callable[[Iterable[Event], Snapshot, Snapshot, Sequence[Entry]], list[Event]]
"""Selects and orders the events to number, from the visible events, the last and current snapshot, and the log."""


def by_snapshot_difference(
    visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]
) -> list[Event]:
    """Events that became visible between two snapshots: by transaction (its largest event id), then by topic."""
    new = [event for event in visible if event.xid >= last.xmax or event.xid in last.xip]
    tx: defaultdict[int, int] = defaultdict(int)
    tx_topic: dict[tuple[int, Topic], int] = {}
    for event in new:
        tx[event.xid] = max(tx[event.xid], event.id)
        tx_topic[event.xid, event.topic] = min(tx_topic.get((event.xid, event.topic), event.id), event.id)
    return sorted(new, key=lambda event: (tx[event.xid], tx_topic[event.xid, event.topic], event.id))


class Postgres:
    """The database. The numbers of a new term begin `term_gap` above all others."""

    def __init__(self, select_new: SelectNew, term_gap: int, *, hides_deleted: bool) -> None:
        self._select_new = select_new
        self._term_gap = term_gap
        self._hides_deleted = hides_deleted
        self.step = 0
        self.state = State()
        self.history = [self.state]  # the state after each commit
        self.flushed = 0  # index in the history; a crash keeps everything up to it
        self.timeline = 1
        self.open: list[Transaction] = []
        self.next_xid = self.state.next_xid
        self.next_id = self.state.next_id
        self.uids = 0
        self.rights = 0
        self.ever_committed: set[int] = set()
        self.numbered: dict[Position, Event] = {}  # every number that was ever assigned
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
        """Take all of these locks. False, with none taken, if another transaction holds one."""
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
        """Insert, update or restore the row, or move it to this topic. False if it is locked."""
        if not self.lock(tx, ("row", row)):
            return False
        old = tx.rows.get(row) or self.state.rows.get(row) or StoredRow(topic)
        version = old.version + 1
        tx.rows[row] = StoredRow(topic, version, exists=True)
        if not old.exists:
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
        """Soft-delete the row. False if it is locked or there is none."""
        old = tx.rows.get(row) or self.state.rows.get(row)
        if old is None or not old.exists or old.deleted or not self.lock(tx, ("row", row)):
            return False
        tx.rows[row] = replace(old, version=old.version + 1, deleted=True)
        self._capture(tx, old.topic, Kind.DELETE, "rows", row, version=old.version + 1)
        return True

    def truncate(self, table: str) -> bool:
        """Truncate a table, in a transaction of its own. False if an open transaction has written to it."""
        kind = "row" if table == "rows" else "user"
        if any(isinstance(thing, tuple) and thing[0] == kind for thing in self._locks):
            return False
        tx = self.begin()
        if table == "rows":
            self._capture(tx, ALL_TOPICS, Kind.TRUNCATE, table, None)
            for row, stored in self.state.rows.items():
                tx.rows[row] = StoredRow(stored.topic, stored.version)
        else:
            self._capture(tx, ALL_TOPICS, Kind.TRUNCATE, table, None, right=self.rights, ends=Right(None, None))
            tx.rights = dict.fromkeys(self.state.rights, 0)
        self.commit(tx)
        return True

    def grant(self, tx: Transaction, user: str, topic: Topic) -> bool:
        """Make the user a member of the topic. False if the user is locked or is a member already."""
        if self._right(tx, user, topic) or not self.lock(tx, ("user", user)):
            return False
        self.rights += 1
        tx.rights[user, topic] = self.rights
        begins = Right(user, topic)
        self._capture(tx, topic, Kind.INSERT, "members", f"{user} {topic}", right=self.rights, begins=begins)
        return True

    def revoke(self, tx: Transaction, user: str, topic: Topic | None) -> bool:
        """End the user's membership in the topic, or in all topics. False if the user is locked or there is none."""
        memberships = [one for one in self.state.rights.keys() | tx.rights.keys() if one[0] == user]
        ending = [one for one in memberships if topic in (None, one[1]) and self._right(tx, *one)]
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
        """Write in a savepoint and roll it back: that uses up an event id and a transaction id."""
        if self.lock(tx, ("row", row)):
            self._assign(tx)
            self.next_id += 1

    def commit(self, tx: Transaction, *, flush: bool = True) -> None:
        """Commit a transaction. Without `flush`, a crash may undo it."""
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
        """Roll back a transaction."""
        if tx in self.state.prepared:
            after = self._next()
            after.prepared.remove(tx)
            self._log_commit(after, flush=True)
        self._end(tx)

    def prepare(self, tx: Transaction) -> None:
        """Prepare a transaction: it survives crashes, but is not visible."""
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

    # Faults, and retention.

    def crash(self, lost: int) -> None:
        """Restart without the last `lost` commits, except those that were flushed."""
        self._restart_from(max(len(self.history) - 1 - lost, self.flushed))

    def fail_over(self, lost: int) -> None:
        """Continue with a standby that misses the last `lost` commits, flushed or not, but no term."""
        opened = next(index for index, state in enumerate(self.history) if state.terms == self.state.terms)
        self._restart_from(max(len(self.history) - 1 - lost, opened))
        self.timeline += 1

    def _restart_from(self, index: int) -> None:
        del self.history[index + 1 :]
        self.state = self.history[index]
        self.flushed = index
        self.open = list(self.state.prepared)
        self._locks = {thing: tx for thing, tx in self._locks.items() if tx in self.open}
        # Ids of transactions and events that were not recorded are assigned again.
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
        # One above the newest transaction that has ended.
        xmax = max((xid + 1 for xid in range(3, self.next_xid) if xid not in running), default=3)
        xip = frozenset(xid for xid in running if xid < xmax)
        return Snapshot(min(xip, default=xmax), xmax, xip)

    def open_term(self, *, next_segment: bool = False) -> Leader:
        """Begin a term, recorded before anything is numbered, in this segment or the next."""
        if next_segment:
            self.next_id = max(self.next_id, (self.state.segments[-1].number + 1) * SEGMENT_IDS)
        after = self._next()
        snapshot = after.snapshot or Snapshot(3, 3, frozenset())
        previous = after.terms[-1] if after.terms else None
        newest = max(previous.base if previous else 0, self._newest())
        base = newest + self._term_gap if previous else 0
        self.next_xid += 1
        if next_segment:
            last = after.segments[-1]
            after.segments[-1] = replace(last, closed_xid=self.next_xid - 1, last_seq=newest)
            after.segments.append(Segment(last.number + 1))
            base = max(base, (last.number + 1) * SEGMENT_SEQS)
        after.terms.append(Term(previous.term + 1 if previous else 1, base, f"e{self.timeline}"))
        after.snapshot = snapshot
        self._log_commit(after, flush=True)
        still_open = [
            one.number for one in after.segments if one.closed_xid is None or one.closed_xid > snapshot.xmin
        ]
        return Leader(base, snapshot, min(still_open))

    def _newest(self) -> int:
        return max((entry.seq for entry in self._kept()), default=0)

    def _kept(self) -> list[Entry]:
        floor = self.state.floor
        return [entry for entry in self.state.log if entry.seq > floor]

    def number(self, leader: Leader) -> list[Change]:
        """Number the new events; return them as the log has them."""
        now = self.snapshot()
        visible = [event for event in self.state.events if event.id // SEGMENT_IDS >= leader.first_segment]
        new = self._select_new(visible, leader.snapshot, now, self.state.log)
        leader.snapshot = now
        if new:
            after = self._next()
            numbers = list(enumerate(new, leader.last_seq + 1))
            begins = {event.xid: seq for seq, event in reversed(numbers)}
            ends = {event.xid: seq for seq, event in numbers}
            entries = [Entry(seq, ends[event.xid], event, self.step) for seq, event in numbers]
            after.log += entries
            for seq, event in numbers:
                self.numbered[Position(after.terms[-1].epoch, Seq(seq))] = event
                if event.begins:
                    after.grants.append((begins[event.xid], event.begins))
            after.snapshot = now
            leader.last_seq += len(new)
            self.next_xid += 1
            self._log_commit(after, flush=any(event.begins for event in new))
            return list(map(self.change, entries))
        return []

    # What daemons query.

    def head(self) -> Position:
        last = self.state.terms[-1]
        return Position(last.epoch, Seq(max(last.base, self._newest())))

    def reasons(self, since: Position) -> list[str]:
        """Every reason why a stream cannot continue from this position."""
        terms, found = self.state.terms, []
        if since.epoch != terms[-1].epoch:
            found.append("epoch")
        if since.seq < self.state.floor:
            found.append("retention")
        at_or_below = [term for term in terms if term.base <= since.seq]
        if not at_or_below:
            return [*found, "crash"]
        bound = next((term.base for term in terms if term.term > at_or_below[-1].term), float("inf"))
        logged = [entry.seq for entry in self._kept() if entry.seq < bound]
        closed = [one.last_seq for one in self.state.segments if at_or_below[-1].base <= one.last_seq < bound]
        if since.seq > max([at_or_below[-1].base, *logged, *closed]):
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
        """The number at which the right to the topic began, and whether a newer grant is not numbered yet."""
        right = Right(user, topic)
        snapshot = self.state.snapshot
        assert snapshot is not None
        pending = any(
            event.begins == right and (event.xid >= snapshot.xmax or event.xid in snapshot.xip)
            for event in self.state.events
        )
        return max((seq for seq, granted in self.state.grants if granted == right), default=0), pending

    def tombstone(self, entry: Entry) -> Entry | None:
        """The first deletion of the row after this entry in the log."""
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

    def is_hidden(self, entry: Entry) -> bool:
        """Is the content of this entry hidden because its row was deleted later?"""
        return entry.event.kind in CONTENT and self.tombstone(entry) is not None

    def change(self, entry: Entry) -> Change:
        """An entry, as a reader of the log gets it."""
        event = entry.event
        record = None
        if event.kind in CONTENT and not (self._hides_deleted and self.is_hidden(entry)):
            columns = f',"version":{event.version}' if event.table == "rows" else ""
            record = f'{{"id":{_json(event.key)}{columns}}}'
        return Change(
            seq=Seq(entry.seq),
            tx=str(event.xid),
            at=str(event.uid),  # not a time, but the uid: it identifies the event in a frame
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
