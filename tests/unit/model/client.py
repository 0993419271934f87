"""A client that follows docs/protocol.md and records what it receives, to be checked at the end."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from daemon.core.change import Position, Topic

NUMBERS = {"eve": "string"}
"""The form of numbers that a user's client chooses, if it does."""


class Violation(AssertionError):
    """An invariant of delivery does not hold."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant


class Connection(Protocol):
    """The client's end of a connection."""

    inbox: deque[dict[str, Any]]

    @property
    def finished(self) -> bool:
        """Has the server closed the connection, and has the client read everything?"""

    def send(self, **frame: Any) -> None:
        """Send a frame to the server."""

    def cut(self) -> None:
        """Break the connection; frames that were not read are lost."""


@dataclass
class Received:
    """One change that was received."""

    uid: int
    seq: int


@dataclass
class Subscription:
    """One topic, as the client knows it. It should have received everything after `base`."""

    pending: bool = True
    subscribed_at: Position | None = None
    position: Position | None = None
    base: Position | None = None
    received: list[Received] = field(default_factory=list)
    state: dict[int, int] = field(default_factory=dict)
    read_from: object = None

    def advance(self, position: Position) -> None:
        last = self.position
        if last is None or last.epoch != position.epoch or last.seq < position.seq:
            self.position = position


class ReadState(Protocol):
    """The application's own interface: the versions of a topic's rows, and the state they were read from."""

    def __call__(self, topic: Topic) -> tuple[dict[int, int], object]: ...


class Client:
    """A user's client: the position from which it resumes, and what it knows of each topic."""

    def __init__(self, user: str, read_state: ReadState) -> None:
        self.user = user
        self.connection: Connection | None = None
        self.wanted: list[Topic] = []
        self.topics: dict[Topic, Subscription] = {}
        self.position: Position | None = None
        self.since: Position | None = None  # the position with which the current connection resumed
        self.refused: list[Topic] = []  # for now: `retry` subscribes to them again
        self._read_state = read_state

    def connect(self, connection: Connection) -> None:
        """Send `hello`, and subscribe to all wanted topics."""
        self.connection, self.since = connection, self.position
        positions = [one.position for one in self.topics.values() if one.position is not None]
        seen = max(positions, key=lambda position: position.seq, default=None)
        connection.send(
            op="hello",
            token=self.user,
            numbers=NUMBERS.get(self.user, "json"),
            **({"since": str(self.since)} if self.since else {}),
            **({"seen": str(seen)} if self.since and seen and seen.seq > self.since.seq else {}),
        )
        for topic in self.wanted:
            self.subscribe(topic)

    def subscribe(self, topic: Topic) -> None:
        """Send `subscribe`."""
        assert self.connection is not None
        subscription = self.topics.setdefault(topic, Subscription())
        subscription.pending, subscription.subscribed_at = True, None
        self.connection.send(op="subscribe", id=topic, topic=topic)

    def unsubscribe(self, topic: Topic) -> None:
        """Send `unsubscribe`."""
        assert self.connection is not None
        self.connection.send(op="unsubscribe", id=topic, topic=topic)

    def retry(self) -> None:
        """Subscribe again to what the server could not look up."""
        refused, self.refused = self.refused, []
        for topic in refused:
            self.subscribe(topic)

    def cut(self) -> None:
        """Break the connection, if there is one."""
        if self.connection is not None:
            self.connection.cut()
            self._disconnected()

    def receive(self, limit: int) -> int:
        """Process up to `limit` frames of the inbox; return their number."""
        count = 0
        while self.connection is not None and self.connection.inbox and count < limit:
            self._process(self.connection.inbox.popleft())
            count += 1
        if self.connection is not None and self.connection.finished:
            self._disconnected()
        return count

    def _disconnected(self) -> None:
        self.connection = None
        self.refused.clear()
        # Forget topics whose `subscribe` or `unsubscribe` was not answered.
        self.topics = {
            topic: subscription
            for topic, subscription in self.topics.items()
            if subscription.base and topic in self.wanted
        }

    @property
    def pending(self) -> bool:
        return any(subscription.pending for subscription in self.topics.values())

    def _advance(self, position: Position) -> None:
        if not self.pending:
            self.position = position

    def _process(self, frame: dict[str, Any]) -> None:
        topic = Topic(frame.get("topic", ""))
        position = Position.parse(frame["pos"]) if "pos" in frame else None
        match frame["op"]:
            case "welcome":
                if self.position is None:
                    self.position = position
            case "subscribed" if position is not None and topic in self.topics:
                self._subscribed(self.topics[topic], topic, position)
            case "changes" if position is not None and topic in self.topics:
                self._changes(self.topics[topic], frame, position)
            case "reset" if position is not None and topic in self.topics:
                subscription = self.topics[topic]
                if position == subscription.subscribed_at:
                    subscription.pending = False  # a reset in place of the replay
                subscription.position = subscription.base = position
                subscription.received = []
                subscription.state, subscription.read_from = self._read_state(topic)
            case "resumed" if position is not None:
                for subscription in self.topics.values():
                    if subscription.subscribed_at:
                        subscription.advance(position)
                        subscription.pending = False
                self._advance(position)
            case "head" if position is not None:
                self._advance(position)
            case "revoked" | "unsubscribed":
                self.topics.pop(topic, None)
            case "error" if frame.get("id") in self.topics:
                topic = Topic(frame["id"])
                if frame["retry"]:
                    self.refused.append(topic)
                elif frame["code"] != "already_subscribed":
                    self.topics.pop(topic)

    def _subscribed(self, subscription: Subscription, topic: Topic, position: Position) -> None:
        subscription.subscribed_at = position
        subscription.pending = position == self.since  # then the topic is replayed
        if subscription.base is None:
            subscription.base = position
            subscription.state, subscription.read_from = self._read_state(topic)
        subscription.advance(position)

    def _changes(self, subscription: Subscription, frame: dict[str, Any], position: Position) -> None:
        prev, last = Position.parse(frame["prev"]), subscription.position
        assert last is not None
        if not subscription.pending and prev.epoch == last.epoch and prev.seq > last.seq:
            raise Violation("I7", f"{self.user} sees a gap in {frame['topic']} from {last} to {prev}")
        for change in frame["changes"]:
            if position.epoch != last.epoch or change["seq"] > last.seq:
                self._apply(subscription, change)
        subscription.advance(position)
        self._advance(position)

    def _apply(self, subscription: Subscription, change: dict[str, Any]) -> None:
        uid = int(change["at"])
        if any(received.uid == uid for received in subscription.received):
            raise Violation("I1", f"{self.user} receives event {uid} again")
        subscription.received.append(Received(uid, change["seq"]))
        if change["table"] != "rows":
            return
        row = change["key"]["id"]
        if type(row) is not (str if NUMBERS.get(self.user) == "string" else int):
            raise Violation("form", f"{self.user} receives the key {row!r}")
        if change["kind"] == "delete":
            subscription.state.pop(int(row), None)
        else:
            subscription.state[int(row)] = change["record"]["version"]
