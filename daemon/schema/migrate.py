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

A rollback is one transaction, whatever it undoes, and so is an upgrade, which applies everything that is pending at
once. Both are verified before they are committed. Only a file that begins with `-- no-transaction` splits them: what
comes before such a file, the file itself, and what comes after it are then done one after the other.

A daemon refuses a schema that is newer than its files, unless every revision that it does not know allows it. For
that the Python file also has, for example, `compatible_with = "shop_0001"`: daemons that know this revision can work
with the new one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, TextIO

import asyncpg

from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.postgres.connect import Connection, OnRetry, connect, retry, role_of
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, LockContention, explain
from daemon.schema import sql_files
from daemon.schema.histories import (
    ROWCAST,
    SESSION,
    bundled,
    check_known,
    current,
    heads,
    histories_of,
    history_of,
    newer,
    reset_session,
    revisions,
    stale,
    triggers_of,
)
from daemon.schema.queries import query, query_for
from daemon.schema.revisions import RevisionHistory, UnknownHistory, UnknownRevision
from daemon.schema.sql_files import SqlFile
from daemon.schema.verify import Verification, VerificationFailed, changed_rows

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = [
    "ROWCAST",
    "SESSION",
    "Move",
    "NotRestored",
    "Report",
    "apply",
    "bundled",
    "check_known",
    "current",
    "heads",
    "histories_of",
    "let_serve",
    "log_report",
    "newer",
    "offline",
    "revisions",
    "rollback",
    "stale",
    "upgrade",
]

log = get_logger()

LOCK: Final = 0x726F_7763_6173_7401
"""The key of the advisory lock that is held while schemas are changed."""

SESSION_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    ConnectionResetError,
)
"""What an open connection can raise. Other OSErrors are not about the database, such as those of a closed pipe."""

Reporter = Callable[[str], None]
"""Called with a line for each thing that happens."""

Work = Callable[[], Awaitable[None]]
Check = Callable[[], Awaitable[list[str]]]


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


class SchemaLockHeld(LockContention):
    """The lock for changing schemas is held by {holders}, which may not change any here: end that session, then try \
again."""

    def __init__(self, holders: str) -> None:
        super().__init__()
        self.holders = holders


class NotRestored(OperatorFault):
    """{fault} Schema {schema} could not be rolled back ({why}): mend that and roll it back, or restore a backup."""

    exit_code: ClassVar[int] = 47

    def __init__(self, fault: OperatorFault, schema: str, why: OperatorFault) -> None:
        self.fault, self.schema, self.why = fault, schema, why


class RevisionNotReached(OperatorFault):
    """Schema {schema} is at {at}, before {revision}: there is nothing to roll back."""

    exit_code: ClassVar[int] = 64

    def __init__(self, schema: str, at: str | None, revision: str) -> None:
        self.schema, self.at, self.revision = schema, at or "the beginning", revision


class PrereleaseDatabase(OperatorFault):
    """Schema rowcast was made before revisions were frozen and cannot be upgraded: drop it and the packs' schemas, \
then run `daemon --apply-ddl` again."""

    exit_code: ClassVar[int] = 22


class NoDaemonRole(OperatorFault):
    """{role} is {what}, so it cannot be a daemon's role: create an ordinary one (create role rowcast_daemon login) \
first."""

    exit_code: ClassVar[int] = 64

    def __init__(self, role: str, what: str) -> None:
        self.role, self.what = role, what


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

    Only one change of schemas runs in a database at a time; others wait for it. A statement waits `lock_timeout`
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
                await session.run(partial(session.run_up, history, revision, first=first), at_once=False)
                at = revision
            await session.run(partial(session.run_file, capture), at_once=False)
            moves.append(Move(history.pack, history.schema, before, at))
            report(str(moves[-1]))
    return Report(tuple(moves))


