"""Applies the schemas of ddl/ and the captures of triggers/ to a database, and rolls them back.

A revision is three files in ddl/<pack>/: `NNNN_name.py`, `NNNN_name.up.sql` and `NNNN_name.down.sql`. Without the
last one it cannot be rolled back. The Python file is always this, with its own numbers::

    from daemon.schema.revisions import run_sql

    revision = "shop_0002"
    down_revision = "shop_0001"


    def upgrade() -> None:
        run_sql(__file__, "up")


    def downgrade() -> None:
        run_sql(__file__, "down")

The .sql files qualify every name. They write the pack's name for its schema; `schemas={"shop": "test"}` puts
another schema there. They neither create nor drop that schema and contain no BEGIN or COMMIT: each revision is one
transaction. A file whose first line is `-- no-transaction` runs statement by statement, outside a transaction, and
must be safe to run again after it failed half-way. triggers/<pack>.sql runs after the revisions at every apply, so it
must be safe to repeat as well. When all revisions are rolled back, triggers/<pack>.down.sql runs first; it drops what
triggers/<pack>.sql has created in the schema.

A rollback is one transaction, whatever it undoes. Only a .down.sql that begins with `-- no-transaction` splits it:
what comes before such a file, the file itself, and what comes after it are then done one after the other.

A daemon refuses a schema that is newer than its files, unless every revision that it does not know allows it. For
that the Python file also has, for example, `compatible_with = "shop_0001"`: daemons that know this revision can work
with the new one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, TextIO

import asyncpg

from daemon import files
from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.postgres.connect import PINNED, Connection, OnRetry, connect, retry
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, LockContention, explain
from daemon.schema import sql_files
from daemon.schema.queries import query, query_for
from daemon.schema.revisions import (
    VERSION_TABLE,
    RevisionHistory,
    UnknownHistory,
    UnknownRevision,
    packs_in,
    send_file,
)
from daemon.schema.sql_files import SqlFile

if TYPE_CHECKING:
    from sqlalchemy import Connection as SyncConnection
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["Move", "Report", "apply", "bundled", "current", "heads", "newer", "offline", "rollback", "stale"]

log = get_logger()

ROWCAST: Final = "rowcast"
"""Rowcast's own history and schema, which every pack requires."""

LOCK: Final = 0x726F_7763_6173_7401
"""The key of the advisory lock that is held while schemas are changed."""

SESSION: Final[Mapping[str, str]] = MappingProxyType(
    {
        **PINNED,  # a name that a file forgot to qualify is not found, least of all in `public`
        "statement_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
    }
)
"""Session settings that make a file mean the same in every database, whatever is set for its owner or role."""

SESSION_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    ConnectionResetError,
)
"""What an open connection can raise. Other OSErrors are not about the database, such as those of a closed pipe."""

Reporter = Callable[[str], None]
"""Called with a line for each thing that happens."""


def log_report(line: str) -> None:
    """A Reporter that logs: what was done, or a warning of the server."""
    if line.lower().startswith("warning"):
        log.warning("schema_warning", done=line)
    else:
        log.info("schema_migration", done=line)


class LockTimeout(LockContention):
    """No lock within {seconds:g} s{place}, because of {blockers}: end that transaction, then try again."""

    def __init__(self, fault: DatabaseFault, seconds: float, blockers: str) -> None:
        super().__init__(fault.reason, sqlstate=fault.sqlstate, place=fault.place)
        self.seconds, self.blockers = seconds, blockers


class RevisionNotReached(OperatorFault):
    """Schema {schema} is at {at}, before {revision}: there is nothing to roll back."""

    exit_code: ClassVar[int] = 64

    def __init__(self, schema: str, at: str | None, revision: str) -> None:
        self.schema, self.at, self.revision = schema, at or "the beginning", revision


class PrereleaseDatabase(OperatorFault):
    """Schema rowcast was made before revisions were frozen and cannot be upgraded: drop it and the packs' schemas, \
then run `daemon --apply-ddl` again."""

    exit_code: ClassVar[int] = 22


class SchemaInUse(OperatorFault):
    """Rowcast's own schema is still used by {users}: roll back the packs and unwatch the tables first."""

    exit_code: ClassVar[int] = 24

    def __init__(self, users: Iterable[str]) -> None:
        self.users = ", ".join(users)


