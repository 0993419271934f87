"""The arguments with which the driver connects as a database URL says."""

import configparser
import os
import random
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from daemon.settings.database_url import environment_of_driver
from daemon.settings.parameters import BadParameter, check_parameters, parameters_of

# What the driver itself understands. It takes any other parameter for a setting of the session.
_FOR_THE_DRIVER: Final = (
    "host", "port", "dbname", "user", "password", "passfile", "sslmode", "sslnegotiation", "sslcert", "sslkey",
    "sslpassword", "sslrootcert", "sslcrl", "ssl_min_protocol_version", "ssl_max_protocol_version",
    "target_session_attrs", "krbsrvname", "gsslib",
)  # fmt: skip

_VERIFYING: Final = {"verify-ca", "verify-full"}


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a URL says: the driver's arguments, the name and time limit of a session, and the kernel's keepalive."""

    driver: Mapping[str, Any]
    application_name: str | None
    time_limit: float | None
    keepalive: bool
    keepalive_options: Mapping[str, int]


def read_url(url: str, time_limit: float) -> Arguments:
    """Read a URL, its service and the files that it names. Raises BadParameter, whose message has nothing secret."""
    parts, given = urlsplit(url), parameters_of(url)
    check_parameters(given)
    given = _with_service(given)
    environment = environment_of_driver()
    hosts = parts.netloc.rpartition("@")[2] or given.get("host", environment.get("PGHOST", ""))
    if given.get("ssl") == "true":
        given.setdefault("sslmode", "require")
    several = "," in hosts
    if several and given.get("load_balance_hosts") == "random":
        parts, given = _shuffled(parts, given)
    over_tcp = not all(unquote(host).startswith("/") for host in hosts.split(","))
    driver: dict[str, Any] = {}
    if over_tcp:
        driver |= _tls(given, environment)
    kept = {name: given[name] for name in _FOR_THE_DRIVER if name in given}
    if not over_tcp or driver:
        kept = {name: value for name, value in kept.items() if not name.startswith("ssl")}
    if "passfile" in kept:
        _check_readable("passfile", kept["passfile"])
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in kept.items())
    driver["dsn"] = parts._replace(query=query).geturl()
    driver["server_settings"] = {"options": given["options"]} if "options" in given else {}
    timeout = int(given["connect_timeout"]) if "connect_timeout" in given else None
    options = {
        "TCP_KEEPIDLE": "keepalives_idle",
        "TCP_KEEPINTVL": "keepalives_interval",
        "TCP_KEEPCNT": "keepalives_count",
        "TCP_USER_TIMEOUT": "tcp_user_timeout",
    }
    return Arguments(
        driver,
        given.get("application_name"),
        time_limit if timeout is None else (float(timeout) if timeout > 0 else None),
        given.get("keepalives") != "0",
        {option: int(given[name]) for option, name in options.items() if int(given.get(name, "0")) > 0},
    )


def several_hosts(arguments: Arguments) -> bool:
    """Does the URL name several hosts, without saying which of them to choose?"""
    parameters = parameters_of(arguments.driver["dsn"])
    hosts = urlsplit(arguments.driver["dsn"]).netloc.rpartition("@")[2] or parameters.get("host", "")
    return "," in hosts and "target_session_attrs" not in parameters


def _with_service(given: Mapping[str, str]) -> dict[str, str]:
    """The parameters, completed with those of the service that they name."""
    environment = environment_of_driver()
    name = given.get("service") or environment.get("PGSERVICE")
    if not name:
        return dict(given)
    files = [Path(environment["PGSERVICEFILE"])] if "PGSERVICEFILE" in environment else []
    with suppress(RuntimeError):
        files += [] if files else [Path.home() / ".pg_service.conf"]
    if "PGSYSCONFDIR" in environment:
        files.append(Path(environment["PGSYSCONFDIR"]) / "pg_service.conf")
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read(files, encoding="utf-8")
    except (OSError, UnicodeDecodeError, configparser.Error):
        raise BadParameter("the service file cannot be read") from None
    if not parser.has_section(name):
        raise BadParameter("the service is not defined: correct the parameter service, or the service file")
    found = dict(parser[name])
    check_parameters(found)
    return {**found, **given}


def _shuffled(parts: Any, given: dict[str, str]) -> tuple[Any, dict[str, str]]:  # noqa: ANN401 - urllib's own type
    account, at, hosts = parts.netloc.rpartition("@")
    if hosts:
        places = hosts.split(",")
        random.shuffle(places)
        return parts._replace(netloc=f"{account}{at}{','.join(places)}"), given
    names, ports = given["host"].split(","), given.get("port", "").split(",")
    pairs = list(zip(names, ports if len(ports) == len(names) else ports * len(names), strict=False))
    random.shuffle(pairs)
    given = {**given, "host": ",".join(name for name, _ in pairs)}
    return parts, given | ({"port": ",".join(port for _, port in pairs)} if len(ports) == len(names) else {})


def _tls(given: dict[str, str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Check the files that TLS needs. Returns the driver's arguments if the URL's parameters do not say it all."""
    mode = given.get("sslmode") or environment.get("PGSSLMODE", "prefer")
    root = given.get("sslrootcert") or environment.get("PGSSLROOTCERT")
    if mode == "disable" and root != "system":
        return {}
    # Without `system` it is only used to try the files, which the driver loads again.
    context = ssl.create_default_context() if root == "system" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if root not in (None, "system"):
        _load("sslrootcert", lambda: context.load_verify_locations(cafile=root))
    elif root is None and mode in _VERIFYING and not _in_home("root.crt"):
        raise BadParameter(f"the parameter sslmode={mode} requires sslrootcert: name a file, or system")
    if "sslcrl" in given:
        _load("sslcrl", lambda: context.load_verify_locations(cafile=given["sslcrl"]))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if "sslcert" in given:
        key = given.get("sslkey") or _in_home("postgresql.key")
        _load("sslcert", lambda: context.load_cert_chain(given["sslcert"], key, lambda: given.get("sslpassword", "")))
    if root != "system":
        return {}
    versions = {"minimum_version": "ssl_min_protocol_version", "maximum_version": "ssl_max_protocol_version"}
    for attribute, name in versions.items():
        if name in given:
            setattr(context, attribute, ssl.TLSVersion[given[name].upper().replace("V", "v").replace(".", "_")])
    return {"ssl": context, "direct_tls": given.get("sslnegotiation") == "direct"}


def _load(name: str, load: Any) -> None:  # noqa: ANN401
    try:
        load()
    except ssl.SSLError:
        raise BadParameter(
            f"the file of the parameter {name} does not fit: it must be PEM, and a key must fit it"
        ) from None
    except OSError as error:
        raise BadParameter(f"the file of the parameter {name} cannot be read ({error.strerror or 'error'})") from None


def _check_readable(name: str, path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
        Path(path).read_bytes()
    except OSError as error:
        raise BadParameter(f"the file of the parameter {name} cannot be read ({error.strerror or 'error'})") from None
    if mode & 0o077:
        raise BadParameter(f"the file of the parameter {name} may be read by others: chmod 600")


def _in_home(name: str) -> str | None:
    """The path of a file in ~/.postgresql, if it exists."""
    with suppress(RuntimeError, OSError):
        path = Path.home() / ".postgresql" / name
        return os.fspath(path) if path.exists() else None
    return None
