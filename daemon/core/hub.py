"""Topic -> who follows it. A frame is built once per run of changes, and all who hear the same get the same bytes."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

from daemon.core import wire
from daemon.core.change import RESET_KINDS, Change, Position, Right, Seq, Topic
from daemon.core.ports import Encode


class RightEnd(NamedTuple):
    """A right has ended at `seq`; it was to topics that `serves` knows."""

    seq: Seq
    right: Right
    serves: Callable[[Topic], bool]


class Follower(Protocol):
    """Who hears of changes, or will once it has caught up. No method waits or raises."""

    @property
    def user(self) -> str:
        """Whose rights count."""

    def deliver(self, frames: bytes) -> None:
        """Hand over all that concerns this follower up to the hub's `position`: encoded frames, in order.

        A follower that has enough may leave its topics from inside this call.
        """

    def revoked(self, topic: Topic) -> None:
        """The right to this topic has ended: it is followed no more, and waited for no more."""

    def moved(self) -> None:
        """What comes next does not continue what was delivered: it must let itself be suspended, and begin anew."""


class _Told(NamedTuple):
    """A frame of a topic, made of one run of changes. `prev` is the topic's position before it."""

    topic: Topic
    prev: Position
    run: Sequence[Change]
    frame: bytes


_Batch = tuple[Collection[Follower], list[bytes]]


