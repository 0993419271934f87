"""The ids that rowcast.ulid() makes: 26 digits, of which 12 are the time and 14 random."""

import string
from typing import Final

from daemon.postgres.connect import Connection

DIGITS: Final = string.digits + "ABCDEFGHJKMNPQRSTVWXYZ"
MANY: Final = 2000


def value(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 32 + DIGITS.index(digit)
    return number


def microseconds(ulid: str) -> int:
    """Since 1970: ten digits for the milliseconds, two for the microseconds within them."""
    return value(ulid[:10]) * 1000 + value(ulid[10:12])


async def test_an_id_contains_the_microsecond_in_which_it_was_made(sql: Connection) -> None:
    rows = await sql.fetch(
        """select (extract(epoch from clock_timestamp()) * 1000000)::bigint as before, rowcast.ulid() as ulid,
                  (extract(epoch from clock_timestamp()) * 1000000)::bigint as after from generate_series(1, $1)""",
        MANY,
    )
    for row in rows:
        assert len(row["ulid"]) == 26
        assert row["before"] <= microseconds(row["ulid"]) <= row["after"]


async def test_ids_of_one_statement_sort_in_the_order_they_were_made(sql: Connection) -> None:
    ids = [row["ulid"] for row in await sql.fetch("select rowcast.ulid() as ulid from generate_series(1, $1)", MANY)]
    assert sorted(times := [ulid[:12] for ulid in ids]) == times
    assert len(set(ids)) == MANY


async def test_two_random_digits_are_any_of_1024_pairs(sql: Connection) -> None:
    ids = [row["ulid"] for row in await sql.fetch("select rowcast.ulid() as ulid from generate_series(1, 30000)")]
    for place in range(12, 25):
        assert len({ulid[place : place + 2] for ulid in ids}) == 32 * 32
