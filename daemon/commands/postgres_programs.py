"""Runs the client programs of PostgreSQL: pg_dump and psql."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import quote, unquote, urlencode, urlsplit

from daemon.core.errors import OperatorFault
from daemon.embedded.binaries import installed
from daemon.settings import Settings
from daemon.settings.parameters import parameters_of

CHUNK: Final = 256 * 1024
"""Bytes that are read or written at once."""

PROGRESS_EVERY: Final = 5.0
"""Seconds between two reports of the progress."""


# Programs from before PostgreSQL 17 may not know these, and can do without them.
_NEWER_PARAMETERS: Final = {"load_balance_hosts", "sslcertmode", "gssdelegation", "sslnegotiation"}


class NoPgClient(OperatorFault):
    """{program} {major} or newer is not installed: install the client programs of PostgreSQL {major}."""

    exit_code: ClassVar[int] = 69

    def __init__(self, program: str, major: int) -> None:
        self.program, self.major = program, major


class ProgramFailed(Exception):
    """A program ended with an error; the text says why, in one line."""


@dataclass(frozen=True, slots=True)
class Program:
    """A client program, and the environment that it runs in."""

    path: Path
    environment: Mapping[str, str]

    @asynccontextmanager
    async def running(self, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """The running program, with pipes. After the block it has ended.

        Raises ProgramFailed if it ended with an error, and OSError.
        """
        process = await asyncio.create_subprocess_exec(
            self.path,
            *arguments,
            env=self.environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended: its error says why
                yield process
            process.stdin.close()
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.stdout.read()  # `wait` also waits for the end of what nobody reads any more
                await process.wait()
            lines = (await errors).decode(errors="replace").splitlines()
        if code:
            found = next((line for line in lines if re.search(r"error|fatal", line, re.IGNORECASE)), None)
            raise ProgramFailed(re.sub(r"^psql:<stdin>:\d+: (ERROR|FATAL): +", "", found or f"it ended with {code}"))


async def program_for(name: str, major: int, settings: Settings) -> tuple[Program, str]:
    """A program of this name for servers of this major version, and the URL to give it. Raises NoPgClient.

    The password is in the program's environment, since other users can see its arguments.
    """
    url, password = without_password(settings.require_dsn())
    variables = {key: value for key, value in settings.as_environment().items() if key.startswith("PG")}
    if password:
        variables["PGPASSWORD"] = password
    for path, environment in _candidates(name):
        with suppress(OSError, ProgramFailed):
            async with Program(path, environment).running("--version") as process:
                output, _ = await asyncio.gather(_read(process), process.wait())
            version = re.search(r"\d+", output.decode(errors="replace"))
            if version and int(version[0]) >= major:
                return Program(path, {**variables, **environment}), url
    raise NoPgClient(name, major)


async def _read(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.read()


def _candidates(name: str) -> Iterator[tuple[Path, Mapping[str, str]]]:
    for binaries in installed():
        yield binaries.bindir / name, binaries.environment()
    if on_path := shutil.which(name):  # where only the client programs are installed
        yield Path(on_path), {"PATH": os.defpath}


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


class Progress:
    """Reports the progress of long work every few seconds."""

    def __init__(self, what: str, report: Callable[[str], None], total: int | None = None) -> None:
        self._what, self._report, self._total = what, report, total
        self._done, self._next = 0, asyncio.get_running_loop().time() + PROGRESS_EVERY

    def add(self, count: int) -> None:
        """Count bytes that are done."""
        self._done += count
        if (now := asyncio.get_running_loop().time()) >= self._next:
            self._next = now + PROGRESS_EVERY
            share = f"{100 * self._done // self._total} %" if self._total else f"{self._done} bytes"
            self._report(f"{self._what}: {share}")
