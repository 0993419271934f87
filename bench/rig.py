"""The rig of every benchmark: a Postgres with fsync on, its databases, processes, and their CPU and memory."""

import asyncio
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import asyncpg

from daemon.embedded.binaries import find_binaries
from daemon.embedded.server import EmbeddedPostgres

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "bench"
READY_TIMEOUT = 60.0  # seconds until a process is ready, including the numbering of existing rows
TICKS = os.sysconf("SC_CLK_TCK")

POSTGRES = MappingProxyType(
    {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "shared_buffers": "256MB",
        "max_wal_size": "4GB",
        "checkpoint_timeout": "30min",  # measurements begin after a checkpoint, and none happens during one
        "max_connections": "200",
    }
)
"""The settings of the server."""


class MeasurementError(Exception):
    """A measurement that could not be made, and why."""


def raise_open_files() -> int:
    """Raise the limit on open files of this process and its children to the hard limit; returns it."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return limit


@contextmanager
def passable_directory() -> Iterator[Path]:
    """A new directory that the server can traverse even if root created it."""
    directory = Path(tempfile.mkdtemp(prefix="rowcast-bench-"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Server:
    """A running server, and the databases that are copied from templates for each measurement."""

    def __init__(self, embedded: EmbeddedPostgres) -> None:
        self.embedded = embedded
        self._made: set[str] = set()
        self._count = 0

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        return self.embedded.pid

    async def template(self, name: str, build: Callable[[str], Awaitable[object]], copy_of: str = "template0") -> str:
        """The name of a template, which `build(dsn)` fills the first time."""
        if name not in self._made:
            await self._run(f'create database "{name}" template "{copy_of}"')
            await build(self.embedded.dsn_for(name))
            self._made.add(name)
        return name

    @asynccontextmanager
    async def database(self, template: str) -> AsyncIterator[str]:
        """The DSN of a copy of a template, right after a checkpoint; dropped at the end."""
        self._count += 1
        name = f"bench_{self._count}"
        await self._run(f'create database {name} template "{template}"', "checkpoint")
        try:
            yield self.embedded.dsn_for(name)
        finally:
            await self._run(f"drop database {name} with (force)")

    async def _run(self, *statements: str) -> None:
        connection = await asyncpg.connect(self.embedded.dsn_for("postgres"))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


@asynccontextmanager
async def postgres(settings: Mapping[str, str] = POSTGRES) -> AsyncIterator[Server]:
    """A private server, removed at the end."""
    with passable_directory() as directory:
        async with EmbeddedPostgres(directory, binaries=find_binaries(), settings=settings) as embedded:
            yield Server(embedded)


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a child process: what it needs to run, and `more`."""
    kept = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "TMPDIR", "PYTHONPATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | more


def daemon_settings() -> dict[str, str]:
    """Settings for the daemon from the environment of the bench; without any it runs as shipped."""
    ours = ("ROWCAST_SECRET", "ROWCAST_LISTEN", "ROWCAST_TEST")
    return {
        name: value for name, value in os.environ.items() if name.startswith("ROWCAST_") and not name.startswith(ours)
    }


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def process(
    command: Sequence[str | Path], environment: Mapping[str, str], ready: Callable[[], Awaitable[object]]
) -> AsyncIterator[int]:
    """Run a process; yields its pid once `ready` returns. Raises MeasurementError if it ends or times out first."""
    with tempfile.TemporaryDirectory(prefix="rowcast-bench-") as home:
        log = Path(home, "log")
        with log.open("wb") as output:
            child = await asyncio.create_subprocess_exec(
                *map(str, command),
                env=dict(environment),
                cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # like a service: the kernel may schedule by session
            )
        waiting, ended = asyncio.ensure_future(ready()), asyncio.ensure_future(child.wait())
        name = " ".join(map(str, command[-2:]))
        try:
            await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED, timeout=READY_TIMEOUT)
            if ended.done():
                raise MeasurementError(f"{name} ended with {child.returncode}: {last_words(log)}")
            if not waiting.done():
                raise MeasurementError(f"{name} was not ready in {READY_TIMEOUT:g} s: {last_words(log)}")
            await waiting
            yield child.pid
            if child.returncode is not None:
                raise MeasurementError(f"{name} ended with {child.returncode}: {last_words(log)}")
        finally:
            waiting.cancel()
            await end(child)
            await asyncio.gather(waiting, ended, return_exceptions=True)


def last_words(log: Path) -> str:
    """The last lines of a process's output, in one line."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])[-600:] or "it printed nothing"


async def end(child: asyncio.subprocess.Process) -> None:
    """Terminate it, and kill it if it does not end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            child.send_signal(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(20):
                await child.wait()
            return


@asynccontextmanager
async def readiness() -> AsyncIterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """A value for NOTIFY_SOCKET, and a function that waits for READY=1 on it."""
    with (
        tempfile.TemporaryDirectory(prefix="rowcast-bench-") as home,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
    ):
        notices.bind(f"{home}/notify")
        notices.setblocking(False)

        async def ready() -> None:
            while b"READY=1" not in await asyncio.get_running_loop().sock_recv(notices, 4096):
                pass

        yield f"{home}/notify", ready


async def accepts(port: int) -> None:
    """Wait until this port accepts connections."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


def python(module: str) -> list[str]:
    """The command that runs a module of this project."""
    return [sys.executable, "-m", module]


def _statistics(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; see proc(5). Empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree(pid: int) -> list[int]:
    """A process and all of its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _statistics(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for known in found:
        found += parents.get(known, [])
    return found


def cpu(pid: int) -> float:
    """Seconds of CPU that a process and its descendants have used, including those that have ended."""
    ticks = 0
    for one in tree(pid):
        if fields := _statistics(one):
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


def resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; shared memory counts once for each of them."""
    total = 0
    for one in tree(pid):
        with suppress(OSError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * resource.getpagesize()
    return total
