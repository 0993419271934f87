"""What a view shows of changes, and which filters are refused."""

import json
from typing import Any

import pytest

from daemon.core.change import Change, Kind
from daemon.core.column_types import Column, JsonNumber
from daemon.core.errors import BadFilter, FilterTooLarge
from daemon.core.filters import Asked, View, view
from tests.unit.core.changes import a_change

NAMES = {"id": "text", "content": "text", "stars": "integer", "price": "numeric", "extra": None}
TABLES = {"messages": {name: Column(name, type_) for name, type_ in NAMES.items()}}


def seen(where: object = None, columns: object = None) -> View:
    return view(Asked(where and {"messages": where}, columns and {"messages": columns}), TABLES)


def shown(a_view: View, change: Change) -> Change | None:
    found = a_view.of_run([change], {})
    return found[0] if found else None


def update(*changed: str, **values: object) -> Change:
    record = json.dumps({"id": "m1", "content": "hi", "stars": 1, "price": 1.5, "extra": None} | values)
    return a_change(7, kind=Kind.UPDATE, record=record, changed=changed)


STARRED = seen({"stars": {"gt": 1}})


def test_an_update_after_which_a_row_does_not_match_is_sent_as_a_delete_of_a_row_that_left() -> None:
    found = shown(STARRED, update("stars", "content", stars=0))
    assert found is not None
    assert (Kind.LEAVE, None, (), '{"id":"m1"}') == (found.kind, found.record, found.changed, found.key)


def test_an_update_that_does_not_change_what_is_compared_is_not_sent_of_a_row_that_does_not_match() -> None:
    assert shown(STARRED, update("content", stars=0)) is None


def test_a_change_of_a_row_that_matches_is_sent_as_it_is() -> None:
    for change in (
        update("stars", stars=2),
        update("content", stars=2),
        update("content", stars=2)._replace(kind=Kind.RESTORE),
    ):
        assert change is shown(STARRED, change)


@pytest.mark.parametrize("kind", [Kind.INSERT, Kind.RESTORE])
def test_a_new_row_that_does_not_match_is_not_sent(kind: Kind) -> None:
    assert shown(STARRED, update()._replace(kind=kind)) is None


@pytest.mark.parametrize("kind", [Kind.DELETE, Kind.LEAVE, Kind.TRUNCATE, Kind.INVALID])
def test_a_change_without_a_record_is_sent_to_all(kind: Kind) -> None:
    change = a_change(7, kind=kind, record=None)
    assert change is shown(STARRED, change)


def test_another_table_is_not_filtered() -> None:
    change = a_change(7, table="reactions")
    assert change is shown(STARRED, change)


def test_an_update_whose_columns_are_unknown_may_have_changed_what_is_compared() -> None:
    kinds = [found.kind for found in (shown(STARRED, update(stars=stars)) for stars in (0, 2)) if found]
    assert [Kind.LEAVE, Kind.UPDATE] == kinds


def test_columns_are_copied_byte_by_byte_and_others_left_out() -> None:
    record = '{"id":"m1","content":"a\\u0001é","stars":1,"price":1.50,"extra":{"a": [1.0]}}'
    found = shown(seen(columns=["price", "extra", "content"]), a_change(7, record=record))
    assert found is not None
    assert '{"content":"a\\u0001é","price":1.50,"extra":{"a": [1.0]}}' == found.record


def test_an_update_of_other_columns_is_sent_only_if_the_row_may_have_begun_to_match() -> None:
    a_view = seen({"stars": {"gte": 1}}, ["content"])
    assert shown(a_view, update("price")) is None
    found = shown(a_view, update("stars", "price"))
    assert found is not None
    assert ('{"content":"hi"}', ()) == (found.record, found.changed)


def test_a_record_that_is_too_deep_to_parse_is_compared_all_the_same() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    change = a_change(7, record=f'{{"id":"m1","stars":2,"extra":{deep}}}')
    assert change is shown(STARRED, change)
    assert shown(STARRED, change._replace(record=f'{{"id":"m1","stars":1,"extra":{deep}}}')) is None


