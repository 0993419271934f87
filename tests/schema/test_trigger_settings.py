"""What turning notifications or soft deletes off does to a database, and that turning them on again undoes it."""

import sys

import asyncpg
import pytest

from daemon.packs import bundled
from daemon.postgres.connect import Connection, open_pool
from daemon.schema import migrate
from daemon.schema.health import SchemaHealth, check
from daemon.settings import Settings, load
from tests.support.daemon import command
from tests.support.postgres import ignore

ADA = "01JH000000VSER0000000000AD"
USER = f"insert into chatgenius.users (id, auth0_id, email, username) values ('{ADA}', 'a', 'ada@x.example', 'Ada')"


async def apply(settings: Settings) -> None:
    await migrate.apply(
        settings.require_dsn(), settings.packs, report=ignore, trigger_settings=settings.trigger_settings
    )


async def captured(sql: Connection) -> list[str]:
    """The tables with a capture trigger."""
    rows = await sql.fetch(
        "select distinct g.tgrelid::regclass::text as name from pg_trigger as g"
        " join pg_proc as p on p.oid = g.tgfoid where p.proname ~ '^capture_[0-9]+_' order by 1"
    )
    return [row["name"] for row in rows]


async def test_without_notifications_only_what_somebody_watches_by_hand_is_captured(
    database: str, sql: Connection
) -> None:
    on, off = load(database_url=database), load(database_url=database, notifications="false")
    before = await captured(sql)
    assert 10 == len(before)
    await sql.execute("create table public.notes (id int primary key, body text)")
    await sql.execute("select rowcast.watch('public.notes', topic => $$'notes'$$, columns => '{id, body}')")

    await apply(off)
    assert ["public.notes"] == await captured(sql)
    await sql.execute(USER)
    assert 0 == await sql.fetchval("select count(*) from rowcast.events")
    assert [] == (await check(off)).problems
    problems = (await check(on)).problems
    assert "schema chatgenius: none of its tables is captured, as with ROWCAST_NOTIFICATIONS=false" in problems[0]
    assert 10 == len([one for one in problems if "it is not watched" in one])

    await apply(on)
    assert {*before, "public.notes"} == {*await captured(sql)}
    assert [] == (await check(on)).problems
    problems = (await check(off)).problems
    assert 10 == len([one for one in problems if "it is captured, but ROWCAST_NOTIFICATIONS is off" in one])


async def test_an_upgrade_under_the_same_settings_keeps_what_is_off_and_is_verified(
    database: str, sql: Connection
) -> None:
    off = load(database_url=database, notifications="false", soft_deletes="false")
    await migrate.rollback(database, "chatgenius", to="chatgenius_0004", report=ignore)
    await migrate.upgrade(database, off.packs, report=ignore, trigger_settings=off.trigger_settings)
    assert [] == await captured(sql)
    assert [] == (await check(off)).problems


async def test_a_daemon_of_a_database_without_captures_is_not_ready_and_says_why(
    database: str, sql: Connection
) -> None:
    await apply(load(database_url=database, notifications="false"))
    pool = await open_pool(database, application_name="test")
    schema = SchemaHealth(pool, load(database_url=database))
    await schema.refresh()
    await pool.close()
    [problem] = schema.problems
    assert problem.startswith("schema chatgenius: none of its tables is captured")
    assert problem.endswith("run `daemon --apply-ddl`")


async def test_a_daemon_with_notifications_off_refuses_to_serve(database: str) -> None:
    code, _, errors = await command(DATABASE_URL=database, ROWCAST_NOTIFICATIONS="off")
    assert 78 == code
    assert "ROWCAST_NOTIFICATIONS is off, so no change is captured and there is nothing to serve" in errors


async def test_without_soft_deletes_rows_are_deleted_or_restored_but_not_deleted_softly(
    database: str, sql: Connection
) -> None:
    on, off = load(database_url=database), load(database_url=database, soft_deletes="false")
    await sql.execute(USER)
    await sql.execute("insert into chatgenius.channels (name, deleted_at) values ('old', now()), ('new', null)")
    events = await sql.fetchval("select count(*) from rowcast.events")

    await apply(off)
    for statement in (
        "update chatgenius.users set deleted_at = now()",
        "insert into chatgenius.channels (name, deleted_at) values ('gone', now())",
    ):
        with pytest.raises(asyncpg.CheckViolationError, match=r"soft deletes are off .*delete the row") as refused:
            await sql.execute(statement)
        assert "rowcast_soft_deletes_off" == refused.value.constraint_name
    assert events == await sql.fetchval("select count(*) from rowcast.events")
    await sql.execute("update chatgenius.channels set name = upper(name)")
    await sql.execute("update chatgenius.channels set deleted_at = null where name = 'OLD'")
    await sql.execute("delete from chatgenius.channels where name = 'NEW'")
    assert ["OLD"] == [row["name"] for row in await sql.fetch("select name from chatgenius.live_channels")]
    assert [] == (await check(off)).problems
    problems = (await check(on)).problems
    assert 3 == len(problems)
    assert all("drop trigger rowcast_soft_deletes on chatgenius." in problem for problem in problems)

    await apply(on)
    await sql.execute("update chatgenius.users set deleted_at = now()")
    assert [] == (await check(on)).problems
    problems = (await check(off)).problems
    assert 3 == len([one for one in problems if one.startswith("trigger rowcast_soft_deletes on chatgenius.")])


async def test_the_flags_leave_every_other_object_of_every_pack_alone(empty_database: str) -> None:
    """Applied with both flags off, then on, a database is the same as one in which they were always on."""
    packs = ",".join(bundled())
    await apply(load(database_url=empty_database, packs=packs, notifications="false", soft_deletes="false"))
    on = load(database_url=empty_database, packs=packs)
    await apply(on)
    found = await check(on)
    assert [] == found.problems


def test_the_printed_sql_has_the_flags_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    off = load(notifications="false")
    migrate.offline(off.packs, sys.stdout, trigger_settings=off.trigger_settings)
    assert "set rowcast.notifications = 'off';" in capsys.readouterr().out