async def let_serve(
    dsn: str,
    role: str,
    *,
    schemas: Collection[str],
    functions: Collection[str],
    report: Reporter,
    lock_timeout: float = 5.0,
    attempts: int = 5,
) -> None:
    """Grant a role what a daemon needs that serves the packs in these schemas, and calls these functions there.

    Raises NoDaemonRole for a role that does not exist or has more than any grant could give, and a DatabaseFault.
    """
    async with _session(dsn, lock_timeout, attempts, report) as session:
        if what := await session.driver.fetchval(query("unfit_role"), role):
            raise NoDaemonRole(role, what)

        async def grant() -> None:
            await session.driver.execute(query("let_serve"), role, list(schemas), list(functions))

        await session.run(grant)
    report(f"{role} may run daemons")


async def upgrade(
    dsn: str,
    packs: Collection[str],
    *,
    report: Reporter,
    back_up: Work | None = None,
    dry_run: bool = False,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
    trigger_settings: Mapping[str, str] = MappingProxyType({}),
    lock_timeout: float = 5.0,
    attempts: int = 5,
) -> Report:
    """Do what `apply` does in one transaction, and commit it only if the result is verified.

    Before that, if a revision is pending, `back_up` is called, and everything is tried in a transaction that is
    rolled back; with `dry_run` that is all. If a file runs without a transaction, there are several steps: when one
    fails, those before it are rolled back. The other parameters are those of `apply`. Raises an OperatorFault:
    everything is then as it was, unless it is NotRestored.
    """
    histories = histories_of(packs, schemas, ddl_folder)
    async with _session(dsn, lock_timeout, attempts, report, trigger_settings) as session:
        if await session.driver.fetchval(query("prerelease")):
            raise PrereleaseDatabase
        before: dict[str, str | None] = {}
        for history in histories:
            await session.check_name(history.schema)
            before[history.schema] = await current(session.driver, history.schema)
        verification = Verification(session.driver, histories, ddl_folder, triggers_folder, trigger_settings)
        work = _Upgrade(session, verification, before)
        moves = tuple(Move(each.pack, each.schema, before[each.schema], each.newest) for each in histories)
        pending = [move for move in moves if move.before != move.after]
        for move in pending:
            report(f"pending: {move}")
        if not pending:
            report("nothing is pending: every schema is at its newest revision")
        if pending and back_up and not dry_run:
            await back_up()
        if pending or dry_run:
            await work.try_out()
        if not dry_run:
            await work.run()
            for move in moves:
                report(str(move))
    return Report(() if dry_run else moves)


