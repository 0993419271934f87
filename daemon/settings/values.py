"""Parsers and checks of single settings. Each raises ValueError with a message that says what is expected."""

import json
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Final, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from daemon.packs import bundled

MAX_SOCKET_PATH: Final = 107
"""The longest path of a Unix socket, in bytes."""

_UNITS: Final = {
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
}

SECRET_BYTES: Final = 32
"""The minimum length of the signing key: RFC 7518, section 3.2, requires the size of the hash for HS256."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port to listen on. With port 0 the system chooses one.

    A Unix socket has the host "unix:/PATH" and port 0.
    """

    host: str
    port: int

    @property
    def is_unix(self) -> bool:
        """Whether this is a Unix socket."""
        return self.host.startswith("unix:")

    def __str__(self) -> str:
        if self.is_unix:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse HOST:PORT or [IPv6]:PORT. Raises ValueError."""
        form = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]]+)):([0-9]{1,5})", text.strip())
        if not form or int(form[3]) > 65535:
            raise ValueError(
                "HOST:PORT is needed, such as 127.0.0.1:8787, with an IPv6 address in brackets: [::]:8787"
            )
        return cls(form[1] or form[2], int(form[3]))


def read_address(value: object) -> object:
    """Turn HOST:PORT into an Address. Raises ValueError."""
    return Address.parse(value) if isinstance(value, str) else value


def read_listen(value: object) -> object:
    """Turn HOST:PORT or unix:/PATH into an Address. Raises ValueError."""
    if not isinstance(value, str) or not value.strip().startswith("unix:"):
        return read_address(value)
    path = value.strip().removeprefix("unix:")
    if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(
            f"unix: needs an absolute path of at most {MAX_SOCKET_PATH} bytes: unix:/run/rowcast/rowcast.sock"
        )
    return Address(f"unix:{path}", 0)


def read_names(value: object) -> object:
    """Turn a comma-separated list or a JSON array into a list. Raises ValueError."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [name.strip() for name in value.split(",")]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError('names are given as "one,two" or as ["one", "two"]') from None


def expand_all(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace `all` with the names of the bundled packs, and `none` with nothing."""
    return tuple(bundled()) if "all" in names else tuple(name for name in names if name != "none")


def check_name(name: str) -> str:
    """Raises ValueError for a name that a pack cannot have, or that a schema can have only in quotes."""
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise ValueError("a name consists of at most 63 characters a-z, 0-9 and _, and does not begin with a digit")
    return name


def without_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Remove duplicates, keeping the order."""
    return tuple(dict.fromkeys(names))


def lower(value: object) -> object:
    """Turn text into lower case."""
    return value.lower() if isinstance(value, str) else value


def read_port(value: object) -> object:
    """Raises ValueError for a URL, which container links may set instead of a port."""
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            "a number such as 5432 is needed. Kubernetes or Docker set this to a URL for a service called postgres: "
            "set the port yourself, set DATABASE_URL, or turn service links off"
        )
    return value


def check_secret(secret: SecretStr) -> SecretStr:
    """Raises ValueError if the key is too short."""
    if len(secret.get_secret_value().encode()) < SECRET_BYTES:
        raise ValueError(f"{SECRET_BYTES} bytes or more are needed: `openssl rand -base64 48` makes a good one")
    return secret


def check_secrets(secrets: SecretStr) -> SecretStr:
    """Raises ValueError if one of the keys, each on a line of its own, is too short."""
    for line in filter(None, map(str.strip, secrets.get_secret_value().splitlines())):
        check_secret(SecretStr(line))
    return secrets


def check_jwks(place: str) -> str:
    """Raises ValueError for a URL from which no keys should be fetched. Anything without a scheme is a path."""
    if "://" not in place:
        return place
    if not place.isascii() or not place.isprintable() or " " in place:
        raise ValueError("the URL contains characters that have to be escaped")
    try:
        url = urlsplit(place)
        host, _ = url.hostname, url.port
    except ValueError:
        raise ValueError("this is not a URL") from None
    if not host or url.username is not None or url.fragment:
        raise ValueError("a URL such as https://HOST/PATH is needed, without a user and a fragment")
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(host)):
        raise ValueError("https is needed, since whoever changes the keys on their way can be any user")
    return place


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_subject(prefix: str) -> str:
    """Raises ValueError for what cannot be the first part of a NATS subject."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", prefix):
        raise ValueError("letters, digits, _ and - are needed, in parts that . separates, such as rowcast.shop")
    return prefix


def check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError for what is not the origin of a page, as browsers write it."""
    for origin in origins:
        written = re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+", origin, re.ASCII)
        if origin not in {"*", "null"} and not (written and origin.isascii() and not _DEFAULT_PORT.match(origin)):
            raise ValueError(
                "origins are written as browsers do: https://chat.example.com, in lower case, without / and without "
                f"the default port, and names in other scripts as xn--: {origin}"
            )
    return origins


_DEFAULT_PORT: Final = re.compile(r"(http://.*:80|https://.*:443)$")


def check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError for what is not the name of a host."""
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", host):
            raise ValueError(f"names without a port are needed, such as chat.example.com: {host}")
    return tuple(map(str.lower, hosts))


def check_proxies(proxies: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError for what is neither an address, nor a network, nor `unix`."""
    for proxy in proxies:
        try:
            if proxy != "unix":
                ip_network(proxy)
        except ValueError:
            raise ValueError(f"addresses or networks such as 192.0.2.0/24 are needed, or unix: {proxy}") from None
    return proxies


def state_home() -> Path:
    """The default data directory, in the user's state directory (XDG Base Directory Specification)."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        if os.geteuid() == 0:
            # Postgres does not run as root, and its user cannot enter root's home. /var/lib/rowcast belongs to the
            # systemd unit, whose start changes the owner of everything in it.
            return Path("/var/lib/rowcast-up")
        try:
            state = Path.home() / ".local/state"
        except RuntimeError:  # in a container the user may have neither HOME nor an entry in /etc/passwd
            state = Path("/var/tmp")  # noqa: S108
    return state / "rowcast"


def read_duration(value: object) -> object:
    """Turn a number with a unit, such as 90m, into a timedelta. Raises ValueError."""
    if not isinstance(value, str):
        return value
    written = re.fullmatch(r"([0-9]{1,6})\s*([smhd])", value.strip().lower())
    if written is None:
        raise ValueError("this is not a duration: write 90m, 12h or 7d")
    return int(written[1]) * _UNITS[written[2]]


def write_duration(duration: timedelta) -> str:
    """The text for which `read_duration` returns this duration."""
    unit = next((unit for unit, length in _UNITS.items() if not duration % length), "s")
    return f"{duration // _UNITS[unit]}{unit}"


Name = Annotated[str, AfterValidator(check_name)]
# Postgres keeps milliseconds and limits as integers: what it would not take is refused at the start.
Seconds = Annotated[float, Field(ge=0.001, le=1_000_000, allow_inf_nan=False)]
SecondsOrOff = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2_147_483_647)]
Share = Annotated[float, Field(gt=0, le=1)]
