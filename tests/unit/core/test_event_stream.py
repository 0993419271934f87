import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowcast_client.engine import Engine, RowcastError, TopicRows
from rowcast_client.engine import Position as EnginePosition

from daemon.core import wire
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.errors import NoSuchTopic
from daemon.core.event_stream import Place, event, live_event, parse_place

A, B = Topic("a"), Topic("b")


def at(seq: int, epoch: str = "e") -> Position:
    return Position(epoch, Seq(seq))


def changes(topic: Topic, seq: int, record: str = "{}", epoch: str = "e") -> bytes:
    change = Change(Seq(seq), "1", "", "app", "rows", topic, Kind.INSERT, "{}", record)
    return wire.changes(topic, at(seq - 1, epoch), [change])


def welcome(seq: int) -> bytes:
    return wire.welcome(
        None, session="s", user='"pos":"x"', pos=at(seq), heartbeat=1, schema="h", limits={}, expires_in=60.0
    )


class Client:
    """The Python client's engine, which follows the same rules, and what it asks for."""

    keeps_rows = False
    source: TopicRows | None = None
    shown: dict[str, Any] | None = None

    def __init__(self, topics: list[Topic], since: str) -> None:
        self.subscribed: list[int] = []
        self.engine = Engine(self)
        if since:
            self.engine.position = EnginePosition.parse(since)
        for topic in topics:
            self.engine.follow(topic, self)
        self.engine.start()

    def open(self, *, fresh: bool) -> None:
        self.engine.dialing()
        self.engine.opened("token")

    def renew(self) -> None:
        pass

    def send(self, frame: dict[str, Any]) -> None:
        if frame["op"] == "subscribe":
            self.subscribed.append(frame["id"])

    def receive(self, changes: list[dict[str, Any]]) -> None: ...

    def set_ready(self, ready: bool, /) -> None: ...

    def receive_signal(self, frame: dict[str, Any]) -> None: ...

    def receive_people(self, people: dict[str, list[dict[str, Any]]]) -> None: ...

    def end(self, error: RowcastError | None) -> None: ...

    def close(self) -> None: ...

    def emit(self, name: str, value: Any) -> None: ...


def ids(place: Place, *payloads: bytes) -> list[str | None]:
    return [None if found is None else found.decode() for found in map(place.after, payloads)]


def test_the_position_of_a_frame_is_the_id_of_its_event() -> None:
    payload = changes(Topic('"pos":"x"'), 7)
    assert b"id: e:7\nevent: changes\ndata: %b\n\n" % payload == live_event(payload)
    assert b"id: e:7\nevent: head\ndata: %b\n\n" % wire.head(at(7)) == live_event(wire.head(at(7)))


@pytest.mark.parametrize(
    "payload",
    [
        wire.head(None, stale=True),
        wire.reset(A, "crash", at(7)),
        wire.revoked(A, at(7)),
        wire.error(NoSuchTopic()),
    ],
)
def test_an_event_that_moves_no_position_has_no_id(payload: bytes) -> None:
    assert live_event(payload).startswith(b"event: ")


def test_a_bye_says_when_the_client_may_reconnect() -> None:
    assert live_event(wire.bye("restart", 1234)).startswith(b"retry: 1234\nevent: bye\n")


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_line_breaks_between_the_members_of_a_record_do_not_end_the_data(end: str) -> None:
    assert b"event: changes" in event(changes(A, 1, f'{{"a":{end}1}}'))
    assert event(changes(A, 1, f'{{"a":{end}1}}')).endswith(b'"record":{"a":\ndata: 1}}]}\n\n')


def test_without_a_position_the_first_id_is_that_of_welcome() -> None:
    place = Place([A, B], "", None, snapshot=False)
    assert ["e:5", None] == ids(place, welcome(5), wire.subscribed(0, A, at(5)))
    assert ["e:5/e:6"] == ids(place, changes(A, 6))  # b has not been answered, and may miss what was before 6
    assert [None, "e:7"] == ids(place, wire.subscribed(1, B, at(6)), changes(A, 7))


