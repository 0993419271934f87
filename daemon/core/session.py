"""The protocol of one client, without any I/O: a frame in, actions out.

The law: a session greets, then it is live, then it has ended. What it may do in each phase stands in `receive`;
it changes phase in `welcomed` and `end`, and nowhere else. Whoever holds the socket performs the actions, in order.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, assert_never

from daemon.core import wire
from daemon.core.change import Position, Seq, Topic
from daemon.core.errors import (
    AlreadyGreeted,
    AlreadySubscribed,
    BadToken,
    ClientFault,
    HelloExpected,
    HelloTimeout,
    NoSuchTopic,
    TooManyTopics,
)
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
    """Find out who this is; answer with `welcomed`, or with `fault`."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class Authorize:
    """Find out whether the user may read the topic; answer with `granted`, or with `fault` and `forget`."""

    user: str
    topic: Topic
    frame: FrameId | None


@dataclass(frozen=True, slots=True)
class Follow:
    """Let the topic's changes flow from `since`, or from now; say `subscribed` first. The right began at `begun`."""

    topic: Topic
    since: Position | None
    begun: Seq
    frame: FrameId | None


@dataclass(frozen=True, slots=True)
class Unfollow:
    """Let nothing more of the topic flow."""

    topic: Topic


@dataclass(frozen=True, slots=True)
class CloseConnection:
    """Close the connection with this code."""

    code: int
    reason: str


Action = Say | Authenticate | Authorize | Follow | Unfollow | CloseConnection


class Session:
    """One client's side of the protocol.

    `deadline` is when the hello must have come, and later when the token expires, in the seconds of whatever clock
    the caller has. `seen` is how far the client has gone in any topic, if beyond where it resumes.
    """

    __slots__ = ("_since", "deadline", "phase", "seen", "topics", "user")

    def __init__(self, deadline: float) -> None:
        self.phase = Phase.GREETING
        self.deadline = deadline
        self.user: str = ""
        self.topics: dict[Topic, Position | None] = {}  # what is followed, or asked for, and since when
        self._since: Position | None = None
        self.seen: Position | None = None

    def receive(self, frame: wire.ClientFrame) -> list[Action]:
        """Answer one frame."""
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
        self.topics[topic] = frame.since or self._since
        return [Authorize(self.user, topic, frame.id)]

    def welcomed(self, user: str, since: Position | None, expires: float, seen: Position | None = None) -> None:
        """The token was good. `since` is where topics without a position of their own are replayed from."""
        self.phase = Phase.LIVE
        self.deadline = expires
        self.user = user
        self._since = since
        self.seen = seen

    def granted(self, topic: Topic, frame: FrameId | None, begun: Seq | None) -> list[Action]:
        """What became of an `Authorize`: where the right began, None if there is none.

        A topic that does not exist and one that is forbidden look the same.
        """
        if self.phase is not Phase.LIVE:
            return []
        if begun is None or topic not in self.topics:  # the right may have ended after it was looked up
            self.topics.pop(topic, None)
            return self.fault(NoSuchTopic(), frame)
        return [Follow(topic, self.topics[topic], begun, frame)]

    def forget(self, topic: Topic) -> None:
        """The topic could not be decided on, or the right to it has ended; the client may ask again."""
        self.topics.pop(topic, None)

    def fault(self, fault: ClientFault, frame: FrameId | None = None) -> list[Action]:
        """Tell the client what it did wrong, and end where the fault says so, or nobody has said hello yet."""
        if self.phase is Phase.ENDED:
            return []
        code = fault.close or (4400 if self.phase is Phase.GREETING else None)
        say = Say(wire.error(fault, frame))
        return [say] if code is None else [say, *self.end(code, fault.code)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        if now < self.deadline:
            return []
        return self.fault(HelloTimeout() if self.phase is Phase.GREETING else BadToken())

    def end(self, code: int, reason: str) -> list[Action]:
        """Close, once."""
        self.phase = Phase.ENDED
        return [CloseConnection(code, reason)]
