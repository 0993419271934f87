"""A client that keeps the rules of docs/protocol.md, and remembers enough to say afterwards what it missed."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from daemon.core.change import Position, Topic


class Violation(AssertionError):
    """An invariant of delivery does not hold."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant = invariant


class Line(Protocol):
    """A client's end of a connection."""

    inbox: deque[dict[str, Any]]

    @property
    def over(self) -> bool:
        """Has the server closed it, and everything been read?"""

    def send(self, **frame: Any) -> None:
        """Say something to the server."""

    def cut(self) -> None:
        """Break it; what was not read yet is lost."""


@dataclass
class Received:
    """One change, as it arrived."""

    uid: int
    seq: int


@dataclass
class Following:
    """One topic as its client knows it. `base`: everything behind it should have been received."""

    pending: bool = True
    answered: Position | None = None
    place: Position | None = None
    base: Position | None = None
    received: list[Received] = field(default_factory=list)
    state: dict[int, int] = field(default_factory=dict)
    read_from: object = None

    def advance(self, position: Position) -> None:
        if self.place is None or self.place.epoch != position.epoch or self.place.seq < position.seq:
            self.place = position


class ReadState(Protocol):
    """The application's own interface: the rows of a topic with their versions, and of which state they are."""

    def __call__(self, topic: Topic) -> tuple[dict[int, int], object]: ...


class Client:
    """The user, the one position that it keeps, and what it knows of each topic."""

    def __init__(self, user: str, read_state: ReadState) -> None:
        self.user = user
        self.line: Line | None = None
        self.wanted: list[Topic] = []
        self.topics: dict[Topic, Following] = {}
        self.position: Position | None = None
        self.since: Position | None = None  # of the present connection
        self._read_state = read_state

    def connect(self, line: Line) -> None:
        """Say hello, and ask for everything that is wanted."""
        self.line, self.since = line, self.position
        places = [following.place for following in self.topics.values() if following.place is not None]
        seen = max(places, key=lambda place: place.seq, default=None)
        line.send(
            op="hello",
            token=self.user,
            **({"since": str(self.since)} if self.since else {}),
            **({"seen": str(seen)} if self.since and seen and seen.seq > self.since.seq else {}),
        )
        for topic in self.wanted:
            self.ask(topic)

    def ask(self, topic: Topic) -> None:
        """Subscribe."""
        assert self.line is not None
        following = self.topics.setdefault(topic, Following())
        following.pending, following.answered = True, None
        self.line.send(op="subscribe", id=topic, topic=topic)

    def leave(self, topic: Topic) -> None:
        """Unsubscribe."""
        assert self.line is not None
        self.line.send(op="unsubscribe", id=topic, topic=topic)

    def cut(self) -> None:
        """The line breaks."""
        if self.line is not None:
            self.line.cut()
            self._hung_up()

    def receive(self, limit: int) -> int:
        """Process what has come in; returns how many frames that was."""
        count = 0
        while self.line is not None and self.line.inbox and count < limit:
            self._process(self.line.inbox.popleft())
            count += 1
        if self.line is not None and self.line.over:
            self._hung_up()
        return count

    def _hung_up(self) -> None:
        self.line = None
        # What was asked for or left, and not answered, is as if it had never been known.
        self.topics = {
            topic: following for topic, following in self.topics.items() if following.base and topic in self.wanted
        }

    @property
    def pending(self) -> bool:
        return any(following.pending for following in self.topics.values())

    def _keep(self, position: Position) -> None:
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
                following = self.topics[topic]
                if position == following.answered:
                    following.pending = False  # this is no replay: there is nothing that it could begin with
                following.place = following.base = position
                following.received = []
                following.state, following.read_from = self._read_state(topic)
            case "resumed" if position is not None:
                for following in self.topics.values():
                    if following.answered:
                        following.advance(position)
                        following.pending = False
                self._keep(position)
            case "head" if position is not None:
                self._keep(position)
            case "revoked" | "unsubscribed":
                self.topics.pop(topic, None)
            case "error" if frame.get("id") in self.topics:
                topic = Topic(frame["id"])
                if frame["retry"]:
                    self.ask(topic)
                elif frame["code"] != "already_subscribed":
                    self.topics.pop(topic)

    def _subscribed(self, following: Following, topic: Topic, position: Position) -> None:
        following.answered = position
        following.pending = position == self.since  # then it is being replayed
        if following.base is None:
            following.base = position
            following.state, following.read_from = self._read_state(topic)
        following.advance(position)

    def _changes(self, following: Following, frame: dict[str, Any], position: Position) -> None:
        prev, place = Position.parse(frame["prev"]), following.place
        assert place is not None
        if not following.pending and prev.epoch == place.epoch and prev.seq > place.seq:
            raise Violation("I7", f"{self.user} sees a gap in {frame['topic']} from {place} to {prev}")
        for change in frame["changes"]:
            if position.epoch != place.epoch or change["seq"] > place.seq:
                self._apply(following, change)
        following.advance(position)
        self._keep(position)

    def _apply(self, following: Following, change: dict[str, Any]) -> None:
        uid = int(change["at"])
        if any(received.uid == uid for received in following.received):
            raise Violation("I1", f"{self.user} is told event {uid} again")
        following.received.append(Received(uid, change["seq"]))
        if change["table"] != "rows":
            return
        if change["kind"] == "delete":
            following.state.pop(change["key"]["id"], None)
        else:
            following.state[change["key"]["id"]] = change["record"]["version"]