@pytest.mark.parametrize("record", ['{"id":"m1"}', '{"stars":"many"}', '{"stars":[1]}'])
def test_a_row_that_cannot_be_compared_any_more_is_sent(record: str) -> None:
    change = a_change(7, record=record)
    assert change is shown(STARRED, change)


def test_views_that_show_the_same_are_equal_however_they_are_written() -> None:
    one = seen({"stars": {"gt": 1}, "id": {"in": ["a", "b"]}}, ["id", "content"])
    other = seen({"and": [{"id": {"in": ["b", "a", "b"]}}, {"stars": {"gt": 1}}]}, ["content", "id"])
    assert one == other
    assert hash(one) == hash(other)
    assert one != seen({"stars": {"gt": 2}, "id": {"in": ["a", "b"]}}, ["id", "content"])
    assert one != seen({"stars": {"gt": 1}, "id": {"in": ["a", "b"]}}, ["id"])
    assert seen({"stars": {"eq": 1}}) == seen({"or": [{"stars": {"eq": "1"}}]})


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"id": {"eq": "x"}}
    for _ in range(depth):
        found = {"or": [found]}
    return found


def test_the_largest_filters_are_accepted() -> None:
    seen(nested(8))
    seen({"or": [{"stars": {"eq": number}} for number in range(64)]})
    seen({"id": {"in": ["x"] * 100}, "content": {"like": "x" * 100}, "price": {"eq": JsonNumber("1.5")}})


@pytest.mark.parametrize(
    "where",
    [
        nested(9),
        {"or": [{"stars": {"eq": number}} for number in range(65)]},
        {"id": {"in": ["x"] * 101}},
        {"id": {"like": "x" * 101}},
        {"or": [{"id": {"ilike": f"%{number}%"}} for number in range(17)]},
    ],
)
def test_a_filter_that_is_too_large_is_refused(where: object) -> None:
    with pytest.raises(FilterTooLarge, match=r"^where\.messages\..*: a filter has at most \d+ "):
        seen(where)


@pytest.mark.parametrize(
    ("where", "member"),
    [
        ({"stars": 1}, "where.messages.stars"),
        ({"stars": {}}, "where.messages.stars"),
        ({"and": {}}, "where.messages.and"),
        ({"and": [{"stars": {"eq": 1}}, 7]}, "where.messages.and[1]"),
        ({"not": [{"stars": {"eq": 1}}]}, "where.messages.not"),
        ({"stars": {"in": []}}, "where.messages.stars.in"),
        ({"stars": {"in": [1, None]}}, "where.messages.stars.in[1]"),
        ({"stars": {"is_null": 1}}, "where.messages.stars.is_null"),
        ({"stars": {"like": "1"}}, "where.messages.stars.like"),
        ({"extra": {"eq": "1"}}, "where.messages.extra.eq"),
        ({"content": {"like": "a\\"}}, "where.messages.content.like"),
        ({"content": {"like": "%a_b%"}}, "where.messages.content.like"),
        ({"x" * 1000: {"eq": 1}}, "where.messages." + "x" * 64 + "..."),
    ],
)
def test_a_wrong_filter_is_refused_with_the_member_that_is_wrong(where: object, member: str) -> None:
    with pytest.raises(BadFilter) as caught:
        seen(where)
    assert str(caught.value).startswith(f"{member}: ")


def test_a_label_that_is_newer_than_the_filter_is_another_one() -> None:
    mood = Column("mood", "enum", frozenset({"sad", "ok"}))
    asked = view(Asked({"messages": {"mood": {"eq": "ok"}}}, None), {"messages": {"mood": mood}})
    assert shown(asked, a_change(1, record='{"mood":"ok"}')) is not None
    assert shown(asked, a_change(2, record='{"mood":"new"}')) is None
