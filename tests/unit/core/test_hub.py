import json
from collections.abc import Iterable
from typing import Any

from daemon.core.change import Change, Kind, Numbers, Position, Right, Seq, Topic
from daemon.core.column_types import Column
from daemon.core.filters import Asked, View, view
from daemon.core.hub import Discontinuity, Hub, RightEnd
from tests.unit.core.changes import a_change


class Recorder:
    """A follower that records what it is sent, one entry for each call."""

    outlet = None

    def __init__(self, user: str = "ada", numbers: Numbers = Numbers.JSON) -> None:
        self.user = user
        self.numbers = numbers
        self.calls: list[list[dict[str, Any]]] = []
        self.revocations: list[Topic] = []
        self.moves = 0

    def discontinued(self) -> None:
        self.moves += 1

    def signal(self, frame: bytes) -> None:
        self.calls.append([json.loads(frame)])

    def revoked(self, topic: Topic) -> None:
        self.revocations.append(topic)

    def deliver(self, frames: bytes) -> None:
        self.calls.append([json.loads(line) for line in frames.splitlines()])

    @property
    def seqs(self) -> list[int]:
        return [change["seq"] for frame in self.frames for change in frame.get("changes", ())]

    @property
    def frames(self) -> list[dict[str, Any]]:
        return [frame for call in self.calls for frame in call]


def with_exact_numbers(change: Change) -> Change:
    return change._replace(key='{"exact":true}')


def a_hub(seq: int = 10) -> Hub:
    hub = Hub(lambda payload: payload + b"\n", with_exact_numbers)
    hub.move(Position("e", Seq(seq)), "epoch")
    return hub


def publish(hub: Hub, *changes: Change, covers: Iterable[Topic] = ()) -> tuple[int, int]:
    ends = [RightEnd(change.seq, change.ends, lambda topic: topic != "other") for change in changes if change.ends]
    return hub.publish(changes, Position("e", changes[-1].seq), lambda _: covers, ends)


def test_a_follower_receives_only_its_own_topic() -> None:
    hub, ada = a_hub(), Recorder()
    hub.follow(Topic("a"), ada)
    publish(hub, a_change(11, "a"), a_change(12, "b"), a_change(13, "a"))
    assert ada.seqs == [11, 13]


def test_a_change_without_followers_does_not_split_a_frame() -> None:
    hub, ada = a_hub(), Recorder()
    hub.follow(Topic("a"), ada)
    assert publish(hub, a_change(11, "a"), a_change(12, "b"), a_change(13, "a")) == (1, 1)


def test_all_frames_of_a_batch_are_one_call() -> None:
    hub, ada = a_hub(), Recorder()
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("b"), ada)
    publish(hub, a_change(11, "a"), a_change(12, "b"), a_change(13, "a"))
    [call] = ada.calls
    assert [(frame["topic"], frame["prev"], frame["pos"]) for frame in call] == [
        ("a", "e:10", "e:11"),
        ("b", "e:10", "e:12"),
        ("a", "e:11", "e:13"),
    ]


def test_all_followers_receive_the_same_bytes_object() -> None:
    hub = a_hub()
    received: list[bytes] = []

    class Listener(Recorder):
        def deliver(self, frames: bytes) -> None:
            received.append(frames)

    for _ in range(3):
        hub.follow(Topic("a"), Listener())
    assert publish(hub, a_change(11, "a")) == (1, 3)
    assert len({id(frames) for frames in received}) == 1


def test_followers_of_the_same_frames_share_one_bytes_object_whatever_else_they_follow() -> None:
    hub = a_hub()
    received: dict[str, bytes] = {}

    class Listener(Recorder):
        def deliver(self, frames: bytes) -> None:
            assert self.user not in received
            received[self.user] = frames

    for user, topics in {"1": "ab", "2": "ba", "3": "a", "4": "abd", "5": "ac", "6": "b", "7": "d"}.items():
        listener = Listener(user)
        for topic in topics:
            hub.follow(Topic(topic), listener)
    published = publish(hub, a_change(11, "a"), a_change(12, "b"), a_change(13, "a"))
    assert (3, 3 * 3 + 2 * 2 + 1) == published
    assert {"1", "2", "3", "4", "5", "6"} == received.keys()
    assert received["1"] is received["2"] is received["4"]
    assert received["3"] is received["5"]
    [first, second, third] = received["1"].splitlines(keepends=True)
    assert (first + third, second) == (received["3"], received["6"])


