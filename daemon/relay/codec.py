"""The bytes of what nodes tell each other: the version, the length of the head, the head in JSON, and texts.

The texts are keys and records as Postgres wrote them. The head says how many bytes each of them takes: no record is
ever parsed. Every decode checks what it reads: whatever the bytes are, it returns a value or raises BadMessage.
"""

import asyncio
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from daemon.core.batch import NONE_ABSENT, Beat, Contents, EndedRight, GoneRow, LogBatch, Unread
from daemon.core.change import MAX_EPOCH, MAX_SEQ, Change, Kind, Position, Right, Seq, Topic
from daemon.core.column_types import Column
from daemon.core.filters import Tables, View
from daemon.core.own_tables import OwnColumn, OwnTable
from daemon.core.ports import Batch
from daemon.core.presence import Key, People, Person
from daemon.core.snapshot import Rows, Visible, Wanted
from daemon.relay.errors import BadMessage, OtherVersion

VERSION: Final = 1
PAGE: Final = 200  # rows of a snapshot after which others get their turn

T = TypeVar("T")

Head = Any
"""What stands in the head of a message: arrays, objects, numbers and texts, of a type that was checked."""

Shape = Any
"""The type of a head."""

_PREFIX: Final = 5  # bytes: the version, and the length of the head
_HASH: Final = 8  # bytes of the hash of topics
_STRICT: Final = ConfigDict(strict=True, hide_input_in_errors=True)
_NO_TEXTS: Final = ()

_Number = Annotated[int, Field(ge=0, le=MAX_SEQ)]
_Length = Annotated[int, Field(ge=0, lt=2**32)]
_Limit = Annotated[int, Field(ge=1, le=MAX_SEQ)]
_Xid = Annotated[int, Field(ge=0, lt=2**64)]
_Hash = Annotated[int, Field(ge=0, lt=2**64)]
_Epoch = Annotated[str, Field(max_length=MAX_EPOCH)]
_Position = tuple[_Epoch, _Number]


