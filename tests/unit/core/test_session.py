import json

from daemon.core import wire
from daemon.core.change import Position, Seq, Topic
from daemon.core.errors import BadJson
from daemon.core.filters import Asked, View
from daemon.core.session import (
    Action,
    Authenticate,
    CloseConnection,
    Follow,
    Phase,
    Say,
    Session,
    Unfollow,
)
from daemon.core.snapshot import Wanted
from daemon.core.wire import Hello

MAX_TOPICS = 3
A_HELLO = b'{"op": "hello", "token": "t", "id": 1}'


def receive(session: Session, frame: bytes) -> list[Action]:
    return session.receive(wire.parse(frame))


def a_live_session(since: Position | None = None) -> Session:
    session = Session(5.0, MAX_TOPICS)
    session.welcomed("ada", Hello(op="hello", token="t").model_copy(update={"since": since}), expires=100.0)
    return session


def codes(actions: list[Action]) -> list[str | int]:
    """The error codes and close codes of these actions, in order."""
    return [
        json.loads(a.payload)["code"] if isinstance(a, Say) else a.code
        for a in actions
        if isinstance(a, Say | CloseConnection)
    ]


def test_a_hello_as_the_first_frame_is_authenticated() -> None:
    [action] = receive(Session(5.0, MAX_TOPICS), A_HELLO)
    assert isinstance(action, Authenticate)
    assert Hello(op="hello", token="t", id=1) == action.frame


def test_a_client_whose_first_frame_is_no_hello_gets_an_error_and_a_close() -> None:
    session = Session(5.0, MAX_TOPICS)
    assert codes(receive(session, b'{"op": "ping"}')) == ["hello_expected", 4400]
    assert Phase.ENDED is session.phase


def test_an_unreadable_frame_before_the_hello_ends_the_session() -> None:
    assert codes(Session(5.0, MAX_TOPICS).fault(BadJson())) == ["bad_json", 4400]


def test_an_unreadable_frame_after_the_hello_only_gets_an_error() -> None:
    session = a_live_session()
    assert codes(session.fault(BadJson())) == ["bad_json"]
    assert Phase.LIVE is session.phase


def test_a_missing_hello_ends_the_session_once() -> None:
    session = Session(5.0, MAX_TOPICS)
    assert session.tick(4.9) == []
    assert codes(session.tick(5.0)) == ["hello_timeout", 4401]
    assert session.tick(6.0) + receive(session, A_HELLO) == []


def test_a_token_that_expires_ends_a_live_session() -> None:
    session = a_live_session()
    assert session.tick(99.0) == []
    assert codes(session.tick(100.0)) == ["token", 4401]


def test_a_second_hello_is_an_error_and_the_session_continues() -> None:
    session = a_live_session()
    assert codes(receive(session, A_HELLO)) == ["already_greeted"]
    assert Phase.LIVE is session.phase


def test_a_subscribe_asks_to_follow_the_topic() -> None:
    session = a_live_session()
    assert [Follow(Topic("users"), None, 7)] == receive(session, b'{"op": "subscribe", "topic": "users", "id": 7}')


def test_sessions_that_follow_a_topic_keep_its_name_once() -> None:
    sessions = [a_live_session(), a_live_session()]
    for session in sessions:
        receive(session, b'{"op": "subscribe", "topic": "channel:01"}')
    [one], [other] = (session.topics for session in sessions)
    assert one is other


def test_a_forgotten_topic_can_be_requested_again() -> None:
    session = a_live_session()
    receive(session, b'{"op": "subscribe", "topic": "users"}')
    session.forget(Topic("users"))
    assert {} == session.topics
    assert [Follow(Topic("users"), None, None)] == receive(session, b'{"op": "subscribe", "topic": "users"}')


def test_subscribing_twice_is_an_error_that_changes_nothing() -> None:
    session = a_live_session()
    receive(session, b'{"op": "subscribe", "topic": "users"}')
    assert codes(receive(session, b'{"op": "subscribe", "topic": "users"}')) == ["already_subscribed"]
    assert [Topic("users")] == list(session.topics)


def test_a_subscription_is_replayed_from_its_own_since_or_else_from_that_of_the_hello() -> None:
    session = a_live_session(since=Position("e", Seq(3)))
    first = receive(session, b'{"op": "subscribe", "topic": "a"}')
    second = receive(session, b'{"op": "subscribe", "topic": "b", "since": "e:7"}')
    assert [Follow(Topic("a"), Position("e", Seq(3)), None)] == first
    assert [Follow(Topic("b"), Position("e", Seq(7)), None)] == second


def test_what_a_client_wants_to_see_is_part_of_its_subscription_once_it_is_checked() -> None:
    session = a_live_session()
    text = b'{"op": "subscribe", "topic": "a", "snapshot": true, "where": {"t": {"n": {"eq": 0.10}}}}'
    [follow] = receive(session, text)
    assert isinstance(follow, Follow)
    assert Asked({"t": {"n": {"eq": "0.10"}}}, None) == follow.asked
    seen = View({}, {}, "")
    checked = session.checked(follow, seen)
    assert session.topics[Topic("a")] is checked
    assert (seen, Wanted(Topic("a"), None, seen)) == (checked.view, checked.snapshot)


def test_an_unsubscribed_topic_is_no_longer_followed() -> None:
    session = a_live_session()
    receive(session, b'{"op": "subscribe", "topic": "users"}')
    unfollow, _ = receive(session, b'{"op": "unsubscribe", "topic": "users"}')
    assert Unfollow(Topic("users")) == unfollow
    assert {} == session.topics


def test_the_number_of_topics_is_limited() -> None:
    session = a_live_session()
    for number in range(MAX_TOPICS):
        receive(session, b'{"op": "subscribe", "topic": "t%d"}' % number)
    assert codes(receive(session, b'{"op": "subscribe", "topic": "one more"}'.replace(b" m", b"_m"))) == [
        "too_many_topics"
    ]


def test_a_ping_is_answered_with_its_id() -> None:
    assert [Say(b'{"op":"pong","id":"x"}')] == receive(a_live_session(), b'{"op": "ping", "id": "x"}')