def test_followers_of_one_form_share_a_frame_that_is_built_once() -> None:
    hub = a_hub()
    received: dict[str, bytes] = {}

    class Listener(Recorder):
        def deliver(self, frames: bytes) -> None:
            received[self.user] = frames

    for user, numbers in {"1": Numbers.JSON, "2": Numbers.STRING, "3": Numbers.STRING, "4": Numbers.JSON}.items():
        hub.follow(Topic("a"), Listener(user, numbers))
    assert (2, 4) == publish(hub, a_change(11, "a"))
    assert received["1"] is received["4"]
    assert received["2"] is received["3"]
    key, exact = b'"key":{"id":"m1"}', b'"key":{"exact":true}'
    assert received["1"].replace(key, exact) == received["2"] != received["1"]


def test_exact_numbers_are_looked_for_only_where_a_follower_wants_them() -> None:
    def look(change: Change) -> Change:
        looked.append(change.seq)
        return change

    looked: list[int] = []
    hub, plain, exact = Hub(lambda payload: payload + b"\n", look), Recorder(), Recorder("bob", Numbers.STRING)
    for topic in ("a", "b"):
        hub.follow(Topic(topic), plain)
    publish(hub, a_change(11, "a"), a_change(12, "b"))
    hub.follow(Topic("b"), exact)
    publish(hub, a_change(13, "a"), a_change(14, "b"))
    hub.unfollow(Topic("b"), exact)
    publish(hub, a_change(15, "b"))
    assert ([14], [14], [11, 12, 13, 14, 15]) == (looked, exact.seqs, plain.seqs)


def test_a_follower_with_exact_numbers_is_suspended_and_loses_its_right_like_any_other() -> None:
    hub, exact, plain = a_hub(), Recorder("ada", Numbers.STRING), Recorder("bob")
    for follower in (exact, plain):
        hub.follow(Topic("a"), follower)
        hub.follow(Topic("b"), follower)
    publish(hub, a_change(11, "a"), a_change(12, "a", ends=Right("ada", Topic("a"))), a_change(13, "b"))
    assert [("changes", "e:11"), ("changes", "e:13"), ("revoked", "e:12")] == [
        (frame["op"], frame["pos"]) for frame in exact.frames
    ]
    assert [{"exact": True}] * 2 == [change["key"] for frame in exact.frames[:2] for change in frame["changes"]]
    assert [11, 12, 13] == plain.seqs
    assert {Topic("b"): 13} == hub.suspend([Topic("a"), Topic("b")], exact)
    assert {Topic("a"), Topic("b")} == set(hub.topics)


def test_an_invalid_change_is_a_reset_in_its_place_and_its_right_still_ends() -> None:
    hub, ada, bob = a_hub(), Recorder("ada"), Recorder("bob")
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("a"), bob)
    invalid = a_change(12, "a", Kind.INVALID, key="{}", record=None, ends=Right("ada", Topic("a")))
    publish(hub, a_change(11, "a"), invalid, a_change(13, "a"), covers=[Topic("a")])
    assert [("changes", "e:11"), ("revoked", "e:12")] == [(frame["op"], frame["pos"]) for frame in ada.frames]
    assert [("changes", "e:11"), ("reset", "e:12"), ("changes", "e:13")] == [
        (frame["op"], frame["pos"]) for frame in bob.frames
    ]
    assert "invalid" == bob.frames[1]["reason"]


def test_a_follower_that_unfollows_receives_nothing_more() -> None:
    hub, ada, bob = a_hub(), Recorder(), Recorder()
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("a"), bob)
    hub.unfollow(Topic("a"), ada)
    hub.unfollow(Topic("never followed"), ada)
    publish(hub, a_change(11, "a"))
    assert (ada.seqs, bob.seqs) == ([], [11])
    hub.unfollow(Topic("a"), bob)
    assert hub.subscriptions == 0


def test_a_topic_that_is_followed_again_begins_at_the_hubs_position() -> None:
    hub, ada = a_hub(), Recorder()
    hub.follow(Topic("a"), ada)
    hub.unfollow(Topic("a"), ada)
    publish(hub, a_change(11, "a"))
    hub.follow(Topic("a"), ada)
    publish(hub, a_change(12, "a"))
    assert ada.calls[0][0]["prev"] == "e:11"


def test_the_followers_of_a_topic_are_counted_in_every_form() -> None:
    hub = a_hub()
    for numbers in Numbers:
        hub.follow(Topic("a"), Recorder(numbers=numbers))
    leaver = Recorder()
    hub.follow(Topic("b"), leaver)
    assert {"a": 2, "b": 1} == hub.follower_counts()
    assert [2, 1, 0] == [hub.count_followers(Topic(topic)) for topic in "abc"]
    hub.unfollow(Topic("b"), leaver)
    assert {"a": 2} == hub.follower_counts()


