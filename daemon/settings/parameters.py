"""The parameters of database URLs: which of libpq's are honoured, and what to do about the others."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final
from urllib.parse import unquote, urlsplit


class BadParameter(ValueError):
    """A parameter that cannot be honoured. The message has its name and what to do, and nothing secret."""


Check = Callable[[str], str | None]
"""Returns why a value is not possible, or None."""


def _any(_: str) -> None:
    return None


def _only(allowed: str, otherwise: str) -> Check:
    values = allowed.split()
    return lambda value: None if value.lower() in values else otherwise


def _number(value: str) -> str | None:
    return None if re.fullmatch(r"[+-]?\d{1,9}", value.strip()) else "must be a whole number"


def _ports(value: str) -> str | None:
    ports = value.split(",")
    whole = all(port.isascii() and port.isdigit() and 0 < int(port) < 65536 for port in ports)
    return None if whole else "must be a number from 1 to 65535, or one for each host"


_UNSUPPORTED: Final = "is not supported: leave it out"
_ENCRYPTION: Final = "is not supported by the driver: leave it out, and use sslmode=verify-full"
_NO_GSS: Final = "must be disable or prefer: the driver encrypts with TLS only, so use sslmode=verify-full"
_PRIMARY: Final = "must be any, primary or read-write: Rowcast needs the primary"
_SSLMODES: Final = "disable allow prefer require verify-ca verify-full"
_TLS_VERSION: Final = _only("tlsv1 tlsv1.1 tlsv1.2 tlsv1.3", "must be TLSv1.2 or TLSv1.3")

PARAMETERS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        # Where, and as whom.
        "host": _any,
        "hostaddr": lambda _: "is not supported: write the address as the host",
        "port": _ports,
        "dbname": _any,
        "user": _any,
        "password": _any,
        "passfile": _any,
        "service": _any,
        "servicefile": lambda _: "is not supported: set PGSERVICEFILE in the environment",
        "target_session_attrs": _only("any primary read-write", _PRIMARY),
        "load_balance_hosts": _only("disable random", "must be disable or random"),
        # The session.
        "application_name": _any,
        "fallback_application_name": _any,
        "client_encoding": _only("auto utf8 utf-8 unicode", "must be UTF8"),
        "options": _any,
        "replication": _only("false off no 0", "must be off: Rowcast does not replicate"),
        # The connection.
        "connect_timeout": _number,
        "keepalives": _only("0 1", "must be 0 or 1"),
        "keepalives_idle": _number,
        "keepalives_interval": _number,
        "keepalives_count": _number,
        "tcp_user_timeout": _number,
        # Encryption and authentication.
        "sslmode": _only(_SSLMODES, "must be one of " + _SSLMODES.replace(" ", ", ")),
        "ssl": _only("true", "must be true, or use sslmode instead"),
        "requiressl": _only("0", "is obsolete: use sslmode=require"),
        "sslnegotiation": _only("postgres direct", "must be postgres or direct"),
        "sslcompression": _only("0", "must be 0: compressed TLS is not safe"),
        "sslcert": _any,
        "sslkey": _any,
        "sslpassword": _any,
        "sslcertmode": _only("allow", "must be allow: the driver sends a certificate whenever it has one"),
        "sslrootcert": _any,
        "sslcrl": _any,
        "sslcrldir": lambda _: "is not supported: put the lists into one file and use sslcrl",
        "sslsni": _only("1", "must be 1: the driver always sends the name of the host"),
        "ssl_min_protocol_version": _TLS_VERSION,
        "ssl_max_protocol_version": _TLS_VERSION,
        "channel_binding": _only("disable prefer", _ENCRYPTION),
        "require_auth": lambda _: _ENCRYPTION,
        "requirepeer": lambda _: _UNSUPPORTED,
        "gssencmode": _only("disable prefer", _NO_GSS),
        "gssdelegation": _only("0", "must be 0: the driver does not delegate credentials"),
        "krbsrvname": _any,
        "gsslib": _only("gssapi sspi", "must be gssapi or sspi"),
    }
)
"""The check of each parameter that PostgreSQL 17's libpq knows. Those without a problem are honoured."""


def parameters_of(url: str) -> dict[str, str]:
    """The parameters after the `?`, of which the last of a name counts; those without a value are left out."""
    found = (part.partition("=") for part in urlsplit(url).query.split("&"))
    return {unquote(name): unquote(value) for name, _, value in found if value}


def check_parameters(parameters: Mapping[str, str]) -> None:
    """Raises BadParameter for a parameter that cannot be honoured. The message has its name, and no value."""
    for name, value in parameters.items():
        check = PARAMETERS.get(name)
        if check is None:
            known = re.sub(r"\W", "", name)[:40]
            raise BadParameter(
                f"the parameter {known} does not exist: put a setting of the session into options, as -c NAME=VALUE"
            )
        if problem := check(value):
            raise BadParameter(f"the parameter {name} {problem}")
    if parameters.get("sslrootcert") == "system" and parameters.get("sslmode", "verify-full") != "verify-full":
        raise BadParameter("the parameter sslrootcert=system requires sslmode=verify-full")
