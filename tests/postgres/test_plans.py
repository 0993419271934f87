"""Query plans: the daemon's statements read only the rows they need, by an index, whatever the log holds."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import pytest

from daemon.log.queries import query
from daemon.postgres.connect import SESSION, Connection, Pool, connect, open_pool
from tests.support.log import ROWS as TABLE
from tests.support.log import leader, until_numbered

ROWS = 20_000


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database, application_name="test", max_size=2)
    yield pool
    await pool.close()


@pytest.fixture
async def log(database: str) -> AsyncIterator[Connection]:
    """A session with the daemon's settings, and a log in which one topic has nearly all the entries."""
    connection = await connect(database, application_name="test", server_settings=SESSION)
    await connection.execute(
        f"""insert into rowcast.log (seq, tx_end, xid, event_id, topic)
            select n, n, '3', n, case when n % 10000 = 0 then 'rare' else 'common' end
            from generate_series(1, {ROWS}) as n;
            analyze rowcast.log"""
    )
    yield connection
    await connection.close()


async def scans(connection: Connection, name: str, arguments: str) -> list[tuple[str, int]]:
    """For each scan of the log: its index, and how many rows it read, including those it filtered out.

    The statement is prepared, as the daemon's are: a plain EXPLAIN would plan for the given arguments.
    """
    await connection.execute(f"prepare tested as {query(name)}")
    [row] = await connection.fetch(f"explain (analyze, format json) execute tested ({arguments})")
    [plan] = json.loads(row[0])
    return [
        (
            node.get("Index Name", node["Node Type"]).partition("_seq_idx")[0],
            node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)),
        )
        for node in nodes(plan["Plan"])
        if node.get("Relation Name", "").startswith("log_") and node["Actual Loops"]
    ]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


@pytest.mark.parametrize("topics", [["common"], ["rare"], ["nobody"], ["common", "rare", "*chatgenius"]])
async def test_a_replay_reads_no_more_than_a_chunk_of_each_topic(log: Connection, topics: list[str]) -> None:
    found = await scans(
        log, "changes_of_topics", f"100, {ROWS}, '{{{','.join(topics)}}}', 50, 100000, 1000000, 1000000"
    )
    by_topic = [read for index, read in found if index.endswith("expr")]  # how Postgres names an index by a hash
    assert by_topic
    assert 50 * len(topics) >= sum(by_topic)
    assert sum(by_topic) == sum(read for _, read in found)  # what was found is not looked up again


@pytest.mark.parametrize("topics", [["common"], ["nobody"], ["common", "rare", "*chatgenius"]])
async def test_the_last_change_of_a_topic_is_found_by_an_index(log: Connection, topics: list[str]) -> None:
    found = await scans(log, "limits_of_topics", f"1, {ROWS}, '{{{','.join(topics)}}}'")
    assert 2 * len(topics) >= sum(read for _, read in found)


HISTORY = 2000
NONCE = UUID(int=0)


@pytest.mark.parametrize(
    ("name", "first_arguments", "arguments", "limit"),
    [
        ("changes", "(0, 10, 10, 10)", f"({HISTORY - 50}, 1000, 1000000, 1000000)", 60),
        (
            "changes_of_topics",
            "(0, 0, '{}', 10, 10, 10, 10)",
            f"({HISTORY - 50}, {HISTORY}, '{{row:1}}', 100, 1000, 1000000, 1000000)",
            60,
        ),
        ("rest_of_transaction", "(0, 0, null, 0)", f"({HISTORY - 50}, {HISTORY}, null, 1000000)", 60),
        ("limits", "(0, 0, 1, 1)", f"({HISTORY - 49}, {HISTORY}, 10, 10)", 120),
        (
            "number_events",
            f"('{NONCE}', 0, '3', '{{}}', 0, 10, 1, 1, 0, null, 10, 10)",
            f"('{NONCE}', {HISTORY}, 'XMAX', '{{}}', 0, 1000, 1, 1, 0, null, 1000000, 1000000)",
            30,
        ),
        (
            "number_few",
            f"('{NONCE}', 0, '3', '{{}}', 0, 10, 1, 1, 0, 10, 10)",
            f"('{NONCE}', {HISTORY}, 'XMAX', '{{}}', 0, 1000, 1, 1, {2 * HISTORY}, 1000000, 1000000)",
            30,
        ),
        ("outlines", "('{}')", f"('{{{HISTORY - 50}}}')", 4),
        ("records", "('{}')", f"('{{{HISTORY - 50}}}')", 4),
        ("fresh_events", "('3', '{}', 0)", "('XMAX', '{}', 0)", 30),
        ("oldest_unnumbered", "", "", 30),
        ("next_seq", "(0)", f"({HISTORY - 50})", 2),
        ("next_seq_of_topics", "(0, 0, '{}')", f"({HISTORY - 50}, {HISTORY}, '{{row:1,row:2}}')", 4),
        ("single_change", "(0, 10)", f"({HISTORY - 50}, 1000)", 4),
        ("unreadable", "(0, 10, '', true)", f"({HISTORY - 50}, 1000, 'a reason', true)", 4),
    ],
)
async def test_a_plan_made_for_empty_tables_does_not_scan_full_ones(
    database: str, pool: Pool, sql: Connection, name: str, first_arguments: str, arguments: str, limit: int
) -> None:
    await sql.execute(TABLE)
    await sql.execute("vacuum analyze")  # the planner now assumes empty tables
    connection = await connect(database, application_name="test", server_settings=SESSION)
    try:
        await connection.execute(f"prepare tested as {query(name)}")
        await connection.execute(f"execute tested {first_arguments}")
        async with leader(database, pool):
            for version in range(1, HISTORY // 8 + 1):
                await sql.execute("update app.rows set version = $1", version)
            await until_numbered(pool)
        await sql.execute("update rowcast.lease set nonce = $1, xid = pg_current_xact_id()", NONCE)
        xmax = await sql.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text")
        await sql.execute("update app.rows set version = -1")
        [row] = await connection.fetch(
            f"explain (analyze, format json) execute tested {arguments.replace('XMAX', xmax)}"
        )
    finally:
        await connection.close()
    read = [
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for node in nodes(json.loads(row[0])[0]["Plan"])
        if node.get("Relation Name", "").startswith(("events_", "log_")) and "Index Name" in node
    ]
    assert 0 < sum(read) <= 2 * limit
