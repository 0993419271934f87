"""The index of the log has a hash of the topic: topics that share one are told apart."""

import random
import re

import pytest

from daemon.log.queries import query
from daemon.postgres.connect import SESSION, Connection, Pool, connect
from tests.support.log import ROWS, leader, until_numbered

HASH = re.compile(r"hashtextextended\((\w+)\.topic, 1\) # hashtextextended\(\1\.topic, 2\)")
MANY = 2**30
LONG = random.Random(1).randbytes(3200).hex()  # longer than an index entry can be, even compressed


@pytest.mark.parametrize("topics", [["row:3"], ["row:8", "row:1"], ["row:2", "nobody"], ["nobody"]])
@pytest.mark.parametrize("limit", [1, 5, 1000])
async def test_what_is_read_of_topics_is_the_same_if_all_topics_have_one_hash(
    database: str, pool: Pool, sql: Connection, topics: list[str], limit: int
) -> None:
    await sql.execute(ROWS)
    async with leader(database, pool):
        for version in range(1, 6):
            await sql.execute("update app.rows set version = $1", version)
        await until_numbered(pool)
    newest = await pool.fetchval("select max(seq) from rowcast.log")
    arguments = {
        "changes_of_topics": (7, newest - 3, topics, limit, 1000, MANY, MANY),
        "next_seq_of_topics": (7, newest - 3, topics),
        "limits_of_topics": (7, newest - 3, topics),
    }
    connection = await connect(database, application_name="test", server_settings=SESSION)
    try:
        for name, values in arguments.items():
            with_one_hash, replaced = HASH.subn("0::bigint", query(name))
            assert 4 == replaced
            assert await connection.fetch(query(name), *values) == await connection.fetch(with_one_hash, *values)
    finally:
        await connection.close()


@pytest.mark.parametrize("topic", ["a", "row:1", "\u00e9" * 128, LONG, "*", ""])
async def test_the_database_finds_a_topic_by_the_hash_that_a_query_makes(
    pool: Pool, sql: Connection, topic: str
) -> None:
    """The column has a collation of its own, which the parameter has not."""
    await sql.execute(
        """insert into rowcast.log (seq, tx_end, xid, event_id, topic)
           values (1, 1, '3', 1, $1), (2, 2, '3', 2, 'other')""",
        topic,
    )
    assert 1 == await pool.fetchval(query("next_seq_of_topics"), 0, 2, [topic])
