"""The frames of `rowcast.v1`: parsing what clients send, and building the payloads of the server."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from json.encoder import encode_basestring
from operator import attrgetter
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, from_json, to_json

from daemon.core.change import MAX_TOPIC, RESET_KINDS, TOPIC_PATTERN, Change, Kind, Numbers, Position, Seq, Topic
from daemon.core.close_codes import Close
from daemon.core.column_types import JsonNumber
from daemon.core.errors import BadFrame, BadJson, BadPosition, BadSnapshot, ClientFault, UnknownOp
from daemon.core.presence import Key, Person
from daemon.core.signals import SignalName

SUBPROTOCOL: Final = "rowcast.v1"

STORED: Final = "stored"

MAX_VALUES: Final = 256  # in a frame of a client: what is not a known member is read before it is ignored

FrameId = Annotated[str, Field(max_length=64)] | Annotated[int, Field(ge=0, lt=2**53)]


def _position(value: object) -> object:
    if isinstance(value, str):
        return Position.parse(value)
    raise BadPosition


def _position_or_stored(value: object) -> object:
    return value if value == STORED else _position(value)


PositionString = Annotated[str, Field(pattern=r"^.+:[0-9]{1,16}$", description="A place in the log.")]
PositionText = Annotated[Position, BeforeValidator(_position, json_schema_input_type=PositionString)]
SessionText = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[!-~]*$")]
TopicText = Annotated[str, Field(min_length=1, max_length=MAX_TOPIC, pattern=TOPIC_PATTERN)]


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)

    id: FrameId | None = None


class Hello(_Frame):
    """The first frame. Topics that are subscribed later are replayed from `since`.

    `seen` is the newest position that the client has processed in any topic, if that is beyond `since`. `session` is
    the one from the `welcome` of its previous connection. `numbers` is the form of int8 and numeric values. `device`
    is what the user calls this client: its acknowledged position is kept, and it stays present while it reconnects.
    """

    op: Literal["hello"]
    token: str
    since: (
        Annotated[
            Position | Literal["stored"],
            BeforeValidator(_position_or_stored, json_schema_input_type=PositionString | Literal["stored"]),
        ]
        | None
    ) = None
    seen: PositionText | None = None
    session: SessionText | None = None
    device: SessionText | None = None
    numbers: Annotated[Numbers | None, Field(strict=False)] = None


class Renew(_Frame):
    """A newer token of the same user takes the place of the last one."""

    op: Literal["token"]
    token: str


class SnapshotOptions(BaseModel):
    """Which rows a snapshot has: of each table those with the `limit` greatest keys, or all."""

    # Ignoring a member would send a client rows that it did not want.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    limit: Annotated[int | None, Field(ge=1, lt=2**31)] = None


def _snapshot(value: object, info: ValidationInfo) -> object:
    if value is None or value is False:
        return None
    if info.data.get("since") is not None:
        raise BadSnapshot
    if value is True:
        return SnapshotOptions()
    if isinstance(value, dict):
        return value
    raise BadSnapshot


_BY_TABLE: Final = {"type": "object", "minProperties": 1}
_NAMES: Final = {"type": "array", "items": {"type": "string"}, "minItems": 1}


class PresenceOptions(BaseModel):
    """What others in the topic see of this client."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    data: dict[str, JsonValue] = {}


class Subscribe(_Frame):
    """Follow a topic: from now, or from `since` on, or beginning with a snapshot of its rows.

    `where` and `columns` say what of it: `filters.view` checks them, which has to know the topic's tables. With
    `presence`, the others who are present there are told, and the client is told of them.
    """

    op: Literal["subscribe"]
    topic: TopicText
    since: PositionText | None = None
    snapshot: Annotated[
        SnapshotOptions | None, BeforeValidator(_snapshot, json_schema_input_type=bool | SnapshotOptions)
    ] = None
    where: Annotated[Any, WithJsonSchema(_BY_TABLE | {"additionalProperties": {"type": "object"}})] = None
    columns: Annotated[Any, WithJsonSchema(_BY_TABLE | {"additionalProperties": _NAMES})] = None
    presence: PresenceOptions | None = None


class Unsubscribe(_Frame):
    """Stop following a topic."""

    op: Literal["unsubscribe"]
    topic: TopicText


class Ping(_Frame):
    """Answered by a pong."""

    op: Literal["ping"]


class Signal(_Frame):
    """Tell the other followers of a topic something that is not stored."""

    op: Literal["signal"]
    topic: TopicText
    name: SignalName
    data: JsonValue = None


class Presence(_Frame):
    """Let others in a topic see these data of this client; without data, be present no longer."""

    op: Literal["presence"]
    topic: TopicText
    data: dict[str, JsonValue] | None


class Ack(_Frame):
    """Everything up to `pos` has been processed: keep it for this device."""

    op: Literal["ack"]
    pos: PositionText


ClientFrame = Hello | Renew | Subscribe | Unsubscribe | Signal | Presence | Ack | Ping
_CLIENT: TypeAdapter[ClientFrame] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="op")])


