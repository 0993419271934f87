"""`daemon restore`: puts a backup into an empty database, roles included, in one transaction."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final

from daemon.commands.backup import query
from daemon.commands.backup_file import BackupUnusable, Description, inspect, parts
from daemon.commands.postgres_programs import CHUNK, ProgramFailed, Progress, program_for
from daemon.core.errors import OperatorFault
from daemon.postgres.connect import connect
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema import migrate
from daemon.settings import Settings

_OPTIONS: Final = (
    "--no-psqlrc",
    "--quiet",
    "--no-password",
    "--set=ON_ERROR_STOP=1",
    "--set=VERBOSITY=terse",
    "--file=-",
)


class DatabaseNotEmpty(OperatorFault):
    """The database is not empty ({contents}): create another one, or give --replace to drop what is in it."""

    exit_code: ClassVar[int] = 30

    def __init__(self, contents: list[str]) -> None:
        self.contents = ", ".join(contents)


class RestoreFailed(OperatorFault):
    """The restore failed, and nothing was changed: {reason}"""

    exit_code: ClassVar[int] = 74

    def __init__(self, reason: str) -> None:
        self.reason = reason


async def restore(settings: Settings, path: Path, *, replace: bool, report: Callable[[str], None]) -> None:
    """Restore a backup in one transaction, and report its size.

    With `replace`, what the database contains is dropped in the same transaction. Raises an OperatorFault; the
    database is then as it was.
    """
    settings = settings.as_login()  # who restores objects of several roles is none of them
    description, length = inspect(path, Progress(f"{path}, checking", report).add, CHUNK)
    major = await _check_target(settings, path, description, replace=replace)
    program, url = await program_for("psql", major, settings)
    progress = Progress(str(path), report, total=length)
    try:
        async with program.running(f"--dbname={url}", "--output=/dev/null", *_OPTIONS) as process:
            assert process.stdin is not None
            # Without COMMIT nothing stands: the input also ends when this process is killed.
            process.stdin.write(b"begin;\n")
            if replace:
                process.stdin.write(query("clear").encode())
            for part in parts(path, length, CHUNK):
                process.stdin.write(part)
                await process.stdin.drain()
                progress.add(len(part))
            process.stdin.write(f"{query('forget_log')}\ncommit;\n".encode())
            await process.stdin.drain()
    except ProgramFailed as error:
        raise RestoreFailed(str(error)) from None
    except OSError as error:
        raise BackupUnusable(path, error.strerror or str(error)) from None
    report(f"{path}: restored {length} bytes")


async def _check_target(settings: Settings, path: Path, description: Description, *, replace: bool) -> int:
    """The server's major version. Raises BackupUnusable, DatabaseNotEmpty and other OperatorFaults."""
    migrate.check_known(description.revisions)
    connection = await connect(
        settings.require_dsn(),
        application_name="rowcast restore",
        attempts=settings.connect_attempts,
    )
    try:
        major = connection.get_server_version().major
        if major < description.postgres:
            newer = f"it comes from PostgreSQL {description.postgres}, and this server is {major}"
            raise BackupUnusable(path, newer)
        contents = [row["what"] for row in await connection.fetch(query("contents"))]
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        connection.terminate()
    if contents and not replace:
        raise DatabaseNotEmpty(contents)
    return major
