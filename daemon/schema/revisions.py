"""The revisions of a pack, run by Alembic, with a version table in the pack's schema and a transaction for each."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TextIO

import asyncpg

from daemon.core.errors import OperatorFault
from daemon.packs import UnknownPack
from daemon.postgres.errors import explain
from daemon.schema import sql_files
from daemon.schema.queries import query_for
from daemon.schema.sql_files import SqlFile

if TYPE_CHECKING:  # importing Alembic and SQLAlchemy takes 0.4 s and 57 MB, so only schema changes do
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import Connection

Direction = Literal["up", "down"]

VERSION_TABLE = "alembic_version"


class UnknownRevision(OperatorFault):
    """{pack} has no revision "{revision}": choose among {known}."""

    exit_code: ClassVar[int] = 64

    def __init__(self, pack: str, revision: str, known: Sequence[str]) -> None:
        self.pack, self.revision, self.known = pack, revision, ", ".join(known)


class InvalidRevisions(OperatorFault):
    """The revisions in ddl/{pack} are inconsistent: {problem}."""

    exit_code: ClassVar[int] = 65

    def __init__(self, pack: str, problem: str) -> None:
        self.pack, self.problem = pack, problem


class NewerDatabase(OperatorFault):
    """Schema {schema} is at {revision}, newer than {newest}, the latest this version knows: upgrade Rowcast."""

    exit_code: ClassVar[int] = 21

    def __init__(self, schema: str, revision: str, newest: str) -> None:
        self.schema, self.revision, self.newest = schema, revision, newest


class UnknownHistory(OperatorFault):
    """Schema {schema} has another application's Alembic history (at "{revision}"): choose another with --schema."""

    exit_code: ClassVar[int] = 22

    def __init__(self, schema: str, revision: str) -> None:
        self.schema, self.revision = schema, revision


class IrreversibleRevision(OperatorFault):
    """{revision} cannot be rolled back: there is no {file}."""

    exit_code: ClassVar[int] = 23

    def __init__(self, revision: str, file: str) -> None:
        self.revision, self.file = revision, file


