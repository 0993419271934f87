"""Sample data: loaded by its own command, any number of times, and never in production."""

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