class Message(Generic[T]):
    """How the values of one kind become bytes. `head` is the type of the JSON, and `show` and `read` convert values.

    `show` returns the head and the texts. `read` gets both, with the texts still joined, and raises ValueError if
    there can be no such value.
    """

    def __init__(
        self, head: Shape, show: Callable[[T], tuple[Head, Iterable[bytes]]], read: Callable[[Head, bytes], T]
    ) -> None:
        self._head = TypeAdapter[Any](head, config=_STRICT)
        self._show = show
        self._read = read

    def encode(self, value: T) -> bytes:
        """The bytes of a value."""
        shown, texts = self._show(value)
        head = self._head.dump_json(shown, warnings=False)
        return b"".join((VERSION.to_bytes(), len(head).to_bytes(4), head, *texts))

    def decode(self, message: bytes) -> T:
        """The value of these bytes. Raises BadMessage, and OtherVersion if that is why they cannot be read."""
        if message and message[0] != VERSION:
            raise OtherVersion(message[0])
        end = _PREFIX + int.from_bytes(message[1:_PREFIX])
        if len(message) < max(end, _PREFIX):
            raise BadMessage("it is cut off")
        try:
            return self._read(self._head.validate_json(message[_PREFIX:end]), message[end:])
        except ValidationError as error:
            [first, *_] = error.errors(include_url=False, include_context=False, include_input=False)
            raise BadMessage(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise BadMessage(str(error)) from None

    async def pack(self, value: T) -> bytes:
        """The same as `encode`. Others may get their turn in between."""
        return self.encode(value)

    async def unpack(self, message: bytes) -> T:
        """The same as `decode`. Others may get their turn in between."""
        return self.decode(message)


def _plain(head: Shape, show: Callable[[T], Head], read: Callable[[Head], T]) -> Message[T]:
    """A message without texts."""

    def read_all(found: Head, texts: bytes) -> T:
        if texts:
            raise ValueError("it has too many bytes")
        return read(found)

    return Message(head, lambda value: (show(value), _NO_TEXTS), read_all)


def _as_is(head: Shape) -> Message[Any]:
    """A message whose values are JSON."""
    return _plain(head, lambda value: value, lambda found: found)


# Changes

_Right = tuple[str | None, str | None]
_ChangeHead = tuple[
    _Number, str, str, str, str, str, Kind, _Length, _Length | None,
    tuple[str, ...], str | None, _Right | None, str | None, str | None,
]  # fmt: skip


def _shown_changes(changes: Iterable[Change]) -> tuple[list[object], list[bytes]]:
    """The heads of changes, and their texts. Outlines are not among them: what is sent has its records."""
    heads, texts = list[object](), list[bytes]()
    for seq, tx, at, schema, table, topic, kind, key, record, changed, actor, ends, model, unreadable, _ in changes:
        key_bytes, record_bytes = key.encode(), None if record is None else record.encode()
        texts.append(key_bytes)
        if record_bytes is not None:
            texts.append(record_bytes)
        heads.append(
            (
                seq, tx, at, schema, table, topic, kind,
                len(key_bytes), None if record_bytes is None else len(record_bytes),
                changed, actor, ends and (ends.user, ends.topic), model, unreadable,
            )
        )  # fmt: skip
    return heads, texts


class _Texts:
    """Texts that were joined, taken one after another."""

    __slots__ = ("_joined", "_taken")

    def __init__(self, joined: bytes) -> None:
        self._joined = joined
        self._taken = 0

    def take(self, length: int) -> str:
        """The next text. Raises ValueError if it is no text."""
        start = self._taken
        self._taken = end = start + length
        return self._joined[start:end].decode()

    def end(self) -> None:
        """Nothing else is expected. Raises ValueError if there is more, or less than was taken."""
        if self._taken != len(self._joined):
            raise ValueError("its texts are not as long as it says")


class Pull(NamedTuple):
    """There is a batch after `after` and up to `upto` that is too large to be sent to everybody: ask for it."""

    epoch: str
    after: Seq
    upto: Seq


def _show_batch(batch: LogBatch | Pull) -> tuple[Head, list[bytes]]:
    if isinstance(batch, Pull):
        return (*batch, None, (), None, (), None), []
    heads, texts = _shown_changes(batch.changes)
    ends = [(seq, (right.user, right.topic), schema, table) for seq, right, schema, table in batch.ends]
    head = (batch.epoch, batch.after, batch.upto, heads, ends, batch.gone, batch.jumps)
    if not batch.absent:
        return (*head, None), texts
    hashes = struct.pack(f">{len(batch.absent)}Q", *batch.absent)
    return (*head, list(batch.absent.values())), [hashes, *texts]


def _read_manifest(found: Head, joined: bytes) -> LogBatch | Pull:
    epoch, after, upto, heads, ends, gone, jumps, sizes = found
    numbers = [head[0] for head in heads or ()]
    if after > upto or (numbers and not after < min(numbers) <= max(numbers) <= upto):
        raise ValueError("its numbers do not belong together")
    absent = NONE_ABSENT
    if sizes is not None:
        taken = _HASH * len(sizes)
        absent = dict(zip(_read_hashes(joined[:taken], len(sizes)), sizes, strict=True))
        joined = joined[taken:]
    changes = Unread(heads or (), joined)
    if heads is None:
        return Pull(epoch, after, upto)
    return LogBatch(
        epoch,
        after,
        upto,
        changes,
        [EndedRight(seq, Right(*right), schema, table) for seq, right, schema, table in ends],
        None if gone is None else [GoneRow(*row) for row in gone],
        jumps,
        absent,
    )


def _read_hashes(joined: bytes, count: int) -> tuple[int, ...]:
    if len(joined) != _HASH * count:
        raise ValueError("it has fewer contents than sizes")
    return struct.unpack(f">{count}Q", joined)


def _read_batch(found: Head, joined: bytes) -> LogBatch:
    manifest = _read_manifest(found, joined)
    if isinstance(manifest, Pull) or manifest.absent:
        raise ValueError("it has no contents")
    return manifest


def _show_read(batch: Batch) -> tuple[object, list[bytes]]:
    heads, texts = _shown_changes(batch)
    return (heads, batch.reached if batch.more else None, batch.validated), texts


def _read_read(found: Head, joined: bytes) -> Batch:
    heads, reached, is_validated = found
    changes = Unread(heads, joined)
    return Batch(changes, more=reached is not None, validated=is_validated, reached=reached)


class Following(NamedTuple):
    """What follows a position: encoded batches, each where the one before it ends. The newest position is `head`."""

    head: Position
    batches: Sequence[bytes]


def _split(joined: bytes, lengths: Iterable[int]) -> list[bytes]:
    """Parts of these lengths. Raises ValueError if that is not all."""
    parts, taken = list[bytes](), 0
    for length in lengths:
        parts.append(joined[taken : taken + length])
        taken += length
    if taken != len(joined):
        raise ValueError("its parts are not as long as it says")
    return parts


def _read_following(found: Head, joined: bytes) -> Following:
    head, lengths = found
    return Following(Position(*head), _split(joined, lengths))


_ManifestHead = tuple[
    _Epoch,
    _Number,
    _Number,
    list[_ChangeHead] | None,
    list[tuple[_Number, _Right, str, str]],
    list[tuple[str, str, str, _Number]] | None,
    list[tuple[_Number, _Number]],
    list[_Length] | None,
]


def _show_contents(contents: Contents) -> tuple[object, list[bytes]]:
    heads, texts = _shown_changes(contents.changes)
    return (contents.epoch, contents.after, contents.upto, heads), texts


def _read_contents(found: Head, joined: bytes) -> Contents:
    epoch, after, upto, heads = found
    return Contents(epoch, after, upto, list(Unread(heads, joined)))


LOG_BATCH: Final[Message[LogBatch]] = Message(_ManifestHead, _show_batch, _read_batch)
"""A piece of the log, with its contents."""

MANIFEST: Final[Message[LogBatch | Pull]] = Message(_ManifestHead, _show_batch, _read_manifest)
"""What every gateway is sent of a piece of the log: the same bytes, or without contents, or where there is one."""

CONTENTS: Final[Message[Contents]] = Message(
    tuple[_Epoch, _Number, _Number, list[_ChangeHead]], _show_contents, _read_contents
)  # fmt: skip
"""Contents that travel by topic."""

BATCH: Final[Message[Batch]] = Message(tuple[list[_ChangeHead], _Number | None, bool], _show_read, _read_read)
"""What a read of the log has returned."""

FOLLOWING: Final[Message[Following]] = Message(
    tuple[_Position, list[_Length]],
    lambda following: ((following.head, list(map(len, following.batches))), following.batches),
    _read_following,
)
"""Batches that follow each other."""

_Age = Annotated[float, Field(ge=0)]
BEAT: Final[Message[Beat]] = _plain(
    tuple[_Epoch, _Number, _Age, str, str, _Number] | tuple[_Epoch, _Number, _Age, str, str, _Number, Literal[False]],
    lambda beat: beat[:-1] if beat.has_tx else beat,
    lambda found: Beat(*found),
)
"""How far a member is. A gateway that is too old to hide transactions cannot read a beat that asks for it."""


# Snapshots

_RowHead = tuple[str, str, str | None, _Length, _Length]


def _show_wanted(wanted: Wanted) -> object:
    return wanted.topic, wanted.limit, wanted.view and wanted.view.condition


def _read_wanted(found: Head) -> Wanted:
    topic, limit, condition = found
    return Wanted(topic, limit, None if condition is None else View.of_condition(condition))


def _show_page(rows: Sequence[Change]) -> tuple[Head, list[bytes]]:
    heads, texts = list[object](), list[bytes]()
    for row in rows:
        key, record = row.key.encode(), (row.record or "").encode()
        texts += key, record
        heads.append((row.schema, row.table, row.model, len(key), len(record)))
    return (rows[0].topic, heads), texts


def _read_page(found: Head, joined: bytes) -> list[Change]:
    topic, heads = found
    texts = _Texts(joined)
    rows = [
        Change(
            Seq(0), "", "", schema, table, topic, Kind.INSERT, texts.take(key), texts.take(record), model=model
        )
        for schema, table, model, key, record in heads
    ]  # fmt: skip
    texts.end()
    return rows


def _show_snapshot(rows_and_pages: tuple[Rows, Sequence[bytes]]) -> tuple[Head, Sequence[bytes]]:
    rows, pages = rows_and_pages
    return (rows.position, rows.visible, rows.upto, rows.omitted, rows.validated, list(map(len, pages))), pages


def _read_snapshot(found: Head, joined: bytes) -> tuple[Rows, Sequence[bytes]]:
    position, visible, upto, omitted, is_validated, lengths = found
    rows = Rows(Position(*position), Visible(*visible), upto, (), omitted, is_validated)
    return rows, _split(joined, lengths)


_PAGE: Final[Message[Sequence[Change]]] = Message(tuple[str, list[_RowHead]], _show_page, _read_page)
_SNAPSHOT: Final[Message[tuple[Rows, Sequence[bytes]]]] = Message(
    tuple[
        _Position, tuple[_Xid, _Xid, frozenset[_Xid]], _Number, dict[str, _Number], bool, list[_Length]
    ],
    _show_snapshot,
    _read_snapshot,
)  # fmt: skip


class RowsMessage:
    """How snapshots become bytes, in pages, because they may be large."""

    async def pack(self, rows: Rows) -> bytes:
        """The bytes of a snapshot. Others get their turn after each page."""
        pages = list[bytes]()
        for first in range(0, len(rows.rows), PAGE):
            pages.append(_PAGE.encode(rows.rows[first : first + PAGE]))
            await asyncio.sleep(0)
        return _SNAPSHOT.encode((rows, pages))

    async def unpack(self, message: bytes) -> Rows:
        """The snapshot of these bytes. Others get their turn after each page. Raises BadMessage."""
        found, pages = _SNAPSHOT.decode(message)
        rows = list[Change]()
        for page in pages:
            rows += _PAGE.decode(page)
            await asyncio.sleep(0)
        if not found.omitted.keys() >= {row.table for row in rows}:
            raise BadMessage("it has rows of a table that it does not name")
        return replace(found, rows=rows)


WANTED: Final = _plain(tuple[str, _Limit | None, str | None], _show_wanted, _read_wanted)
"""A snapshot that clients ask for. Of a view it has the condition only: whoever asked applies the rest."""

ROWS: Final = RowsMessage()
"""A snapshot."""


# The columns that filters compare, and the tables that are served without a pack

_ColumnHead = tuple[str, str | None, list[str]]


def _show_tables(found: Sequence[Tables]) -> object:
    distinct: list[Tables] = []
    places = list[int]()
    for tables in found:
        if tables not in distinct:
            distinct.append(tables)
        places.append(distinct.index(tables))
    return places, [
        {
            table: [(column.name, column.type, sorted(column.labels)) for column in columns.values()]
            for table, columns in tables.items()
        }
        for tables in distinct
    ]


def _read_tables(found: Head) -> list[Tables]:
    places, distinct = found
    known: list[Tables] = [
        {
            table: {name: Column(name, type_, frozenset(labels)) for name, type_, labels in columns}
            for table, columns in tables.items()
        }
        for tables in distinct
    ]
    if any(place >= len(known) for place in places):
        raise ValueError("it names tables that it does not have")
    return [known[place] for place in places]


TABLES: Final[Message[Sequence[Tables]]] = _plain(
    tuple[list[_Length], list[dict[str, list[_ColumnHead]]]], _show_tables, _read_tables
)
"""The published columns of what several topics are made of. Most topics are made of the same."""

OWN_TABLES: Final[Message[Sequence[OwnTable]]] = _plain(
    list[tuple[str, str, str, tuple[str, ...], tuple[str, ...], list[tuple[str, str, bool]]]],
    lambda tables: tables,
    lambda found: [
        OwnTable(schema, table, pack, topics, key, tuple(OwnColumn(*column) for column in columns))
        for schema, table, pack, topics, key, columns in found
    ],
)
"""The tables that are served without a pack."""


# Who is present, and what devices have acknowledged

_Key = tuple[str, str]
_Person = tuple[str, datetime, datetime, bool]
_Place = tuple[str, _Key]


class Stored(NamedTuple):
    """Whom a process stores and removes. See PeopleStore."""

    process: str
    present: Mapping[tuple[Topic, Key], Person]
    gone: Sequence[tuple[Topic, Key]]


def _read_stored(found: Head) -> Stored:
    process, present, gone = found
    return Stored(
        process,
        {(topic, Key(*key)): Person(*person) for (topic, key), person in present},
        [(topic, Key(*key)) for topic, key in gone],
    )


def _read_others(found: Head) -> dict[Topic, list[People]]:
    return {
        topic: [{Key(*key): Person(*person) for key, person in people} for people in processes]
        for topic, processes in found
    }


STORED: Final[Message[Stored]] = _plain(
    tuple[str, list[tuple[_Place, _Person]], list[_Place]],
    lambda stored: (stored.process, list(stored.present.items()), stored.gone),
    _read_stored,
)
"""Whom a process stores and removes."""

OTHERS: Final[Message[Mapping[Topic, list[People]]]] = _plain(
    list[tuple[str, list[list[tuple[_Key, _Person]]]]],
    lambda others: [
        (topic, [list(people.items()) for people in processes]) for topic, processes in others.items()
    ],
    _read_others,
)  # fmt: skip
"""Who is present according to other processes."""

ACKS: Final[Message[Mapping[Key, Position]]] = _plain(
    list[tuple[_Key, _Position]],
    lambda acks: list(acks.items()),
    lambda found: {Key(*key): Position(*position) for key, position in found},
)
"""Positions that devices have acknowledged."""


# Small ones

POSITION: Final[Message[Position]] = _plain(_Position, lambda position: position, lambda found: Position(*found))
TEXT: Final[Message[str]] = _as_is(str)
OPTIONAL_TEXT: Final[Message[str | None]] = _as_is(str | None)
TEXTS: Final[Message[Sequence[str]]] = _as_is(list[str])
BOOLEAN: Final[Message[bool]] = _as_is(bool)
NOTHING: Final[Message[None]] = _as_is(None)
PAIRS: Final[Message[Sequence[tuple[str, str]]]] = _as_is(list[tuple[str, str]])
"""Users and topics, or users and devices."""

SINCE_UPTO: Final[Message[tuple[Position, Position]]] = _plain(
    tuple[_Position, _Position],
    lambda positions: positions,
    lambda found: (Position(*found[0]), Position(*found[1])),
)
POSITIONS: Final[Message[Sequence[Position | None]]] = _plain(
    list[_Position | None],
    lambda positions: positions,
    lambda found: [position and Position(*position) for position in found],
)
TOPICS_UPTO: Final[Message[tuple[str, Sequence[str], int, int, int]]] = _as_is(
    tuple[_Epoch, list[str], _Number, _Number, _Limit]
)
"""An epoch, topics, after which number, up to which number, and about how many changes."""

AFTER: Final[Message[tuple[str, int, int]]] = _as_is(tuple[_Epoch, _Number, _Limit])
"""An epoch, after which number, and about how many changes."""

HASHES_UPTO: Final[Message[tuple[Position, int, Sequence[int]]]] = _plain(
    tuple[_Position, _Number, list[_Hash]],
    lambda asked: asked,
    lambda found: (Position(*found[0]), *found[1:]),
)
"""After which position, up to which number, and the hashes of topics."""

RIGHTS: Final[Message[tuple[str, Sequence[tuple[str, str]]]]] = _as_is(tuple[_Epoch, list[tuple[str, str]]])
"""An epoch, and users and topics."""

PROCESS_AND_TOPICS: Final[Message[tuple[str, Sequence[str]]]] = _as_is(tuple[str, list[str]])

FROM: Final[Message[Sequence[tuple[int | None] | str]]] = _as_is(list[tuple[_Number | None] | str])
"""Each is an answer, or why there is none: the position from which a user may read a topic; None if not at all."""

ALLOWED: Final[Message[Sequence[tuple[bool] | str]]] = _as_is(list[tuple[bool] | str])
USERS: Final[Message[Sequence[tuple[str | None] | str]]] = _as_is(list[tuple[str | None] | str])
