"""SSH connections that forward a Unix socket to the database. This module alone uses asyncssh, which is an extra."""

import asyncio
import errno
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import asyncssh
from asyncssh.known_hosts import SSHKnownHosts
from asyncssh.public_key import get_default_certificate_algs, get_default_public_key_algs

from daemon.core.errors import OperatorFault
from daemon.postgres.errors import ConnectionRefused, raise_if_cancelled
from daemon.postgres.ssh_faults import (
    ForwardingProhibited,
    HostKeyChanged,
    HostKeyUnknown,
    KnownHostsUnusable,
    SshAuthenticationFailed,
    SshFault,
    SshHostUnknown,
    SshKeyMissing,
    SshKeyUnusable,
    SshRefused,
    SshTimeout,
    TunnelDirectoryUnusable,
)
from daemon.settings.ssh import DEFAULT_PORT, SshRoute

CONNECT_TIMEOUT: Final = 10.0  # seconds for all of a connection, authentication included
PROBE_TIMEOUT: Final = 10.0  # seconds for the SSH host to reach the database
CLOSE_TIMEOUT: Final = 2.0  # seconds for the peer to close

OPTIONS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "config": None,  # neither the user's ssh_config, nor the agent: the settings say it all
        "agent_path": None,
        "preferred_auth": "publickey",
        "connect_timeout": CONNECT_TIMEOUT,
        "login_timeout": CONNECT_TIMEOUT,
        # A peer that vanished is noticed within 20 s, like that of a direct connection.
        "keepalive_interval": 5,
        "keepalive_count_max": 3,
    }
)

MAX_REASON: Final = 200  # characters of a peer's text in a message


def _read_key(route: SshRoute) -> asyncssh.SSHKey:
    passphrase = route.passphrase.get_secret_value() if route.passphrase else None
    try:
        return asyncssh.read_private_key(route.key, passphrase)
    except FileNotFoundError:
        raise SshKeyMissing(route.key) from None
    except OSError as error:
        raise SshKeyUnusable(route.key, error.strerror or "it cannot be read") from None
    except asyncssh.KeyEncryptionError:
        raise SshKeyUnusable(route.key, _WRONG if passphrase else _ENCRYPTED) from None
    except asyncssh.KeyImportError as error:
        encrypted = "Passphrase" in str(error)
        raise SshKeyUnusable(route.key, _ENCRYPTED if encrypted else "it is not a private key") from None


_ENCRYPTED: Final = "it is encrypted, so set SSH_KEY_PASSPHRASE or SSH_KEY_PASSPHRASE_FILE"
_WRONG: Final = "SSH_KEY_PASSPHRASE does not decrypt it"


class _Client(asyncssh.SSHClient):
    """Remembers which host key was refused, and why the connection ended."""

    def __init__(self, route: SshRoute, known_hosts: SSHKnownHosts) -> None:
        self._route, self._known_hosts = route, known_hosts
        self.refused: HostKeyUnknown | None = None
        self.end = "the server closed it"

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Refuse a key that is not in the known hosts."""
        found, *_ = asyncssh.match_known_hosts(self._known_hosts, host, addr, _port(port))
        kind = HostKeyChanged if found else HostKeyUnknown
        name = f"{key.get_algorithm()} {key.get_fingerprint()}"
        self.refused = kind(self._route.address, name, self._route.known_hosts)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Keep the reason."""
        if exc is not None:
            self.end = _reason(exc)


class Session:
    """An SSH connection that forwards the socket of a route to its database."""

    def __init__(self, route: SshRoute, connection: asyncssh.SSHClientConnection, client: _Client) -> None:
        self._route, self._connection, self._client = route, connection, client

    async def forward(self) -> None:
        """Open the socket; connections to it lead to the database. Raises TunnelDirectoryUnusable."""
        here, database = str(self._route.socket), self._route.database
        try:
            if database.socket:
                await self._connection.forward_local_path(here, database.socket)
            else:
                await self._connection.forward_local_path_to_port(here, database.host, database.port)
        except OSError as error:
            raise TunnelDirectoryUnusable(self._route.directory, error.strerror or str(error)) from None

    async def probe(self) -> None:
        """Connect to the database and hang up: behind a forwarded socket the reason of a refusal is lost.

        Raises ConnectionRefused and ForwardingProhibited.
        """
        database = self._route.database
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                if database.socket:
                    _, writer = await self._connection.open_unix_connection(database.socket)
                else:
                    _, writer = await self._connection.open_connection(database.host, database.port)
        except asyncssh.ChannelOpenError as error:
            if error.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
                raise ForwardingProhibited(self._route.address, _clean(error.reason), str(database)) from None
            # A server says the same whether there is no such socket or forwarding to sockets is prohibited.
            more = ", or AllowStreamLocalForwarding is off" if database.socket else ""
            raise ConnectionRefused(f"{_clean(error.reason)}{more}", address=str(self._route)) from None
        except TimeoutError:
            raise ConnectionRefused("no answer in time", address=str(self._route)) from None
        except asyncssh.Error as error:
            raise SshFault(self._route.address, _reason(error)) from None
        writer.close()

    async def ended(self) -> str:
        """Wait until the connection has ended; returns why."""
        await self._connection.wait_closed()
        return self._client.end

    async def close(self) -> None:
        """Close the connection and the socket."""
        self._connection.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._connection.wait_closed()
            return
        self._connection.abort()


