"""What nodes tell each other survives the way, and whatever else arrives is refused with one error."""

from collections.abc import Coroutine
from datetime import UTC
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.core.batch import Beat, Contents, EndedRight, GoneRow, LogBatch, Unread, concerning
from daemon.core.change import MAX_SEQ, RESET_KINDS, Change, Kind, Position, Right, Seq, Topic
from daemon.core.column_types import TYPES, Column
from daemon.core.filters import Asked, view
from daemon.core.own_tables import OwnColumn, OwnTable
from daemon.core.ports import Batch
from daemon.core.presence import Key, Person
from daemon.core.snapshot import Rows, Visible, Wanted
from daemon.relay import codec
from daemon.relay.codec import Following, Message, Pull, Stored
from daemon.relay.errors import BadMessage, OtherVersion

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.integers(0, MAX_SEQ).map(Seq)
OPTIONAL = st.none() | TEXT
TOPIC = TEXT.map(Topic)
POSITION = st.builds(Position, TEXT, NUMBER)
RIGHT = st.builds(Right, OPTIONAL, OPTIONAL)
TIME = st.datetimes(timezones=st.just(UTC))
KEY = st.builds(Key, TEXT, TEXT)
PERSON = st.builds(Person, TEXT, TIME, TIME, st.booleans())
PEOPLE = st.dictionaries(KEY, PERSON, max_size=3)
XID = st.integers(0, 2**64 - 1)
CHANGE = st.builds(
    Change, NUMBER, TEXT, TEXT, TEXT, TEXT, TOPIC, st.sampled_from(Kind), TEXT, OPTIONAL,
    st.lists(TEXT, max_size=3).map(tuple), OPTIONAL, st.none() | RIGHT, OPTIONAL, OPTIONAL, st.none(),
)  # fmt: skip
CHANGES = st.lists(CHANGE, max_size=5)
ROW = st.builds(
    lambda table, key, record, model: Change(
        Seq(0), "", "", "app", table, Topic("t"), Kind.INSERT, key, record, model=model
    ),
    TEXT, TEXT, TEXT, OPTIONAL,
)  # fmt: skip
COLUMN = st.builds(Column, TEXT, st.none() | st.sampled_from(sorted(TYPES)), st.frozensets(TEXT, max_size=3))
TABLES = st.dictionaries(
    TEXT, st.lists(COLUMN, max_size=3).map(lambda columns: {column.name: column for column in columns}), max_size=3
)


@st.composite
def log_batches(draw: st.DrawFn) -> LogBatch:
    after, size = draw(st.integers(0, 2**40)), draw(st.integers(0, 50))
    inside = st.integers(after + 1, after + size).map(Seq)
    changes = [change._replace(seq=draw(inside)) for change in draw(CHANGES)] if size else []
    ends = draw(st.lists(st.builds(EndedRight, NUMBER, RIGHT, TEXT, TEXT), max_size=3))
    gone = draw(st.none() | st.lists(st.builds(GoneRow, TEXT, TEXT, TEXT, NUMBER), max_size=3))
    jumps = draw(st.lists(st.tuples(NUMBER, NUMBER), max_size=3))
    return LogBatch(draw(TEXT), Seq(after), Seq(after + size), changes, ends, gone, jumps)


@st.composite
def without_contents(draw: st.DrawFn) -> LogBatch:
    hashes = st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), max_size=4)
    return draw(log_batches())._replace(absent=draw(hashes))


def rows(
    position: Position, visible: Visible, upto: Seq, found: list[Change], omitted: dict[str, int], validated: bool
) -> Rows:
    return Rows(position, visible, upto, found, {**{row.table: 0 for row in found}, **omitted}, validated)


PULLS = st.builds(lambda epoch, ends: Pull(epoch, *sorted(ends)), TEXT, st.tuples(NUMBER, NUMBER))