def parse(text: bytes) -> ClientFrame:
    """Parse a frame of a client. Raises BadJson, UnknownOp or BadFrame; none of them repeats the input but its id."""
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise BadFrame(f"there are more than {MAX_VALUES} values")
    try:
        found = from_json(text, cache_strings="none", allow_inf_nan=False)
    except ValueError:
        raise BadJson from None
    if not isinstance(found, dict):
        raise BadJson
    if found.get("where") is not None:  # its numbers are compared with all their digits
        found["where"] = json.loads(text, parse_float=JsonNumber)["where"]
    try:
        return _CLIENT.validate_python(found)
    except ValidationError as error:
        fault = _fault(error.errors(include_url=False, include_input=False)[0])
    fault.frame = _frame_id(found)
    raise fault


def _fault(problem: ErrorDetails) -> ClientFault:
    """What is wrong with a frame."""
    match problem["type"]:
        case "union_tag_invalid":
            return UnknownOp()
        case "union_tag_not_found":
            return BadFrame('the member "op" is missing')
    where = ".".join(str(part) for part in problem["loc"][1:])
    return BadFrame(f"{where}: {problem['msg'].removeprefix('Value error, ')}")


def _frame_id(found: dict[str, object]) -> FrameId | None:
    """The `id` of a frame that is otherwise invalid, for its error frame; None if it has none."""
    named = found.get("id")
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
    expires_in: float,
    numbers: Numbers | None = None,
    since: Position | None = None,
    last_close: Close | None = None,
) -> bytes:
    """The token is valid. `heartbeat`: seconds between `head` frames; `schema`: the hash of the payload contracts.

    `expires_in`: seconds until the token expires. `numbers`: the form that the client chose, if it did. `since`:
    where it resumes, if it asked for what is stored. `last_close`: why this daemon closed the client's previous
    connection, if it did.
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
        expires_in=expires_in,
        numbers=numbers,
        since=since and str(since),
        last_close=last_close and last_close._asdict(),
    )


def renewed(frame: FrameId | None, expires_in: float) -> bytes:
    """The new token is valid, for `expires_in` seconds."""
    return _payload("renewed", id=frame, expires_in=expires_in)


def subscribed(frame: FrameId | None, topic: Topic, pos: Position, *, snapshot: bool = False) -> bytes:
    """Every change of the topic after `pos` will be sent; before that, with `snapshot`, the rows of the topic."""
    return _payload("subscribed", id=frame, topic=topic, pos=str(pos), snapshot=snapshot or None)


def snapshot(topic: Topic, table: str, rows: Sequence[Change], *, omitted: int, more: bool) -> bytes:
    """Rows of one table, as they were at the position of `subscribed`.

    `omitted`: how many further rows of the table cannot be sent. `more`: it is not the last such frame of the topic.
    """
    body = ",".join(f'{{"key":{row.key},"record":{row.record}}}' for row in rows)
    left_out = f',"omitted":{omitted}' if omitted else ""
    return (
        f'{{"op":"snapshot","topic":{_json(topic)},"table":{_name(table)},"rows":[{body}]{left_out},"more":{_json(more)}}}'
    ).encode()


def compact(value: JsonValue) -> bytes:
    """A JSON value without blanks; a number that no double holds is null."""
    return to_json(value, inf_nan_mode="null")


def signal(topic: str, name: str, data: str, user: str) -> bytes:
    """Another follower of the topic tells something. `data` is JSON."""
    return (
        f'{{"op":"signal","topic":{_json(topic)},"name":{_json(name)},"data":{data},"user":{_json(user)}}}'.encode()
    )


def presence_state(topic: Topic, people: Mapping[Key, Person]) -> bytes:
    """Everybody who is present in the topic."""
    users: dict[str, list[str]] = {}
    for key, person in people.items():
        users.setdefault(key.user, []).append(_entry(key, person))
    state = ",".join(f"{_json(user)}:[{','.join(entries)}]" for user, entries in users.items())
    return f'{{"op":"presence","topic":{_json(topic)},"state":{{{state}}}}}'.encode()


def presence_changes(
    topic: Topic, *, joined: Mapping[Key, Person], left: Iterable[Key], updated: Mapping[Key, Person]
) -> bytes:
    """Who has come, who has gone, and whose data is another since the last such frame."""
    parts = [
        *_list("joined", (_entry(key, person, named=True) for key, person in joined.items())),
        *_list("left", (_json({"user": key.user, "device": key.device}) for key in left)),
        *_list("updated", (_entry(key, person, named=True) for key, person in updated.items())),
    ]
    return f'{{"op":"presence","topic":{_json(topic)},{",".join(parts)}}}'.encode()


def _list(name: str, entries: Iterable[str]) -> list[str]:
    text = ",".join(entries)
    return [f'"{name}":[{text}]'] if text else []


def _entry(key: Key, person: Person, *, named: bool = False) -> str:
    user = f'"user":{_json(key.user)},' if named else ""
    return f'{{{user}"device":{_json(key.device)},"data":{person.data},"since":{_json(person.since.isoformat())}}}'


def unsubscribed(frame: FrameId | None, topic: Topic) -> bytes:
    """Nothing more of the topic will be sent."""
    return _payload("unsubscribed", id=frame, topic=topic)


def pong(frame: FrameId | None) -> bytes:
    """The answer to a ping."""
    return _payload("pong", id=frame)


def resumed(pos: Position, replayed: int) -> bytes:
    """Every topic that was being replayed is live from `pos` on. `replayed` changes were sent."""
    return _payload("resumed", pos=str(pos), replayed=replayed)


def reset(topic: Topic, reason: str, pos: Position) -> bytes:
    """Changes may be missing: the client fetches the topic's state again. The stream continues after `pos`."""
    return _payload("reset", topic=topic, reason=reason, pos=str(pos))