@dataclass(frozen=True, slots=True)
class _Upgrade:
    """The pending revisions of some histories, each history followed by its file in triggers/."""

    session: "_Session"
    verification: Verification
    before: Mapping[str, str | None]

    def parts(self) -> list["_Part"]:
        """What is to be run, in order. Raises BadSqlFile, NewerDatabase, UnknownHistory."""
        parts = []
        for history in self.verification.histories:
            pending = history.revisions[history.place(self.before[history.schema]) :]
            parts += [_Part(history, revision, history.up_file(revision).in_transaction) for revision in pending]
            parts.append(_Part(history, None, at_once=True))
        return parts

    async def try_out(self) -> None:
        """Run everything that can run in a transaction, and roll it back."""
        report, parts = self.session.report, self.parts()
        left_out = [str(part) for part in parts if not part.at_once]
        if not left_out:
            report("dry run: everything that is pending, in a transaction that is rolled back")
            await self._run_verified(parts, commit=False)
            report("dry run: passed")
            return
        report(f"dry run: without {', '.join(left_out)}, which cannot run in a transaction")
        try:
            await self.session.run(partial(self._run, [part for part in parts if part.at_once]), commit=False)
            report("dry run: passed")
        except OperatorFault as fault:  # perhaps only because of what was left out
            report(f"warning: dry run: {fault}")

    async def run(self) -> None:
        """Run everything. Raises an OperatorFault, after it has been undone; NotRestored if it could not be."""
        groups = [list(group) for _, group in groupby(self.parts(), key=lambda part: part.at_once or id(part))]
        done: list[_Part] = []
        try:
            for number, group in enumerate(groups, 1):
                which = f"step {number} of {len(groups)}: " if len(groups) > 1 else ""
                self.session.report(f"{which}applying {', '.join(map(str, group))}")
                done += group if not group[0].at_once else []
                if number == len(groups):
                    await self._run_verified(group)
                else:
                    await self.session.run(partial(self._run, group), at_once=group[0].at_once)
                done += group if group[0].at_once else []
        except OperatorFault as fault:
            if done:
                self.session.report(f"failed, so what was applied is rolled back: {fault}")
                await self._undo(fault, done)
            raise

    async def _run_verified(self, parts: Sequence["_Part"], *, commit: bool = True) -> None:
        await self.session.run_verified(
            partial(self._run, parts),
            self.verification,
            check=self.verification.applied,
            before=partial(self.verification.before, self.before),
            commit=commit,
        )

    async def _run(self, parts: Sequence["_Part"]) -> None:
        for history, revision, _ in parts:
            if revision is None:
                await self.session.run_file(triggers_of(history, self.verification.triggers_folder))
            else:
                first = "" if history.before(revision) else query_for("make_schema", history.schema)
                await self.session.next_file()
                await self.session.run_up(history, revision, first=first)

    async def _undo(self, fault: OperatorFault, done: Sequence["_Part"]) -> None:
        """Undo what was done, or half done, newest first. Raises NotRestored."""
        folder = self.verification.triggers_folder
        for history in reversed(self.verification.histories):
            schema, before = history.schema, self.before[history.schema]
            try:
                at = await current(self.session.driver, schema)
                half_done = done[-1].revision if done[-1].history is history and not done[-1].at_once else None
                if half_done and history.place(at) < history.place(half_done):
                    await self.session.run_statements(history.down_file(half_done))
                if at == before:
                    continue
                captured = _Part(history, None, at_once=True) in done
                first = triggers_of(history, folder, ".down.sql") if captured and before is None else None
                verification = replace(self.verification, histories=[history])
                await _undo(self.session, history, at, before, first=first, verify=verification)
                self.session.report(str(Move(history.pack, schema, at, before)))
            except OperatorFault as why:
                raise NotRestored(fault, schema, why) from None


class _Part(NamedTuple):
    """A revision of a history, or if that is None its file in triggers/; and whether it runs in a transaction."""

    history: RevisionHistory
    revision: str | None
    at_once: bool

    def __str__(self) -> str:
        return self.revision or f"the captures of {self.history.pack}"


async def rollback(
    dsn: str,
    pack: str,
    *,
    report: Reporter,
    to: str | None = None,
    verify: bool = True,
    schema: str | None = None,
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
    lock_timeout: float = 5.0,
    attempts: int = 5,
) -> Report:
    """Roll back a pack's revisions after `to`, newest first. Without `to`: all, the version table and the schema.

    All of it is one transaction, unless a file runs without one: see above. It is committed only if the result is
    what the files make up to `to`, or if `verify` is false. Only schemas and extensions that Rowcast created are
    dropped. The other parameters are those of `apply`. Raises an OperatorFault.
    """
    history = history_of(pack, schema, ddl_folder)
    if to is not None and to not in history.revisions:
        raise UnknownRevision(pack, to, history.revisions)
    async with _session(dsn, lock_timeout, attempts, report) as session:
        await session.check_name(history.schema)
        before = await current(session.driver, history.schema)
        applied, kept = history.place(before), history.place(to)
        if applied < kept:
            raise RevisionNotReached(history.schema, before, history.revisions[kept - 1])
        if applied > kept:
            if not kept and pack == ROWCAST:
                await session.check_unused(bundled(ddl_folder))
            verification = Verification(session.driver, [history], ddl_folder, triggers_folder)
            triggers_down = triggers_of(history, triggers_folder, ".down.sql") if to is None else None
            await _undo(session, history, before, to, first=triggers_down, verify=verification if verify else None)
        move = Move(pack, history.schema, before, to if applied > kept else before)
        report(str(move))
    return Report((move,))


