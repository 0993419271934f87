"""Topic -> who follows it. A frame is built once per run of changes and handed to every follower."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from daemon.core import wire
from daemon.core.change import Change, Kind, Position, Right, Seq, Topic
from daemon.core.ports import Encode


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


class Hub:
    """The live end of the log in this process: how far it has come, and who follows what.

    `position` is what has been delivered to every follower; it moves only in `publish` and `move`. `breaks` counts
    the moves, `broken` is the reason of the last one: who is on the way from a position of before must start anew.
    """

    def __init__(self, encode: Encode) -> None:
        self.position = Position("", Seq(0))
        self.breaks = 0
        self.broken = ""
        self._encode = encode
        self._followers: dict[Topic, dict[Follower, None]] = {}
        self._waiting: dict[Topic, dict[Follower, None]] = {}  # not live yet, but their rights may end
        self._before: dict[Topic, Position] = {}  # of each followed topic, the position of its last frame

    def wait(self, topic: Topic, follower: Follower) -> None:
        """Tell this follower if the right to the topic ends, from before it is looked up until it follows."""
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
    def topics(self) -> Iterable[Topic]:
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
        ends: Iterable[tuple[Seq, Right]] = (),
    ) -> tuple[int, int]:
        """Deliver changes, in order, and move to `position`. Returns how many frames were built and delivered.

        Each follower gets everything that concerns it in one call. `covers` names the followed topics that a
        truncated table or a lost change puts in doubt: their followers are told `reset`. `ends` are the rights that
        ended, and where: whoever loses one hears of that topic what came before, and `revoked`.
        """
        outgoing: defaultdict[Follower, list[bytes]] = defaultdict(list)
        cuts = self._cuts(ends)
        built = delivered = 0
        for topic, run in wire.runs(change for change in changes if self._concerns(change)):
            if run[0].kind in (Kind.TRUNCATE, Kind.LOST):
                frames = [
                    (covered, wire.reset(covered, change.kind.value, Position(position.epoch, change.seq)))
                    for change in run
                    for covered in covers(change)
                ]
            else:
                frames = [(topic, wire.changes(topic, self._before[topic], run))]
            for concerned, payload in frames:
                frame = self._encode(payload)
                built += 1
                for follower in self._followers[concerned]:
                    cut = cuts.get((concerned, follower)) if cuts else None
                    if cut is None or run[-1].seq < cut:
                        outgoing[follower].append(frame)
                    elif concerned == topic and (kept := [change for change in run if change.seq < cut]):
                        outgoing[follower].append(self._encode(wire.changes(topic, self._before[topic], kept)))
                self._before[concerned] = Position(position.epoch, run[-1].seq)
        self.position = position
        for (topic, follower), cut in cuts.items():
            outgoing[follower].append(self._encode(wire.revoked(topic, Position(position.epoch, cut))))
            self.unfollow(topic, follower)
            follower.revoked(topic)
        for follower, batch in outgoing.items():
            follower.deliver(batch[0] if len(batch) == 1 else b"".join(batch))
            delivered += len(batch)
        return built, delivered

    def _cuts(self, ends: Iterable[tuple[Seq, Right]]) -> dict[tuple[Topic, Follower], Seq]:
        """Who follows, or waits for, a topic that it may no longer read, and since when."""
        cuts: dict[tuple[Topic, Follower], Seq] = {}
        for seq, right in ends:
            for topic in (right.topic,) if right.topic is not None else {*self._followers, *self._waiting}:
                for follower in (*self._followers.get(topic, ()), *self._waiting.get(topic, ())):
                    if right.user is None or right.user == follower.user:
                        cuts.setdefault((topic, follower), seq)
        return cuts

    def _wait_no_more(self, topic: Topic, follower: Follower) -> None:
        waiting = self._waiting.get(topic, {})
        waiting.pop(follower, None)
        if not waiting:
            self._waiting.pop(topic, None)

    def _concerns(self, change: Change) -> bool:
        return change.topic in self._followers or change.kind in (Kind.TRUNCATE, Kind.LOST)

    def move(self, position: Position, reason: str) -> None:
        """Go on from a position that does not continue the last one: every follower of every topic is reset."""
        self.position = position
        self.breaks += 1
        self.broken = reason
        outgoing: defaultdict[Follower, list[bytes]] = defaultdict(list)
        for topic, followers in self._followers.items():
            frame = self._encode(wire.reset(topic, reason, position))
            self._before[topic] = position
            for follower in followers:
                outgoing[follower].append(frame)
        for follower, frames in outgoing.items():
            follower.deliver(b"".join(frames))