def test_a_truncate_resets_the_topics_it_affects_in_order() -> None:
    hub, ada, bob = a_hub(), Recorder(), Recorder()
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("b"), bob)
    truncate = a_change(12, "*chatgenius", Kind.TRUNCATE, key="{}", record=None)
    publish(hub, a_change(11, "a"), truncate, a_change(13, "a"), covers=[Topic("a")])
    [call] = ada.calls
    assert [frame["op"] for frame in call] == ["changes", "reset", "changes"]
    assert (call[1]["reason"], call[1]["pos"]) == ("truncate", "e:12")
    assert call[2]["prev"] == "e:12"
    assert bob.calls == []


def test_each_follower_is_notified_once_when_the_hub_moves() -> None:
    hub, ada, bob = a_hub(), Recorder("ada"), Recorder("bob")
    for topic in ("a", "b"):
        hub.follow(Topic(topic), ada)
    hub.watch_rights(Topic("a"), bob)
    hub.move(Position("f", Seq(90)), "crash")
    assert (1, 0) == (ada.moves, bob.moves)
    assert Discontinuity(2, "crash", Position("f", Seq(90))) == hub.discontinuity


def test_suspending_a_follower_stops_delivery_and_returns_the_last_position_of_each_topic() -> None:
    hub, ada, bob = a_hub(), Recorder("ada"), Recorder("bob")
    for topic in ("a", "b"):
        hub.follow(Topic(topic), ada)
    hub.follow(Topic("a"), bob)
    hub.watch_rights(Topic("requested"), ada)
    publish(hub, a_change(11, "a"), a_change(12, "unfollowed"))
    topics = [Topic(topic) for topic in ("a", "b", "requested")]
    assert {"a": 11, "b": 10} == hub.suspend(topics, ada)
    assert {} == hub.suspend(topics, ada)
    publish(hub, a_change(13, "a"))
    assert ([11], [11, 13]) == (ada.seqs, bob.seqs)


def test_a_suspended_follower_is_notified_when_its_right_ends() -> None:
    hub, ada = a_hub(), Recorder("ada")
    hub.follow(Topic("a"), ada)
    hub.suspend([Topic("a")], ada)
    publish(hub, an_end(11, "a", user="ada", of="a"))
    assert ([Topic("a")], ["revoked"]) == (ada.revocations, [frame["op"] for frame in ada.frames])


def test_suspending_a_follower_during_delivery_does_not_affect_others() -> None:
    hub, ada = a_hub(), Recorder("ada")

    class Slow(Recorder):
        def deliver(self, frames: bytes) -> None:
            super().deliver(frames)
            hub.suspend([Topic("a"), Topic("b")], self)

        def discontinued(self) -> None:
            hub.suspend([Topic("a"), Topic("b")], self)

    slow, other = Slow(), Slow()
    for follower in (slow, ada, other):
        for topic in ("a", "b"):
            hub.follow(Topic(topic), follower)
    publish(hub, a_change(11, "a"))
    publish(hub, a_change(12, "a"))
    assert ([11], [11, 12], [11]) == (slow.seqs, ada.seqs, other.seqs)
    for follower in (slow, other):
        hub.follow(Topic("a"), follower)
    hub.move(Position("f", Seq(90)), "crash")
    publish(hub, a_change(91, "a"))
    assert ([11], [11, 12, 91], [11]) == (slow.seqs, ada.seqs, other.seqs)


def an_end(seq: int, topic: str, *, user: str | None = None, of: str | None = None) -> Change:
    """A delete that ends the right of `user` (None: of all) to the topic `of` (None: to all)."""
    return a_change(seq, topic, Kind.DELETE, record=None, ends=Right(user, Topic(of) if of else None))


def test_a_follower_that_loses_its_right_receives_what_came_before_and_nothing_after() -> None:
    hub, ada, bob = a_hub(), Recorder("ada"), Recorder("bob")
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("a"), bob)
    publish(hub, a_change(11, "a"), an_end(12, "a", user="ada", of="a"), a_change(13, "a"))
    publish(hub, a_change(14, "a"))
    assert ([11], [11, 12, 13, 14]) == (ada.seqs, bob.seqs)
    assert {"op": "revoked", "topic": "a", "pos": "e:12"} == ada.frames[-1]
    assert ([Topic("a")], []) == (ada.revocations, bob.revocations)


def test_followers_that_keep_their_right_receive_a_transaction_in_one_frame() -> None:
    hub, ada, bob = a_hub(), Recorder("ada"), Recorder("bob")
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("a"), bob)
    publish(hub, a_change(11, "a"), an_end(12, "a", user="ada", of="a"), a_change(13, "a"))
    assert ["changes"] == [frame["op"] for frame in bob.frames]


