"""What every line stands on: a Postgres with fsync on, databases in it, processes, and what they have used."""

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
READY_TIMEOUT = 60.0  # seconds for a process to be ready, numbering of what it finds included
TICKS = os.sysconf("SC_CLK_TCK")

POSTGRES = MappingProxyType(
    {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "shared_buffers": "256MB",
        "max_wal_size": "4GB",
        "checkpoint_timeout": "30min",  # each measurement begins behind a checkpoint, and none falls into it
        "max_connections": "200",
    }
)
"""What the server is started with."""


class Broken(Exception):
    """A measurement that could not be made, and why."""


def raise_open_files() -> int:
    """Let this process and its children open as many files as they may; how many that is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


@contextmanager
def passable_directory() -> Iterator[Path]:
    """A new directory that the server may pass through even if root made it."""
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
        """The DSN of a copy of a template, right behind a checkpoint; dropped at the end."""
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
    """A server of our own, gone at the end."""
    with passable_directory() as directory:
        async with EmbeddedPostgres(directory, binaries=find_binaries(), settings=settings) as embedded:
            yield Server(embedded)


def clean_environment(**more: str) -> dict[str, str]:
    """What a child gets: what it needs to run, and what is given."""
    kept = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "TMPDIR", "PYTHONPATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | more


def asked_of_the_daemon() -> dict[str, str]:
    """The settings of the daemon that whoever runs the bench has chosen; without any it runs as shipped."""
    ours = ("ROWCAST_SECRET", "ROWCAST_LISTEN", "ROWCAST_TEST")
    return {
        name: value for name, value in os.environ.items() if name.startswith("ROWCAST_") and not name.startswith(ours)
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def process(
    command: Sequence[str | Path], environment: Mapping[str, str], ready: Callable[[], Awaitable[object]]
) -> AsyncIterator[int]:
    """The pid of a process for which `ready` has come back; it is asked to end at the end. Raises Broken."""
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
                start_new_session=True,  # as a service has: the kernel may share the processors out by sessions
            )
        waiting, ended = asyncio.ensure_future(ready()), asyncio.ensure_future(child.wait())
        name = " ".join(map(str, command[-2:]))
        try:
            await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED, timeout=READY_TIMEOUT)
            if ended.done():
                raise Broken(f"{name} ended with {child.returncode}: {last_words(log)}")
            if not waiting.done():
                raise Broken(f"{name} was not ready in {READY_TIMEOUT:g} s: {last_words(log)}")
            await waiting
            yield child.pid
            if child.returncode is not None:
                raise Broken(f"{name} ended with {child.returncode}: {last_words(log)}")
        finally:
            waiting.cancel()
            await end(child)
            await asyncio.gather(waiting, ended, return_exceptions=True)


def last_words(log: Path) -> str:
    """The end of what a process has said, in one line."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])[-600:] or "it said nothing"


async def end(child: asyncio.subprocess.Process) -> None:
    """Ask it to end, and kill it if it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            child.send_signal(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(20):
                await child.wait()
            return


@asynccontextmanager
async def readiness() -> AsyncIterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """What NOTIFY_SOCKET is to be, and a wait for the READY=1 that comes there."""
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


async def answers(port: int) -> None:
    """Wait until somebody accepts at this port."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


def python(module: str) -> list[str]:
    """How to run a module of ours."""
    return [sys.executable, "-m", module]


def _statistics(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name; see proc(5). Empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _statistics(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for known in found:
        found += parents.get(known, [])
    return found


def cpu(pid: int) -> float:
    """Seconds of CPU that a process and its descendants have used, those that ended among them."""
    ticks = 0
    for one in tree(pid):
        if fields := _statistics(one):
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


def resident(pid: int) -> int:
    """Bytes of memory that a process and its descendants hold, what they share counted once each."""
    total = 0
    for one in tree(pid):
        with suppress(OSError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * resource.getpagesize()
    return total
