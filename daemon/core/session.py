"""The protocol of one client, without any I/O: a frame comes in, actions go out.

The state machine: a session is GREETING, then LIVE, then ENDED. `receive` says what is allowed in each phase; only
`welcomed` and `end` change the phase. The owner of the socket performs the actions, in order.
"""

import sys
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import assert_never

from pydantic import JsonValue

from daemon.core import presence, signals, wire
from daemon.core.change import Numbers, Position, Topic
from daemon.core.errors import (
    AlreadyGreeted,
    AlreadySubscribed,
    BadToken,
    ClientFault,
    FilterTooLarge,
    HelloExpected,
    HelloTimeout,
    NotSubscribed,
    PresenceTooLarge,
    SignalTooLarge,
    TooManyTopics,
)
from daemon.core.filters import MAX_FILTER, Asked, View
from daemon.core.snapshot import Wanted
from daemon.core.wire import Ack, FrameId, Hello, Ping, Presence, Renew, Signal, Subscribe, Unsubscribe


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
    """Verify the token of this frame, and look up where a hello resumes if that is stored.

    Answer with `welcomed` or `renewed`, or with `fault`.
    """

    frame: Hello | Renew


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
    presence: str | None = None  # what the client says of itself, as a JSON object; None if it is not to be present


@dataclass(frozen=True, slots=True)
class Unfollow:
    """Send nothing more of the topic."""

    topic: Topic


@dataclass(frozen=True, slots=True)
class SendSignal:
    """Send this to the other followers of the topic."""

    topic: Topic
    name: str
    data: str  # as JSON
    frame: FrameId | None


@dataclass(frozen=True, slots=True)
class BePresent:
    """Let others in the topic see these data, a JSON object; None: be present no longer."""

    topic: Topic
    data: str | None
    frame: FrameId | None


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Keep this position for the client's device."""

    position: Position


@dataclass(frozen=True, slots=True)
class CloseConnection:
    """Close the connection with this code."""

    code: int
    reason: str


Action = Say | Authenticate | Follow | Unfollow | SendSignal | BePresent | Acknowledge | CloseConnection


class Session:
    """One client's side of the protocol.

    `deadline` is when the hello must have arrived, and later when the token expires, in seconds of the caller's
    clock. `topics` are those that the client follows or has requested, at most `max_topics`, each with the Follow of
    its subscription: a topic that was left and requested again has another one. Their filters have `max_filter`
    characters at most. `seen` is the newest position that
    the client has processed in any topic, if that is beyond where it resumes. `numbers` is the form of its int8 and
    numeric values. `device` is what its user calls it; empty if nothing was said.
    """

    __slots__ = (
        "_since",
        "deadline",
        "device",
        "max_filter",
        "max_topics",
        "numbers",
        "phase",
        "seen",
        "topics",
        "user",
    )

    def __init__(self, deadline: float, max_topics: int, max_filter: int = MAX_FILTER) -> None:
        self.max_topics = max_topics
        self.max_filter = max_filter
        self.phase = Phase.GREETING
        self.deadline = deadline
        self.user: str = ""
        self.device: str = ""
        self.topics: dict[Topic, Follow] = {}
        self._since: Position | None = None
        self.seen: Position | None = None
        self.numbers = Numbers.JSON

    def receive(self, frame: wire.ClientFrame) -> list[Action]:
        """Answer one frame. A Follow or an Authenticate is always the last action. Raises a ClientFault."""
        if self.phase is Phase.ENDED:
            return []
        if self.phase is Phase.GREETING:
            return [Authenticate(frame)] if isinstance(frame, Hello) else self.fault(HelloExpected(), frame.id)
        match frame:
            case Hello():
                return self.fault(AlreadyGreeted(), frame.id)
            case Renew():
                return [Authenticate(frame)]
            case Subscribe():
                return self._subscribe(frame)
            case Unsubscribe():
                topic = Topic(frame.topic)
                self.topics.pop(topic, None)
                return [Unfollow(topic), Say(wire.unsubscribed(frame.id, topic))]
            case Signal():
                return self._signal(frame)
            case Presence():
                return self._be_present(frame)
            case Ack():
                return [Acknowledge(frame.pos)]
            case Ping():
                return [Say(wire.pong(frame.id))]
        assert_never(frame)

    def _subscribe(self, frame: Subscribe) -> list[Action]:
        topic = Topic(sys.intern(frame.topic))  # all its followers keep it
        if topic in self.topics:
            return self.fault(AlreadySubscribed(), frame.id)
        if len(self.topics) >= self.max_topics:
            return self.fault(TooManyTopics(self.max_topics), frame.id)
        asked = None if frame.where is frame.columns is None else Asked(frame.where, frame.columns)
        shown = None if frame.presence is None else _presence_data(frame.presence.data, frame.id)
        wanted = None if frame.snapshot is None else Wanted(topic, frame.snapshot.limit)
        since = None if wanted else frame.since or self._since
        self.topics[topic] = Follow(topic, since, frame.id, wanted, asked, presence=shown)
        return [self.topics[topic]]

    def checked(self, follow: Follow, view: View) -> Follow:
        """The client's subscription, which sees this of its topic; it takes the place of `follow`.

        Raises FilterTooLarge.
        """
        if sum(other.view.size for other in self.topics.values() if other.view) + view.size > self.max_filter:
            raise FilterTooLarge("where", self.max_filter, "characters, with those of the connection's other topics")
        snapshot = follow.snapshot and follow.snapshot._replace(view=view)
        self.topics[follow.topic] = replace(follow, snapshot=snapshot, asked=None, view=view)
        return self.topics[follow.topic]

    def _signal(self, frame: Signal) -> list[Action]:
        topic = Topic(frame.topic)
        if topic not in self.topics:
            return self.fault(NotSubscribed(), frame.id)
        data = wire.compact(frame.data)
        if len(data) > signals.MAX_DATA:
            return self.fault(SignalTooLarge(signals.MAX_DATA), frame.id)
        return [SendSignal(topic, frame.name, data.decode(), frame.id)]

    def _be_present(self, frame: Presence) -> list[Action]:
        topic = Topic(frame.topic)
        if topic not in self.topics:
            return self.fault(NotSubscribed(), frame.id)
        return [BePresent(topic, None if frame.data is None else _presence_data(frame.data, frame.id), frame.id)]

    def welcomed(self, user: str, hello: Hello, expires: float) -> None:
        """The token of this hello is valid."""
        self.phase = Phase.LIVE
        self.deadline = expires
        self.user = user
        self.device = hello.device or hello.session or ""
        # Where topics without a position of their own are replayed from.
        self._since = hello.since if isinstance(hello.since, Position) else None
        self.seen = hello.seen
        self.numbers = hello.numbers or Numbers.JSON

    def renewed(self, frame: Renew, user: str, expires: float, expires_in: float) -> list[Action]:
        """The token of this frame is valid, for this user."""
        if user != self.user:
            return self.fault(BadToken(), frame.id)
        self.deadline = expires
        return [Say(wire.renewed(frame.id, expires_in))]

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


def _presence_data(data: dict[str, JsonValue], frame: FrameId | None) -> str:
    """The data as JSON. Raises PresenceTooLarge."""
    text = wire.compact(data)
    if len(text) > presence.MAX_DATA:
        fault = PresenceTooLarge(presence.MAX_DATA)
        fault.frame = frame
        raise fault
    return text.decode()