def revoked(topic: Topic, pos: Position) -> bytes:
    """The right to the topic ended at `pos`. No change at or after that position was sent."""
    return _payload("revoked", topic=topic, pos=str(pos))


def head(pos: Position | None, *, stale: bool = False) -> bytes:
    """The heartbeat: everything up to `pos` has been sent. `pos` is None while topics are being replayed.

    `stale`: changes may be waiting for delivery at the moment, so there may be newer ones.
    """
    return _payload("head", pos=pos and str(pos), stale=stale or None)


def error(fault: ClientFault, frame: FrameId | None = None) -> bytes:
    """What the client did wrong; `retry` says whether trying again can help."""
    return _payload("error", id=frame, code=fault.code, message=str(fault), retry=fault.retry)


def bye(reason: str, retry_ms: int) -> bytes:
    """A planned close follows: reconnect after `retry_ms` milliseconds and resume."""
    return _payload("bye", reason=reason, retry_ms=retry_ms)


def runs(changes: Iterable[Change]) -> Iterable[tuple[Topic, Sequence[Change]]]:
    """Split changes into runs that make one frame each: consecutive changes of one topic, or one reset kind.

    Within a transaction the log keeps each topic together, so a frame holds whole transactions of its topic. Since
    runs follow one another in the log, a client can resume from the `pos` of any frame, whatever topics it follows.
    """
    changes = tuple(changes)
    has_resets = not RESET_KINDS.isdisjoint(map(_kind, changes))
    for _, run in groupby(changes, key=_frame_of if has_resets else _topic):
        together = tuple(run)
        yield together[0].topic, together


_kind, _topic = attrgetter("kind"), attrgetter("topic")


def _frame_of(change: Change) -> object:
    return (change.topic, change.kind) if change.kind in RESET_KINDS else change.topic


def changes(
    topic: Topic, prev: Position, run: Sequence[Change], upto: Seq | None = None, *, has_tx: bool = True
) -> bytes:
    """The changes of one topic, in order. `prev` is the topic's position before them, so that a client sees a gap.

    `upto` is the position after them, if that is not the last of these changes. `has_tx`: whether they name their
    transactions.
    """
    epoch = prev.epoch
    name, before, after = _text(topic), _text(f"{epoch}:{prev.seq}"), _text(f"{epoch}:{upto or run[-1].seq}")
    texts = _texts(run, has_tx=has_tx)
    # A frame may be large: it is joined at once.
    texts[0] = f'{{"op":"changes","topic":{name},"prev":{before},"pos":{after},"changes":[{texts[0]}'
    texts[-1] += "]}"
    return ",".join(texts).encode()


def change(change: Change, *, has_tx: bool = True) -> bytes:
    """One change as JSON. Key and record are copied as Postgres wrote them."""
    [text] = _texts([change], has_tx=has_tx)
    return text.encode()


def _texts(run: Iterable[Change], *, has_tx: bool) -> list[str]:
    """Each change as JSON. What it has in common with the one before it is not made again."""
    texts: list[str] = []
    last_tx = last_at = last_table = last_kind = None
    when = what = ""
    for seq, tx, at, _, table, _, kind, key, record, changed, actor, _, _, _, _ in run:
        if tx != last_tx or at != last_at:
            last_tx, last_at = tx, at
            when = f',"tx":"{tx}","at":"{at}' if has_tx else f',"at":"{at}'
        if kind is not last_kind or table != last_table:
            last_table, last_kind = table, kind
            what = f'","table":{_name(table)},"kind":{_KINDS[kind]},"key":'
        if record is not None and not changed and actor is None and kind is not _LEAVE:
            texts.append(f'{{"seq":{seq}{when}{what}{key},"record":{record}}}')
            continue
        rest = ',"left":true' if kind is _LEAVE else ""
        if record is not None:
            rest += f',"record":{record}'
        if changed:
            rest += f',"changed":{_json(changed)}'
        if actor is not None:
            rest += f',"meta":{_json({"actor": actor})}'
        texts.append(f'{{"seq":{seq}{when}{what}{key}{rest}}}')
    return texts


def _json(value: object) -> str:
    return to_json(value).decode()


_text = encode_basestring  # a string as JSON, as `_json` makes it, in a third of the time
_name = lru_cache(1000)(_json)  # there are few tables
# Formatting a member of an enumeration takes as long as all the rest; so does finding one.
_LEAVE: Final = Kind.LEAVE
_KINDS: Final = {kind: _json("delete" if kind is Kind.LEAVE else kind.value) for kind in Kind}
