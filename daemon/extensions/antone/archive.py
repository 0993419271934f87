"""Antone's retention: rows that are old enough go from their tables to files, and not one of them on the way.

What is old enough is what the views of 0006_retention.up.sql show. One file, one transaction::

    the file's name is written to the ledger, and committed
    the rows are locked, read, and written to the file, which is made durable
    the file is read back from the disk, and compared with what the database gave
    exactly these rows are deleted, the ledger says that the file is complete, and all of it is committed

Whoever is killed before the last commit leaves all rows where they were, and a file that the ledger does not call
complete: the next run removes it.
"""

import csv
import gzip
import io
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Final

import asyncpg

from daemon import files
from daemon.core.errors import OperatorFault
from daemon.postgres.connect import Connection, connect
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, explain
from daemon.postgres.queries import split_statements
from daemon.schema import sql_files
from daemon.schema.health import SchemaNotCurrent
from daemon.settings import Settings

PACK: Final = "antone"
SESSION: Final = {
    "search_path": "",
    "timezone": "UTC",
    "lock_timeout": "5s",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
}
_LOCK: Final = 0x726F_7763_6173_7402
"""The key of the advisory lock that an archiving session holds; migrate.LOCK is the one before."""

Tell = Callable[[str], None]
Record = dict[str, Any]


class ArchiveNotWritable(OperatorFault):
    """{path} cannot be written ({reason}): choose another directory with --to."""

    exit_code: ClassVar[int] = 73

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


class ArchiveCorrupt(OperatorFault):
    """Reading {path} back failed ({reason}): check the disk. Its rows are still in the database."""

    exit_code: ClassVar[int] = 74

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


class ArchiveInProgress(OperatorFault):
    """Another archive run is active in this database: try again later."""

    exit_code: ClassVar[int] = 75


@dataclass(frozen=True, slots=True)
class Format:
    """How records become a file: its suffix, and the two ways between records, as JSON texts, and bytes."""

    suffix: str
    encode: Callable[[Sequence[str]], bytes]
    decode: Callable[[bytes], list[Record]]


@dataclass(frozen=True, slots=True)
class Subject:
    """One table that is archived; `rows` go into a file at most."""

    table: str
    format: Format
    rows: int
    children: bool = False  # does a row take others along, which are to be locked before and deleted with it?


def _exact(text: str) -> Any:  # noqa: ANN401
    """JSON with its numbers as they are written: a float holds fewer digits than a number of Postgres'."""
    return json.loads(text, parse_float=str, parse_int=str)


def _json(records: Sequence[str]) -> bytes:
    """One array, a record a line."""
    return ("[\n" + ",\n".join(records) + "\n]\n").encode()


def _from_json(data: bytes) -> list[Record]:
    records: list[Record] = _exact(data.decode())
    return records


def _csv(records: Sequence[str]) -> bytes:
    """A line of names, then a line for each record, as RFC 4180 has it."""
    rows: list[Record] = [_exact(record) for record in records]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _from_csv(data: bytes) -> list[Record]:
    return [dict(row) for row in csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True)]


JSON: Final = Format("json", _json, _from_json)
CSV: Final = Format("csv", _csv, _from_csv)
JSON_GZ: Final = Format(
    "json.gz",
    lambda records: gzip.compress(_json(records), mtime=0),
    lambda data: _from_json(gzip.decompress(data)),
)
SUBJECTS: Final = (
    Subject("posts", JSON, 1000, children=True),
    Subject("kpi_metrics", CSV, 10_000),
    Subject("audit_logs", JSON_GZ, 10_000),
)


def fingerprint(records: Sequence[Record]) -> tuple[int, str]:
    """How many records there are, and a hash of all that they say, in their order."""
    lines = (json.dumps(record, sort_keys=True, separators=(",", ":")) for record in records)
    return len(records), sha256("\n".join(lines).encode()).hexdigest()