def at_once(steps: Coroutine[Any, Any, Any]) -> Any:
    """What it returns. Between its steps nobody gets a turn."""
    while True:
        try:
            steps.send(None)
        except StopIteration as ended:
            return ended.value


class Snapshots(Message[Rows]):
    """The form of snapshots, without turns of others."""

    def __init__(self) -> None:
        """Needs nothing."""

    def encode(self, value: Rows) -> bytes:
        found: bytes = at_once(codec.ROWS.pack(value))
        return found

    def decode(self, message: bytes) -> Rows:
        found: Rows = at_once(codec.ROWS.unpack(message))
        return found


MESSAGES: dict[str, tuple[Message[Any], st.SearchStrategy[Any]]] = {
    "log batch": (codec.LOG_BATCH, log_batches()),
    "manifest": (codec.MANIFEST, log_batches() | without_contents() | PULLS),
    "contents": (codec.CONTENTS, st.builds(Contents, TEXT, NUMBER, NUMBER, CHANGES)),
    "beat": (codec.BEAT, st.builds(Beat, TEXT, NUMBER, st.floats(0, 1e6), TEXT, TEXT, NUMBER, st.booleans())),
    "hashes upto": (
        codec.HASHES_UPTO,
        st.tuples(POSITION, NUMBER, st.lists(st.integers(0, 2**64 - 1), max_size=4)),
    ),
    "following": (codec.FOLLOWING, st.builds(Following, POSITION, st.lists(st.binary(max_size=9), max_size=4))),
    "rows": (
        Snapshots(),
        st.builds(
            rows,
            POSITION,
            st.builds(Visible, XID, XID, st.frozensets(XID, max_size=3)),
            NUMBER,
            st.lists(ROW, max_size=4),
            st.dictionaries(TEXT, st.integers(0, 9), max_size=2),
            st.booleans(),
        ),
    ),
    "tables": (codec.TABLES, st.lists(TABLES, max_size=4)),
    "own tables": (
        codec.OWN_TABLES,
        st.lists(
            st.builds(
                OwnTable,
                TEXT,
                TEXT,
                TEXT,
                st.lists(TEXT, max_size=2).map(tuple),
                st.lists(TEXT, max_size=2).map(tuple),
                st.lists(st.builds(OwnColumn, TEXT, TEXT, st.booleans()), max_size=3).map(tuple),
            ),
            max_size=3,
        ),
    ),
    "stored people": (
        codec.STORED,
        st.builds(
            Stored,
            TEXT,
            st.dictionaries(st.tuples(TOPIC, KEY), PERSON, max_size=3),
            st.lists(st.tuples(TOPIC, KEY), max_size=3),
        ),
    ),
    "other people": (codec.OTHERS, st.dictionaries(TOPIC, st.lists(PEOPLE, max_size=3), max_size=3)),
    "acks": (codec.ACKS, st.dictionaries(KEY, POSITION, max_size=4)),
    "position": (codec.POSITION, POSITION),
    "since and upto": (codec.SINCE_UPTO, st.tuples(POSITION, POSITION)),
    "positions": (codec.POSITIONS, st.lists(st.none() | POSITION, max_size=4)),
    "text": (codec.TEXT, TEXT),
    "optional text": (codec.OPTIONAL_TEXT, OPTIONAL),
    "texts": (codec.TEXTS, st.lists(TEXT, max_size=4)),
    "boolean": (codec.BOOLEAN, st.booleans()),
    "nothing": (codec.NOTHING, st.none()),
    "pairs": (codec.PAIRS, st.lists(st.tuples(TEXT, TEXT), max_size=4)),
    "topics": (codec.TOPICS_UPTO, st.tuples(TEXT, st.lists(TEXT, max_size=3), NUMBER, NUMBER, st.integers(1, 9))),
    "after": (codec.AFTER, st.tuples(TEXT, NUMBER, st.integers(1, 9))),
    "lookups": (codec.RIGHTS, st.tuples(TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=4))),
    "process and topics": (codec.PROCESS_AND_TOPICS, st.tuples(TEXT, st.lists(TEXT, max_size=3))),
    "rights": (codec.FROM, st.lists(st.tuples(st.none() | NUMBER) | TEXT, max_size=4)),
    "allowed": (codec.ALLOWED, st.lists(st.tuples(st.booleans()) | TEXT, max_size=4)),
    "users": (codec.USERS, st.lists(st.tuples(OPTIONAL) | TEXT, max_size=4)),
}
EVERY = [*(message for message, _ in MESSAGES.values()), codec.BATCH, codec.WANTED]