async def _undo(
    session: "_Session",
    history: RevisionHistory,
    before: str | None,
    to: str | None,
    *,
    first: SqlFile | None,
    verify: Verification | None,
) -> None:
    """Roll back a schema from one revision to another, after the file `first`; verified with the last step."""
    steps = history.down_steps(history.revisions[history.place(to) : history.place(before)][::-1])
    at_once = [history.down_file(step[0]).in_transaction for step in steps]
    known = await verify.before({history.schema: before}) if verify and not at_once[-1] else []
    for number, step in enumerate(steps):
        if len(steps) > 1:
            which = f"{', '.join(step)}, as step {number + 1} of {len(steps)}"
            session.report(f"rolling back {which}: earlier steps stay undone if a later one fails")
        if not at_once[number]:
            await session.run(partial(session.run_file, first))
        work = partial(session.run_down, history, step, first=first if at_once[number] else None)
        first = None
        if verify and at_once[number] and number == len(steps) - 1:
            check, without = (
                partial(verify.at, {history.schema: to}),
                partial(verify.before, {history.schema: before}),
            )
            await session.run_verified(work, verify, check=check, before=without)
        else:
            await session.run(work, at_once=at_once[number])
    if verify and not at_once[-1]:
        found = await verify.at({history.schema: to}, everywhere=True)
        if problems := [problem for problem in found if problem not in known]:
            raise VerificationFailed(problems, f"{history.schema} stays at {to or 'nothing'}")


def offline(
    packs: Collection[str],
    out: TextIO,
    *,
    schemas: Mapping[str, str] = MappingProxyType({}),
    ddl_folder: Path | None = None,
    triggers_folder: Path | None = None,
    trigger_settings: Mapping[str, str] = MappingProxyType({}),
    owner: str | None = None,
) -> None:
    """Write the SQL with which `apply` would fill an empty database, for psql. Raises an OperatorFault."""
    out.write("-- Rowcast's schema and packs, for an empty database: psql -X -v ON_ERROR_STOP=1 -f FILE\n\n")
    session = reset_session({**SESSION, **trigger_settings}, owner)
    for history in histories_of(packs, schemas, ddl_folder):
        first = query_for("make_schema", history.schema)
        for revision in history.revisions:
            out.write(f"{session}\n")
            history.run("up", revision, out, first=first)
            first = ""
        if file := triggers_of(history, triggers_folder):
            out.write(f"{session}\nbegin;\n\n{file.script}\ncommit;\n\n")


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
        driver.add_log_listener(lambda _, message: _report_message(report, message))
        await wait_for_lock(driver, report, lock_timeout)
        async with engine.connect() as alembic:
            reset = reset_session(settings, role_of(dsn))
            yield _Session(driver, alembic, dsn, reset, lock_timeout, attempts, report)
    except (*SESSION_ERRORS, SQLAlchemyError) as error:
        raise explain(error) from None
    finally:
        await engine.dispose()
        driver.terminate()


def _report_message(report: Reporter, message: asyncpg.PostgresLogMessage) -> None:
    """Report a message of the server, except that something to be dropped is not there."""
    if not str(message.message).endswith(", skipping"):
        report(f"{(message.severity_en or 'notice').lower()}: {message.message}")


def _report_retries(report: Reporter) -> OnRetry:
    return lambda fault, attempt: report(f"{fault} (attempt {attempt} failed)")


