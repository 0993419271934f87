"""Whom a request comes from, and whether it may: origins of pages, names of this daemon, and trusted proxies."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, Literal

from daemon.gateway.http import Page, Request, text_page

UNIX: Final = "unix"
"""How a setting names the peers of a Unix socket among the trusted proxies."""

ProxyHeader = Literal["x-forwarded-for", "forwarded"]

_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}
_PORT: Final = re.compile(r":(\d*|_[\w.-]+)\Z")  # a proxy may write the latter (RFC 7239, 6.3)
_FOR: Final = re.compile(r'(?:^|;)\s*for\s*=\s*"?([^;"]*)"?', re.IGNORECASE)

OTHER_ORIGIN: Final = text_page("Pages of this origin may not connect: add it to ROWCAST_ORIGINS.", 403)
PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET",
    "Access-Control-Allow-Headers": "Authorization, Cache-Control, Last-Event-ID",
    "Access-Control-Max-Age": "600",
}
"""What the page of another origin may ask for, in the answer to the request that asks for it."""

OTHER_HOST: Final = text_page("This daemon does not have the name in Host: add it to ROWCAST_HOSTS.", 421)


def host_name(host: str) -> str:
    """The name in a Host header or the authority of a URL, without its port and brackets, in lower case."""
    return _PORT.sub("", host).strip("[]").lower()


def address_in(text: str) -> IPv4Address | IPv6Address | None:
    """The IP address that `text` is; None if it is none."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_this_machine(name: str) -> bool:
    """Whether this name or address always means the machine of whoever uses it."""
    address = address_in(name)
    return name == "localhost" if address is None else address.is_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Who may come in.

    `origins` are those of pages that may connect besides the daemon's own; `*` means all. With `admits_local_pages`,
    pages of this machine, files included, may connect to a daemon that they address as this machine. `has_tls`: the
    daemon's own pages come with https only, so one that came without can be of whoever is in between. `hosts` are the
    names of this daemon; if there are none, only what is trusted because of its address asks for one.
    `proxies` are believed about the address of a client, in `proxy_header` and in no other.
    """

    origins: frozenset[str] = frozenset()
    admits_local_pages: bool = True
    has_tls: bool = False
    hosts: frozenset[str] = frozenset()
    proxies: tuple[IPv4Network | IPv6Network | Literal["unix"], ...] = ()
    proxy_header: ProxyHeader = "x-forwarded-for"

    def wrong_host(self, request: Request) -> Page | None:
        """The answer to a request for a daemon of another name."""
        return OTHER_HOST if self.hosts and not self.is_named_in(request) else None

    def is_named_in(self, request: Request) -> bool:
        """Whether Host is an address, `localhost`, or a name of this daemon.

        No site can let any of these point here (DNS rebinding), so a page of that host is this daemon's own.
        """
        name = host_name(request.headers.get("host", ""))
        return name == "localhost" or name in self.hosts or address_in(name) is not None

    def wrong_origin(self, request: Request) -> Page | None:
        """The answer to a page that may not connect. Programs that are no browsers send no Origin."""
        origin = request.headers.get("origin")
        if origin is None or {"*", origin} & self.origins:
            return None
        scheme, _, authority = origin.partition("://")
        host = request.headers.get("host", "").lower()
        is_own = authority and host.removesuffix(_DEFAULT_PORTS.get(scheme, ":")) == authority
        if is_own and not (self.has_tls and scheme == "http"):
            return None
        is_local = origin == "null" or is_this_machine(host_name(authority))
        if is_local and self.admits_local_pages and is_this_machine(host_name(host)):
            return None
        return OTHER_ORIGIN

    def sharing(self, request: Request) -> dict[str, str]:
        """The headers that let a page of another origin read the answer, if `wrong_origin` lets it in.

        What a browser sends by itself, such as the cookie that a proxy turns into a token, may go with the request of
        a page whose origin is named, and of no other: `*` and `null` can be anybody.
        """
        origin = request.headers.get("origin")
        if origin is None:
            return {}
        headers = {"Access-Control-Expose-Headers": "Retry-After", "Vary": "Origin"}
        if "*" in self.origins and origin not in self.origins:
            return headers | {"Access-Control-Allow-Origin": "*"}
        trusted = {} if origin == "null" else {"Access-Control-Allow-Credentials": "true"}
        return headers | trusted | {"Access-Control-Allow-Origin": origin}

    def trusts(self, host: str) -> bool:
        """Whether a peer with this address, "" for one on a Unix socket, is a trusted proxy."""
        if not self.proxies:
            return False
        if not host:
            return UNIX in self.proxies
        address = address_in(host)
        return any(address in network for network in self.proxies if not isinstance(network, str) and address)

    def client_behind_proxy(self, headers: Mapping[str, str]) -> str:
        """The address of the client for whom a trusted proxy asks; "" if the proxy does not tell.

        Each proxy adds the address of its own peer at the end. So the last one that is not a trusted proxy's is
        true, and everything before it is what the client made up.
        """
        for entry in reversed(headers.get(self.proxy_header, "").split(",")):
            address = address_in(self._address_of(entry.strip()))
            if address is None:
                return ""
            if not self.trusts(str(address)):
                return str(address)
        return ""

    def _address_of(self, entry: str) -> str:
        if self.proxy_header == "forwarded":
            found = _FOR.search(entry)
            entry = found[1].strip() if found else ""
        return entry if entry.count(":") > 1 and not entry.startswith("[") else host_name(entry)