def test_a_right_can_end_by_a_change_in_a_topic_without_followers() -> None:
    hub, ada = a_hub(), Recorder("ada")
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("b"), ada)
    publish(hub, a_change(11, "a"), an_end(12, "users", user="ada"), a_change(13, "b"))
    assert [11] == ada.seqs
    assert {Topic("a"), Topic("b")} == set(ada.revocations)
    assert 0 == hub.subscriptions


def test_a_topic_that_ends_is_revoked_for_all_followers() -> None:
    hub, ada, bob = a_hub(), Recorder("ada"), Recorder("bob")
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("a"), bob)
    hub.follow(Topic("b"), bob)
    publish(hub, an_end(11, "a", of="a"), a_change(12, "b"))
    assert ([Topic("a")], [Topic("a")]) == (ada.revocations, bob.revocations)
    assert [12] == bob.seqs


def test_a_waiting_follower_is_notified_when_its_right_ends() -> None:
    hub, ada = a_hub(), Recorder("ada")
    hub.watch_rights(Topic("a"), ada)
    publish(hub, an_end(11, "a", user="ada", of="a"))
    publish(hub, an_end(12, "a", user="ada", of="a"))
    assert [Topic("a")] == ada.revocations
    assert ["e:11"] == [frame["pos"] for frame in ada.frames]


def test_a_truncate_does_not_reset_a_follower_that_lost_its_right_before() -> None:
    hub, ada = a_hub(), Recorder("ada")
    hub.follow(Topic("a"), ada)
    truncate = a_change(12, "*chatgenius", Kind.TRUNCATE, key="{}", record=None)
    publish(hub, an_end(11, "a", user="ada", of="a"), truncate, covers=[Topic("a")])
    assert ["revoked"] == [frame["op"] for frame in ada.frames]


def test_the_end_of_all_rights_of_a_pack_leaves_other_packs_alone() -> None:
    hub, ada = a_hub(), Recorder("ada")
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("other"), ada)
    publish(hub, an_end(11, "a", user="ada"), a_change(12, "a"), a_change(13, "other"))
    assert [Topic("a")] == ada.revocations
    assert [13] == ada.seqs


def a_limit(seq: int, topic: str, ends: Right | None = None) -> Change:
    return a_change(seq, topic, Kind.LIMIT, key="{}", record=None, ends=ends)


def publish_limits(hub: Hub, *changes: Change) -> None:
    ends = [RightEnd(change.seq, change.ends, lambda _: True) for change in changes if change.ends]
    hub.publish(changes, Position("e", changes[-1].seq), lambda change: {change.topic} & {*hub.topics}, ends)


def test_a_too_large_transaction_resets_each_topic_once_in_order() -> None:
    hub, ada = a_hub(), Recorder()
    for topic in ("a", "b", "c"):
        hub.follow(Topic(topic), ada)
    publish_limits(hub, a_change(11, "a"), a_limit(20, "a"), a_limit(25, "a"), a_limit(30, "b"), a_change(31, "a"))
    assert ["changes", "reset", "reset", "changes"] == [frame["op"] for frame in ada.frames]
    assert [("a", "limit", "e:25"), ("b", "limit", "e:30")] == [
        (frame["topic"], frame["reason"], frame["pos"]) for frame in ada.frames[1:3]
    ]
    assert "e:25" == ada.frames[3]["prev"]


def test_a_follower_that_loses_its_right_in_a_too_large_transaction_gets_no_content_and_no_reset() -> None:
    hub, ada, bob = a_hub(), Recorder("ada"), Recorder("bob")
    hub.follow(Topic("a"), ada)
    hub.follow(Topic("a"), bob)
    publish_limits(hub, a_change(11, "a"), a_limit(20, "a", Right("ada", Topic("a"))), a_limit(25, "a"))
    assert ["changes", "revoked"] == [frame["op"] for frame in ada.frames]
    assert ["changes", "reset"] == [frame["op"] for frame in bob.frames]


def a_view(content: str) -> View:
    columns = {name: Column(name, "text") for name in ("id", "content")}
    return view(Asked({"messages": {"content": {"eq": content}}}, None), {"messages": columns})


def says(seq: int, content: str, **members: object) -> Change:
    return a_change(seq, "a", record=json.dumps({"id": f"m{seq}", "content": content}), **members)  # type: ignore[arg-type]


