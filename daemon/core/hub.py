"""Topic -> who follows it. A frame is built once per run of changes and handed to every follower."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from daemon.core import wire
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.ports import Encode


class Follower(Protocol):
    """Who hears of changes: a client that is not behind."""

    def deliver(self, frames: bytes) -> None:
        """Hand over encoded frames, in order. It neither waits nor raises."""


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
        self._before: dict[Topic, Position] = {}  # of each followed topic, the position of its last frame

    def follow(self, topic: Topic, follower: Follower) -> None:
        """Deliver the topic's changes past `position` to this follower."""
        if topic not in self._followers:
            self._followers[topic] = {}
            self._before[topic] = self.position
        self._followers[topic][follower] = None

    def unfollow(self, topic: Topic, follower: Follower) -> None:
        """Deliver nothing more of the topic to this follower; it need not have followed it."""
        followers = self._followers.get(topic, {})
        followers.pop(follower, None)
        if not followers and self._followers.pop(topic, None) is not None:
            del self._before[topic]

    @property
    def topics(self) -> Iterable[Topic]:
        """The topics that somebody follows."""
        return self._followers.keys()

    @property
    def subscriptions(self) -> int:
        """How many pairs of topic and follower there are."""
        return sum(map(len, self._followers.values()))

    def publish(
        self, changes: Sequence[Change], position: Position, covers: Callable[[Change], Iterable[Topic]]
    ) -> tuple[int, int]:
        """Deliver changes, in order, and move to `position`. Returns how many frames were built and delivered.

        Each follower gets everything that concerns it in one call. `covers` names the followed topics that a
        truncated table or a lost change puts in doubt: their followers are told `reset`.
        """
        outgoing: defaultdict[Follower, list[bytes]] = defaultdict(list)
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
                self._before[concerned] = Position(position.epoch, run[-1].seq)
                built += 1
                for follower in self._followers[concerned]:
                    outgoing[follower].append(frame)
        self.position = position
        for follower, batch in outgoing.items():
            follower.deliver(batch[0] if len(batch) == 1 else b"".join(batch))
            delivered += len(batch)
        return built, delivered

    def _concerns(self, change: Change) -> bool:
        return change.topic in self._followers or change.kind in (Kind.TRUNCATE, Kind.LOST)

    def move(self, position: Position, reason: str) -> None:
        """Go on from a position that does not continue the last one: every follower of every topic is reset."""
        self.position = position
        self.breaks += 1
        self.broken = reason
        for topic, followers in self._followers.items():
            frame = self._encode(wire.reset(topic, reason, position))
            self._before[topic] = position
            for follower in tuple(followers):
                follower.deliver(frame)