Connect = Callable[[], Awaitable[Session]]
"""Connects and authenticates. Raises an SshFault or KnownHostsUnusable."""


async def connector(route: SshRoute) -> Connect:
    """A function that connects, with the private key in memory. Raises SshKeyUnusable."""
    key = await asyncio.to_thread(_read_key, route)  # to decrypt it takes a second
    return partial(_connect, route, key)


async def _connect(route: SshRoute, key: asyncssh.SSHKey) -> Session:
    known_hosts = _read_known_hosts(route)
    client = _Client(route, known_hosts)
    try:
        connection = await asyncssh.connect(
            route.host,
            route.port,
            username=route.user,
            client_keys=[key],
            known_hosts=known_hosts,
            server_host_key_algs=_host_key_algorithms(route, known_hosts),
            client_factory=lambda: client,
            **OPTIONS,
        )
    except (OSError, asyncssh.Error, ValueError) as error:
        raise_if_cancelled()
        raise client.refused or _explain(error, route) from None
    return Session(route, connection, client)


def _read_known_hosts(route: SshRoute) -> SSHKnownHosts:
    try:
        files = [str(path) for path in route.known_hosts if path.exists()]
        if files:
            return asyncssh.read_known_hosts(files)
        reason = "there is no file"
    except OSError as error:
        reason = error.strerror or "error"
    except ValueError:
        reason = "a line is not in their format"
    raise KnownHostsUnusable(route.known_hosts, reason)


def _host_key_algorithms(route: SshRoute, known_hosts: SSHKnownHosts) -> list[str]:
    """All algorithms, and first those of the known keys: a host with several keys then shows one that is known.

    By default asyncssh offers no others. A server without a known key would just hang up, and its key not be seen.
    """
    keys, authorities, *_ = asyncssh.match_known_hosts(known_hosts, route.host, "", _port(route.port))
    certificates = get_default_certificate_algs() if authorities else []
    known = [algorithm for key in keys for algorithm in key.sig_algorithms]
    return [name.decode() for name in dict.fromkeys([*certificates, *known, *get_default_public_key_algs()])]


def _explain(error: OSError | asyncssh.Error | ValueError, route: SshRoute) -> OperatorFault:
    address, text = route.address, str(error)
    match error:
        case socket.gaierror():
            return SshHostUnknown(address, error.strerror or "no address")
        case TimeoutError():
            return SshTimeout(address)
        case asyncssh.ConnectionLost() if "timeout" in text:
            return SshTimeout(address)
        case OSError():
            # For a host with several addresses, asyncio raises one error that joins the texts of all.
            numbers = {error.errno} if error.errno else {int(n) for n in re.findall(r"\[Errno (\d+)]", text)}
            if numbers == {errno.ECONNREFUSED}:
                return SshRefused(address)
            return SshFault(address, ", ".join(errno.errorcode.get(n, str(n)) for n in sorted(numbers)) or "lost")
        case asyncssh.PermissionDenied():
            return SshAuthenticationFailed(address, route.user, route.key)
    return SshFault(address, _reason(error))


def _reason(error: Exception) -> str:
    return _clean(error.reason if isinstance(error, asyncssh.Error) else str(error)) or type(error).__name__


def _clean(text: str) -> str:
    """A peer's text, in one line that cannot control a terminal."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:MAX_REASON]


def _port(port: int) -> int | None:
    return None if port == DEFAULT_PORT else port  # known_hosts names only other ports
