"""The SSH tunnel that the settings describe: where it leads, and the database URL that leads through it."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from pydantic import SecretStr

from daemon.settings.database_url import environment_of_driver, wants_tls
from daemon.settings.parameters import BadParameter, check_parameters, parameters_of
from daemon.settings.values import Address

SOCKET_PORT: Final = 5432
"""The port in the name of the tunnel's socket; it has nothing to do with the port of the database."""

DEFAULT_PORT: Final = 22
KNOWN_HOSTS: Final = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")
DEFAULT_KEYS: Final = {"development": "~/.ssh/id_rsa", "production": "/etc/ssh/private_key"}
DEFAULT_ATTEMPTS: Final = {"development": 3, "production": 5}
DEFAULT_DELAYS: Final = {"development": 1.0, "production": 2.0}  # seconds


@dataclass(frozen=True, slots=True)
class Database:
    """A database as seen from the SSH host. `host` is a name, an address, or the directory of a Unix socket."""

    host: str
    port: int

    @property
    def socket(self) -> str | None:
        """The path of its Unix socket; None if it is reached over TCP."""
        return f"{self.host}/.s.PGSQL.{self.port}" if self.host.startswith("/") else None

    def __str__(self) -> str:
        return self.socket or str(Address(self.host, self.port))


@dataclass(frozen=True, slots=True)
class SshRoute:
    """How to reach the database through SSH. `retry_delay` is in seconds."""

    host: str
    port: int
    user: str
    key: Path
    passphrase: SecretStr | None
    known_hosts: tuple[Path, ...]
    attempts: int
    retry_delay: float
    database: Database
    directory: Path

    @property
    def address(self) -> str:
        """The SSH host and port, for messages."""
        return str(Address(self.host, self.port))

    @property
    def socket(self) -> Path:
        """The tunnel's end on this machine."""
        return self.directory / f".s.PGSQL.{SOCKET_PORT}"

    def __str__(self) -> str:
        """What messages call the database."""
        through = self.host if self.port == DEFAULT_PORT else self.address
        return f"{self.database} through {through}"


def database_of(url: str) -> Database:
    """The one database that a URL names. Raises ValueError, whose message contains nothing of the URL."""
    given, environment = parameters_of(url), environment_of_driver()
    try:
        check_parameters(given)
    except BadParameter as problem:
        raise ValueError(f"DATABASE_URL: {problem}") from None
    if wants_tls(url):
        raise ValueError("SSH_HOST excludes TLS to the database: leave out sslmode; SSH encrypts as far as SSH_HOST")
    place = urlsplit(url).netloc.rpartition("@")[2] or given.get("host") or environment.get("PGHOST", "")
    if "," in place:
        raise ValueError("SSH_HOST leads to one database: name a single host in DATABASE_URL")
    if not place and "service" in given:
        raise ValueError("SSH_HOST needs the host of the database in DATABASE_URL, not only in its service")
    host, port = _split(unquote(place))
    return Database(host or "localhost", int(port or given.get("port") or environment.get("PGPORT", "5432")))


def _split(place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, _, port = place[1:].partition("]")
        return host, port.removeprefix(":")
    if place.count(":") > 1:  # an IPv6 address, as the parameter host has it
        return place, ""
    host, _, port = place.partition(":")
    return host, port


def url_through(url: str, directory: Path) -> str:
    """The same URL with the tunnel's socket in this directory for a host."""
    parts = urlsplit(url)
    account, at, _ = parts.netloc.rpartition("@")
    kept = {
        name: value
        for name, value in parameters_of(url).items()
        if name not in {"host", "port"} and not name.startswith("ssl")
    }
    query = "&".join(
        f"{name}={quote(value, safe='')}"
        for name, value in {**kept, "host": str(directory), "port": str(SOCKET_PORT)}.items()
    )
    return f"{parts.scheme}://{account}{at}{parts.path}?{query}"


def tunnel_directory(*destination: object) -> Path:
    """The private directory of a tunnel: one for each process, and in it for each destination."""
    return Path(tempfile.gettempdir(), f"rowcast-{os.getpid()}-{hash(destination) & 0xFFFF_FFFF:08x}")


def expanded(path: str | Path) -> Path:
    """The path, with the user's home for `~`, if there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
