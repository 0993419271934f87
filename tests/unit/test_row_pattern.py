"""The pattern of ordinary rows: what it matches is valid, and ordinary rows of every kind of column match."""

import json
import re
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from daemon.core.own_tables import OwnColumn, OwnTable
from daemon.core.row_pattern import row_pattern
from daemon.delivery.own_tables import row_model
from daemon.packs import PLAIN_PATTERNS, BigInt, Row, Ulid, bundled, key_model
from daemon.packs.chatgenius import Message

SHAPES = {
    "boolean": "true",
    "smallint": "-7",
    "bigint": "123456789012345678",
    "numeric": "10.50",
    "real": "0.1",
    "double precision": '"NaN"',
    "timestamp with time zone": '"2026-01-10T12:00:00.123456+00:00"',
    "date": '"2026-01-10"',
    "uuid": '"0b9a1c2d-0000-4000-8000-000000000001"',
    "jsonb": '{"a": 1, "b": null}',
    "json": '[1,"x"]',
    "numeric[]": "[1.5, 2]",
    "text[]": '["a","b"]',
    "text": '"é and an emoji: 🙂"',
    "a name (n.)": "null",
}
OWN = row_model(
    OwnTable("app", "t", "own", ("t",), ("boolean",), tuple(OwnColumn(name, name, nullable=True) for name in SHAPES))
)


class Limits(Row):
    key: ClassVar[tuple[str, ...]] = ("id",)

    id: Annotated[BigInt, Field(ge=1)]
    count: Annotated[int, Field(ge=0)]
    serial: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
    name: Annotated[str, Field(min_length=1, max_length=3)]
    rest: Annotated[str, Field(min_length=2)]
    kind: Literal["a", "a.b"]
    tags: list[str]
    note: str = ""


ROWS = [OWN, Limits, *(row for pack in bundled().values() for row in pack.tables.values())]
MODELS = [model for row in ROWS for model in (row, key_model(row))]


def pattern_of(model: type[BaseModel]) -> re.Pattern[str]:
    model.model_rebuild()
    return row_pattern(model.__pydantic_core_schema__, PLAIN_PATTERNS)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_what_looks_like_an_ordinary_row_is_valid(model: type[BaseModel], data: st.DataObject) -> None:
    """Postgres writes no control characters into JSON; and whoever uses the pattern looks for backslashes."""
    pattern = pattern_of(model)
    if pattern.pattern == r"(?!)":
        return
    characters = st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters="\\")
    text = data.draw(st.from_regex(pattern, fullmatch=True, alphabet=characters))
    model.__pydantic_validator__.validate_json(text)
    assert isinstance(json.loads(text, parse_constant=pytest.fail), dict)


def test_a_row_with_every_shape_of_a_column_is_ordinary() -> None:
    values = [f"{json.dumps(name)}:{value}" for name, value in SHAPES.items()]
    assert pattern_of(OWN).fullmatch("{" + ",".join(values) + "}")
    assert pattern_of(key_model(OWN)).fullmatch('{"boolean":true}')


MESSAGE = {
    "id": "01JH000000MSG0000000000001",
    "channel_id": "01JH000000CHAN00000GENERA1",
    "user_id": "01JH000000VSER0000000A11CE",
    "content": "hello",
    "metadata": None,
    "created_at": "2026-01-10T12:00:00.123456+00:00",
    "updated_at": "2026-01-10T12:00:00+00:00",
}


def is_ordinary(members: dict[str, Any]) -> bool:
    return pattern_of(Message).fullmatch(json.dumps(members, separators=(",", ":"))) is not None


def test_a_message_is_ordinary() -> None:
    assert is_ordinary(MESSAGE)
    assert is_ordinary(MESSAGE | {"created_at": "2026-01-10T12:00:00.1+05:30"})
    assert is_ordinary(MESSAGE | {"metadata": {"mood": "good", "stars": 5}})


@pytest.mark.parametrize(
    "members",
    [
        {"id": "01JH"},
        {"content": None},
        {"content": 1},
        {"content": 'x","more":"y'},
        {"metadata": []},
        {"metadata": {"deep": {"er": 1}}},
        {"created_at": "yesterday"},
        {"created_at": "2026-01-10T12:00:00"},
        {"created_at": "2026-01-10T12:00:00.1234567+00:00"},
        {"created_at": "infinity"},
        {"created_at": "10000-01-10T12:00:00+00:00"},
        {"created_at": "0044-03-15T12:00:00+00:00 BC"},
        {"more": 1},
    ],
)
def test_what_is_invalid_or_unusual_is_not_ordinary(members: dict[str, Any]) -> None:
    assert not is_ordinary(MESSAGE | members)


@pytest.mark.parametrize("column", MESSAGE)
def test_a_row_without_a_column_is_not_ordinary(column: str) -> None:
    assert not is_ordinary({name: value for name, value in MESSAGE.items() if name != column})


class ChecksField(Row):
    id: str

    @field_validator("id")
    @classmethod
    def check(cls, value: str) -> str:
        return value


class ChecksModel(Row):
    id: str

    @model_validator(mode="after")
    def check(self) -> "ChecksModel":
        return self


class ChecksValue(Row):
    id: Annotated[str, AfterValidator(str)]


class Strips(Row):
    model_config = ConfigDict(str_max_length=1)

    id: str


class OtherPattern(Row):
    id: Annotated[str, Field(pattern="^.*$")]


class OtherLimit(Row):
    id: Annotated[int, Field(gt=0)]


class LaterBegin(Row):
    id: Annotated[int, Field(ge=5)]


class PatternAndLength(Row):
    id: Annotated[Ulid, Field(max_length=3)]


class Nested(Row):
    id: Limits


@pytest.mark.parametrize(
    "model",
    [
        ChecksField,
        ChecksModel,
        ChecksValue,
        Strips,
        OtherPattern,
        OtherLimit,
        LaterBegin,
        PatternAndLength,
        Nested,
    ],
    ids=lambda model: model.__name__,
)
def test_a_model_that_demands_more_than_is_known_has_no_ordinary_rows(model: type[BaseModel]) -> None:
    assert pattern_of(model).pattern == r"(?!)"