@dataclass(frozen=True, slots=True)
class Move:
    """The change of one schema: the revisions before and after; None means that it has no revision."""

    pack: str
    schema: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        name = self.pack if self.schema == self.pack else f"{self.pack} in schema {self.schema}"
        if self.before == self.after:
            return f"{name}: already at {self.after or 'nothing'}"
        return f"{name}: {self.before or 'nothing'} -> {self.after or 'nothing'}"


@dataclass(frozen=True, slots=True)
class Report:
    """What an apply or a rollback did, in order."""

    moves: tuple[Move, ...]

    @property
    def changed(self) -> bool:
        """True unless every schema was at its revision already."""
        return any(move.before != move.after for move in self.moves)


def bundled(ddl_folder: Path | None = None) -> tuple[str, ...]:
    """The names of the bundled packs."""
    return tuple(pack for pack in packs_in(_ddl(ddl_folder)) if pack != ROWCAST)


def heads(
    packs: Collection[str], *, schemas: Mapping[str, str] = MappingProxyType({}), ddl_folder: Path | None = None
) -> dict[str, str]:
    """The newest revision in the files for each schema, Rowcast's own first.

    Raises UnknownPack, InvalidRevisions, BadSchemaName.
    """
    return {history.schema: history.newest for history in histories_of(packs, schemas, ddl_folder)}


async def current(connection: Connection, schema: str) -> str | None:
    """The revision that a schema is at; None if it has no history. Raises UnknownHistory."""
    sql_files.check_schema_name(schema, own=True)
    if await connection.fetchval("select pg_catalog.to_regclass($1)", f"{schema}.{VERSION_TABLE}") is None:
        return None
    rows = await connection.fetch(query_for("current", schema))
    if len(rows) > 1:
        raise UnknownHistory(schema, ", ".join(row["version_num"] for row in rows))
    return rows[0]["version_num"] if rows else None


async def revisions(connection: Connection) -> dict[str, str]:
    """The revision of each schema in this database that has a history of Rowcast or of a pack."""
    found: dict[str, str] = {}
    for name in [ROWCAST, *(row["schema_name"] for row in await connection.fetch(query("histories")))]:
        with suppress(sql_files.BadSchemaName, UnknownHistory):
            if revision := await current(connection, name):
                found[name] = revision
    return found


def check_known(found: Mapping[str, str], *, ddl_folder: Path | None = None) -> None:
    """Raises NewerDatabase if one of these revisions, by schema, is newer than the files of its pack."""
    ddl = _ddl(ddl_folder)
    for schema, revision in found.items():
        pack = revision.rpartition("_")[0]
        if pack in packs_in(ddl):
            RevisionHistory.read(pack, schema, ddl).place(revision)


async def stale(
    connection: Connection,
    packs: Collection[str],
    *,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
) -> str | None:
    """Why a daemon with these files cannot serve the schemas in the database; None if it can.

    It can if they are at its newest revisions, or at later ones that say they are compatible with it. Raises the
    driver's errors.
    """
    for history in histories_of(packs, schemas, ddl_folder):
        revision = await current(connection, history.schema)
        if revision != history.newest and not await _is_compatible(connection, history, revision):
            return f"schema {history.schema} is at {revision or 'nothing'}, not at {history.newest}"
    return None


async def newer(
    connection: Connection,
    packs: Collection[str],
    *,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
) -> dict[str, str]:
    """The schemas that are at a revision that the files do not know, with that revision."""
    found = {}
    for history in histories_of(packs, schemas, ddl_folder):
        revision = await current(connection, history.schema)
        if revision is not None and history.is_newer(revision):
            found[history.schema] = revision
    return found


async def _is_compatible(connection: Connection, history: RevisionHistory, revision: str | None) -> bool:
    """Whether every revision after the newest in the files says that daemons with these files can work with it."""
    if revision is None or not history.is_newer(revision):
        return False
    if await connection.fetchval("select pg_catalog.to_regclass('rowcast.compatibility')") is None:
        return False
    rows = await connection.fetch(query("compatibility"), history.schema)
    return history.allows({row["revision"]: row["compatible_with"] for row in rows}, revision)