@pytest.mark.parametrize("name", MESSAGES)
@settings(max_examples=30)
@given(st.data())
def test_every_value_arrives_as_it_was_sent(name: str, data: st.DataObject) -> None:
    message, values = MESSAGES[name]
    value = data.draw(values)
    assert value == message.decode(message.encode(value))


@given(CHANGES, st.booleans(), st.none() | NUMBER)
def test_a_read_arrives_with_where_it_has_ended(changes: list[Change], validated: bool, reached: Seq | None) -> None:
    sent = Batch(changes, more=reached is not None, validated=validated, reached=reached)
    found = codec.BATCH.decode(codec.BATCH.encode(sent))
    assert (sent, sent.more, sent.validated) == (found, found.more, found.validated)
    assert not sent.more or sent.reached == found.reached


@pytest.mark.parametrize(
    "where", [None, {"t": {"name": {"like": 'a"\u00e9%\U0001f600'}, "not": {"n": {"in": [2, 1]}}}}]
)
def test_a_wanted_snapshot_arrives_with_the_condition_of_its_view(where: object) -> None:
    tables = {"t": {"name": Column("name", "text"), "n": Column("n", "integer")}}
    shown = None if where is None else view(Asked(where, {"t": ["n"]}), tables)
    sent = Wanted(Topic("t"), 3, shown)
    found = codec.WANTED.decode(codec.WANTED.encode(sent))
    assert sent[:2] == found[:2]
    assert (shown and shown.condition) == (found.view and found.view.condition)


@pytest.mark.parametrize("condition", ["", "[]", "1", "{", "[" * 100_000, '{"a":' * 100_000])
def test_a_condition_that_is_no_object_is_refused(condition: str) -> None:
    message = codec._as_is(tuple[str, int, str]).encode(("t", 1, condition))
    with pytest.raises(BadMessage):
        codec.WANTED.decode(message)


def decoded(message: Message[Any], found: bytes) -> None:
    """Decode it, if it can be."""
    try:
        message.decode(found)
    except BadMessage as error:
        assert str(error)


HEADS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(TEXT, inner, max_size=3),
)


@given(st.sampled_from(EVERY), st.binary(max_size=60), HEADS)
def test_whatever_arrives_is_a_value_or_a_bad_message(message: Message[Any], some: bytes, head: object) -> None:
    whole = codec._as_is(object).encode(head)
    for found in (some, b"\1" + some, b"\1\0\0\0\2[]" + some, whole, whole + some):
        decoded(message, found)


@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_message_that_was_cut_off_or_has_grown_is_refused(name: str, data: st.DataObject) -> None:
    message, values = MESSAGES[name]
    whole = message.encode(data.draw(values))
    for found in (whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"x"):
        with pytest.raises(BadMessage):
            message.decode(found)


@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_message_with_a_wrong_byte_is_a_value_or_refused(name: str, data: st.DataObject) -> None:
    message, values = MESSAGES[name]
    found = bytearray(message.encode(data.draw(values)))
    found[data.draw(st.integers(0, len(found) - 1))] ^= data.draw(st.integers(1, 255))
    decoded(message, bytes(found))


@pytest.mark.parametrize("message", EVERY)
def test_a_message_of_another_version_says_so(message: Message[Any]) -> None:
    with pytest.raises(OtherVersion, match="another version"):
        message.decode(b"\2\0\0\0\2[]")


