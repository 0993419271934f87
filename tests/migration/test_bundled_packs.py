"""The bundled histories: Rowcast's own, and those of the packs."""

import io
import json
from typing import Any

import pytest

from daemon.postgres.connect import Connection, Pool
from daemon.postgres.errors import DependentObjects
from daemon.schema import migrate
from tests.support.catalog import catalog
from tests.support.folders import execute, value
from tests.support.log import leader, until_numbered
from tests.support.postgres import Server, replay

every_pack = pytest.mark.parametrize("pack", migrate.bundled())


def ignore(_: str) -> None:
    """A report that is ignored."""


@every_pack
async def test_a_rollback_leaves_nothing_and_applying_again_gives_the_same_catalog(
    pack: str, empty_database: str
) -> None:
    schemas = ("rowcast", pack)
    await migrate.apply(empty_database, [], report=ignore)
    without = await catalog(empty_database, schemas)
    await migrate.apply(empty_database, [pack], report=ignore)
    once = await catalog(empty_database, schemas)
    assert without != once
    for _ in range(2):
        await migrate.rollback(empty_database, pack, report=ignore)
        assert without == await catalog(empty_database, schemas)
        await migrate.apply(empty_database, [pack], report=ignore)
        assert once == await catalog(empty_database, schemas)


@every_pack
async def test_each_revision_can_be_rolled_back_and_applied_again(pack: str, empty_database: str) -> None:
    schemas = ("rowcast", pack)
    await migrate.apply(empty_database, [pack], report=ignore)
    once = await catalog(empty_database, schemas)
    newest = migrate.heads([pack])[pack]
    for number in range(int(newest[-4:]) - 1, 0, -1):
        await migrate.rollback(empty_database, pack, to=f"{pack}_{number:04}", report=ignore)
        await migrate.apply(empty_database, [pack], report=ignore)
        assert once == await catalog(empty_database, schemas)


@every_pack
async def test_a_view_of_somebody_elses_stops_the_rollback_of_a_pack_and_nothing_is_changed(
    pack: str, empty_database: str
) -> None:
    schemas = ("rowcast", "public", pack)
    await migrate.apply(empty_database, [pack], report=ignore)
    table = await value(
        empty_database, "select format('%I.%I', schema_name, table_name) from rowcast.watched limit 1"
    )
    await execute(empty_database, f"create view public.mine as select * from {table}")
    before = await catalog(empty_database, schemas)
    with pytest.raises(DependentObjects, match=rf"view public\.mine depends on .*{table}") as caught:
        await migrate.rollback(empty_database, pack, report=ignore)
    assert 25 == caught.value.exit_code
    assert before == await catalog(empty_database, schemas)
    await execute(empty_database, "drop view public.mine")
    await migrate.rollback(empty_database, pack, report=ignore)
    assert await value(empty_database, "select to_regnamespace($1::text) is null", pack)


async def test_a_view_of_somebody_elses_stops_the_rollback_of_rowcasts_own_schema(empty_database: str) -> None:
    await migrate.apply(empty_database, [], report=ignore)
    await execute(empty_database, "create view public.mine as select * from rowcast.changes")
    before = await catalog(empty_database, ("rowcast", "public"))
    with pytest.raises(DependentObjects, match=r"view public\.mine depends on view rowcast\.changes"):
        await migrate.rollback(empty_database, "rowcast", report=ignore)
    assert before == await catalog(empty_database, ("rowcast", "public"))


async def test_rolling_back_rowcasts_own_schema_leaves_nothing(empty_database: str) -> None:
    empty = await catalog(empty_database, ("rowcast",))
    await migrate.apply(empty_database, [], report=ignore)
    once = await catalog(empty_database, ("rowcast",))
    for _ in range(2):
        await migrate.rollback(empty_database, "rowcast", report=ignore)
        assert empty == await catalog(empty_database, ("rowcast",))
        await migrate.apply(empty_database, [], report=ignore)
        assert once == await catalog(empty_database, ("rowcast",))


# The columns that the view has at every revision.
CHANGES = """select seq, tx_end, tx, at, schema_name, table_name, model, topic, kind, key, record, changed, actor,
                    revokes, revokes_user, revokes_topic
             from rowcast.changes order by seq"""


@pytest.mark.usefixtures("rows")
async def test_the_log_reads_the_same_at_each_of_rowcasts_revisions(
    database: str, sql: Connection, pool: Pool
) -> None:
    async with leader(database, pool):
        await sql.execute("update app.rows set version = version + 1; delete from app.rows where id = 1")
        await until_numbered(pool)
    changes = await sql.fetch(CHANGES)
    assert 9 == len(changes)

    async def found() -> dict[str, Any]:
        """All but the functions of snapshots, which watching the tables again makes."""
        facts = await catalog(database, ("rowcast",))
        return {name: fact for name, fact in facts.items() if "rowcast.snapshot_" not in name}

    once = await found()
    newest = migrate.heads([])["rowcast"]
    for number in range(int(newest[-4:]) - 1, 0, -1):
        await migrate.rollback(database, "rowcast", to=f"rowcast_{number:04}", report=ignore)
        assert changes == await sql.fetch(CHANGES)
        purging = sql.transaction()
        await purging.start()
        assert (1, 1) == tuple(await sql.fetchrow("select * from rowcast.purge(10)") or ())
        await purging.rollback()
        await migrate.apply(database, [], report=ignore)
        assert changes == await sql.fetch(CHANGES)
        assert once == await found()