async def wait_for_lock(driver: Connection, report: Reporter, lock_timeout: float) -> None:
    """Take the advisory lock, which is released with the connection.

    Waits while somebody holds it who may be changing schemas. Others may take it as well: raises SchemaLockHeld after
    they have held it for `lock_timeout` seconds, if that is not 0.
    """
    reported, since = False, None
    loop = asyncio.get_running_loop()
    # Polled, since pg_advisory_lock() would deadlock with CREATE INDEX CONCURRENTLY: that waits for every statement
    # that has begun, so the holder of the lock would wait for us.
    while not await driver.fetchval("select pg_catalog.pg_try_advisory_lock($1)", LOCK):
        holders = await driver.fetch(query("lock_holder"), LOCK)
        if holders and not reported:
            report(f"waiting for {_names(holders)}, which holds the lock for changing schemas in this database")
            reported = True
        if any(holder["may_change_schemas"] for holder in holders):
            since = None
        elif holders:
            since = since or loop.time()
            if lock_timeout and loop.time() - since >= lock_timeout:
                raise SchemaLockHeld(_names(holders))
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
        """Apply one revision in a transaction of its own, or as a part of one. It begins with the SQL `first`."""
        await self.alembic.run_sync(lambda connection: history.run("up", revision, connection, first=first))

    async def run_down(self, history: RevisionHistory, revisions: Sequence[str], *, first: SqlFile | None) -> None:
        """Roll back revisions, after the file `first`."""
        await self.run_file(first)
        for revision in revisions:
            last = "" if history.pack == ROWCAST else query("forget_captures")
            if revision == history.revisions[0]:
                last += query_for("leave", history.schema)
            await self.next_file()
            await self.alembic.run_sync(partial(history.run, "down", revision, last=last))

    async def run_file(self, file: SqlFile | None) -> None:
        """Run a file of triggers/, if there is one, in a transaction of its own, or as a part of one."""
        if file is None or not file.statements:
            return
        await self.next_file()
        try:
            async with self.driver.transaction():
                await self.driver.execute(file.text)
        except asyncpg.PostgresError as error:
            raise explain(error, place=file.place(error)) from None

    async def run_statements(self, file: SqlFile) -> None:
        """Run what of a file can be run, statement by statement: what it undoes may be there in part."""
        for statement in file.statements:
            try:
                await self.driver.execute(statement.text)
            except asyncpg.PostgresError as error:
                self.report(f"warning: {explain(error, place=file.place(error, statement))}")

    async def next_file(self) -> None:
        """Make the session as it is at the start, so that a file does not depend on the one before it."""
        if self.driver.is_in_transaction():
            await self.driver.execute(query("settle_constraints"))
        await self.driver.execute(self.reset)

    async def run(self, work: Work, *, at_once: bool = True, commit: bool = True) -> None:
        """Do some work, all of it in one transaction unless `at_once` is false, and again if it gets no lock.

        Without `commit`, the transaction is rolled back. Raises LockTimeout, which names the blockers.
        """

        async def in_transaction() -> None:
            transaction = self.driver.transaction(
                isolation="read_committed"
            )  # as SQLAlchemy's, which are parts of it
            await transaction.start()
            try:
                await work()
                await self.next_file()
            except BaseException:
                if not self.driver.is_closed():
                    await transaction.rollback()
                raise
            await (transaction.commit() if commit else transaction.rollback())

        await self._with_retries(in_transaction if at_once else work)

    async def run_verified(
        self,
        work: Work,
        verification: Verification,
        *,
        check: Check,
        before: Check,
        commit: bool = True,
    ) -> None:
        """Do some work in one transaction, and verify it there. Raises VerificationFailed; then nothing is changed.

        `check` finds the problems that the work has left, and `before` those that there were without it, which do
        not count. Reports the tables in which the number of rows is another.
        """
        lines: list[str] = []

        async def verified(known: Collection[str] = ()) -> None:
            rows = await verification.rows()
            await work()
            await self.next_file()
            if problems := [problem for problem in await check() if problem not in known]:
                raise VerificationFailed(problems)
            lines[:] = changed_rows(rows, await verification.rows(everywhere=False))

        try:
            await self.run(verified, commit=commit)
        except VerificationFailed as failed:
            known = await before()
            if problems := [problem for problem in failed.problems if problem not in known]:
                for problem in problems:
                    self.report(f"problem: {problem}")
                raise VerificationFailed(problems) from None
            for problem in failed.problems:
                self.report(f"warning: {problem} (as before)")
            await self.run(partial(verified, known), commit=commit)
        for line in lines:
            self.report(line)

    async def _with_retries(self, work: Work) -> None:
        """Run one transaction, and try again if it gets no lock. Raises LockTimeout, which names the blockers."""

        async def once() -> None:
            async with self._blockers() as blockers:
                try:
                    await self.next_file()
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
