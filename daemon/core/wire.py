"""The frames of `rowcast.v1`: what clients say, and the bytes that answer them."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from daemon.core.change import RESET_KINDS, Change, Kind, Position, Topic
from daemon.core.close_codes import Close
from daemon.core.errors import BadFrame, BadJson, BadPosition, ClientFault, UnknownOp

SUBPROTOCOL: Final = "rowcast.v1"

FrameId = Annotated[str, Field(max_length=64)] | Annotated[int, Field(ge=0, lt=2**53)]


def _position(value: object) -> object:
    if isinstance(value, str):
        return Position.parse(value)
    raise BadPosition


PositionText = Annotated[Position, BeforeValidator(_position)]
SessionText = Annotated[str, Field(min_length=1, max_length=64)]
TopicText = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x20\x7f*][^\x00-\x20\x7f]*$")]


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)

    id: FrameId | None = None


class Hello(_Frame):
    """The first frame. `since`: the topics subscribed afterwards are replayed from there.

    `seen` is the greatest position that the client has processed in any topic, if that is beyond `since`.
    `session` is that of its connection before this one, from its `welcome`.
    """

    op: Literal["hello"]
    token: str
    since: PositionText | None = None
    seen: PositionText | None = None
    session: SessionText | None = None


class Subscribe(_Frame):
    """Follow a topic, from now or from `since` on."""

    op: Literal["subscribe"]
    topic: TopicText
    since: PositionText | None = None
    # Reserved by the protocol: silence would hand a client rows that it asked to have filtered out.
    snapshot: None = None
    where: None = None


class Unsubscribe(_Frame):
    """Stop following a topic."""

    op: Literal["unsubscribe"]
    topic: TopicText


class Ping(_Frame):
    """Answered by a pong."""

    op: Literal["ping"]


ClientFrame = Hello | Subscribe | Unsubscribe | Ping
_CLIENT: TypeAdapter[ClientFrame] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="op")])


def parse(text: bytes) -> ClientFrame:
    """Read one frame of a client. Raises BadJson, UnknownOp or BadFrame; none of them repeats the input."""
    try:
        return _CLIENT.validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    match problem["type"]:
        case "json_invalid":
            raise BadJson
        case "union_tag_invalid":
            raise UnknownOp
        case "union_tag_not_found":
            raise BadFrame('the member "op" is missing')
    if not problem["loc"]:
        raise BadJson  # JSON, but no object
    where = ".".join(str(part) for part in problem["loc"][1:])
    raise BadFrame(f"{where}: {problem['msg'].removeprefix('Value error, ')}")


def frame_id(text: bytes) -> FrameId | None:
    """The `id` of a frame that could not be read otherwise, so that its error can name it."""
    try:
        found = from_json(text)
    except ValueError:
        return None
    named = found.get("id") if isinstance(found, dict) else None
    if isinstance(named, bool) or not isinstance(named, str | int):
        return None
    return named if len(str(named)) <= 64 else None


def _payload(op: str, **members: object) -> bytes:
    return to_json({"op": op} | {name: value for name, value in members.items() if value is not None})


def welcome(
    frame: FrameId | None,
    *,
    session: str,
    user: str,
    pos: Position,
    heartbeat: float,
    schema: str,
    limits: dict[str, int],
    last_close: Close | None = None,
) -> bytes:
    """Accepted. `heartbeat`: seconds between `head` frames; `schema`: the hash of the payload contracts.

    `last_close`: why this daemon ended the client's connection before this one, if it did.
    """
    return _payload(
        "welcome",
        id=frame,
        session=session,
        user=user,
        pos=str(pos),
        heartbeat=heartbeat,
        schema=schema,
        limits=limits,
        last_close=last_close and last_close._asdict(),
    )


def subscribed(frame: FrameId | None, topic: Topic, pos: Position) -> bytes:
    """Everything of the topic after `pos` will come."""
    return _payload("subscribed", id=frame, topic=topic, pos=str(pos))


def unsubscribed(frame: FrameId | None, topic: Topic) -> bytes:
    """Nothing of the topic will come any more."""
    return _payload("unsubscribed", id=frame, topic=topic)


def pong(frame: FrameId | None) -> bytes:
    """The answer to a ping."""
    return _payload("pong", id=frame)


def resumed(pos: Position, replayed: int) -> bytes:
    """Every topic that was being replayed is live from `pos` on; `replayed` changes were sent for it."""
    return _payload("resumed", pos=str(pos), replayed=replayed)


def reset(topic: Topic, reason: str, pos: Position) -> bytes:
    """Continuity cannot be proven: the client fetches the topic's state anew; the stream goes on after `pos`."""
    return _payload("reset", topic=topic, reason=reason, pos=str(pos))


def revoked(topic: Topic, pos: Position) -> bytes:
    """The right to the topic ended at `pos`; nothing of it was sent that came there or later."""
    return _payload("revoked", topic=topic, pos=str(pos))


def head(pos: Position | None, *, stale: bool = False) -> bytes:
    """The heartbeat: everything up to `pos` has been sent; None while something is being replayed.

    `stale`: the log cannot be read just now, so there may be more than the client can be told.
    """
    return _payload("head", pos=pos and str(pos), stale=stale or None)


def error(fault: ClientFault, frame: FrameId | None = None) -> bytes:
    """What the client did wrong; `retry` says whether trying again can help."""
    return _payload("error", id=frame, code=fault.code, message=str(fault), retry=fault.retry)


def bye(reason: str, retry_ms: int) -> bytes:
    """A planned close follows: come back after `retry_ms` milliseconds and resume."""
    return _payload("bye", reason=reason, retry_ms=retry_ms)


def runs(changes: Iterable[Change]) -> Iterable[tuple[Topic, Sequence[Change]]]:
    """Split changes, in their order, into what one frame may hold: neighbours of one topic, and doubts of one kind.

    Inside a transaction the log keeps each topic together, so a frame holds whole transactions of its topic; and
    since runs follow one another, whoever has processed a frame can resume from its `pos`, whatever it follows.
    """
    for _, run in groupby(changes, key=_frame_of):
        together = tuple(run)
        yield together[0].topic, together


def _frame_of(change: Change) -> object:
    return (change.topic, change.kind) if change.kind in RESET_KINDS else change.topic


def changes(topic: Topic, prev: Position, run: Sequence[Change]) -> bytes:
    """The changes of one topic, in order. `prev` is the topic's position before them, so that a gap shows."""
    name, before, after = _json(topic), _json(str(prev)), _json(f"{prev.epoch}:{run[-1].seq}")
    told = ",".join(map(_change, run))
    return f'{{"op":"changes","topic":{name},"prev":{before},"pos":{after},"changes":[{told}]}}'.encode()


def change(change: Change) -> bytes:
    """One change. What Postgres wrote as JSON goes in as it is."""
    return _change(change).encode()


def _change(change: Change) -> str:
    left = change.kind is Kind.LEAVE
    told = (
        f'{{"seq":{change.seq},"tx":"{change.tx}","at":"{change.at}","table":{_name(change.table)},'
        f'"kind":"{"delete" if left else change.kind}","key":{change.key}'
    )
    if left:
        told += ',"left":true'
    if change.record is not None:
        told += f',"record":{change.record}'
    if change.changed:
        told += f',"changed":{_json(change.changed)}'
    if change.actor is not None:
        told += f',"meta":{_json({"actor": change.actor})}'
    return told + "}"


def _json(value: object) -> str:
    return to_json(value).decode()


_name = lru_cache(1000)(_json)  # there are few tables