@dataclass(frozen=True, slots=True)
class RevisionHistory:
    """The revisions of a pack, oldest first, and the schema that they are for."""

    pack: str
    schema: str
    files: dict[str, Path]  # revision -> its Python file

    @classmethod
    def read(cls, pack: str, schema: str, ddl: Path) -> Self:
        """Read ddl/<pack>. Raises UnknownPack, InvalidRevisions."""
        if pack not in packs_in(ddl):
            raise UnknownPack(pack, packs_in(ddl))
        paths = sorted((ddl / pack).glob("[0-9]*.py"))
        stems = {path.stem for path in paths}
        for number, path in enumerate(paths, 1):
            if not re.fullmatch(rf"{number:04}_\w+", path.stem):
                raise InvalidRevisions(
                    pack, f"{path.name} should be {number:04}_<name>.py, without gaps or duplicates"
                )
            if not path.with_suffix(".up.sql").exists():
                raise InvalidRevisions(pack, f"there is no {path.stem}.up.sql")
        for path in sorted((ddl / pack).glob("[0-9]*.sql")):
            if path.name.partition(".")[0] not in stems:
                raise InvalidRevisions(pack, f"{path.name} has no .py file")
        return cls(pack, schema, {f"{pack}_{path.stem[:4]}": path.absolute() for path in paths})

    @property
    def revisions(self) -> tuple[str, ...]:
        """All revisions, oldest first."""
        return tuple(self.files)

    @property
    def newest(self) -> str:
        """The revision that a current schema is at."""
        return self.revisions[-1]

    def place(self, revision: str | None) -> int:
        """The number of revisions up to and including `revision`; 0 for None.

        Raises NewerDatabase, UnknownHistory.
        """
        if revision is None:
            return 0
        if revision in self.files:
            return self.revisions.index(revision) + 1
        if self.is_newer(revision):
            raise NewerDatabase(self.schema, revision, self.newest)
        raise UnknownHistory(self.schema, revision)

    def before(self, revision: str) -> str | None:
        """The revision that `revision` builds on; None for the first."""
        index = self.revisions.index(revision)
        return self.revisions[index - 1] if index else None

    def until(self, revision: str) -> Self:
        """This history up to and including one of its revisions."""
        return replace(self, files=dict(islice(self.files.items(), self.place(revision))))

    def is_newer(self, revision: str) -> bool:
        """Whether a later version of these files must have written this revision."""
        return revision not in self.files and re.fullmatch(rf"{self.pack}_\d+", revision) is not None

    def allows(self, compatible_with: Mapping[str, str], revision: str) -> bool:
        """Whether all revisions after the newest, up to `revision`, say that daemons with these files may stay."""
        unknown = range(len(self.files) + 1, int(revision.rpartition("_")[2]) + 1)
        return all(compatible_with.get(f"{self.pack}_{number:04}") in self.files for number in unknown)

    def up_file(self, revision: str) -> SqlFile:
        """The file that applies a revision. Raises BadSqlFile."""
        return self._read(self.files[revision], "up")

    def down_file(self, revision: str) -> SqlFile:
        """The file that rolls a revision back. Raises IrreversibleRevision, BadSqlFile."""
        path = self.files[revision].with_suffix(".down.sql")
        if not path.exists():
            raise IrreversibleRevision(revision, f"{self.pack}/{path.name}")
        return self._read(self.files[revision], "down")

    def _read(self, path: Path, direction: Direction) -> SqlFile:
        return sql_files.read(path.with_suffix(f".{direction}.sql"), pack=self.pack, schema=self.schema)

    def down_steps(self, revisions: Sequence[str]) -> list[list[str]]:
        """The revisions to roll back, in groups that are one transaction each. Raises what `down_file` does."""
        steps: list[list[str]] = []
        joins = False
        for revision in revisions:
            in_transaction = self.down_file(revision).in_transaction
            if joins and in_transaction:
                steps[-1].append(revision)
            else:
                steps.append([revision])
            joins = in_transaction
        return steps

    def run(
        self,
        direction: Direction,
        revision: str,
        target: "Connection | TextIO",
        *,
        first: str = "",
        last: str = "",
    ) -> None:
        """Apply or roll back one revision, in one transaction that begins with the SQL `first` and ends with `last`.

        `target` is a connection, inside SQLAlchemy's greenlet, or a stream to write the SQL to. If the connection is
        in a transaction already, it stays in it. Raises InvalidRevisions and the errors of `run_sql`; a transaction
        that began here is then rolled back.
        """
        from alembic.runtime.migration import MigrationContext  # noqa: PLC0415
        from sqlalchemy import Connection  # noqa: PLC0415

        scripts = self._scripts()
        before = self.before(revision)
        if direction == "up":
            steps = partial(scripts._upgrade_revs, revision)
        else:
            steps = partial(scripts._downgrade_revs, before or "base")
        options: dict[str, Any] = {"version_table_schema": self.schema, "script": scripts}
        options["fn"] = lambda heads, _: steps(heads)
        execute: Callable[[str], None]
        if isinstance(target, Connection):
            context = MigrationContext.configure(target, opts=options)
            execute = partial(_send, target)
        else:
            options |= {"as_sql": True, "output_buffer": target, "starting_rev": before}
            context = MigrationContext.configure(dialect_name="postgresql", opts=options)
            execute = context.impl.static_output
        token = _RUNNING.set(_Running(self, context, execute))
        try:
            with context.begin_transaction():
                if first:
                    execute(first)
                context.run_migrations()
                if declaration := self._declaration(scripts, direction, revision):
                    execute(declaration)
                if last:
                    execute(last)
        finally:
            _RUNNING.reset(token)

    def _declaration(self, scripts: "ScriptDirectory", direction: Direction, revision: str) -> str:
        """SQL that notes, or forgets, which daemons may stay with a revision; empty if it does not say."""
        oldest = getattr(scripts.get_revision(revision).module, "compatible_with", None)
        if oldest is None:
            return ""
        if oldest not in self.revisions[: self.revisions.index(revision)]:
            raise InvalidRevisions(self.pack, f'compatible_with = "{oldest}" of {revision} names no earlier revision')
        name = "note_compatible" if direction == "up" else "forget_compatible"
        return query_for(name, self.schema).replace("the_revision", revision).replace("the_oldest", oldest)

    def _scripts(self) -> "ScriptDirectory":
        from alembic.script import ScriptDirectory  # noqa: PLC0415
        from alembic.util import CommandError  # noqa: PLC0415

        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs each step at INFO
        folder = self.files[self.newest].parent
        scripts = ScriptDirectory(folder.parent, version_locations=[folder])
        try:
            found = {script.revision: script.down_revision for script in scripts._load_revisions()}
        except CommandError as error:
            raise InvalidRevisions(self.pack, str(error)) from None
        for revision, path in self.files.items():
            before = self.before(revision)
            if revision not in found or found[revision] != before:
                last = f'"{before}"' if before else None
                raise InvalidRevisions(
                    self.pack, f'{path.name} should say revision = "{revision}", down_revision = {last}'
                )
        return scripts


@dataclass(frozen=True, slots=True)
class _Running:
    """The context of the revision that is running, for run_sql."""

    history: RevisionHistory
    context: "MigrationContext"
    execute: Callable[[str], None]


_RUNNING: ContextVar[_Running] = ContextVar("_RUNNING")


def run_sql(revision_file: str, direction: Direction) -> None:
    """Run the .up.sql or .down.sql file of a revision; call it only in the revision's upgrade() or downgrade().

    The text is sent unchanged in one message, so nothing in it is taken for a bind parameter. Raises BadSqlFile, and
    a DatabaseFault that names file and line.
    """
    running = _RUNNING.get()
    file = running.history._read(Path(revision_file), direction)
    if not file.statements:
        return  # asyncpg raises an error when the server answers an empty query
    if file.in_transaction:
        _execute(file, running.execute)
        return
    with running.context.autocommit_block():
        for statement in file.statements:
            try:
                running.execute(statement.text.rstrip(";") + ";")
            except asyncpg.PostgresError as error:
                raise explain(error, place=file.place(error, statement)) from None


def _execute(file: SqlFile, execute: Callable[[str], None]) -> None:
    try:
        execute(file.script)
    except asyncpg.PostgresError as error:
        raise explain(error, place=file.place(error)) from None


def _send(connection: "Connection", text: str) -> None:
    """Send SQL unchanged through asyncpg: SQLAlchemy would parse `:name`, or accept only one statement."""
    connection.exec_driver_sql("select 1")  # the adapter sends BEGIN only with the first statement of its own
    adapter: Any = connection.connection.dbapi_connection
    adapter.run_async(lambda driver: driver.execute(text))


def packs_in(ddl: Path) -> tuple[str, ...]:
    """The names of the packs in a ddl folder, including Rowcast's own history."""
    return tuple(sorted(path.name for path in ddl.iterdir() if any(path.glob("[0-9]*.py"))))