@pytest.mark.parametrize(("after", "upto", "seq"), [(5, 4, 5), (5, 7, 5), (5, 7, 8)])
def test_a_batch_whose_numbers_do_not_belong_together_is_refused(after: int, upto: int, seq: int) -> None:
    change = Change(Seq(seq), "1", "", "app", "rows", Topic("a"), Kind.INSERT, "{}", "{}")
    message = codec.LOG_BATCH.encode(LogBatch("e", Seq(after), Seq(upto), [change]))
    with pytest.raises(BadMessage):
        codec.LOG_BATCH.decode(message)


def test_others_get_their_turn_after_each_page_of_a_snapshot() -> None:
    row = Change(Seq(0), "", "", "app", "rows", Topic("a"), Kind.INSERT, "{}", "{}")
    rows = Rows(Position("e", Seq(0)), Visible(1, 1, frozenset()), Seq(0), [row] * (2 * codec.PAGE + 1), {"rows": 0})
    packing = codec.ROWS.pack(rows)
    turns = [packing.send(None) for _ in range(3)]
    with pytest.raises(StopIteration) as packed:
        packing.send(None)
    unpacking = codec.ROWS.unpack(packed.value.value)
    turns += [unpacking.send(None) for _ in range(3)]
    with pytest.raises(StopIteration) as unpacked:
        unpacking.send(None)
    assert ([None] * 6, rows) == (turns, unpacked.value.value)


def test_a_manifest_has_the_bytes_of_its_batch_and_a_pull_is_no_batch() -> None:
    batch = LogBatch("e", Seq(0), Seq(1), [], [], [], [])
    assert codec.LOG_BATCH.encode(batch) == codec.MANIFEST.encode(batch)
    with pytest.raises(BadMessage):
        codec.LOG_BATCH.decode(codec.MANIFEST.encode(Pull("e", Seq(0), Seq(1))))


@pytest.mark.parametrize(("key", "record"), [(3, 1), (2, 1), (3, None), (2, 3)])
def test_texts_that_end_elsewhere_or_within_a_character_are_refused(key: int, record: int | None) -> None:
    def head(key: int, record: int | None) -> tuple[Any, ...]:
        return (8, "", "", "app", "rows", "a", Kind.INSERT, key, record, (), None, None, None, None)

    texts = "{}é".encode()
    assert "é" == Unread([head(2, 2)], texts)[0].record
    with pytest.raises(ValueError, match=r"not as long|decode"):
        Unread([head(key, record)], texts)


@given(changes=CHANGES, data=st.data())
def test_unread_changes_are_those_that_were_sent(changes: list[Change], data: st.DataObject) -> None:
    sent = LogBatch("e", Seq(0), Seq(2**53 - 1), [change._replace(seq=Seq(1)) for change in changes])
    found = codec.MANIFEST.decode(codec.MANIFEST.encode(sent))
    assert isinstance(found, LogBatch)
    first, last = data.draw(st.integers(-6, 6)), data.draw(st.integers(-6, 6))
    assert sent.changes[first:last] == found.changes[first:last]
    assert (
        [*sent.changes[::-1]]
        == [*reversed(found.changes)]
        == [found.changes[~place] for place in range(len(changes))]
    )
    topics = {change.topic for change in changes if data.draw(st.booleans())}
    expected = [change for change in sent.changes if change.topic in topics or change.kind in RESET_KINDS]
    assert expected == concerning(found.changes, topics)


def test_a_record_travels_as_postgres_wrote_it() -> None:
    record = '{"n": 1e400, "deep": ' + "[" * 5000 + "]" * 5000 + ', "half": "\\ud800"}'
    change = Change(Seq(1), "1", "", "app", "rows", Topic("a"), Kind.INSERT, '{"id":  1}', record)
    found = codec.LOG_BATCH.decode(codec.LOG_BATCH.encode(LogBatch("e", Seq(0), Seq(1), [change])))
    assert [change] == found.changes
