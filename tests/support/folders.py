"""ddl/ and triggers/ folders of a test's own, with packs of a few lines."""

from pathlib import Path
from typing import Any

import asyncpg

from daemon.schema import migrate

REVISION = """
from daemon.schema.revisions import run_sql

revision = "{revision}"
down_revision = {down_revision}


def upgrade() -> None:
    run_sql(__file__, "up")


def downgrade() -> None:
    run_sql(__file__, "down")
"""


class Folders:
    """The folders, into which a test writes packs and on which it runs daemon.schema.migrate."""

    def __init__(self, root: Path) -> None:
        self.ddl, self.triggers = root / "ddl", root / "triggers"
        self.ddl.mkdir()
        self.triggers.mkdir()
        self.reported: list[str] = []
        self.revision("rowcast", 1, up="create table rowcast.own ();", down="drop table rowcast.own;")

    def revision(self, pack: str, number: int, *, up: str, down: str | None = None) -> Path:
        """Write the files of one revision, without a .down.sql if `down` is None; return the Python file."""
        path = self.ddl / pack / f"{number:04}_part.py"
        path.parent.mkdir(exist_ok=True)
        previous = f'"{pack}_{number - 1:04}"' if number > 1 else None
        path.write_text(REVISION.format(revision=f"{pack}_{number:04}", down_revision=previous))
        path.with_suffix(".up.sql").write_text(up)
        if down is not None:
            path.with_suffix(".down.sql").write_text(down)
        return path

    def shop(self) -> None:
        """Write a pack `shop` with two revisions."""
        self.revision(
            "shop",
            1,
            up="create table shop.goods (id int primary key, name text not null);",
            down="drop table shop.goods;",
        )
        self.revision(
            "shop",
            2,
            up="create view shop.names as select name from shop.goods;create index goods_name on shop.goods (name);",
            down="drop index shop.goods_name;\ndrop view shop.names;",
        )

    async def apply(self, dsn: str, *packs: str, **options: Any) -> migrate.Report:
        """Call migrate.apply with these folders."""
        return await migrate.apply(dsn, packs, **self._options(options))

    async def upgrade(self, dsn: str, *packs: str, **options: Any) -> migrate.Report:
        """Call migrate.upgrade with these folders."""
        return await migrate.upgrade(dsn, packs, **self._options(options))

    async def rollback(self, dsn: str, pack: str, **options: Any) -> migrate.Report:
        """Call migrate.rollback with these folders."""
        return await migrate.rollback(dsn, pack, **self._options(options))

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        folders = {"ddl_folder": self.ddl, "triggers_folder": self.triggers}
        return {"report": self.reported.append, "lock_timeout": 5.0} | folders | options


async def execute(dsn: str, sql: str) -> None:
    """Run SQL on a connection of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def value(dsn: str, sql: str, *arguments: object) -> Any:
    """The first column of the first row of a query."""
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(sql, *arguments)
    finally:
        await connection.close()
