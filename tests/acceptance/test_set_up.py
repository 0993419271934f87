"""Setting a database up from Python, as an application does."""

import asyncio
import re
import sys
from pathlib import Path

import asyncpg
import pytest
import stamina.instrumentation

from daemon import setup_database
from daemon.postgres.errors import ConnectionRefused, SuperuserRefused
from daemon.settings import BadSettings
from tests.support.daemon import clean_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` of this checkout is read."""
    monkeypatch.chdir(tmp_path)


async def test_the_example_of_the_guide_runs_word_for_word(empty_database: str, tmp_path: Path) -> None:
    guide = (ROOT / "docs/packs/chatgenius/README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / ".env.local").write_text(f'DATABASE_URL="{empty_database}"\n')
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        example,
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert (0, "chatgenius: 1 user\ntest: 0 users\n") == (process.returncode, output.decode()), errors.decode()
    logged = [line for line in errors.decode().splitlines() if '"event":' in line]
    assert len(logged) == len(errors.decode().splitlines())
    assert any('"schema_migration"' in line and "chatgenius in schema test: nothing -> " in line for line in logged)


async def test_every_session_of_the_pool_finds_the_tables_by_their_bare_names_again(empty_database: str) -> None:
    async with setup_database(database_url=empty_database, max_size=1) as pool:
        async with pool.acquire() as connection:
            await connection.execute("set search_path = public; set timezone = 'Asia/Tokyo'")
        assert 0 == await pool.fetchval("select count(*) from messages")
        assert "chatgenius, pg_temp" == await pool.fetchval("select current_setting('search_path')")
        assert "UTC" == await pool.fetchval("select current_setting('timezone')")


async def test_setting_up_again_with_several_packs_changes_nothing(database: str) -> None:
    made = "select array_agg(oid order by oid) from pg_class where relnamespace = 'chatgenius'::regnamespace"
    async with setup_database(database_url=database) as pool:
        before = await pool.fetchval(made)
    async with setup_database(database_url=database, packs=("chatgenius", "disclosure")) as pool:
        assert before == await pool.fetchval(made)
        assert 0 == await pool.fetchval("select count(*) from channels cross join disclosure_log")


async def test_a_database_that_is_down_is_tried_three_times_after_one_and_two_seconds(tmp_path: Path) -> None:
    pauses: list[float] = []
    stamina.instrumentation.set_on_retry_hooks([lambda details: pauses.append(details.wait_for)])
    try:
        with pytest.raises(ConnectionRefused, match="Nothing answers at"):
            async with setup_database(database_url=f"postgresql://nobody@/nothing?host={tmp_path}"):
                pass
    finally:
        stamina.instrumentation.set_on_retry_hooks(())
    assert [1.0, 2.0] == pauses


async def test_settings_that_cannot_be_used_are_refused_in_one_line(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadSettings, match="No database is configured"):
        async with setup_database():
            pass
    with pytest.raises(BadSettings, match="requires a single pack"):
        async with setup_database(test=True, database_url=database, packs=("chatgenius", "antone")):
            pass
    with pytest.raises(BadSettings, match="there is no such setting"):
        async with setup_database(datbase_url=database):
            pass
    monkeypatch.setenv("ROWCAST_ENVIRONMENT", "production")
    with pytest.raises(SuperuserRefused):
        async with setup_database(database_url=database):
            pass
    sql = await asyncpg.connect(database)
    assert await sql.fetchval("select to_regnamespace('test') is null") is True
    await sql.close()