async def apply(
    dsn: str,
    packs: Collection[str],
    *,
    report: Reporter,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
    trigger_settings: Mapping[str, str] = MappingProxyType({}),
    lock_timeout: float = 5.0,
    attempts: int = 5,
) -> Report:
    """Bring Rowcast's own schema, then the packs, to their newest revisions, and run their trigger files.

    Only one apply or rollback runs in a database at a time; others wait for it. A statement waits `lock_timeout`
    seconds for a lock; then its revision is rolled back and tried again. Connecting, and each revision, is tried at
    most `attempts` times. `trigger_settings` are session settings that the trigger files read. `report` is called
    with what was done, and with notices and warnings of the server. Raises an OperatorFault; the revisions that were
    applied before it stay.
    """
    histories = histories_of(packs, schemas, ddl_folder)
    captures = [triggers_of(history, triggers_folder) for history in histories]
    moves = []
    async with _session(dsn, lock_timeout, attempts, report, trigger_settings) as session:
        if await session.driver.fetchval(query("prerelease")):
            raise PrereleaseDatabase
        for history, capture in zip(histories, captures, strict=True):
            await session.check_name(history.schema)
            before = at = await current(session.driver, history.schema)
            for revision in history.revisions[history.place(at) :]:
                first = query_for("make_schema", history.schema) if at is None else ""
                await session.run_up(history, revision, first=first)
                at = revision
            await session.run_file(capture)
            moves.append(Move(history.pack, history.schema, before, at))
            report(str(moves[-1]))
    return Report(tuple(moves))


async def rollback(
    dsn: str,
    pack: str,
    *,
    report: Reporter,
    to: str | None = None,
    schema: str | None = None,
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
    lock_timeout: float = 5.0,
    attempts: int = 5,
) -> Report:
    """Roll back a pack's revisions after `to`, newest first. Without `to`: all, the version table and the schema.

    All of it is one transaction, unless a file runs without one: see above. Only schemas and extensions that Rowcast
    created are dropped. The other parameters are those of `apply`.
    """
    history = _history(pack, schema, _ddl(ddl_folder))
    if to is not None and to not in history.revisions:
        raise UnknownRevision(pack, to, history.revisions)
    triggers_down = triggers_of(history, triggers_folder, ".down.sql")
    async with _session(dsn, lock_timeout, attempts, report) as session:
        await session.check_name(history.schema)
        before = await current(session.driver, history.schema)
        applied, kept = history.place(before), history.place(to)
        if applied < kept:
            raise RevisionNotReached(history.schema, before, history.revisions[kept - 1])
        undone = history.revisions[kept:applied][::-1]
        steps = history.down_steps(undone)  # raises before anything is changed
        if undone and not kept and pack == ROWCAST:
            await session.check_unused(bundled(ddl_folder))
        for number, step in enumerate(steps):
            if len(steps) > 1:
                which = f"{', '.join(step)}, as step {number + 1} of {len(steps)}"
                report(f"rolling back {which}: earlier steps stay undone if a later one fails")
            before_all = triggers_down if not number and not kept else None
            await session.run_down(history, step, first=before_all)
        move = Move(pack, history.schema, before, to if undone else before)
        report(str(move))
    return Report((move,))