def test_the_position_stands_still_until_every_topic_has_resumed() -> None:
    place = Place([A, B], "e:5", None, snapshot=False)
    assert [None, None] == ids(place, welcome(9), wire.subscribed(0, A, at(5)))
    assert ["e:5/e:8", "e:5/e:9"] == ids(place, changes(A, 8), wire.resumed(at(9), 1))
    assert [None, "e:5/e:10"] == ids(place, wire.subscribed(1, B, at(5)), changes(A, 10))
    assert ["e:5/e:10", "e:10"] == ids(place, changes(B, 7), wire.resumed(at(10), 1))
    assert place.is_live


def test_what_a_client_has_seen_before_it_reconnected_stays_in_the_id() -> None:
    since, seen = parse_place("e:5/e:8")
    place = Place([A], since, seen, snapshot=False)
    assert [None, "e:5/e:8"] == ids(place, wire.subscribed(0, A, at(5)), changes(A, 6))


def test_an_id_of_another_epoch_is_beyond_the_position() -> None:
    place = Place([A, B], "e:5", None, snapshot=False)
    assert [None, "e:5/f:2"] == ids(place, wire.subscribed(0, A, at(1, "f")), changes(A, 2, epoch="f"))


def test_there_is_no_id_until_the_rows_of_a_snapshot_have_been_sent() -> None:
    place = Place([A], "", None, snapshot=True)
    snapshot = wire.snapshot(A, "rows", [], omitted=0, more=False)
    before = (welcome(5), wire.subscribed(0, A, at(5), snapshot=True), snapshot, changes(A, 6))
    assert [None, None, None, None, "e:7"] == ids(place, *before, wire.resumed(at(7), 1))


def test_a_topic_that_is_refused_or_revoked_is_not_waited_for() -> None:
    place = Place([A, B], "e:5", None, snapshot=False)
    assert [None, None, "e:6"] == ids(
        place, wire.error(NoSuchTopic(), 0), wire.revoked(B, at(6)), wire.head(at(6))
    )  # fmt: skip


@given(st.data())
def test_ids_are_the_positions_of_a_client_that_keeps_the_rules(data: st.DataObject) -> None:
    topics = [Topic(name) for name in "abc"[: data.draw(st.integers(1, 3))]]
    since = data.draw(st.sampled_from(["", "e:5"]))
    place, client = Place(topics, since, None, snapshot=False), Client(topics, since)
    followed: list[Topic] = []
    last_id, head, answered = since, 10, 0

    def send(payload: bytes) -> None:
        nonlocal last_id
        found = place.after(payload)
        last_id = last_id if found is None else found.decode()
        frame = json.loads(payload)
        if frame["op"] in {"subscribed", "error"}:
            frame["id"] = client.subscribed[frame["id"]]
        client.engine.receive(frame)

    send(welcome(head))
    actions = st.sampled_from(["answer", "refuse", "changes", "head", "resumed"])
    for action in data.draw(st.lists(actions, max_size=20)):
        head += 1
        match action:
            case "changes" if followed:
                topic = data.draw(st.sampled_from(followed))
                send(
                    wire.changes(topic, at(0), [Change(Seq(head), "1", "", "s", "t", topic, Kind.DELETE, "{}", None)])
                )
            case "head":
                send(wire.head(at(head)))
            case "resumed":
                send(wire.resumed(at(head), 0))
            case "refuse" if answered < len(topics):
                send(wire.error(NoSuchTopic(), answered))
                answered += 1
            case "answer" if answered < len(topics):
                followed.append(topics[answered])
                send(wire.subscribed(answered, topics[answered], at(5) if since else at(head)))
                answered += 1
        assert str(client.engine.position) == last_id.partition("/")[0]