def save(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read: durably, and whole or not at all. Raises NoArchive."""
    try:
        with os.fdopen(files.create_partial(path), "wb") as file:
            file.write(data)
        files.commit_partial(path)
    except OSError as error:
        raise ArchiveNotWritable(path, error.strerror or str(error)) from None


def read_back(path: Path, form: Format, expected: tuple[int, str]) -> str:
    """The hash of a file's bytes, once its records have proven to be the expected ones. Raises NotReadBack."""
    try:
        data = path.read_bytes()
        found = fingerprint(form.decode(data))
    except (OSError, EOFError, ValueError, TypeError, csv.Error) as error:
        raise ArchiveCorrupt(path, type(error).__name__) from None
    if found[0] != expected[0]:
        raise ArchiveCorrupt(path, f"{found[0]} records instead of {expected[0]}")
    if found != expected:
        raise ArchiveCorrupt(path, "other records")
    return sha256(data).hexdigest()


async def archive(
    settings: Settings, directory: Path, *, dry_run: bool, report: Tell, rows_per_file: int | None = None
) -> int:
    """Move what is old enough to files in `directory`, and return how many rows went; 0 in a dry run.

    `report` is told of each file, or in a dry run of each period. A dry run writes nothing, neither to the directory
    nor to the database. What is done stays done if a later file fails. Raises an OperatorFault.
    """
    connection = await connect(
        settings.require_dsn(),
        application_name="rowcast archive",
        server_settings=SESSION,
        attempts=settings.connect_attempts,
    )
    try:
        job = _Job(connection, _statements(settings.schema_name or PACK), directory, report)
        if dry_run:
            await job.preview(rows_per_file)
            return 0
        if not await connection.fetchval("select pg_try_advisory_lock($1)", _LOCK):
            raise ArchiveInProgress
        _make(directory)
        await job.clear()
        moved = [rows for subject in SUBJECTS for rows in await job.move(subject, rows_per_file or subject.rows)]
    except DRIVER_ERRORS as error:
        fault = explain(error, place=" in the archive")
        if isinstance(fault, DatabaseFault) and fault.sqlstate in ("3F000", "42P01"):
            raise SchemaNotCurrent("there is nothing to archive in this database") from None
        raise fault from None
    finally:
        connection.terminate()
    report(f"{sum(moved)} rows in {len(moved)} files" if moved else "nothing is old enough")
    return sum(moved)


def _statements(schema: str) -> Mapping[str, str]:
    """The statements of the pack's archive.sql, by name."""
    text = sql_files.read(files.folder("ddl") / PACK / "archive.sql", pack=PACK, schema=schema).text
    return split_statements(text)


def _make(directory: Path) -> None:
    try:
        files.make_private_directory(directory)
    except OSError as error:
        raise ArchiveNotWritable(directory, error.strerror or str(error)) from None


@dataclass(frozen=True, slots=True)
class _Job:
    """One run, in one session."""

    connection: Connection
    sql: Mapping[str, str]
    directory: Path
    report: Tell

    async def preview(self, rows_per_file: int | None) -> None:
        """Say what a run would do now."""
        due = [(subject, period) for subject in SUBJECTS for period in await self._due(subject)]
        for subject, period in due:
            files = -(-period["rows"] // (rows_per_file or subject.rows))
            self.report(f"{subject.table} {period['period']}: {period['rows']} rows would go to {files} files")
        self.report(f"dry run: {sum(period['rows'] for _, period in due)} rows are old enough")

    async def clear(self) -> None:
        """Remove what runs that were stopped have left; their rows were not deleted."""
        for (name,) in await self.connection.fetch(self.sql["unfinished"]):
            for path in (self.directory / name, files.partial_path(self.directory / name)):
                try:
                    path.unlink()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise ArchiveNotWritable(path, error.strerror or str(error)) from None
                self.report(f"{path.name}: removed, since its run was stopped before its rows were deleted")
            await self.connection.execute(self.sql["forget"], name)

    async def move(self, subject: Subject, rows_per_file: int) -> list[int]:
        """Move all rows of a table that are old enough; how many there are in each file."""
        moved = []
        for period in await self._due(subject):
            done = 0
            while rows := await self._move_file(subject, period, rows_per_file):
                done += rows
                moved.append(rows)
                self.report(f"{subject.table} {period['period']}: {done} of {period['rows']} rows")
        return moved

    async def _due(self, subject: Subject) -> list[asyncpg.Record]:
        return await self.connection.fetch(self.sql[f"{subject.table}_due"])

    async def _move_file(self, subject: Subject, period: asyncpg.Record, max_rows: int) -> int:
        """Move rows of one period to one file; how many, 0 if none are left that nobody else is at work on."""
        table, sql = subject.table, self.sql
        name = f"{table}-{period['period']}-{secrets.token_hex(4)}.{subject.format.suffix}"
        await self.connection.execute(sql["begin_file"], name, table, period["period"])
        async with self.connection.transaction(isolation="read_committed"):
            between = period["first"], period["last"]
            ids = [row["id"] for row in await self.connection.fetch(sql[f"{table}_lock"], *between, max_rows)]
            if ids and subject.children:
                await self.connection.execute(sql[f"{table}_lock_children"], ids)
            rows = await self.connection.fetch(sql[f"{table}_rows"], ids) if ids else []
            if not rows:
                await self.connection.execute(sql["forget"], name)
                return 0
            records = [row["record"] for row in rows]
            path = self.directory / name
            save(path, subject.format.encode(records))
            digest = read_back(path, subject.format, fingerprint([_exact(record) for record in records]))
            written = [row["id"] for row in rows]
            if subject.children:
                await self.connection.execute(sql[f"{table}_delete_children"], written)
            gone = await self.connection.execute(sql[f"{table}_delete"], written)
            if gone != f"DELETE {len(rows)}":
                raise ArchiveCorrupt(path, f"the database says {gone} to {len(rows)} rows")
            await self.connection.execute(sql["complete_file"], name, len(rows), digest)
        self.report(f"{name}: {len(rows)} rows, sha256 {digest}")
        return len(rows)