class Hub:
    """The live end of the log in this process: how far it has come, and who follows what.

    `position` is what has been delivered to every follower; it moves only in `publish` and `move`. `breaks` counts
    the moves, `broken` is the reason of the last one and `begun` where it led: who is on the way from a position of
    before must start anew there.
    """

    def __init__(self, encode: Encode) -> None:
        self.position = Position("", Seq(0))
        self.breaks = 0
        self.broken = ""
        self.begun = self.position
        self._encode = encode
        self._followers: dict[Topic, dict[Follower, None]] = {}
        self._waiting: dict[Topic, dict[Follower, None]] = {}  # not live yet, but their rights may end
        self._asking: dict[Topic, dict[Follower, Seq]] = {}
        self._before: dict[Topic, Position] = {}  # of each followed topic, the position of its last frame

    def ask(self, topic: Topic, follower: Follower) -> None:
        """The follower's right to the topic is being looked up: note whether it ends meanwhile."""
        self._asking.setdefault(topic, {})[follower] = Seq(0)

    def answered(self, topic: Topic, follower: Follower) -> Seq:
        """It has been looked up. Returns where the right last ended meanwhile; 0 if it did not."""
        asking = self._asking[topic]
        ended = asking.pop(follower)
        if not asking:
            del self._asking[topic]
        return ended

    def wait(self, topic: Topic, follower: Follower) -> None:
        """Tell this follower if the right to the topic ends, until it follows."""
        self._waiting.setdefault(topic, {})[follower] = None

    def follow(self, topic: Topic, follower: Follower) -> None:
        """Deliver the topic's changes past `position` to this follower."""
        self._wait_no_more(topic, follower)
        if topic not in self._followers:
            self._followers[topic] = {}
            self._before[topic] = self.position
        self._followers[topic][follower] = None

    def unfollow(self, topic: Topic, follower: Follower) -> None:
        """Deliver nothing more of the topic to this follower; it need not have followed it."""
        self._wait_no_more(topic, follower)
        followers = self._followers.get(topic, {})
        followers.pop(follower, None)
        if not followers and self._followers.pop(topic, None) is not None:
            del self._before[topic]

    def suspend(self, topics: Iterable[Topic], follower: Follower) -> dict[Topic, Seq]:
        """Deliver nothing more of these topics for now, but tell this follower if a right to one of them ends.

        Returns those of them that it followed, each with the place of its last frame.
        """
        suspended: dict[Topic, Seq] = {}
        for topic in topics:
            if follower in self._followers.get(topic, ()):
                suspended[topic] = self._before[topic].seq
                self.unfollow(topic, follower)
                self.wait(topic, follower)
        return suspended

    @property
    def topics(self) -> Collection[Topic]:
        """The topics that somebody follows."""
        return self._followers.keys()

    @property
    def subscriptions(self) -> int:
        """How many pairs of topic and follower there are."""
        return sum(map(len, self._followers.values()))

    def publish(
        self,
        changes: Sequence[Change],
        position: Position,
        covers: Callable[[Change], Iterable[Topic]],
        ends: Iterable[RightEnd] = (),
    ) -> tuple[int, int]:
        """Deliver changes, in order, and move to `position`. Returns how many frames were built and delivered.

        Each follower gets everything that concerns it in one call, and the same object as all who get the same.
        `covers` names the followed topics that a change of one of the kinds in DOUBTS concerns: their followers are
        told `reset`. `ends` are the rights that ended, and where: whoever loses one hears of that topic what came
        before, and `revoked`.
        """
        cuts = self._cuts(ends)
        told = self._told(changes, position.epoch, covers)
        losing = {follower for _, follower in cuts}
        batches = self._shared(told, losing)
        batches += [([follower], self._curtailed(told, follower, cuts, position.epoch)) for follower in losing]
        self.position = position
        for topic, follower in cuts:
            self.unfollow(topic, follower)
            follower.revoked(topic)
        delivered = 0
        for followers, frames in batches:
            delivered += len(followers) * len(frames)
            joined = frames[0] if len(frames) == 1 else b"".join(frames)
            for follower in followers:
                follower.deliver(joined)
        return len(told), delivered

    def _told(
        self, changes: Iterable[Change], epoch: str, covers: Callable[[Change], Iterable[Topic]]
    ) -> list[_Told]:
        """What the followed topics hear, in order."""
        told: list[_Told] = []
        for topic, run in wire.runs(change for change in changes if self._concerns(change)):
            for concerned in covers(run[-1]) if run[-1].kind in RESET_KINDS else (topic,):
                prev = self._before[concerned]
                told.append(_Told(concerned, prev, run, self._frame(concerned, prev, run, epoch)))
                self._before[concerned] = Position(epoch, run[-1].seq)
        return told

    def _shared(self, told: Iterable[_Told], losing: Collection[Follower]) -> list[_Batch]:
        """What is handed to whom but those who lose a right: one batch for all who hear of the same topics."""
        frames: defaultdict[Topic, list[tuple[int, bytes]]] = defaultdict(list)
        for place, (topic, _, _, frame) in enumerate(told):
            frames[topic].append((place, frame))
        groups: dict[tuple[Topic, ...], list[Follower]] = {}
        if len(frames) == 1:
            [topic] = frames
            groups[topic,] = list(self._followers[topic])
        elif frames:
            heard: dict[Follower, tuple[Topic, ...]] = {}
            for topic in frames:
                for follower in self._followers[topic]:
                    heard[follower] = (*heard.get(follower, ()), topic)
            for follower, topics in heard.items():
                groups.setdefault(topics, []).append(follower)
        return [
            (
                [follower for follower in followers if follower not in losing] if losing else followers,
                [frame for _, frame in sorted(chain.from_iterable(frames[topic] for topic in topics))],
            )
            for topics, followers in groups.items()
        ]

    def _curtailed(
        self, told: Iterable[_Told], follower: Follower, cuts: Mapping[tuple[Topic, Follower], Seq], epoch: str
    ) -> list[bytes]:
        """What somebody is handed who loses a right: of that topic what came before, and that the right has ended."""
        frames: list[bytes] = []
        for topic, prev, run, frame in told:
            if follower in self._followers[topic]:
                cut = cuts.get((topic, follower))
                if cut is None or run[-1].seq < cut:
                    frames.append(frame)
                elif kept := [change for change in run if change.seq < cut]:
                    frames.append(self._frame(topic, prev, kept, epoch))
        for (topic, loser), cut in cuts.items():
            if loser is follower:
                frames.append(self._encode(wire.revoked(topic, Position(epoch, cut))))
        return frames

    def _frame(self, topic: Topic, prev: Position, run: Sequence[Change], epoch: str) -> bytes:
        """What a topic hears of a run: its changes, or that they put it in doubt."""
        last = run[-1]
        if last.kind in RESET_KINDS:
            return self._encode(wire.reset(topic, last.kind.value, Position(epoch, last.seq)))
        return self._encode(wire.changes(topic, prev, run))

    def _cuts(self, ends: Iterable[RightEnd]) -> dict[tuple[Topic, Follower], Seq]:
        """Who follows, or waits for, a topic that it may no longer read, and since when. Notes it for who asks."""
        cuts: dict[tuple[Topic, Follower], Seq] = {}
        for seq, right, serves in ends:
            known = (right.topic,) if right.topic is not None else {*self._followers, *self._waiting, *self._asking}
            for topic in filter(serves, known):
                for follower in (*self._followers.get(topic, ()), *self._waiting.get(topic, ())):
                    if right.user is None or right.user == follower.user:
                        cuts.setdefault((topic, follower), seq)
                for follower in self._asking.get(topic, ()):
                    if right.user is None or right.user == follower.user:
                        self._asking[topic][follower] = seq
        return cuts

    def _wait_no_more(self, topic: Topic, follower: Follower) -> None:
        waiting = self._waiting.get(topic, {})
        waiting.pop(follower, None)
        if not waiting:
            self._waiting.pop(topic, None)

    def _concerns(self, change: Change) -> bool:
        return change.topic in self._followers or change.kind in RESET_KINDS

    def move(self, position: Position, reason: str) -> None:
        """Go on from a position that does not continue the last one.

        What lies between is known to nobody, the ends of rights included: every follower is told `moved`.
        """
        self.position = self.begun = position
        self.breaks += 1
        self.broken = reason
        for follower in {follower for followers in self._followers.values() for follower in followers}:
            follower.moved()
