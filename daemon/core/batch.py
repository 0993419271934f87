"""What a daemon publishes at once: a piece of the log, with all that those who hold content of it must know."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Self, overload

from daemon.core.change import RESET_KINDS, Change, Kind, Right, Seq, Topic

OVERHEAD: Final = 900  # bytes that a change takes in addition to its key and record, alone in its topic
FRESH: Final = 2.5  # seconds that a member counts as alive after its beat
_kind = attrgetter("kind")
NONE_ABSENT: Final[Mapping[int, int]] = MappingProxyType({})


class Unread(Sequence[Change]):
    """Changes as another node has sent them: each is made when it is looked at, and few are.

    `heads` are the fields of the changes, but for their keys and records: in place of these are the bytes that each
    takes of the texts. Raises ValueError if the texts are shorter or longer, or cannot be read.
    """

    __slots__ = ("_starts", "_texts", "heads")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, heads: Sequence[tuple[Any, ...]], texts: bytes) -> None:
        self.heads = heads
        self._texts = texts
        self._starts = list(accumulate([head[_KEY] + (head[_RECORD] or 0) for head in heads], initial=0))
        if self._starts[-1] != len(texts):
            raise ValueError("its texts are not as long as it says")
        if not texts.isascii():
            for _ in self:  # UnicodeDecodeError is a ValueError
                pass

    @property
    def size(self) -> int:
        """The bytes of keys and records."""
        return len(self._texts)

    def concerning(self, topics: Container[Topic]) -> list[Change]:
        """Those in these topics, and those that reset topics."""
        return [
            self[place]
            for place, head in enumerate(self.heads)
            if head[_TOPIC] in topics or head[_KIND] in RESET_KINDS
        ]

    def places(self) -> Iterator[tuple[Topic, int]]:
        """The topic of each change, and its place."""
        return ((head[_TOPIC], place) for place, head in enumerate(self.heads))

    def __len__(self) -> int:
        return len(self.heads)

    @overload
    def __getitem__(self, place: int) -> Change: ...
    @overload
    def __getitem__(self, place: slice) -> list[Change]: ...
    def __getitem__(self, place: int | slice) -> Change | list[Change]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        seq, tx, at, schema, table, topic, kind, key, record, changed, actor, ends, model, unreadable = self.heads[
            place
        ]
        start = self._starts[place if place >= 0 else place - 1]
        end = start + key
        return Change(
            seq, tx, at, schema, table, topic, kind,
            self._texts[start:end].decode(), None if record is None else self._texts[end : end + record].decode(),
            changed, actor, ends and Right(*ends), model, unreadable,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


_TOPIC, _KIND, _KEY, _RECORD = map(Change._fields.index, ("topic", "kind", "key", "record"))


def heads_of(changes: Sequence[Change]) -> Sequence[tuple[Any, ...]]:
    """The changes, or what there is of them without looking at keys and records."""
    return changes.heads if type(changes) is Unread else changes


def concerning(changes: Sequence[Change], topics: Container[Topic]) -> Sequence[Change]:
    """The changes, without those that nobody in these topics gets, if these can be left unread."""
    return changes.concerning(topics) if type(changes) is Unread else changes


class EndedRight(NamedTuple):
    """A right that ended at `seq`: one to topics of the pack or own table that `schema` and `table` belong to."""

    seq: Seq
    right: Right
    schema: str
    table: str


class GoneRow(NamedTuple):
    """A row that was deleted: whatever the log tells of its content up to `upto` must not be told any more."""

    schema: str
    table: str
    key: str
    upto: Seq


class LogBatch(NamedTuple):
    """Everything in the log between two positions of an epoch, after `after` and up to `upto`: whole transactions.

    `changes` may be sent to clients, in order. `ends` and `gone` are also of changes that may not. `gone` is None if
    not all of the deleted rows are known, because a `limit` stands for them. `jumps` are pairs of numbers that follow
    each other in the log, with others left out in between.

    `absent` names contents that belong to the batch and are not among `changes`: the hashes of their topics, each
    with about how many bytes it has. A batch without any is whole.
    """

    epoch: str
    after: Seq
    upto: Seq
    changes: Sequence[Change] = ()
    ends: Sequence[EndedRight] = ()
    gone: Sequence[GoneRow] | None = ()
    jumps: Sequence[tuple[Seq, Seq]] = ()
    absent: Mapping[int, int] = NONE_ABSENT

    def since(self, seq: Seq) -> Self:
        """The part of it that comes after `seq`, where a transaction ends."""
        if seq <= self.after:
            return self
        return self._replace(
            after=seq,
            changes=[change for change in self.changes if change.seq > seq],
            ends=[end for end in self.ends if end.seq > seq],
            gone=None if self.gone is None else [row for row in self.gone if row.upto > seq],
            jumps=[jump for jump in self.jumps if jump[1] > seq],
        )


def size_of(changes: Iterable[Change]) -> int:
    """The characters of keys and records."""
    return sum(len(change.key) + len(change.record or "") for change in changes)


def memory_of(changes: Collection[Change]) -> int:
    """The bytes of memory that a batch or contents with these changes take, about."""
    return size_of(changes) + OVERHEAD * (1 + len(changes))


class Contents(NamedTuple):
    """The changes in topics of one hash that the batch between `after` and `upto` has.

    Two leaders may cut the log differently, so only both numbers together name a batch.
    """

    epoch: str
    after: Seq
    upto: Seq
    changes: Sequence[Change]


def hash_of(topic: Topic) -> int:
    """The number under which the contents of a topic travel, of 64 bits. Topics that share one travel together."""
    return int.from_bytes(blake2b(topic.encode(), digest_size=8).digest())


def apart(batch: LogBatch) -> tuple[LogBatch, dict[int, list[Change]]]:
    """A whole batch without its contents, and the contents by the hash of their topics.

    Changes that reset topics stay in the batch: they may concern topics that they do not name.
    """
    resets, contents, hashes = list[Change](), dict[int, list[Change]](), dict[Topic, int]()
    for change in batch.changes:
        if change.kind in RESET_KINDS:
            resets.append(change)
            continue
        topic = change.topic
        if topic not in hashes:
            hashes[topic] = hash_of(topic)
        contents.setdefault(hashes[topic], []).append(change)
    return batch._replace(changes=resets), contents


def jumps_in(after: Seq, changes: Sequence[Change]) -> list[tuple[Seq, Seq]]:
    """The pairs of numbers that follow each other, from `after` on, with others left out in between."""
    if changes[-1].seq - after == len(changes):
        return []
    jumps = []
    for change in changes:
        if change.seq != after + 1:
            jumps.append((after, change.seq))
        after = change.seq
    return jumps


def gone_in(changes: Sequence[Change]) -> list[GoneRow] | None:
    """The rows that these whole transactions delete; None if a `limit` stands for some of them.

    A row that was written again in the same transaction keeps what that transaction tells of it.
    """
    kinds = set(map(_kind, changes))
    if Kind.LIMIT in kinds:
        return None
    if Kind.DELETE not in kinds:
        return []
    begun: dict[str, Seq] = {}  # where each transaction begins
    rewritten: set[tuple[str, str, str, str]] = set()
    for change in changes:
        begun.setdefault(change.tx, change.seq)
        if change.record is not None or change.is_left:
            rewritten.add((change.tx, change.schema, change.table, change.key))
    return [
        GoneRow(
            change.schema,
            change.table,
            change.key,
            Seq(begun[change.tx] - 1)
            if (change.tx, change.schema, change.table, change.key) in rewritten
            else change.seq,
        )
        for change in changes
        if change.kind is Kind.DELETE
    ]


class Beat(NamedTuple):
    """How far a member is: its position, and `age`, the seconds since it knew that nothing followed it.

    `contract` is the hash of the row models of what it serves. Up to `floor`, the log is past retention. `has_tx`:
    whether clients may learn which transaction made a change.
    """

    epoch: str
    seq: Seq
    age: float
    member: str
    contract: str
    floor: Seq = Seq(0)
    has_tx: bool = True
