import json
from itertools import chain, product

import pytest

from daemon.core import wire
from daemon.core.change import Kind, Position, Seq, Topic
from daemon.core.errors import BadFrame, BadJson, ClientFault, NoSuchTopic, UnknownOp
from tests.unit.core.changes import a_change

SECRET = "do-not-repeat-me"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", BadJson),
        (b"{", BadJson),
        (b"null", BadJson),
        (b"[]", BadJson),
        (b'"hello"', BadJson),
        (b'{"op": "hello", "op": "hello"', BadJson),
        (b'{"op": "ping", "id": ' + b"9" * 5000 + b"}", BadJson),
        (b"[" * 100_000, BadFrame),
        (b'{"op": "ping", "x": [' + b"0," * 256 + b"0]}", BadFrame),
        (b'{"op": "ping", "x": [' + b"[]," * 128 + b"0]}", BadFrame),
        (b"{}", BadFrame),
        (b'{"op": 7}', UnknownOp),
        (b'{"op": null}', UnknownOp),
        (b'{"op": "do-not-repeat-me"}', UnknownOp),
        (b'{"op": "hello"}', BadFrame),
        (b'{"op": "hello", "token": 7}', BadFrame),
        (b'{"op": "hello", "token": "t", "since": 7}', BadFrame),
        (b'{"op": "hello", "token": "t", "since": "do-not-repeat-me"}', BadFrame),
        (b'{"op": "hello", "token": "t", "since": "e:99999999999999999999"}', BadFrame),
        (b'{"op": "hello", "token": "t", "since": "e:-1"}', BadFrame),
        (b'{"op": "hello", "token": "t", "since": ":1"}', BadFrame),
        (b'{"op": "hello", "token": "t", "session": 7}', BadFrame),
        (b'{"op": "hello", "token": "t", "numbers": "exact"}', BadFrame),
        (b'{"op": "hello", "token": "t", "numbers": true}', BadFrame),
        (b'{"op": "hello", "token": "t", "session": "' + b"s" * 65 + b'"}', BadFrame),
        (b'{"op": "subscribe"}', BadFrame),
        (b'{"op": "subscribe", "topic": ""}', BadFrame),
        (b'{"op": "subscribe", "topic": "do-not-repeat-me\\u0000"}', BadFrame),
        (b'{"op": "subscribe", "topic": "*chatgenius"}', BadFrame),
        (b'{"op": "subscribe", "topic": "a b"}', BadFrame),
        (b'{"op": "subscribe", "topic": {"do-not-repeat-me": 1}}', BadFrame),
        (b'{"op": "ping", "id": {"do-not-repeat-me": 1}}', BadFrame),
        (b'{"op": "ping", "id": true}', BadFrame),
    ],
)
def test_an_unreadable_frame_raises_its_fault_without_quoting_it(text: bytes, fault: type[ClientFault]) -> None:
    with pytest.raises(fault) as caught:
        wire.parse(text)
    assert SECRET not in str(caught.value)


def test_unknown_members_of_a_frame_are_ignored() -> None:
    assert wire.Ping(op="ping") == wire.parse(b'{"op": "ping", "colour": "blue"}')


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'{"id": 7}', 7),
        (b'{"id": "x", "op": "fly"}', "x"),
        (b'{"id": "x", "op": "subscribe"}', "x"),
        (b'{"id": true}', None),
        (b'{"id": []}', None),
        (b"{", None),
        (b"7", None),
    ],
)
def test_the_id_of_a_broken_frame_is_found_if_it_has_one(text: bytes, found: object) -> None:
    with pytest.raises(ClientFault) as caught:
        wire.parse(text)
    assert found == caught.value.frame


def test_an_error_has_a_code_and_says_whether_to_retry() -> None:
    assert json.loads(wire.error(NoSuchTopic(), 7)) == {
        "op": "error",
        "id": 7,
        "code": "no_such_topic",
        "message": "There is no such topic, or you may not read it.",
        "retry": False,
    }


def test_a_heartbeat_contains_only_known_members() -> None:
    assert {"op": "head", "pos": "e:7"} == json.loads(wire.head(Position("e", Seq(7))))
    assert {"op": "head", "stale": True} == json.loads(wire.head(None, stale=True))


def test_a_changes_frame_holds_each_change_as_the_protocol_says() -> None:
    frame = wire.changes(
        Topic("channel:1"),
        Position("e", Seq(40)),
        [
            a_change(42, kind=Kind.UPDATE, changed=("content",), actor="ada"),
            a_change(43, kind=Kind.DELETE, record=None),
        ],
    )
    assert json.loads(frame) == {
        "op": "changes",
        "topic": "channel:1",
        "prev": "e:40",
        "pos": "e:43",
        "changes": [
            {
                "seq": 42,
                "tx": "741",
                "at": "2026-01-10T12:00:00.123456Z",
                "table": "messages",
                "kind": "update",
                "key": {"id": "m1"},
                "record": {"id": "m1", "content": "hi"},
                "changed": ["content"],
                "meta": {"actor": "ada"},
            },
            {
                "seq": 43,
                "tx": "741",
                "at": "2026-01-10T12:00:00.123456Z",
                "table": "messages",
                "kind": "delete",
                "key": {"id": "m1"},
            },
        ],
    }


