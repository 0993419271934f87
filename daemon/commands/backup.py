"""`daemon backup`: dumps the whole database with pg_dump, and the roles it needs, as SQL for an empty database."""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import quote

from daemon import files
from daemon.commands.backup_file import BackupUnusable, Description, inspect, last_line
from daemon.commands.postgres_programs import CHUNK, ProgramFailed, Progress, program_for
from daemon.core.errors import OperatorFault
from daemon.postgres.connect import Connection, connect, role_of
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.postgres.queries import Queries
from daemon.schema import migrate
from daemon.settings import BadSettings, Settings

query: Final = Queries(Path(__file__).with_name("backup.sql"))

# Any client can run INSERTs, while COPY data requires psql.
_OPTIONS: Final = ("--format=plain", "--inserts", "--rows-per-insert=1000", "--no-password")
_END: Final = b"-- PostgreSQL database dump complete"
_TAIL: Final = 4096  # bytes at the end of the dump that contain that line
_SUFFIX: Final = ".backup"
_ABANDONED_AGE: Final = 86400.0  # seconds without a write after which nobody completes an incomplete file


class BackupNotWritable(OperatorFault):
    """{path} cannot be written ({reason}): choose another file."""

    exit_code: ClassVar[int] = 73

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


class DumpFailed(OperatorFault):
    """The backup failed: {reason}"""

    exit_code: ClassVar[int] = 74

    def __init__(self, reason: str) -> None:
        self.reason = reason


class BackupCorrupt(OperatorFault):
    """Reading {path} back failed ({reason}): check the disk. It was removed, and older backups were kept."""

    exit_code: ClassVar[int] = 74

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


async def keep_backups(settings: Settings, *, report: Callable[[str], None]) -> None:
    """Write a new backup to the directory of the settings, and remove all but the newest ones of this database.

    Nothing is removed until the new one is complete and has been read back. Raises an OperatorFault.
    """
    if settings.backup_dir is None:
        raise BadSettings("There is no place for the backup: give a FILE, or set ROWCAST_BACKUP_DIR.")
    directory, prefix = settings.backup_dir, f"{await _database_name(settings)}-"
    path = directory / f"{prefix}{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}{_SUFFIX}"
    try:
        files.make_private_directory(directory)
    except OSError as error:
        raise BackupNotWritable(directory, error.strerror or str(error)) from None
    await backup(settings, path, report=report)
    try:
        inspect(path, Progress(f"{path}, checking", report).add, CHUNK)
    except BackupUnusable as fault:
        path.unlink(missing_ok=True)  # or it would count as one of the newest
        raise BackupCorrupt(path, fault.reason) from None
    for old in _superseded(directory, prefix, settings.backup_keep):
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            raise BackupNotWritable(old, error.strerror or str(error)) from None
        report(f"{old}: removed")


def _superseded(directory: Path, prefix: str, keep: int) -> list[Path]:
    """The backups with this prefix but the newest `keep`, and what is left of those that were never completed."""
    complete = sorted(path for path in directory.glob(f"*{_SUFFIX}") if _has_prefix(path.name, prefix))
    incomplete = [
        path
        for path in directory.glob(files.partial_path(Path(f"*{_SUFFIX}")).name)
        if _has_prefix(path.name[1:].removesuffix(".part"), prefix)
        and time.time() - path.stat().st_mtime > _ABANDONED_AGE
    ]
    return complete[:-keep] + incomplete


def _has_prefix(name: str, prefix: str) -> bool:
    """Whether this is the name of a backup with this prefix, and not with a longer one that begins with it."""
    return name.startswith(prefix) and "-" not in name.removeprefix(prefix)


async def _database_name(settings: Settings) -> str:
    """The name of the database, as a part of a file's name."""
    connection = await connect(
        settings.require_dsn(), application_name="rowcast backup", target="any", attempts=settings.connect_attempts
    )
    try:
        return quote(await connection.fetchval("select current_database()"), safe="")
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        connection.terminate()


async def backup(settings: Settings, path: Path, *, report: Callable[[str], None]) -> None:
    """Write the database to a new file that only its owner may read, and report its size.

    The file appears only when it is complete. Raises an OperatorFault.
    """
    connection = await connect(
        settings.require_dsn(),
        application_name="rowcast backup",
        target="any",
        attempts=settings.connect_attempts,
    )
    try:
        description = Description(connection.get_server_version().major, await migrate.revisions(connection))
        head = description.line() + await _roles(connection)
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        connection.terminate()
    program, url = await program_for("pg_dump", description.postgres, settings)
    progress = Progress(str(path), report)
    try:
        digest = hashlib.sha256()
        with os.fdopen(_create(path), "wb") as file:
            role = role_of(settings.require_dsn())
            options = (*_OPTIONS, f"--role={role}") if role else _OPTIONS
            async with program.running(f"--dbname={url}", *options) as process:
                assert process.stdout is not None
                part, tail = head, b""
                while part:
                    file.write(part)
                    digest.update(part)
                    progress.add(len(part))
                    tail = (tail + part)[-_TAIL:]
                    part = await process.stdout.read(CHUNK)
            if _END not in tail:
                raise DumpFailed("pg_dump did not finish")
            file.write(last_line(digest.hexdigest()))
        files.commit_partial(path)
        size = size_of(path)
    except ProgramFailed as error:
        raise DumpFailed(str(error)) from None
    except OSError as error:
        raise BackupNotWritable(path, error.strerror or str(error)) from None
    finally:
        with suppress(OSError):
            files.partial_path(path).unlink()
    report(f"{path}: {size} bytes")


async def _roles(connection: Connection) -> bytes:
    statement: str | None = await connection.fetchval(query("roles"))
    text = f"-- The roles that the objects below belong to or are granted to, where they are missing.\n{statement}\n"
    return text.encode() if statement else b""


def _create(path: Path) -> int:
    """Create the private, incomplete file, and return its descriptor. Raises BackupNotWritable and OSError."""
    if path.exists():
        raise BackupNotWritable(path, "it is there already")
    return files.create_partial(path)


def size_of(path: Path) -> int:
    """The size of a file in bytes. Raises OSError."""
    return path.stat().st_size
