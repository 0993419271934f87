"""Antone's retention: moves old rows from their tables to files, without losing or duplicating any.

The views of 0006_retention.up.sql define which rows are old enough. Each file is written in these steps::

    commit the file's name and place to the ledger
    begin; lock the rows, read them, write them to the file, and make it durable
    read the file back from the disk, and compare it with the rows
    delete exactly these rows, mark the file as complete in the ledger, and commit

If a run is killed before the last commit, all rows remain in their tables, and the ledger does not mark the file as
complete: the next run removes it, wherever it writes its own files, or says where it is if it cannot reach it.
"""

import csv
import gzip
import io
import json
import os
import secrets
import socket
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
"""The key of the advisory lock that an archiving session holds; migrate.LOCK is the key before it."""

Report = Callable[[str], None]
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
    """A file format. `encode` takes records as JSON texts; `decode` returns them parsed, with numbers as text."""

    suffix: str
    encode: Callable[[Sequence[str]], bytes]
    decode: Callable[[bytes], list[Record]]


@dataclass(frozen=True, slots=True)
class ArchivedTable:
    """A table that is archived, at most `rows_per_file` rows to a file."""

    name: str
    format: Format
    rows_per_file: int
    has_children: bool = False  # whether rows of other tables are archived, and so locked and deleted, with its rows


def _parse_exact(text: str) -> Any:  # noqa: ANN401
    """Parse JSON with numbers as text, since a float has fewer digits than Postgres' numeric."""
    return json.loads(text, parse_float=str, parse_int=str)


def _json(records: Sequence[str]) -> bytes:
    """One JSON array, with a record per line."""
    return ("[\n" + ",\n".join(records) + "\n]\n").encode()


def _from_json(data: bytes) -> list[Record]:
    records: list[Record] = _parse_exact(data.decode())
    return records


def _csv(records: Sequence[str]) -> bytes:
    """A header line, then a line for each record, as in RFC 4180."""
    rows: list[Record] = [_parse_exact(record) for record in records]
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
ARCHIVED_TABLES: Final = (
    ArchivedTable("posts", JSON, 1000, has_children=True),
    ArchivedTable("kpi_metrics", CSV, 10_000),
    ArchivedTable("audit_logs", JSON_GZ, 10_000),
)


def fingerprint(records: Sequence[Record]) -> tuple[int, str]:
    """The number of records, and a hash of their content and order."""
    lines = (json.dumps(record, sort_keys=True, separators=(",", ":")) for record in records)
    return len(records), sha256("\n".join(lines).encode()).hexdigest()


def save(path: Path, data: bytes) -> None:
    """Write a file durably and atomically, readable by its owner only. Raises ArchiveNotWritable."""
    try:
        with os.fdopen(files.create_partial(path), "wb") as file:
            file.write(data)
        files.commit_partial(path)
    except OSError as error:
        raise ArchiveNotWritable(path, error.strerror or str(error)) from None


def read_back(path: Path, form: Format, expected: tuple[int, str]) -> str:
    """Check that a file contains the expected records, and return the SHA-256 of its bytes. Raises ArchiveCorrupt."""
    try:
        data = path.read_bytes()
        found = fingerprint(form.decode(data))
    except (OSError, EOFError, ValueError, TypeError, csv.Error) as error:
        raise ArchiveCorrupt(path, type(error).__name__) from None
    if found[0] != expected[0]:
        raise ArchiveCorrupt(path, f"{found[0]} records instead of {expected[0]}")
    if found != expected:
        raise ArchiveCorrupt(path, "the records differ")
    return sha256(data).hexdigest()


