"""What the specification of ChatGenius asks to be logged and counted, from a running daemon."""

import json
import re
from typing import Any

from ulid import ULID

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, command, daemon_process, get


def check_form(line: dict[str, Any], level: str) -> None:
    """A line is as the specification's LogFormat says."""
    assert {"timestamp", "correlationId", "level", "event", "data"} == line.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    ULID.from_str(line["correlationId"])
    assert level == line["level"]


async def logged_by(*arguments: str, event: str, **environment: str) -> list[dict[str, Any]]:
    """The lines with this event that a command logs."""
    _, _, errors = await command(*arguments, ROWCAST_LOG_FORMAT="json", **environment)
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


async def test_migrations_violated_constraints_and_triggers_that_fail_are_logged_in_the_form_of_the_specification(
    empty_database: str, database: str, sql: Connection, chat: Chat
) -> None:
    migrations = await logged_by("--apply-ddl", event="schema_migration", DATABASE_URL=empty_database)
    for line in migrations:
        check_form(line, "info")
    done = [line["data"]["done"].partition(" -> ") for line in migrations]
    assert ["rowcast: nothing", "chatgenius: nothing"] == [before for before, arrow, _ in done if arrow]

    await sql.execute("alter table chatgenius.users add constraint no_alice check (username <> 'alice') not valid")
    [violation] = await logged_by("seed", event="constraint_violation", DATABASE_URL=database)
    check_form(violation, "error")
    assert ("no_alice", "chatgenius.users") == (violation["data"]["constraint"], violation["data"]["table"])

    # A capture that fails without failing the write, and one that somebody disabled.
    await sql.execute("create table chatgenius.t (id int primary key, n int)")
    await sql.execute(
        "select rowcast.watch('chatgenius.t', $$'t:' || 10 / r.n$$, '{id}', model => 'files', on_error => 'lenient')"
    )
    await sql.execute("alter table chatgenius.messages disable trigger rowcast_update")
    async with daemon_process(database) as daemon:
        async with daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            await sql.execute("insert into chatgenius.t values (1, 0)")
            await client.until("reset")
        assert 0 == await daemon.stop()
        failures = [line for line in daemon.events() if line["event"] == "trigger_error"]
    for line in failures:
        check_form(line, "error")
    assert {"chatgenius.messages", "t"} == {line["data"]["table"] for line in failures}


async def scraped(daemon: Daemon) -> dict[str, float]:
    """The metrics by name and labels."""
    _, page = await get(f"{daemon.http}/metrics")
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def test_queries_indexes_and_triggers_are_counted_by_name(
    empty_database: str, database: str, sql: Connection, chat: Chat
) -> None:
    name = await sql.fetchval("select current_database()")
    await sql.execute(f"alter database {name} set track_functions = 'pl'")
    await sql.execute("set track_functions = 'pl'; set enable_seqscan = off")
    await chat.say("hello")
    await sql.execute("select from chatgenius.users where auth0_id = 'x'")
    counted = "select count(*) from pg_stat_user_functions where funcname ~ '^capture_[0-9]+_messages$' and calls > 0"
    while not await sql.fetchval(counted):  # Postgres publishes its statistics now and then
        await sql.execute("select pg_stat_clear_snapshot()")
    async with daemon_process(database) as daemon, daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.say("hello again")
        await client.changes()
        found = await scraped(daemon)
    assert found['rowcast_query_seconds_count{query="number_events"}'] >= 1
    assert found['rowcast_query_seconds_count{query="readable_from"}'] >= 1
    assert found['rowcast_query_seconds_bucket{le="10.0",query="head"}'] >= 1
    assert found['rowcast_captured_total{table="chatgenius.messages"}'] >= 1
    assert found['rowcast_trigger_executions_total{table="chatgenius.messages"}'] >= 1
    assert found['rowcast_index_scans_total{index="users_auth0_id_key",table="chatgenius.users"}'] >= 1


async def test_a_canary_and_ordinary_changes_are_timed_on_their_way(
    database: str, sql: Connection, chat: Chat
) -> None:
    async with daemon_process(database, environment={"ROWCAST_CANARY_EVERY": "0.05"}) as daemon:
        async with daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            refused = await client.subscribe("rowcast:canary")
            assert ("error", "no_such_topic") == (refused["op"], refused["code"])
            await chat.say("hello")
            await client.changes()
        found = await scraped(daemon)
        while found["rowcast_canary_seconds_count"] < 3:
            found = await scraped(daemon)
        assert found["rowcast_delivery_seconds_count"] >= 1
        assert 200 == (await get(f"{daemon.http}/readyz"))[0]
    assert 1 == await sql.fetchval("select count(*) from rowcast.canary")
    assert (0, "") == (await command("check", DATABASE_URL=database))[::2]
