"""Contents that travel by topic: which of them a gateway wants, and which it has at hand."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from daemon.core.batch import Contents, LogBatch, hash_of, memory_of
from daemon.core.change import Change, Position, Seq, Topic, can_be_named

LINGER: Final = 30.0  # seconds for which a topic stays wanted after its last follower, or its last replay
MAX_AT_HAND: Final = 16 * 2**20  # bytes that may wait for their batches
MAX_SWEPT: Final = 1000  # topics at a time

OnChange = Callable[[Iterable[int]], None]
"""Gets hashes for which `Interest.is_wanted` may have changed."""


class Interest:
    """The topics that clients of this gateway follow, or followed a short time ago, by their hashes.

    A topic that is wanted since a position: every change in it after that position and up to the hub's has been
    published here. Batches that are whole have all topics, so what they bring is there from before.

    Nothing has to be subscribed to until a batch comes without contents.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_change: OnChange | None = None
        self._clock = clock
        self._since: dict[int, Seq] = {}
        self._followed: Counter[int] = Counter()  # how many topics: two may have the same hash
        self._lingering: dict[int, float] = {}  # until when, the first one to end first
        self._whole_since = Seq(0)  # where the batches begin that were all whole
        self._by_topic_at: float | None = None  # when a batch last came without contents; None if only whole ones do

    def is_wanted(self, topic_hash: int) -> bool:
        """Whether the contents of this hash should arrive here."""
        return self._by_topic_at is not None and topic_hash in self._since

    def follow(self, topic: Topic) -> None:
        """See core.hub.Interest."""
        topic_hash = hash_of(topic)
        self._followed[topic_hash] += 1
        self._lingering.pop(topic_hash, None)
        self._want(topic_hash)

    def unfollow(self, topic: Topic) -> None:
        """See core.hub.Interest."""
        topic_hash = hash_of(topic)
        self._followed[topic_hash] -= 1
        if not self._followed[topic_hash]:
            del self._followed[topic_hash]
            self._linger(topic_hash)

    def covers(self, topics: Collection[Topic], after: Seq) -> bool:
        """Whether everything in these topics has been published here that lies after this position.

        If not, they are wanted from now on, for a while: who asks goes on from here soon. What concerns many topics
        is in every batch.
        """
        if after >= self._whole_since:
            return True
        are_covered = True
        for topic_hash in {hash_of(topic) for topic in topics if can_be_named(topic)}:
            if self._since.get(topic_hash, after + 1) > after:
                are_covered = False
                self._want(topic_hash)
                if topic_hash not in self._followed:
                    self._linger(topic_hash)
        return are_covered

    def missing(self, absent: Mapping[int, int], at_hand: Collection[int]) -> list[int]:
        """Which of these contents have to be had first. Topics that only linger are given up instead."""
        found = []
        for topic_hash in absent.keys() & self._since.keys():
            if topic_hash not in at_hand:
                if topic_hash in self._followed:
                    found.append(topic_hash)
                else:
                    self._drop(topic_hash)
        return found

    def record(self, batch: LogBatch) -> None:
        """A batch has arrived."""
        if batch.absent:
            was_by_topic, self._by_topic_at = self._by_topic_at is not None, self._clock()
            if not was_by_topic:
                self._changed(list(self._since))
        elif self._by_topic_at is not None and self._clock() - self._by_topic_at > LINGER:
            self._by_topic_at = None  # the leader publishes whole batches by now
            self._changed(list(self._since))

    def publish(self, batch: LogBatch) -> None:
        """A batch is being published, and has every content that is wanted."""
        if batch.absent:
            self._whole_since = batch.upto

    def restart(self, position: Position) -> None:
        """What follows this position is published, and nothing before it."""
        self._whole_since = position.seq
        self._since = dict.fromkeys(self._since, position.seq)

    def sweep(self) -> None:
        """Give up some of the topics that have lingered long enough."""
        now = self._clock()
        over = list[int]()
        for topic_hash, until in self._lingering.items():
            if until > now or len(over) == MAX_SWEPT:
                break
            over.append(topic_hash)
        for topic_hash in over:
            self._drop(topic_hash)

    def _want(self, topic_hash: int) -> None:
        if topic_hash not in self._since:
            self._since[topic_hash] = self._whole_since
            self._changed([topic_hash])

    def _linger(self, topic_hash: int) -> None:
        self._lingering.pop(topic_hash, None)  # it moves to the end
        self._lingering[topic_hash] = self._clock() + LINGER

    def _drop(self, topic_hash: int) -> None:
        del self._since[topic_hash], self._lingering[topic_hash]
        self._changed([topic_hash])

    def _changed(self, hashes: Iterable[int]) -> None:
        if self.on_change is not None:
            self.on_change(hashes)


_Batch = tuple[str, Seq, Seq]
"""A batch: its epoch, and the numbers that it lies between."""


class AtHand:
    """Contents that have arrived, until their batch is published or passed over."""

    def __init__(self) -> None:
        self._size = 0
        self._found: dict[_Batch, dict[int, Collection[Change]]] = {}

    def arrive(self, contents: Contents) -> bool:
        """Keep what has arrived, unless too much waits already. Returns whether it is kept."""
        if not contents.changes or self._size > MAX_AT_HAND:
            return False
        self.put(contents, {hash_of(contents.changes[0].topic): contents.changes})
        return True

    def put(self, batch: LogBatch | Contents, found: Mapping[int, Collection[Change]]) -> None:
        """Keep contents of this batch, or of the one that these contents belong to."""
        kept = self._found.setdefault((batch.epoch, batch.after, batch.upto), {})
        for topic_hash, changes in found.items():
            if topic_hash not in kept:
                self._size += memory_of(changes)
                kept[topic_hash] = changes

    def of(self, batch: LogBatch) -> Mapping[int, Collection[Change]]:
        """What is at hand of a batch."""
        return self._found.get((batch.epoch, batch.after, batch.upto), {})

    def complete(self, batch: LogBatch) -> LogBatch:
        """The batch with those of its contents that are at hand."""
        at_hand = self.of(batch)
        present = batch.absent.keys() & at_hand.keys()
        if not present:
            return batch
        numbers = {change.seq for change in batch.changes}
        found = [
            change for topic_hash in present for change in at_hand[topic_hash] if change.seq not in numbers
        ]  # fmt: skip
        absent = {each: size for each, size in batch.absent.items() if each not in present}
        return batch._replace(changes=sorted([*batch.changes, *found], key=lambda change: change.seq), absent=absent)

    def forget(self, upto: Position) -> None:
        """Everything up to this position has been published; nothing of another epoch will be."""
        for batch in [each for each in self._found if each[0] != upto.epoch or each[2] <= upto.seq]:
            self._size -= sum(map(memory_of, self._found.pop(batch).values()))
