"""The SQL that --sql prints."""

import asyncio
import io
import subprocess

from daemon.schema import migrate
from tests.support.catalog import catalog
from tests.support.folders import Folders, value
from tests.support.postgres import Server, chosen_binaries

SCHEMAS = ("rowcast", "shop", "test")


async def replay(dsn: str, script: str) -> None:
    """Run a script with psql."""
    binaries = chosen_binaries()
    psql = await asyncio.create_subprocess_exec(
        binaries.bindir / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=binaries.environment(),
    )  # fmt: skip
    _, errors = await psql.communicate(script.encode())
    assert 0 == psql.returncode, errors.decode()


async def test_the_script_builds_what_apply_builds(folders: Folders, empty_database: str, postgres: Server) -> None:
    folders.shop()
    folders.revision("shop", 3, up="-- no-transaction\ncreate index concurrently more on shop.goods (id)")
    folders.revision("shop", 4, up="create table shop.odd (a text default E'it\\'s :x %s') -- end")
    folders.revision("shop", 5, up="-- nothing")
    (folders.triggers / "shop.sql").write_text(
        "create or replace function shop.f() returns int language sql return 1"
    )
    script = io.StringIO()
    migrate.offline(
        ["shop"], script, schemas={"shop": "test"}, ddl_folder=folders.ddl, triggers_folder=folders.triggers
    )
    await replay(empty_database, script.getvalue())
    async with postgres.database() as other:
        await folders.apply(other, "shop", schemas={"shop": "test"})
        assert await catalog(other, SCHEMAS) == await catalog(empty_database, SCHEMAS)
        assert "shop_0005" == await value(empty_database, "select version_num from test.alembic_version")
    report = await folders.apply(empty_database, "shop", schemas={"shop": "test"})
    assert not report.changed


async def test_each_revision_is_a_transaction_of_the_script(folders: Folders) -> None:
    folders.shop()
    script = io.StringIO()
    migrate.offline(["shop"], script, ddl_folder=folders.ddl, triggers_folder=folders.triggers)
    assert 3 == script.getvalue().count("BEGIN;\n") == script.getvalue().count("COMMIT;\n")
    assert script.getvalue().startswith("-- Rowcast's schema and packs")
