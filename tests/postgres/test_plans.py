"""How the daemon's statements find what they look for: by an index, whatever is in the log, and read nothing else."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from daemon.app import SESSION
from daemon.postgres.connect import Connection, connect
from daemon.postgres.queries import query

ROWS = 20_000


@pytest.fixture
async def log(database: str) -> AsyncIterator[Connection]:
    """A session of the daemon's, and a log in which one topic has all places but a few."""
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
    """Of each scan of the log: its index, and how many rows it read, those it threw away among them.

    The statement is prepared, as the daemon's are: EXPLAIN alone would know the arguments, and plan for them.
    """
    await connection.execute(f"prepare it as {query(name)}")
    [row] = await connection.fetch(f"explain (analyze, format json) execute it ({arguments})")
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
    for part in plan.get("Plans", []):
        yield from nodes(part)


@pytest.mark.parametrize("topics", [["common"], ["rare"], ["nobody"], ["common", "rare", "*chatgenius"]])
async def test_a_replay_reads_of_each_topic_no_more_than_a_chunk(log: Connection, topics: list[str]) -> None:
    found = await scans(log, "changes_of_topics", f"100, {ROWS}, '{{{','.join(topics)}}}', 50, 100000")
    by_topic = [read for index, read in found if "topic" in index]
    assert by_topic
    assert 50 * len(topics) >= sum(by_topic)
    assert 50 * len(topics) >= sum(read for index, read in found if "topic" not in index)


@pytest.mark.parametrize("topics", [["common"], ["nobody"], ["common", "rare", "*chatgenius"]])
async def test_the_limit_of_a_topic_is_found_at_once(log: Connection, topics: list[str]) -> None:
    found = await scans(log, "limits_of_topics", f"1, {ROWS}, '{{{','.join(topics)}}}'")
    assert 2 * len(topics) >= sum(read for _, read in found)
