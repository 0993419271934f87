"""`daemon backup`: dumps the whole database with pg_dump, as SQL for psql and an empty database."""

import asyncio
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import quote, unquote, urlencode, urlsplit

from daemon import files
from daemon.core.errors import OperatorFault
from daemon.embedded.binaries import installed
from daemon.postgres.connect import connect
from daemon.settings import Settings
from daemon.settings.parameters import parameters_of

# Any client can run INSERTs, while COPY data requires psql.
_OPTIONS: Final = ("--format=plain", "--inserts", "--rows-per-insert=1000", "--no-password")
# A pg_dump from before PostgreSQL 17 may not know these, and a dump can do without them.
_NEWER_PARAMETERS: Final = {"load_balance_hosts", "sslcertmode", "gssdelegation", "sslnegotiation"}
_END: Final = b"-- PostgreSQL database dump complete"
_TAIL: Final = 4096  # bytes at the end of the file that contain that line


class NoPgDump(OperatorFault):
    """pg_dump {major} or newer is not installed: install the client programs of PostgreSQL {major}."""

    exit_code: ClassVar[int] = 69

    def __init__(self, major: int) -> None:
        self.major = major


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


async def backup(settings: Settings, path: Path, *, report: Callable[[str], None]) -> None:
    """Write the database to a new file that only its owner may read, and report its size.

    The file appears only when it is complete. Raises an OperatorFault.
    """
    dsn = settings.require_dsn()
    connection = await connect(
        dsn, application_name="rowcast backup", target="any", attempts=settings.connect_attempts
    )
    major = connection.get_server_version().major
    await connection.close()
    program, environment = await _pg_dump(major)
    url, password = without_password(dsn)
    pg_variables = {name: value for name, value in settings.as_environment().items() if name.startswith("PG")}
    try:
        _create(path)
        command = [str(program), f"--dbname={url}", f"--file={files.partial_path(path)}", *_OPTIONS]
        await _run(command, {**pg_variables, **environment, **({"PGPASSWORD": password} if password else {})})
        if not _is_complete(files.partial_path(path)):
            raise DumpFailed("pg_dump did not finish")
        files.commit_partial(path)
        size = _size(path)
    except OSError as error:
        raise BackupNotWritable(path, error.strerror or str(error)) from None
    finally:
        with suppress(OSError):
            files.partial_path(path).unlink()
    report(f"{path}: {size} bytes")


def without_password(dsn: str) -> tuple[str, str | None]:
    """Split a database URL into a URL that process lists may show, and its password."""
    url = urlsplit(dsn)
    account, at, hosts = url.netloc.rpartition("@")
    user, _, password = account.partition(":")
    options = parameters_of(dsn)
    in_query = options.pop("password", "")
    known = {name: value for name, value in options.items() if name not in _NEWER_PARAMETERS}
    kept = urlencode(known, quote_via=quote)  # libpq does not take + for a blank
    return url._replace(netloc=f"{user}{at}{hosts}", query=kept).geturl(), unquote(password) or in_query or None


async def _pg_dump(major: int) -> tuple[Path, Mapping[str, str]]:
    """A pg_dump for servers of this major version, and its environment. Raises NoPgDump."""
    for program, environment in _candidates():
        with suppress(OSError, DumpFailed):
            version = re.search(r"\d+", await _run([str(program), "--version"], environment))
            if version and int(version[0]) >= major:
                return program, environment
    raise NoPgDump(major)


def _candidates() -> Iterator[tuple[Path, Mapping[str, str]]]:
    for binaries in installed():
        yield binaries.bindir / "pg_dump", binaries.environment()
    if on_path := shutil.which("pg_dump"):  # where only the client programs are installed
        yield Path(on_path), {"PATH": os.defpath}


async def _run(command: list[str], environment: Mapping[str, str]) -> str:
    """Run a program and return its output. Raises OSError, and DumpFailed with its error message."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise DumpFailed(next((line for line in lines if "error" in line), f"it ended with {process.returncode}"))
    return output.decode(errors="replace")


def _create(path: Path) -> None:
    """Create the private, empty file that pg_dump writes to. Raises BackupNotWritable and OSError."""
    if path.exists():
        raise BackupNotWritable(path, "it is there already")
    os.close(files.create_partial(path))


def _size(path: Path) -> int:
    return path.stat().st_size


def _is_complete(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return _END in file.read()
