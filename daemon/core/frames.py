"""The frames of the server as types. The contracts are made from them, and tests compare what a daemon sends.

A frame is a class here, its builder in `wire`, and a row in docs/protocol.md. A member that may be missing is
NotRequired: no frame contains null outside of a row.
"""

from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter
from typing_extensions import TypedDict

from daemon.core.change import MAX_TOPIC, TOPIC_PATTERN
from daemon.core.signals import SignalName
from daemon.core.wire import FrameId, PositionString

_Topic = Annotated[str, Field(min_length=1, max_length=MAX_TOPIC, pattern=TOPIC_PATTERN)]
_Columns = dict[str, Any]


class Limits(TypedDict):
    """What one connection may do."""

    topics: int
    frame_bytes: int


class LastClose(TypedDict):
    """Why this daemon ended a connection."""

    code: int
    reason: str


class Meta(TypedDict):
    """Who made a change, if the application says so."""

    actor: NotRequired[str]


class RowChange(TypedDict):
    """What happened to one row."""

    seq: int
    tx: NotRequired[str]
    at: str
    table: str
    kind: Literal["insert", "update", "delete", "restore"]
    key: _Columns
    left: NotRequired[Literal[True]]
    record: NotRequired[_Columns]
    changed: NotRequired[list[str]]
    meta: NotRequired[Meta]


class RowOfSnapshot(TypedDict):
    """One row of a topic."""

    key: _Columns
    record: _Columns


class Welcome(TypedDict):
    """You are connected."""

    op: Literal["welcome"]
    id: NotRequired[FrameId]
    session: str
    user: str
    pos: PositionString
    heartbeat: float
    schema: str
    limits: Limits
    expires_in: float
    numbers: NotRequired[Literal["json", "string"]]
    since: NotRequired[PositionString]
    last_close: NotRequired[LastClose]


class Renewed(TypedDict):
    """The new token is valid, for so many seconds."""

    op: Literal["renewed"]
    id: NotRequired[FrameId]
    expires_in: float


class Subscribed(TypedDict):
    """You will receive everything in the topic after this position, and before it the rows, if it says so."""

    op: Literal["subscribed"]
    id: NotRequired[FrameId]
    topic: _Topic
    pos: PositionString
    snapshot: NotRequired[Literal[True]]


class Unsubscribed(TypedDict):
    """You will receive nothing more from the topic."""

    op: Literal["unsubscribed"]
    id: NotRequired[FrameId]
    topic: _Topic


class Pong(TypedDict):
    """The answer to a ping."""

    op: Literal["pong"]
    id: NotRequired[FrameId]


class Resumed(TypedDict):
    """Every topic that was being replayed is live from this position on."""

    op: Literal["resumed"]
    pos: PositionString
    replayed: int


class Reset(TypedDict):
    """What you know about the topic may be wrong; the stream continues after this position."""

    op: Literal["reset"]
    topic: _Topic
    reason: str
    pos: PositionString


class Revoked(TypedDict):
    """Your right to the topic ended at this position."""

    op: Literal["revoked"]
    topic: _Topic
    pos: PositionString


class Head(TypedDict):
    """The heartbeat: everything up to this position has been sent."""

    op: Literal["head"]
    pos: NotRequired[PositionString]
    stale: NotRequired[Literal[True]]


class Error(TypedDict):
    """A frame was refused."""

    op: Literal["error"]
    id: NotRequired[FrameId]
    code: str
    message: str
    retry: bool


class Bye(TypedDict):
    """A planned close follows."""

    op: Literal["bye"]
    reason: str
    retry_ms: int


class Snapshot(TypedDict):
    """Rows of one table of the topic."""

    op: Literal["snapshot"]
    topic: _Topic
    table: str
    rows: list[RowOfSnapshot]
    omitted: NotRequired[int]
    more: bool


class Changes(TypedDict):
    """What happened in the topic after `prev`, up to `pos`, in order."""

    op: Literal["changes"]
    topic: _Topic
    prev: PositionString
    pos: PositionString
    changes: list[RowChange]


class Signal(TypedDict):
    """Another client that follows the topic says something."""

    op: Literal["signal"]
    topic: _Topic
    name: SignalName
    data: JsonValue
    user: str


class Device(TypedDict):
    """A device that is present, and what it says of itself."""

    device: str
    data: _Columns
    since: str


class Left(TypedDict):
    """A device that is not present any more."""

    user: str
    device: str


class Person(Device):
    """A device of a user."""

    user: str


class Presence(TypedDict):
    """Who is present in the topic, or what has changed."""

    op: Literal["presence"]
    topic: _Topic
    state: NotRequired[dict[str, list[Device]]]
    joined: NotRequired[list[Person]]
    left: NotRequired[list[Left]]
    updated: NotRequired[list[Person]]


ServerFrame = (
    Welcome
    | Renewed
    | Subscribed
    | Unsubscribed
    | Pong
    | Resumed
    | Reset
    | Revoked
    | Head
    | Error
    | Bye
    | Snapshot
    | Changes
    | Signal
    | Presence
)

EXACTLY: Final[TypeAdapter[ServerFrame]] = TypeAdapter(
    Annotated[ServerFrame, Field(discriminator="op")],
    config=ConfigDict(extra="forbid", strict=True, defer_build=True),
)
"""Refuses a frame that is not exactly as its class says. Clients ignore members that they do not know."""
