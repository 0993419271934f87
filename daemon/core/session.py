"""The protocol of one client, without any I/O: a frame comes in, actions go out.

The state machine: a session is GREETING, then LIVE, then ENDED. `receive` says what is allowed in each phase; only
`welcomed` and `end` change the phase. The owner of the socket performs the actions, in order.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final, assert_never

from daemon.core import wire
from daemon.core.change import Numbers, Position, Topic
from daemon.core.errors import (
    AlreadyGreeted,
    AlreadySubscribed,
    BadToken,
    ClientFault,
    HelloExpected,
    HelloTimeout,
    TooManyTopics,
)
from daemon.core.filters import Asked, View
from daemon.core.snapshot import Wanted
from daemon.core.wire import FrameId, Hello, Ping, Subscribe, Unsubscribe

MAX_TOPICS: Final = 128


class Phase(Enum):
    """Where a session is in its life."""

    GREETING = auto()
    LIVE = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Say:
    """Send this payload."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Authenticate:
    """Verify the token of the hello; answer with `welcomed`, or with `fault`."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class Follow:
    """Let the client follow the topic from `since`, from a snapshot, or from now, if the user may read it.

    If not, answer with `forget` and `fault`. `asked` is what it wants to see of the topic, if not all; answer with
    `checked` once that is a `view`.
    """

    topic: Topic
    since: Position | None
    frame: FrameId | None
    snapshot: Wanted | None = None
    asked: Asked | None = None
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Unfollow:
    """Send nothing more of the topic."""

    topic: Topic


@dataclass(frozen=True, slots=True)
class CloseConnection:
    """Close the connection with this code."""

    code: int
    reason: str


Action = Say | Authenticate | Follow | Unfollow | CloseConnection


class Session:
    """One client's side of the protocol.

    `deadline` is when the hello must have arrived, and later when the token expires, in seconds of the caller's
    clock. `topics` are those that the client follows or has requested, each with the Follow of its subscription: a
    topic that was left and requested again has another one. `seen` is the newest position that the client has
    processed in any topic, if that is beyond where it resumes. `numbers` is the form of its int8 and numeric values.
    """

    __slots__ = ("_since", "deadline", "numbers", "phase", "seen", "topics", "user")

    def __init__(self, deadline: float) -> None:
        self.phase = Phase.GREETING
        self.deadline = deadline
        self.user: str = ""
        self.topics: dict[Topic, Follow] = {}
        self._since: Position | None = None
        self.seen: Position | None = None
        self.numbers = Numbers.JSON

    def receive(self, frame: wire.ClientFrame) -> list[Action]:
        """Answer one frame. A Follow is always the last action."""
        if self.phase is Phase.ENDED:
            return []
        if self.phase is Phase.GREETING:
            return [Authenticate(frame)] if isinstance(frame, Hello) else self.fault(HelloExpected(), frame.id)
        match frame:
            case Hello():
                return self.fault(AlreadyGreeted(), frame.id)
            case Subscribe():
                return self._subscribe(frame)
            case Unsubscribe():
                topic = Topic(frame.topic)
                self.topics.pop(topic, None)
                return [Unfollow(topic), Say(wire.unsubscribed(frame.id, topic))]
            case Ping():
                return [Say(wire.pong(frame.id))]
        assert_never(frame)

    def _subscribe(self, frame: Subscribe) -> list[Action]:
        topic = Topic(frame.topic)
        if topic in self.topics:
            return self.fault(AlreadySubscribed(), frame.id)
        if len(self.topics) >= MAX_TOPICS:
            return self.fault(TooManyTopics(MAX_TOPICS), frame.id)
        asked = None if frame.where is frame.columns is None else Asked(frame.where, frame.columns)
        if frame.snapshot is not None:
            self.topics[topic] = Follow(topic, None, frame.id, Wanted(topic, frame.snapshot.limit), asked)
        else:
            self.topics[topic] = Follow(topic, frame.since or self._since, frame.id, asked=asked)
        return [self.topics[topic]]

    def checked(self, follow: Follow, view: View) -> Follow:
        """The client's subscription, which sees this of its topic; it takes the place of `follow`."""
        snapshot = follow.snapshot and follow.snapshot._replace(view=view)
        self.topics[follow.topic] = replace(follow, snapshot=snapshot, view=view)
        return self.topics[follow.topic]

    def welcomed(self, user: str, hello: Hello, expires: float) -> None:
        """The token of this hello is valid."""
        self.phase = Phase.LIVE
        self.deadline = expires
        self.user = user
        self._since = hello.since  # where topics without a position of their own are replayed from
        self.seen = hello.seen
        self.numbers = hello.numbers or Numbers.JSON

    def forget(self, topic: Topic) -> None:
        """The topic is not followed any more; the client may ask again."""
        self.topics.pop(topic, None)

    def fault(self, fault: ClientFault, frame: FrameId | None = None) -> list[Action]:
        """Tell the client what it did wrong. Closes if the fault says so, or before the session is live."""
        if self.phase is Phase.ENDED:
            return []
        code = fault.close or (4400 if self.phase is Phase.GREETING else None)
        say = Say(wire.error(fault, frame))
        return [say] if code is None else [say, *self.end(code, fault.code)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed: close if the deadline is over."""
        if now < self.deadline:
            return []
        return self.fault(HelloTimeout() if self.phase is Phase.GREETING else BadToken())

    def end(self, code: int, reason: str) -> list[Action]:
        """Close."""
        self.phase = Phase.ENDED
        return [CloseConnection(code, reason)]