async def test_a_second_apply_of_everything_changes_nothing(empty_database: str) -> None:
    schemas = ("rowcast", *migrate.bundled())
    assert (await migrate.apply(empty_database, migrate.bundled(), report=ignore)).changed
    once = await catalog(empty_database, schemas)
    assert not (await migrate.apply(empty_database, migrate.bundled(), report=ignore)).changed
    assert once == await catalog(empty_database, schemas)


def in_test(pack: str, facts: dict[str, Any], app: str) -> dict[str, Any]:
    """The facts of an object as they should be once its pack is in the schema `test`.

    `app` is the ACL prefix of the application's role there: named after the schema, or the same for all schemas.
    """
    moved: dict[str, Any] = json.loads(json.dumps(facts).replace(f"{pack}.", "test.").replace(f"{pack}_app=", app))
    if moved.get("acl"):
        moved["acl"].sort()
    return moved


@every_pack
async def test_a_pack_is_the_same_in_another_schema(pack: str, empty_database: str, postgres: Server) -> None:
    await migrate.apply(empty_database, [pack], schemas={pack: "test"}, report=ignore)
    assert await value(empty_database, "select to_regnamespace($1::text) is null", pack)
    async with postgres.database() as other:
        await migrate.apply(other, [pack], report=ignore)
        there = await catalog(empty_database, ("test",))
        here = await catalog(other, (pack,))
    app = "test_app=" if "test_app=" in str(there) else f"{pack}_app="
    moved = {
        name.replace(f"{pack}.", "test.").replace(f"schema {pack}", "schema test"): in_test(pack, facts, app)
        for name, facts in here.items()
    }
    assert moved == there


@every_pack
async def test_the_script_builds_what_apply_builds(pack: str, empty_database: str, postgres: Server) -> None:
    script = io.StringIO()
    migrate.offline([pack], script)
    await replay(empty_database, script.getvalue())
    async with postgres.database() as other:
        await migrate.apply(other, [pack], report=ignore)
        assert await catalog(other, ("rowcast", pack)) == await catalog(empty_database, ("rowcast", pack))
    assert not (await migrate.apply(empty_database, [pack], report=ignore)).changed


@every_pack
async def test_a_rollback_keeps_extensions_that_existed_before(pack: str, empty_database: str) -> None:
    await execute(empty_database, "create extension citext schema public")
    await migrate.apply(empty_database, [pack], report=ignore)
    await migrate.rollback(empty_database, pack, report=ignore)
    found = await catalog(empty_database, ())
    assert {"extension citext", "extension plpgsql"} == {name for name in found if name.startswith("extension")}


async def test_an_extension_is_dropped_with_the_last_pack_that_wants_it(empty_database: str) -> None:
    await migrate.apply(empty_database, ["chatgenius"], report=ignore)
    await execute(empty_database, "select rowcast.want_extension('another', 'citext')")
    await migrate.rollback(empty_database, "chatgenius", report=ignore)
    assert 1 == await value(empty_database, "select count(*) from pg_extension where extname = 'citext'")
    await execute(empty_database, "select rowcast.drop_extensions('another')")
    assert 0 == await value(empty_database, "select count(*) from pg_extension where extname = 'citext'")


async def test_an_extension_that_outlived_its_pack_is_dropped_with_the_next_pack_that_wants_it(
    empty_database: str,
) -> None:
    warnings: list[str] = []
    exists = "select exists (select from pg_extension where extname = 'citext')"
    await migrate.apply(empty_database, ["chatgenius"], report=ignore)
    await execute(empty_database, "create table public.names (name public.citext)")
    for _ in range(2):
        await migrate.rollback(empty_database, "chatgenius", report=warnings.append)
        assert "warning: extension citext stays: something else uses it" in warnings
        await migrate.apply(empty_database, ["chatgenius"], report=ignore)
    await execute(empty_database, "drop table public.names")
    assert await value(empty_database, exists)
    await migrate.rollback(empty_database, "chatgenius", report=ignore)
    assert not await value(empty_database, exists)
    assert 0 == await value(empty_database, "select count(*) from rowcast.extensions")


async def test_an_extension_that_outlived_its_pack_is_dropped_with_rowcasts_own_schema(empty_database: str) -> None:
    await migrate.apply(empty_database, ["chatgenius"], report=ignore)
    await execute(empty_database, "create table public.names (name public.citext)")
    await migrate.rollback(empty_database, "chatgenius", report=ignore)
    await execute(empty_database, "drop table public.names")
    await migrate.rollback(empty_database, "rowcast", report=ignore)
    assert not await value(empty_database, "select exists (select from pg_extension where extname = 'citext')")


@every_pack
async def test_an_application_role_that_was_created_after_applying_gets_its_rights_at_the_next_apply(
    pack: str, empty_database: str
) -> None:
    await migrate.apply(empty_database, [pack], report=ignore)
    once = await catalog(empty_database, ("rowcast", pack))
    if await value(empty_database, "select exists (select from pg_roles where rolname = $1)", f"{pack}_app"):
        await execute(empty_database, f"drop owned by {pack}_app")
        assert once != await catalog(empty_database, ("rowcast", pack))
    await migrate.apply(empty_database, [pack], report=ignore)
    assert once == await catalog(empty_database, ("rowcast", pack))
