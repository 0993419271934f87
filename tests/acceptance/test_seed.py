"""Sample data: loaded by its own command, any number of times, and never in production."""

import json

import asyncpg
import pytest

from daemon.packs import bundled
from tests.support.catalog import contents
from tests.support.daemon import command


async def test_seeding_again_changes_nothing(empty_database: str) -> None:
    assert 0 == (await command("--apply-ddl", "--pack", "all", DATABASE_URL=empty_database))[0]
    loaded = []
    for _ in range(2):
        code, output, errors = await command("--pack", "all", "seed", DATABASE_URL=empty_database)
        assert (0, "") == (code, errors)
        assert output == f"sample data of {', '.join(bundled())} is loaded\n"
        loaded.append({pack: await contents(empty_database, pack) for pack in bundled()})
    assert all(any(counts.values()) for counts in loaded[0].values())
    assert loaded[0] == loaded[1]


@pytest.mark.parametrize("verb", [["seed"], ["up", "--data-dir", "."]])
async def test_no_sample_data_reaches_production(database: str, verb: list[str]) -> None:
    code, output, errors = await command(*verb, DATABASE_URL=database, ROWCAST_ENVIRONMENT="production")
    assert (35, "") == (code, output)
    assert "daemon: Sample data is not allowed in production" in errors
    sql = await asyncpg.connect(database)
    assert 0 == await sql.fetchval("select count(*) from chatgenius.users")
    await sql.close()


async def test_a_violated_constraint_is_logged_with_its_table_and_without_the_row(database: str) -> None:
    sql = await asyncpg.connect(database)
    await sql.execute("alter table chatgenius.users add constraint users_no_alice check (username <> 'alice')")
    await sql.close()
    code, output, errors = await command("seed", DATABASE_URL=database, ROWCAST_LOG_FORMAT="json")
    logged, said = errors.splitlines()
    assert (18, "") == (code, output)
    event = json.loads(logged)
    assert ("error", "constraint_violation") == (event["level"], event["event"])
    assert {"constraint": "users_no_alice", "table": "chatgenius.users", "sqlstate": "23514"} == event["data"]
    assert said.startswith("daemon: ")
    assert "Archer" not in errors


async def test_a_revision_that_meets_a_row_it_must_refuse_logs_the_constraint(empty_database: str) -> None:
    await command("--apply-ddl", DATABASE_URL=empty_database)
    await command("rollback", "chatgenius", "--to", "chatgenius_0003", DATABASE_URL=empty_database)
    sql = await asyncpg.connect(empty_database)
    await sql.execute("insert into chatgenius.users (auth0_id, email, username) values ('x', ' x@example.com', 'x')")
    code, _, errors = await command("--apply-ddl", DATABASE_URL=empty_database, ROWCAST_LOG_FORMAT="json")
    *events, said = errors.splitlines()
    assert 18 == code
    assert ["users_email_well_formed"] == [
        event["data"]["constraint"] for event in map(json.loads, events) if event["event"] == "constraint_violation"
    ]
    assert said.endswith(": correct these rows, then try again.")
    await sql.execute("update chatgenius.users set email = 'x@example.com'")
    await sql.close()
    assert 0 == (await command("--apply-ddl", DATABASE_URL=empty_database))[0]
