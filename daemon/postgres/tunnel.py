"""The SSH tunnel to the database, for the time of a command.

A tunnel is a Unix socket in a private directory. While the tunnel is open, connections to the socket lead to the
database, and `Settings.dsn` names it, so nothing reaches the database past the tunnel. When the SSH connection is
lost, connections are refused until the tunnel is open again, at the same path.

    opening --connected--> open --lost--> down --connected--> open
       |
       '--a fault, or no attempt left--> the command ends

Each process has a tunnel of its own, so several workers have several.
"""

import asyncio
import itertools
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from daemon.core.errors import OperatorFault
from daemon.health import Check, Progress
from daemon.logs import get_logger
from daemon.postgres.backoff import MAX_DELAY, backoff_delay
from daemon.postgres.errors import ConnectionRefused, raise_if_cancelled
from daemon.postgres.ssh_faults import SshFault, SshUnavailable, TunnelDirectoryUnusable
from daemon.settings import Settings
from daemon.settings.ssh import SshRoute
from daemon.settings.values import MAX_SOCKET_PATH

if TYPE_CHECKING:
    from daemon.postgres.ssh import Connect, Session

log = get_logger()


class Tunnel:
    """A tunnel, and how many use it."""

    def __init__(self, route: SshRoute) -> None:
        self.users = 0
        self._route = route
        self._failure = ""  # why the tunnel is down; empty while it is open
        self._connect_ssh: Connect
        self._session: Session
        self._keeping: asyncio.Task[None]

    def problems(self) -> list[str]:
        """Why the tunnel is down, if it is."""
        return [f"the SSH tunnel to {self._route.address} is down: {self._failure}"] if self._failure else []

    async def open(self) -> None:
        """Open the tunnel, and keep it open until `close`. Raises an OperatorFault."""
        try:
            from daemon.postgres import ssh  # noqa: PLC0415 - asyncssh is an extra
        except ImportError:
            raise SshUnavailable from None
        self._connect_ssh = await ssh.connector(self._route)
        await self._open_at_startup()
        self._keeping = asyncio.create_task(self._keep_open())

    async def close(self) -> None:
        """Close the tunnel and its connections."""
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        await self._session.close()
        self._remove_directory()

    async def _open_at_startup(self) -> None:
        for attempt in itertools.count(1):
            try:
                await self._connect(probe=True)
            except (SshFault, ConnectionRefused) as fault:
                if attempt >= self._route.attempts or not getattr(fault, "transient", True):
                    raise
                log.warning("tunnel_retry", reason=str(fault), attempt=attempt)
                await asyncio.sleep(self._route.retry_delay)
            else:
                return

    async def _connect(self, *, probe: bool = False) -> None:
        """Connect and open the socket; with `probe`, only if the database can be reached. Raises an OperatorFault."""
        session = await self._connect_ssh()
        try:
            raise_if_cancelled()
            if probe:
                await session.probe()
            _make_directory(self._route)
            await session.forward()
        except BaseException:
            await session.close()
            raise
        self._session, self._failure = session, ""
        log.info("tunnel_connected", through=self._route.address, database=str(self._route.database))

    async def _keep_open(self) -> None:
        """Open the tunnel again whenever it is lost."""
        attempt = 0
        while True:
            since = time.monotonic()
            self._failure = await self._session.ended()
            log.warning("tunnel_lost", through=self._route.address, reason=self._failure)
            if time.monotonic() - since > MAX_DELAY:
                attempt = 0
            progress = Progress()
            while self._failure:
                await asyncio.sleep(backoff_delay(attempt))
                attempt += 1
                try:
                    await self._connect()
                except OperatorFault as fault:
                    self._failure = str(fault)
                    if progress.fail(self._failure):
                        log.warning("tunnel_retry", reason=self._failure, attempt=attempt)

    def _remove_directory(self) -> None:
        with suppress(OSError):
            self._route.socket.unlink(missing_ok=True)
            self._route.directory.rmdir()


def _make_directory(route: SshRoute) -> None:
    """Make the tunnel's directory, which only its owner may enter. Raises TunnelDirectoryUnusable."""
    directory = route.directory
    if len(os.fsencode(route.socket)) > MAX_SOCKET_PATH:
        raise TunnelDirectoryUnusable(directory.parent, "its path is too long")
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()  # a process of the same number may have left it behind
    except OSError as error:
        raise TunnelDirectoryUnusable(directory.parent, error.strerror or str(error)) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise TunnelDirectoryUnusable(directory, "it belongs to another user")


_open: Final[dict[Path, Tunnel]] = {}
_changing: Final = asyncio.Lock()


@asynccontextmanager
async def through_tunnel(settings: Settings) -> AsyncIterator[Check]:
    """Keep the SSH tunnel of these settings open while the block runs; without SSH_HOST there is none.

    Yields a function that returns why the tunnel is down. Blocks with equal settings share one tunnel. Raises an
    OperatorFault if it cannot be opened.
    """
    route = settings.ssh_route
    if route is None:
        yield list
        return
    async with _changing:
        tunnel = _open.get(route.directory)
        if tunnel is None:
            tunnel = Tunnel(route)
            await tunnel.open()
            _open[route.directory] = tunnel
        tunnel.users += 1
    try:
        yield tunnel.problems
    finally:
        async with _changing:
            tunnel.users -= 1
            if not tunnel.users:
                del _open[route.directory]
                await tunnel.close()