def offline(
    packs: Collection[str],
    out: TextIO,
    *,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
    trigger_settings: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the SQL with which `apply` would fill an empty database, for psql. Raises an OperatorFault."""
    out.write("-- Rowcast's schema and packs, for an empty database: psql -X -v ON_ERROR_STOP=1 -f FILE\n\n")
    session = reset_session({**SESSION, **trigger_settings})
    for history in histories_of(packs, schemas, ddl_folder):
        first = query_for("make_schema", history.schema)
        for revision in history.revisions:
            out.write(f"{session}\n")
            history.run("up", revision, out, first=first)
            first = ""
        if file := triggers_of(history, triggers_folder):
            out.write(f"{session}\nbegin;\n\n{file.script}\ncommit;\n\n")


def reset_session(settings: Mapping[str, str]) -> str:
    """The statements that run before each file, so that no file sees the settings of the one before it."""
    values = {name: ", ".join(f"'{part.strip()}'" for part in value.split(",")) for name, value in settings.items()}
    lines = ["reset session authorization; reset all;", *(f"set {name} = {value};" for name, value in values.items())]
    return "".join(f"{line}\n" for line in lines)


def _ddl(folder: Path | None) -> Path:
    return folder or files.folder("ddl")


def triggers_of(history: RevisionHistory, folder: Path | None, suffix: str = ".sql") -> SqlFile | None:
    path = (folder or files.folder("triggers")) / f"{history.pack}{suffix}"
    return sql_files.read(path, pack=history.pack, schema=history.schema) if path.exists() else None


def histories_of(
    packs: Collection[str], schemas: Mapping[str, str], ddl_folder: Path | None
) -> Sequence[RevisionHistory]:
    """Rowcast's own history and those of the packs, in the order of applying."""
    ddl = _ddl(ddl_folder)
    histories = [_history(pack, schemas.get(pack), ddl) for pack in dict.fromkeys((ROWCAST, *packs))]
    owners: dict[str, str] = {}
    for history in histories:
        if (owner := owners.setdefault(history.schema, history.pack)) != history.pack:
            raise sql_files.BadSchemaName(history.schema, f"{owner} and {history.pack} cannot share it")
    return histories


def _history(pack: str, schema: str | None, ddl: Path) -> RevisionHistory:
    schema = pack if pack == ROWCAST or schema is None else schema
    sql_files.check_schema_name(schema, own=pack == ROWCAST)
    return RevisionHistory.read(pack, schema, ddl)


@asynccontextmanager
async def _session(
    dsn: str,
    lock_timeout: float,
    attempts: int,
    report: Reporter,
    trigger_settings: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator["_Session"]:
    """A session that holds the lock for changing schemas. Errors in the block are raised as an OperatorFault."""
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415
    from sqlalchemy.pool import NullPool  # noqa: PLC0415

    settings = {**SESSION, "lock_timeout": f"{lock_timeout * 1000:.0f}", **trigger_settings}
    driver = await connect(
        dsn,
        application_name="rowcast ddl",
        server_settings=settings,
        statement_cache_size=0,
        attempts=attempts,
        on_retry=_report_retries(report),
    )

    async def same_connection() -> Connection:
        return driver  # so SQLAlchemy needs no URL, and its transactions are those of our own statements

    engine = create_async_engine("postgresql+asyncpg://", async_creator=same_connection, poolclass=NullPool)
    try:
        driver.add_log_listener(lambda _, message: report(f"{message.severity_en.lower()}: {message.message}"))
        await _wait_for_lock(driver, report)
        async with engine.connect() as alembic:
            yield _Session(driver, alembic, dsn, reset_session(settings), lock_timeout, attempts, report)
    except (*SESSION_ERRORS, SQLAlchemyError) as error:
        raise explain(error) from None
    finally:
        await engine.dispose()
        driver.terminate()


def _report_retries(report: Reporter) -> OnRetry:
    return lambda fault, attempt: report(f"{fault} (attempt {attempt} failed)")


async def _wait_for_lock(driver: Connection, report: Reporter) -> None:
    """Take the advisory lock, which is released with the connection; wait while another session holds it."""
    reported = False
    # Polled, since pg_advisory_lock() would deadlock with CREATE INDEX CONCURRENTLY: that waits for every statement
    # that has begun, so the holder of the lock would wait for us.
    while not await driver.fetchval("select pg_catalog.pg_try_advisory_lock($1)", LOCK):
        holders = await driver.fetch(query("lock_holder"), LOCK)
        if holders and not reported:
            report(f"waiting for {_names(holders)}, which is changing schemas in this database")
            reported = True
        await asyncio.sleep(0.1)


@dataclass(frozen=True, slots=True)
class _Session:
    """One connection, used through asyncpg and through Alembic."""

    driver: Connection
    alembic: "AsyncConnection"
    dsn: str
    reset: str
    lock_timeout: float
    attempts: int
    report: Reporter

    async def check_name(self, schema: str) -> None:
        """Raises BadSchemaName for a reserved word, which would need quotes."""
        if not await self.driver.fetchval("select pg_catalog.quote_ident($1) = $1", schema):
            raise sql_files.BadSchemaName(schema, "it is a reserved word of SQL")

    async def check_unused(self, packs: Collection[str]) -> None:
        """Raises SchemaInUse if a pack is applied or a table is watched."""
        users, schemas = [], []
        for row in await self.driver.fetch(query("histories")):
            with suppress(sql_files.BadSchemaName, UnknownHistory):
                revision = await current(self.driver, row["schema_name"])
                pack = (revision or "").rpartition("_")[0]
                if pack in packs:
                    users.append(f"{pack} (schema {row['schema_name']})")
                    schemas.append(row["schema_name"])
        if await self.driver.fetchval("select pg_catalog.to_regclass('rowcast.watched')") is not None:
            watched = await self.driver.fetch(query("watched"), schemas)
            users += [f"table {row['table_name']}" for row in watched]
        if users:
            raise SchemaInUse(users)

    async def run_up(self, history: RevisionHistory, revision: str, *, first: str) -> None:
        """Apply one revision in one transaction, which begins with the SQL `first`."""

        async def work() -> None:
            await self.alembic.run_sync(lambda connection: history.run("up", revision, connection, first=first))

        await self._with_retries(work)

    async def run_down(self, history: RevisionHistory, revisions: Sequence[str], *, first: SqlFile | None) -> None:
        """Roll back revisions in one transaction, which begins with the file `first`."""
        in_transaction = history.down_file(revisions[0]).in_transaction
        if not in_transaction:
            await self.run_file(first)

        def down(connection: "SyncConnection") -> None:
            if first is not None and in_transaction:
                send_file(connection, first)
            for revision in revisions:
                last = "" if history.pack == ROWCAST else query("forget_captures")
                if revision == history.revisions[0]:
                    last += query_for("leave", history.schema)
                history.run("down", revision, connection, last=last)

        async def work() -> None:
            if in_transaction:
                async with self.alembic.begin():
                    await self.alembic.run_sync(down)
            else:
                await self.alembic.run_sync(down)

        await self._with_retries(work)

    async def run_file(self, file: SqlFile | None) -> None:
        """Run a file of triggers/, if there is one, in one transaction."""
        if file is None or not file.statements:
            return

        async def work() -> None:
            try:
                async with self.driver.transaction():
                    await self.driver.execute(file.text)
            except asyncpg.PostgresError as error:
                raise explain(error, place=file.place(error)) from None

        await self._with_retries(work)

    async def _with_retries(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run one transaction, and try again if it gets no lock. Raises LockTimeout, which names the blockers."""

        async def once() -> None:
            async with self._blockers() as blockers:
                try:
                    await self.driver.execute(self.reset)
                    await work()
                except LockContention as fault:
                    if blockers and fault.sqlstate == asyncpg.LockNotAvailableError.sqlstate:
                        raise LockTimeout(fault, self.lock_timeout, blockers[-1]) from None
                    raise

        await retry(once, on=(LockContention,), attempts=self.attempts, on_retry=_report_retries(self.report))

    @asynccontextmanager
    async def _blockers(self) -> AsyncIterator[list[str]]:
        """Collects the sessions that block this one for more than half of the lock timeout."""
        seen: list[str] = []
        watch = asyncio.create_task(self._watch_blockers(seen))
        try:
            yield seen
        finally:
            watch.cancel()
            await asyncio.wait([watch])

    async def _watch_blockers(self, seen: list[str]) -> None:
        if not self.lock_timeout:
            return  # without a timeout there is no LockTimeout to explain
        await asyncio.sleep(self.lock_timeout / 2)
        with suppress(DatabaseFault, *DRIVER_ERRORS):  # naming the blockers is optional
            watcher = await connect(self.dsn, application_name="rowcast ddl watch", attempts=1)
            try:
                while True:
                    rows = await watcher.fetch(query("blockers"), self.driver.get_server_pid())
                    if rows:
                        seen.append(_names(rows))
                    await asyncio.sleep(self.lock_timeout / 10)
            finally:
                watcher.terminate()


def _names(rows: Iterable[asyncpg.Record]) -> str:
    """A description of sessions for a message."""
    return ", ".join(
        f"process {row['pid']} ({row['application_name'] or 'no name'} of {row['user_name'] or 'the server'}"
        + (f", {row['state']}" if row["state"] else "")
        + (f" for {row['seconds']} s" if row["seconds"] else "")
        + ")"
        for row in rows
    )
