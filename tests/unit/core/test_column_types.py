"""Values of columns, as frames and filters write them."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.core.column_types import TYPES, Column, JsonNumber

ZONED = Column("at", "timestamptz")


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_is_the_microseconds_since_1970(moment: datetime) -> None:
    since = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert since == ZONED.parse(moment.isoformat())


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("smallint", 32768),
        ("integer", 2**31),
        ("integer", "1.0"),
        ("integer", True),
        ("integer", JsonNumber("1e0")),
        ("bigint", 2**63),
        ("bigint", "9" * 100),
        ("numeric", "1e131072"),
        ("numeric", "1e-16384"),
        ("numeric", "nan"),
        ("numeric", " 1"),
        ("numeric", None),
        ("real", "1e39"),
        ("real", "1e-60"),
        ("double precision", "1e309"),
        ("double precision", "1e-400"),
        ("text", "a\0b"),
        ("text", 7),
        ("enum", "green"),
        ("boolean", "true"),
        ("boolean", 1),
        ("uuid", "a0eebc999c0b4ef8bb6d6bb9bd380a11"),
        ("date", "2026-02-29"),
        ("date", "2026-13-01"),
        ("date", "0000-01-01"),
        ("date", "0001-02-29"),
        ("date", "4714-11-23 BC"),
        ("date", "2026-01-10T00:00:00"),
        ("timestamp", "2026-01-10T12:00:00Z"),
        ("timestamp", "2026-01-10T24:00:00"),
        ("timestamptz", "2026-01-10T12:00:00"),
        ("timestamptz", "2026-01-10T12:00:00.1234567Z"),
        ("timestamptz", "2026-01-10T12:00:60Z"),
        ("timestamptz", "2026-01-10T12:00:00+16:00"),
        ("timestamptz", "294277-01-01T00:00:00Z"),
        ("timestamptz", "yesterday"),
    ],
)
def test_a_value_that_the_type_cannot_hold_is_refused_with_what_it_must_be(type_: str, value: object) -> None:
    with pytest.raises(ValueError, match=TYPES[type_].form.partition(" ")[0]):
        Column("v", type_, frozenset({"red"} if type_ == "enum" else ())).text(value)


def test_what_cannot_be_compared_can_only_be_null() -> None:
    assert {"is_null"} == Column("v", None).operators