async def archive(
    settings: Settings, directory: Path, *, dry_run: bool, report: Report, rows_per_file: int | None = None
) -> int:
    """Move rows that are old enough to files in `directory`, and return their number; 0 in a dry run.

    `report` is called with a line for each file, or in a dry run for each period. A dry run writes nothing, neither
    to the directory nor to the database. Files that are complete stay complete if a later one fails. Raises an
    OperatorFault.
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
        _create(directory)
        await job.remove_unfinished()
        moved = [
            rows for table in ARCHIVED_TABLES for rows in await job.move(table, rows_per_file or table.rows_per_file)
        ]
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


def _create(directory: Path) -> None:
    try:
        files.make_private_directory(directory)
    except OSError as error:
        raise ArchiveNotWritable(directory, error.strerror or str(error)) from None


def _remove(path: Path, report: Report) -> bool:
    """Remove a file, complete or not; whether there was one. Raises ArchiveNotWritable."""
    found = False
    for candidate in (path, files.partial_path(path)):
        try:
            candidate.unlink()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ArchiveNotWritable(candidate, error.strerror or str(error)) from None
        report(f"{candidate.name}: removed, since its run was stopped before its rows were deleted")
        found = True
    return found


@dataclass(frozen=True, slots=True)
class _Job:
    """One run, on one connection."""

    connection: Connection
    sql: Mapping[str, str]
    directory: Path
    report: Report

    async def preview(self, rows_per_file: int | None) -> None:
        """Report what a run would do."""
        due = [(table, period) for table in ARCHIVED_TABLES for period in await self._due(table)]
        for table, period in due:
            file_count = -(-period["rows"] // (rows_per_file or table.rows_per_file))
            self.report(f"{table.name} {period['period']}: {period['rows']} rows would go to {file_count} files")
        self.report(f"dry run: {sum(period['rows'] for _, period in due)} rows are old enough")

    async def remove_unfinished(self) -> None:
        """Remove the files of runs that were stopped; the rows in them were not deleted.

        A file that may be out of reach is reported, and the ledger keeps it.
        """
        here = socket.gethostname()
        for name, host, directory in await self.connection.fetch(self.sql["unfinished"]):
            written_to = Path(directory) if directory else self.directory
            if _remove(written_to / name, self.report):
                await self.connection.execute(self.sql["forget"], name)
            elif host == here and written_to.is_dir():
                await self.connection.execute(self.sql["forget"], name)  # the run was stopped before it wrote
            else:
                place = f"in {directory} on {host}" if directory else "in the directory of its run"
                self.report(
                    f"{name}: its run was stopped, so it may be left {place}. Its rows are still in the database: "
                    "remove it there, then its row from archived_files"
                )

    async def move(self, table: ArchivedTable, rows_per_file: int) -> list[int]:
        """Move all rows of a table that are old enough, and return the number of rows in each file."""
        moved = []
        for period in await self._due(table):
            done = 0
            while rows := await self._move_file(table, period, rows_per_file):
                done += rows
                moved.append(rows)
                self.report(f"{table.name} {period['period']}: {done} of {period['rows']} rows")
        return moved

    async def _due(self, table: ArchivedTable) -> list[asyncpg.Record]:
        return await self.connection.fetch(self.sql[f"{table.name}_due"])

    async def _move_file(self, table: ArchivedTable, period: asyncpg.Record, max_rows: int) -> int:
        """Move up to `max_rows` rows of one period to one file, and return their number.

        It is 0 if no rows are left that no other session has locked.
        """
        sql = self.sql
        name = f"{table.name}-{period['period']}-{secrets.token_hex(4)}.{table.format.suffix}"
        place = socket.gethostname(), str(self.directory.resolve())
        await self.connection.execute(sql["begin_file"], name, table.name, period["period"], *place)
        async with self.connection.transaction(isolation="read_committed"):
            between = period["first"], period["last"]
            locked = await self.connection.fetch(sql[f"{table.name}_lock"], *between, max_rows)
            ids = [row["id"] for row in locked]
            if ids and table.has_children:
                await self.connection.execute(sql[f"{table.name}_lock_children"], ids)
            rows = await self.connection.fetch(sql[f"{table.name}_rows"], ids) if ids else []
            if not rows:
                await self.connection.execute(sql["forget"], name)
                return 0
            records = [row["record"] for row in rows]
            path = self.directory / name
            save(path, table.format.encode(records))
            digest = read_back(path, table.format, fingerprint([_parse_exact(record) for record in records]))
            written = [row["id"] for row in rows]
            if table.has_children:
                await self.connection.execute(sql[f"{table.name}_delete_children"], written)
            deleted = await self.connection.execute(sql[f"{table.name}_delete"], written)
            if deleted != f"DELETE {len(rows)}":
                raise ArchiveCorrupt(path, f"the database reports {deleted} for {len(rows)} rows")
            await self.connection.execute(sql["complete_file"], name, len(rows), digest)
        self.report(f"{name}: {len(rows)} rows, sha256 {digest}")
        return len(rows)
