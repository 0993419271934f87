"""Checks of the database URL: whether it is well-formed, and whether it is safe for production."""

import os
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Self
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from daemon.settings.parameters import parameters_of


class DatabaseUrl(str):
    """A database URL, and what it does not say itself.

    A superuser may not connect to it `in_production`. `address` is what messages call the database if that is not
    the host of the URL. Every session takes on `role` (SET ROLE), if there is one.
    """

    __slots__ = ("address", "in_production", "role")
    in_production: bool
    address: str | None
    role: str | None

    def __new__(  # noqa: D102
        cls, url: str, *, in_production: bool = False, address: str | None = None, role: str | None = None
    ) -> Self:
        made = super().__new__(cls, url)
        made.in_production, made.address, made.role = in_production, address, role
        return made


_HOST_AND_PORT: Final = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")


def check_database_url(url: SecretStr) -> SecretStr:
    """Raises ValueError for a URL that the driver would misread. The message contains nothing of the URL."""
    text = url.get_secret_value().strip()
    scheme, separator, _ = text.partition("://")
    if not separator or scheme not in {"postgres", "postgresql"}:
        driver = ', without "+driver"' if "+" in scheme else ""
        raise ValueError(f"postgresql://USER:PASSWORD@HOST:PORT/DATABASE is needed{driver}")
    try:
        parts = urlsplit(text)
        account, at, hosts = parts.netloc.rpartition("@")
        # An @ only behind a / or a ? ends a password that contains these; its beginning looks like a port.
        is_cut = bool(hosts) and not at and "@" in parts.path + parts.query
        whole = not (parts.fragment or is_cut or "@" in account)
        whole = whole and all(map(_HOST_AND_PORT.fullmatch, hosts.split(",")))
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(
            "special characters in the user and the password must be percent-encoded (@ is %40, / is %2F)"
        )
    return SecretStr(text)


def environment_of_driver() -> dict[str, str]:
    """The variables that libpq and the driver read, such as PGHOST; those without a value are left out."""
    return {name: value for name, value in os.environ.items() if name.startswith("PG") and value}


_LOCAL_NAMES: Final = {
    "localhost",
    "localhost.localdomain",
    "localhost4",
    "localhost6",
    "ip6-localhost",
    "ip6-loopback",
}
_ENCRYPTED: Final = {"require", "verify-ca", "verify-full"}


def _is_this_machine(host: str) -> bool:
    """True if this host is the machine itself, without a name lookup."""
    name = host.strip().rstrip(".").lower()
    if not name or name in _LOCAL_NAMES or name.endswith(".localhost"):
        return True
    address: IPv4Address | IPv6Address
    try:
        address = ip_address(name)
    except ValueError:
        try:
            address = IPv4Address(socket.inet_aton(name))  # resolvers accept 127.1 and 0x7f000001 too
        except (OSError, UnicodeError):
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _host(place: str) -> str:
    """The host of HOST:PORT or [IPv6]:PORT, or a directory, as the driver reads it."""
    if place.startswith("/"):
        return place
    return place[1:].partition("]")[0] if place.startswith("[") else unquote(place.partition(":")[0])


def wants_tls(dsn: str) -> bool:
    """Whether this URL does without TLS under no circumstances. PGSSLMODE is the default."""
    options = parameters_of(dsn)
    mode = options.get("sslmode") or ("service" not in options and os.environ.get("PGSSLMODE"))
    if options.get("ssl") == "true":
        mode = mode or "require"
    return options.get("sslrootcert") == "system" or mode in _ENCRYPTED


def production_problem(dsn: str) -> str | None:
    """Why this URL is not allowed in production, or None. The text contains nothing of the URL.

    The URL is read as the driver reads it: a host before the `?` wins, and PGHOST and PGSSLMODE are the defaults.
    """
    url = urlsplit(dsn)
    options = parameters_of(dsn)
    named = url.netloc.rpartition("@")[2] or options.get("host") or os.environ.get("PGHOST", "")
    over_tcp = [host for host in map(_host, named.split(",")) if not host.startswith("/")]
    if any(map(_is_this_machine, over_tcp)):
        return "a database on localhost over TCP: use its host name, or the directory of its socket"
    if over_tcp and not wants_tls(dsn):
        return "a database without TLS: add sslmode=verify-full to its URL, or at least sslmode=require"
    return None