def test_followers_of_a_topic_receive_what_their_views_show() -> None:
    hub, plain, ada, bob = a_hub(), Recorder(), Recorder(), Recorder()
    hub.follow(Topic("a"), plain)
    hub.follow(Topic("a"), ada, a_view("x"))
    hub.follow(Topic("a"), bob, a_view("y"))
    assert (2, 2) == publish(hub, says(11, "x"), says(12, "x"))
    assert (2, 2) == publish(hub, says(13, "y"))
    assert ([11, 12, 13], [11, 12], [13]) == (plain.seqs, ada.seqs, bob.seqs)


def test_followers_with_equal_views_share_one_bytes_object() -> None:
    hub = a_hub()
    received: list[bytes] = []

    class Listener(Recorder):
        def deliver(self, frames: bytes) -> None:
            received.append(frames)

    for _ in range(3):
        hub.follow(Topic("a"), Listener(), a_view("x"))
    assert (1, 3) == publish(hub, says(11, "x"))
    assert 1 == len({id(frames) for frames in received})


def test_a_frame_that_is_not_sent_to_a_follower_leaves_no_gap_for_it() -> None:
    hub, ada, plain = a_hub(), Recorder(), Recorder()
    hub.follow(Topic("a"), plain)
    hub.follow(Topic("a"), ada, a_view("x"))
    for change in (says(11, "x"), says(12, "y"), says(13, "y"), says(14, "x")):
        publish(hub, change)
    assert [("e:10", "e:11"), ("e:11", "e:14")] == [(frame["prev"], frame["pos"]) for frame in ada.frames]
    assert ["e:10", "e:11", "e:12", "e:13"] == [frame["prev"] for frame in plain.frames]


def test_a_frame_goes_up_to_the_end_of_its_transactions_whatever_its_view_shows_of_them() -> None:
    hub, ada = a_hub(), Recorder()
    hub.follow(Topic("a"), ada, a_view("x"))
    publish(hub, says(11, "x"), says(12, "y"))
    assert ([11], "e:12") == (ada.seqs, ada.frames[0]["pos"])


def test_numbers_are_exact_in_the_frames_of_a_view_too() -> None:
    hub, ada = a_hub(), Recorder(numbers=Numbers.STRING)
    hub.follow(Topic("a"), ada, a_view("x"))
    publish(hub, says(11, "x"), says(12, "y"))
    assert [{"exact": True}] == [change["key"] for change in ada.frames[0]["changes"]]


def test_a_reset_reaches_followers_with_any_view() -> None:
    hub, ada = a_hub(), Recorder()
    hub.follow(Topic("a"), ada, a_view("x"))
    publish(hub, a_change(11, "*", Kind.TRUNCATE, key="{}", record=None), covers=[Topic("a")])
    publish(hub, says(12, "x"))
    assert ["reset", "changes"] == [frame["op"] for frame in ada.frames]
    assert "e:11" == ada.frames[1]["prev"]


def test_a_follower_with_a_view_that_loses_a_right_gets_what_it_shows_until_then() -> None:
    hub, ada, bob = a_hub(), Recorder(), Recorder("bob")
    hub.follow(Topic("a"), ada, a_view("x"))
    hub.follow(Topic("a"), bob, a_view("y"))
    everybody = Right(None, Topic("a"))
    publish(hub, says(11, "x"), says(12, "z"), says(13, "x", ends=everybody))
    assert [["changes", "revoked"], ["revoked"]] == [[frame["op"] for frame in one.frames] for one in (ada, bob)]
    assert ([11], "e:12") == (ada.seqs, ada.frames[0]["pos"])
    assert ([], 0) == (list(hub.topics), hub.subscriptions)


def test_a_follower_that_left_may_follow_again_with_another_view() -> None:
    hub, ada = a_hub(), Recorder()
    hub.follow(Topic("a"), ada, a_view("x"))
    hub.unfollow(Topic("a"), ada)
    assert [] == list(hub.topics)
    hub.follow(Topic("a"), ada, a_view("y"))
    publish(hub, says(11, "x"), says(12, "y"))
    assert {Topic("a"): 12} == hub.suspend([Topic("a")], ada)
    publish(hub, says(13, "y"))
    assert [12] == ada.seqs


def test_the_followers_of_a_topic_are_those_that_are_live_in_any_form() -> None:
    hub = a_hub()
    live, exact, behind, elsewhere = Recorder(), Recorder(numbers=Numbers.STRING), Recorder(), Recorder()
    for follower in (live, exact, behind):
        hub.follow(Topic("a"), follower)
    hub.follow(Topic("b"), elsewhere)
    hub.suspend([Topic("a")], behind)
    assert [live, exact] == hub.followers(Topic("a"))
    assert [] == hub.followers(Topic("c"))