def test_a_transaction_is_left_out_where_nobody_may_learn_it_whatever_the_record_holds() -> None:
    one = a_change(42, record='{"id":"m1","content":"x","tx":"741","y":1}')
    frame = wire.changes(Topic("channel:1"), Position("e", Seq(40)), [one, one], has_tx=False)
    of_frame = json.loads(frame)["changes"]
    assert [json.loads(wire.change(one, has_tx=False))] * 2 == of_frame
    assert json.loads(wire.change(one)) == {**of_frame[0], "tx": "741"}


def test_a_row_that_moved_to_another_topic_is_a_delete_with_left() -> None:
    frame = wire.changes(Topic("channel:1"), Position("e", Seq(1)), [a_change(2, kind=Kind.LEAVE, record=None)])
    [change] = json.loads(frame)["changes"]
    assert (change["kind"], change["left"]) == ("delete", True)


def test_a_table_with_an_awkward_name_stays_valid_json() -> None:
    frame = wire.changes(Topic("channel:1"), Position("e", Seq(1)), [a_change(2, table='we"ird\n', actor='"')])
    [change] = json.loads(frame)["changes"]
    assert (change["table"], change["meta"]) == ('we"ird\n', {"actor": '"'})


@pytest.mark.parametrize("has_tx", [True, False])
def test_each_change_of_a_frame_is_written_as_it_is_alone(has_tx: bool) -> None:
    """What follows a change has some of its members, and others of its own."""
    first = a_change(1)
    others = [
        first._replace(tx="742"),
        first._replace(at="2026-01-10T12:00:01.000000Z"),
        first._replace(table="users"),
        first._replace(kind=Kind.UPDATE),
        first._replace(kind=Kind.UPDATE, changed=("content",)),
        first._replace(kind=Kind.UPDATE, actor="ada"),
        first._replace(kind=Kind.DELETE, record=None),
        first._replace(kind=Kind.LEAVE, record=None),
        first._replace(key='{"id":"m2"}', record='{"id":"m2","content":"hi"}'),
    ]
    pairs = chain(*product([first, *others], repeat=2))
    run = [change._replace(seq=Seq(place)) for place, change in enumerate(pairs)]
    frame = json.loads(wire.changes(Topic("channel:1"), Position("e", Seq(0)), run, has_tx=has_tx))
    assert [json.loads(wire.change(change, has_tx=has_tx)) for change in run] == frame["changes"]


def test_consecutive_changes_of_a_topic_share_a_frame_in_order() -> None:
    changes = [a_change(1, "a"), a_change(2, "a"), a_change(3, "b"), a_change(4, "a")]
    assert [(topic, [change.seq for change in run]) for topic, run in wire.runs(changes)] == [
        ("a", [1, 2]),
        ("b", [3]),
        ("a", [4]),
    ]


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
def test_a_number_that_json_does_not_have_is_refused(number: bytes) -> None:
    with pytest.raises(BadJson):
        wire.parse(b'{"op": "signal", "topic": "a", "name": "n", "data": [%b]}' % number)


def test_a_signal_repeats_its_data_but_for_numbers_that_no_double_holds() -> None:
    text = '{"text":"é","list":[1,2.5,null,true],"large":123456789012345678901234567890,"huge":1e999}'
    frame = wire.parse(f'{{"op": "signal", "topic": "a", "name": "n", "data": {text}}}'.encode())
    assert isinstance(frame, wire.Signal)
    sent = wire.signal("a", "n", wire.compact(frame.data).decode(), "ada").decode()
    expected = text.replace("1e999", "null")
    assert f'{{"op":"signal","topic":"a","name":"n","data":{expected},"user":"ada"}}' == sent


@pytest.mark.parametrize("device", ["", "a b", "é", "x" * 65, "a\\u0000"])
def test_a_device_has_a_name_that_every_database_can_hold(device: str) -> None:
    with pytest.raises(BadFrame):
        wire.parse(f'{{"op": "hello", "token": "t", "device": "{device}"}}'.encode())


@pytest.mark.parametrize("position", ["e\\u0000:1", "é:1", "e\\n:1", "e:²"])
def test_a_position_has_only_what_every_database_can_hold(position: str) -> None:
    with pytest.raises(BadFrame, match="must be a position"):
        wire.parse(f'{{"op": "ack", "pos": "{position}"}}'.encode())
