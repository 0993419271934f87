"""`daemon backup`: it writes a file that restores the database, or prints one line that says why it cannot."""

import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from daemon.commands.backup import without_password
from daemon.commands.seed import seed
from daemon.schema import migrate
from daemon.settings import load
from tests.support.catalog import catalog, contents
from tests.support.daemon import command
from tests.support.postgres import Server


async def run_script(dsn: str, path: Path) -> None:
    """Run the file as psql does; lines that begin with a backslash are psql's own commands."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("\\"))
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        await connection.execute(text)
    await connection.close()


def meaning(catalog: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A catalog without what a dump spells differently: redundant casts, and privileges that are the default."""
    found = {}
    for name, facts in catalog.items():
        kept = dict(facts)
        if name.startswith("constraint "):
            kept["definition"] = re.sub(r"::(character varying|text)(\[\])?|[()]", "", facts["definition"])
        if "acl" in facts and facts.get("owner"):
            owner = facts["owner"]
            default = [f"=X/{owner}"] if name.startswith("function ") else []
            granted = facts["acl"] if facts["acl"] is not None else default
            kept["acl"] = [right for right in granted if not right.startswith(f"{owner}=")]
        found[name] = kept
    return found


async def test_a_backup_restores_schema_and_rows_in_an_empty_database(
    empty_database: str, postgres: Server, tmp_path: Path
) -> None:
    packs = ("antone", "chatgenius")
    await migrate.apply(empty_database, packs, report=lambda _: None)
    await seed(load(database_url=empty_database, packs=packs))
    file = tmp_path / "before.sql"
    code, output, errors = await command("backup", str(file), DATABASE_URL=empty_database)
    assert (0, f"{file}: {file.stat().st_size} bytes\n", "") == (code, output, errors)
    assert 0o600 == file.stat().st_mode & 0o777
    assert [file] == list(tmp_path.iterdir())
    schemas = ("rowcast", *packs)
    before = await catalog(empty_database, schemas)
    rows = [await contents(empty_database, schema) for schema in schemas]
    async with postgres.database() as restored:
        await run_script(restored, file)
        after = await catalog(restored, schemas)
        assert rows == [await contents(restored, schema) for schema in schemas]
        checked = await command("--pack", "antone", "--pack", "chatgenius", "check", DATABASE_URL=restored)
    assert meaning(before) == meaning(after)
    assert 0 == checked[0], checked


async def test_a_backup_before_a_bad_change_brings_back_what_it_destroyed(
    empty_database: str, postgres: Server, tmp_path: Path
) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    await seed(load(database_url=empty_database, packs=("antone",)))
    before = await contents(empty_database, "antone")
    assert 0 == (await command("backup", str(tmp_path / "b.sql"), DATABASE_URL=empty_database))[0]
    connection = await asyncpg.connect(empty_database)
    await connection.execute("truncate antone.authors cascade; drop table antone.learning_events")
    await connection.close()
    code, output, _ = await command("--pack", "antone", "check", DATABASE_URL=empty_database)
    assert 1 == code
    assert "antone.learning_events: the table is missing" in output
    async with postgres.database() as restored:
        await run_script(restored, tmp_path / "b.sql")
        assert before == await contents(restored, "antone")


async def test_an_existing_file_is_not_overwritten(database: str, tmp_path: Path) -> None:
    file = tmp_path / "before.sql"
    file.write_text("precious")
    code, output, errors = await command("backup", str(file), DATABASE_URL=database)
    assert (73, "") == (code, output)
    assert f"daemon: {file} cannot be written (it is there already): choose another file.\n" == errors
    assert "precious" == file.read_text()


async def test_a_backup_that_fails_leaves_no_file_and_names_no_password(database: str, tmp_path: Path) -> None:
    url = f"{database}&no_such_option=1"
    code, output, errors = await command("backup", str(tmp_path / "b.sql"), DATABASE_URL=url)
    assert 0 != code
    assert ("", 1) == (output, len(errors.splitlines()))
    password = without_password(database)[1]
    assert password
    assert password not in errors
    assert [] == list(tmp_path.iterdir())
    code, _, errors = await command("backup", str(tmp_path / "no" / "b.sql"), DATABASE_URL=database)
    assert 73 == code
    assert "cannot be written (No such file or directory)" in errors


@pytest.mark.parametrize(
    ("dsn", "shown", "password"),
    [
        ("postgresql://u:p%40ss@h:1/d?sslmode=require", "postgresql://u@h:1/d?sslmode=require", "p@ss"),
        ("postgresql://u@h/d?password=hunter2&port=1", "postgresql://u@h/d?port=1", "hunter2"),
        ("postgresql://h/d", "postgresql://h/d", None),
        ("postgresql://u:p@/d?host=%2Frun%2Fpg", "postgresql://u@/d?host=%2Frun%2Fpg", "p"),
        ("postgresql://u:p@a:1,b:2/d", "postgresql://u@a:1,b:2/d", "p"),
    ],
)
def test_the_password_is_kept_out_of_the_command_line(dsn: str, shown: str, password: str | None) -> None:
    assert (shown, password) == without_password(dsn)
