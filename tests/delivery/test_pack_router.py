"""What the router lets through, and what it turns into a dead letter."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
from pydantic import model_validator

from daemon.core import wire
from daemon.core.change import Change, Kind, Seq, Topic, can_be_named
from daemon.core.errors import BadFrame
from daemon.delivery.pack_router import PackRouter
from daemon.packs import Pack, Row

ONE = Topic("row:1")


class Simple(Row):
    id: int


class Renamed(Row):
    key: ClassVar = ("number",)

    number: int


class Broken(Row):
    """A row model with a mistake: validating raises what no one expects."""

    id: int

    @model_validator(mode="before")
    @classmethod
    def _fail(cls, _: object) -> Any:
        raise RecursionError


class WithoutAnswer(Mapping[str, type[Row]]):
    """Tables that cannot be looked up."""

    def __getitem__(self, name: str) -> type[Row]:
        raise MemoryError

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


TABLES = MappingProxyType({"rows": Simple, "broken": Broken})
ROUTER = PackRouter({"app": Pack("app", TABLES, (r"row:.*", r"\*any")), "more": Pack("more", TABLES, (r"more:\d+",))})
FAILING = PackRouter({"app": Pack("app", WithoutAnswer(), (r"row:.*",))})


def a_change(
    topic: str = ONE, kind: Kind = Kind.INSERT, *, seq: int = 1, table: str = "rows", schema: str = "app"
) -> Change:
    record = '{"id":1}' if kind is Kind.INSERT else None
    return Change(Seq(seq), "1", "", schema, table, Topic(topic), kind, '{"id":1}', record)


UNNAMED = ["", " ", "row: 1", "row:\x00", "row:\x7f", "row:\n", "row:" + "1" * 300, "*", "*any", "*app"]


@pytest.mark.parametrize("topic", [*UNNAMED, "row:1", "row:\u00e9", "row:" + "1" * 124, "row:" + "1" * 125])
def test_a_topic_can_be_named_if_a_client_can_subscribe_to_it(topic: str) -> None:
    try:
        wire.parse(json.dumps({"op": "subscribe", "topic": topic}).encode())
    except BadFrame:
        assert not can_be_named(topic)
        assert ROUTER.schema_of(Topic(topic)) is None
    else:
        assert can_be_named(topic)
        assert "app" == ROUTER.schema_of(Topic(topic))


@pytest.mark.parametrize("topic", UNNAMED)
def test_a_change_in_a_topic_that_no_client_can_name_is_a_dead_letter_and_resets_nothing(topic: str) -> None:
    for kind in (Kind.INSERT, Kind.DELETE):
        valid, [invalid] = ROUTER.validate([a_change(topic, kind)])
        assert ([], "app", "topic: cannot_be_named") == (valid, invalid.pack, invalid.reason)


@pytest.mark.parametrize("topic", ["other:1", "more:1", "row"])
def test_a_change_in_a_topic_that_its_pack_does_not_serve_is_a_dead_letter(topic: str) -> None:
    valid, [invalid] = ROUTER.validate([a_change(topic)])
    assert ([], "app", "topic: not_served") == (valid, invalid.pack, invalid.reason)


def test_a_limit_that_capture_wrote_for_a_topic_that_nobody_can_follow_is_a_dead_letter() -> None:
    limit = a_change("no such topic", Kind.LIMIT)._replace(key="{}")
    valid, [invalid] = ROUTER.validate([limit])
    assert ([], "topic: cannot_be_named") == (valid, invalid.reason)


def test_changes_of_schemas_that_are_not_served_are_ignored() -> None:
    assert ([], []) == ROUTER.validate([a_change(schema="elsewhere"), a_change("", schema="elsewhere")])


@pytest.mark.parametrize(
    ("router", "table", "reason"),
    [(ROUTER, "broken", "RecursionError"), (FAILING, "rows", "MemoryError"), (ROUTER, "none", "table: no_row_model")],
)
def test_a_change_that_cannot_be_validated_resets_its_topic_and_stops_no_other(
    router: PackRouter, table: str, reason: str
) -> None:
    valid, invalid = router.validate([a_change(seq=1, table=table), a_change(kind=Kind.LIMIT, seq=2)])
    assert [(1, ONE, Kind.INVALID, "{}", None), (2, ONE, Kind.LIMIT, '{"id":1}', None)] == [
        (change.seq, change.topic, change.kind, change.key, change.record) for change in valid
    ]
    [dead_letter] = invalid
    assert reason in dead_letter.reason


def test_truncations_and_losses_need_no_topic_that_can_be_named() -> None:
    for kind in (Kind.TRUNCATE, Kind.LOST, Kind.LIMIT):
        change = a_change("*app", kind)._replace(key="{}")
        assert ([change], []) == ROUTER.validate([change])


def test_a_table_that_is_served_otherwise_is_validated_by_its_new_model() -> None:
    def served(model: type[Row]) -> dict[tuple[str, str], Pack]:
        return {("app", "rows"): Pack("app.rows", {"rows": model}, ("row:.*",))}

    router = PackRouter(own=served(Simple))
    assert ([a_change()], []) == router.validate([a_change()])
    router.own = served(Renamed)
    _, invalid = router.validate([a_change()])
    assert ["key: missing number"] == [found.reason for found in invalid]
    router.own = served(Simple)
    assert ([a_change()], []) == router.validate([a_change()])


def test_what_is_known_of_topics_is_limited_and_nothing_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.delivery.pack_router.MAX_FORMS", 10)
    router = PackRouter(ROUTER.packs)
    for number in range(100):
        valid, refused = a_change(f"row:{number}"), a_change(f"else:{number}")
        sendable, invalid = router.validate([valid, refused, valid])
        assert [valid, valid] == sendable
        assert [refused] == [found.change for found in invalid]
        assert len(router._validators[2]) <= 10 + 2
