"""Which daemons may stay while the schema is newer than what they know."""

import pytest

from daemon.postgres.connect import connect
from daemon.schema import migrate
from daemon.schema.revisions import InvalidRevisions, NewerDatabase
from tests.support.folders import Folders, execute, value
from tests.support.postgres import ignore

COMPATIBLE = """
create table rowcast.compatibility (
    schema_name name, revision text, compatible_with text, primary key (schema_name, revision)
);
"""


def old_and_new(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, Folders]:
    """The files of a daemon that knows shop_0002, and those of later versions, to which tests add revisions."""
    both = Folders(tmp_path_factory.mktemp("old")), Folders(tmp_path_factory.mktemp("new"))
    for folders in both:
        folders.revision("rowcast", 1, up=COMPATIBLE, down="drop table rowcast.compatibility;")
        folders.shop()
    return both


def revision(folders: Folders, number: int, compatible_with: str | None) -> None:
    path = folders.revision("shop", number, up="select 1;", down="select 1;")
    if compatible_with:
        path.write_text(path.read_text() + f'compatible_with = "{compatible_with}"\n')


async def verdict(dsn: str, folders: Folders) -> tuple[str | None, dict[str, str]]:
    """Why a daemon with these files cannot serve, and what is newer than it knows."""
    connection = await connect(dsn, application_name="test")
    try:
        stale = await migrate.stale(connection, ["shop"], ddl_folder=folders.ddl)
        return stale, await migrate.newer(connection, ["shop"], ddl_folder=folders.ddl)
    finally:
        await connection.close()


async def test_a_daemon_serves_a_newer_schema_that_says_it_is_compatible(
    empty_database: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old, new = old_and_new(tmp_path_factory)
    revision(new, 3, "shop_0002")
    revision(new, 4, "shop_0001")
    await new.apply(empty_database, "shop")
    assert (None, {"shop": "shop_0004"}) == await verdict(empty_database, old)
    assert (None, {}) == await verdict(empty_database, new)
    with pytest.raises(NewerDatabase):
        await old.apply(empty_database, "shop")


@pytest.mark.parametrize(
    "declared", [("shop_0002", None), (None, "shop_0002"), ("shop_0002", "shop_0003"), (None, None)]
)
async def test_a_daemon_serves_no_newer_schema_of_which_one_revision_does_not_allow_it(
    empty_database: str, tmp_path_factory: pytest.TempPathFactory, declared: tuple[str | None, str | None]
) -> None:
    old, new = old_and_new(tmp_path_factory)
    for number, compatible_with in enumerate(declared, 3):
        revision(new, number, compatible_with)
    await new.apply(empty_database, "shop")
    stale, _ = await verdict(empty_database, old)
    assert "schema shop is at shop_0004, not at shop_0002" == stale


async def test_a_new_daemon_is_not_ready_on_an_older_schema_and_what_was_declared_is_forgotten(
    empty_database: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old, new = old_and_new(tmp_path_factory)
    revision(new, 3, "shop_0002")
    await new.apply(empty_database, "shop")
    await new.rollback(empty_database, "shop", to="shop_0002")
    assert ("schema shop is at shop_0002, not at shop_0003", {}) == await verdict(empty_database, new)
    assert (None, {}) == await verdict(empty_database, old)
    assert 0 == await value(empty_database, "select count(*) from rowcast.compatibility")


async def test_a_declaration_that_names_no_earlier_revision_is_refused(
    empty_database: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, new = old_and_new(tmp_path_factory)
    revision(new, 3, "shop_0003")
    with pytest.raises(
        InvalidRevisions, match='compatible_with = "shop_0003" of shop_0003 names no earlier revision'
    ):
        await new.apply(empty_database, "shop")


async def test_applying_again_restores_the_bundled_declarations(empty_database: str) -> None:
    declared = "select array_agg(revision::text order by revision) from rowcast.compatibility"
    await migrate.apply(empty_database, [], report=ignore)
    once = await value(empty_database, declared)
    assert "rowcast_0004" in once
    await migrate.rollback(empty_database, "rowcast", to="rowcast_0003", report=ignore)
    await migrate.apply(empty_database, [], report=ignore)
    assert once == await value(empty_database, declared)


async def test_a_database_from_before_revisions_were_frozen_is_refused_in_one_line(empty_database: str) -> None:
    await migrate.apply(empty_database, [], report=ignore)
    await execute(
        empty_database,
        "drop view rowcast.changes; alter table rowcast.log drop column xid;"
        "update rowcast.alembic_version set version_num = 'rowcast_0001'",
    )
    with pytest.raises(migrate.PrereleaseDatabase, match="made before revisions were frozen") as caught:
        await migrate.apply(empty_database, [], report=ignore)
    assert 22 == caught.value.exit_code
    assert "\n" not in str(caught.value)
