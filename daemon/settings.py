"""What the operator decides: one frozen object, read once, validated whole.

A value on the command line wins over the environment, that over .env.local, that over .env, and that over the file
given by --config. Nothing else in Rowcast reads the environment, but for daemon/systemd.py.
"""

import json
import os
import re
import socket
import tomllib
from base64 import urlsafe_b64decode
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pydantic import (
    AfterValidator,
    AliasGenerator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from daemon.core.errors import OperatorFault
from daemon.packs import bundled

SECRET_BYTES: Final = 32
"""The least that signs a token: as much as HS256 makes of it."""

TOKEN_KEY_BYTES: Final = 32
"""What a key of Fernet has: half of it signs, half of it encrypts."""

# Kubernetes and Docker put the addresses of a service called "rowcast" into the environment of its neighbours, and
# ROWCAST_TEST_* is for the tests. None of them is a mistyped setting.
_NOT_OURS: Final = re.compile(r"ROWCAST_(SERVICE_(HOST|PORT)|PORT|TEST)(_\w+)?")
_HOST_AND_PORT: Final = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")


class BadSettings(OperatorFault):
    """{problems}"""

    exit_code: ClassVar[int] = 78

    def __init__(self, *problems: str) -> None:
        self.problems = "\n".join(problems)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Port 0 lets the system choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read HOST:PORT or [IPv6]:PORT. Raises ValueError."""
        form = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]]+)):([0-9]{1,5})", text.strip())
        if not form or int(form[3]) > 65535:
            raise ValueError(
                "HOST:PORT is needed, such as 127.0.0.1:8787, with an IPv6 address in brackets: [::]:8787"
            )
        return cls(form[1] or form[2], int(form[3]))


def _address(value: object) -> object:
    return Address.parse(value) if isinstance(value, str) else value


def _names(value: object) -> object:
    """A comma-separated or JSON list as a list."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [name.strip() for name in value.split(",")]
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('names are given as "one,two" or as ["one", "two"]') from None


def _all(names: tuple[str, ...]) -> tuple[str, ...]:
    """Every bundled pack where `all` is asked for."""
    return tuple(bundled()) if "all" in names else names


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise ValueError(
            "a name consists of the characters a-z, 0-9 and _, does not begin with a digit, and has 63 at most"
        )
    return name


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _port(value: object) -> object:
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            "a number such as 5432 is needed. An address is what Kubernetes or Docker put here for a service "
            "called postgres: set the port yourself, set DATABASE_URL, or switch service links off"
        )
    return value


def _database_url(url: SecretStr) -> SecretStr:
    """Find what would make the driver misunderstand it, and say so without a word of the URL."""
    text = url.get_secret_value().strip()
    scheme, separator, _ = text.partition("://")
    if not separator or scheme not in {"postgres", "postgresql"}:
        driver = ', without "+driver"' if "+" in scheme else ""
        raise ValueError(f"postgresql://USER:PASSWORD@HOST:PORT/DATABASE is needed{driver}")
    try:
        parts = urlsplit(text)
        account, _, hosts = parts.netloc.rpartition("@")
        whole = not parts.fragment and "@" not in account and all(map(_HOST_AND_PORT.fullmatch, hosts.split(",")))
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(
            "special characters in the user and the password must be percent-encoded (@ is %40, / is %2F)"
        )
    return SecretStr(text)


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
    """Does this host mean the machine itself? No name is looked up."""
    name = host.strip().rstrip(".").lower()
    if not name or name in _LOCAL_NAMES or name.endswith(".localhost"):
        return True
    address: IPv4Address | IPv6Address
    try:
        address = ip_address(name)
    except ValueError:
        try:
            address = IPv4Address(socket.inet_aton(name))  # 127.1 and 0x7f000001 are addresses to a resolver too
        except (OSError, UnicodeError):
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _host(place: str) -> str:
    """The host of HOST:PORT, [IPv6]:PORT or a directory, as the driver finds it."""
    if place.startswith("/"):
        return place
    return place[1:].partition("]")[0] if place.startswith("[") else unquote(place.partition(":")[0])


def _unguarded(dsn: str) -> str | None:
    """Why this way to the database is none for production, without a word of the URL; None if it is one.

    Read as the driver reads it: a host before the `?` wins, and what is missing comes from its own variables.
    """
    url = urlsplit(dsn)
    options = dict(parse_qsl(url.query))
    named = url.netloc.rpartition("@")[2] or options.get("host") or os.environ.get("PGHOST", "")
    over_tcp = [host for host in map(_host, named.split(",")) if not host.startswith("/")]
    if any(map(_is_this_machine, over_tcp)):
        return "no database on localhost: name its own host, or the directory of its socket"
    mode = options.get("sslmode") or ("service" not in options and os.environ.get("PGSSLMODE"))
    if over_tcp and mode not in _ENCRYPTED:
        return "no database without TLS: add sslmode=verify-full to its URL, or at least sslmode=require"
    return None


def _secret(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value().encode()) < SECRET_BYTES:
        raise ValueError(f"{SECRET_BYTES} bytes or more are needed: `openssl rand -base64 48` makes a good one")
    return secret


def _token_keys(keys: SecretStr) -> SecretStr:
    """Find what is no key of Fernet, and say so without a word of it."""
    written = keys.get_secret_value().split()
    try:
        whole = written and all(len(urlsafe_b64decode(key)) == TOKEN_KEY_BYTES for key in written)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(
            f"one key or more is needed, each of {TOKEN_KEY_BYTES} bytes in URL-safe base64, the newest first: "
            "`openssl rand -base64 32 | tr +/ -_` makes a good one"
        )
    return keys


def _state_home() -> Path:
    """Where a user's programs keep what must outlive them (XDG Base Directory Specification)."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        if os.geteuid() == 0:  # Postgres does not run as root, and the user that it gets may not enter root's home
            return Path("/var/lib/rowcast")
        try:
            state = Path.home() / ".local/state"
        except RuntimeError:  # a container whose user has neither HOME nor a line in /etc/passwd
            state = Path("/var/tmp")  # noqa: S108
    return state / "rowcast"


def _duration(value: object) -> object:
    """A number and its unit, as people write it."""
    if not isinstance(value, str):
        return value
    written = re.fullmatch(r"(\d{1,6})\s*([smhd])", value.strip().lower())
    if written is None:
        raise ValueError("this is no duration: write 90m, 12h or 7d")
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[written[2]]
    return timedelta(**{unit: int(written[1])})


def _variable(field: str) -> str:
    """The environment variable of a field."""
    return field.upper() if field.startswith(("database_", "postgres_")) else f"ROWCAST_{field.upper()}"


Name = Annotated[str, AfterValidator(_name)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Everything that can be set. Made by `load`; the descriptions are the table in docs/operate.md."""

    model_config = SettingsConfigDict(
        alias_generator=AliasGenerator(validation_alias=_variable),
        case_sensitive=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = Field(
        None, description="the database as postgresql://USER:PASSWORD@HOST:PORT/DATABASE; POSTGRES_* is then not read"
    )
    postgres_host: str | None = Field(
        None,
        description="the database's host, or the directory of its socket; localhost if another POSTGRES_* is set",
    )
    postgres_port: Annotated[int, BeforeValidator(_port), Field(ge=1, le=65535)] = Field(
        5432, description="the database's port"
    )
    postgres_db: str | None = Field(None, description="the database's name; that of the user if it is not set")
    postgres_user: str | None = Field(None, description="the database's user; postgres if another POSTGRES_* is set")
    postgres_password: SecretStr | None = Field(None, description="the password of that user, as it is")
    packs: Annotated[tuple[Name, ...], BeforeValidator(_names), AfterValidator(_once), AfterValidator(_all)] = Field(
        ("chatgenius",), min_length=1, description="the packs to apply and to serve, separated by commas, or `all`"
    )
    schema_name: Name | None = Field(
        None,
        validation_alias="ROWCAST_SCHEMA",
        description="the Postgres schema of the pack, if there is only one; that of its name if it is not set",
    )
    environment: Annotated[Literal["development", "production"], BeforeValidator(_lower)] = Field(
        "development",
        description="development or production, which loads no sample data, and takes no database on localhost or "
        "without TLS but through its socket",
    )
    data_dir: Path = Field(
        default_factory=_state_home, description="the directory in which `daemon up` keeps its database"
    )
    listen: Annotated[Address, BeforeValidator(_address)] = Field(
        Address("127.0.0.1", 8787), description="the HOST:PORT for websockets and pages, an IPv6 address in brackets"
    )
    workers: Count = Field(1, description="the number of processes that serve; more than one for more than one core")
    worker_silence: Seconds = Field(
        10.0, description="the seconds without a sign of life until one of several processes is killed and replaced"
    )
    metrics_listen: Annotated[Address, BeforeValidator(_address)] | None = Field(
        None,
        description="a HOST:PORT beside ROWCAST_LISTEN; of several processes each has its own port, from PORT on",
    )
    secret: Annotated[SecretStr, AfterValidator(_secret)] | None = Field(
        None, description="the HS256 key that signs tokens, 32 bytes or more"
    )
    secret_file: Path | None = Field(
        None, description="a file that holds that key; if neither is set, $CREDENTIALS_DIRECTORY/secret"
    )
    token_keys: Annotated[SecretStr, AfterValidator(_token_keys)] | None = Field(
        None,
        description="the keys that encrypt the OAuth tokens of email_unsubscribe, separated by spaces or lines; the "
        "first one encrypts, all of them decrypt",
    )
    token_keys_file: Path | None = Field(
        None, description="a file that holds these keys; if neither is set, $CREDENTIALS_DIRECTORY/token_keys"
    )
    log_format: Annotated[Literal["auto", "json", "pretty"], BeforeValidator(_lower)] = Field(
        "auto", description="the form of a log line; auto is pretty on a terminal and JSON elsewhere"
    )
    log_level: Annotated[Literal["debug", "info", "warn", "error"], BeforeValidator(_lower)] = Field(
        "info", description="the least that is logged: debug, info, warn or error"
    )
    beat_every: Seconds = Field(5.0, description="the seconds between two beats through Postgres to the listener")
    beat_limit: Seconds = Field(
        15.0, description="the seconds without a beat until the listener connects anew; more than ROWCAST_BEAT_EVERY"
    )
    poll_every: Seconds = Field(1.0, description="the seconds until the log is read although nothing rang")
    heartbeat: Seconds = Field(20.0, description="the seconds between two `head` frames to a client")
    order_commit: Annotated[Literal["async", "sync"], BeforeValidator(_lower)] = Field(
        "async",
        description="how the order is committed; with sync no client sees what a crash of Postgres could take back",
    )
    retention: Annotated[timedelta, BeforeValidator(_duration), Field(ge=timedelta(minutes=1))] = Field(
        timedelta(days=7),
        description="how long the log is kept, as 90m, 12h or 7d: who was away for longer is told `reset`",
    )
    lock_timeout: Seconds = Field(5.0, description="the seconds that the DDL waits for a lock before it gives up")
    connect_attempts: Count = Field(5, description="the number of attempts to reach the database at the start")
    drain_seconds: float = Field(
        5.0, ge=0, allow_inf_nan=False, description="the seconds that clients have for leaving when the daemon stops"
    )
    queue_bytes: Count = Field(
        1024 * 1024,
        description="the bytes that may wait for a client before the next batch; with more it is served from the log",
    )
    deflate_bytes: int = Field(
        0,
        ge=0,
        description="the bytes of the smallest frame that is compressed, for clients who offer it; 0 compresses none",
    )
    max_clients: Count | None = Field(
        None,
        description="the number of clients of a process; as many as the open files allow, and 10000, if not set",
    )
    read_chunk: Count = Field(1000, description="the number of changes in one read of the log")
    transaction_changes: Count = Field(
        100_000, description="the changes of one transaction that are told; of a larger one, clients hear `reset`"
    )
    recent_bytes: int = Field(
        32 * 1024 * 1024,
        ge=0,
        description="the bytes of the newest changes held in memory, for clients who come back; 0 holds none",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given: `load` looks everywhere, since it must know where it found what is wrong."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _one_database(cls, given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("DATABASE_URL"):
            return given
        return {name: value for name, value in given.items() if not name.startswith("POSTGRES_")}

    @model_validator(mode="after")
    def _beat_before_the_limit(self) -> Self:
        if self.beat_every < self.beat_limit:
            return self
        raise ValueError("ROWCAST_BEAT_LIMIT must be more than ROWCAST_BEAT_EVERY")

    @model_validator(mode="after")
    def _a_schema_for_one_pack(self) -> Self:
        if self.schema_name is None or len(self.packs) == 1:
            return self
        raise ValueError("ROWCAST_SCHEMA names the schema of one pack, and ROWCAST_PACKS has more: drop one of them")

    @model_validator(mode="after")
    def _a_guarded_database_in_production(self) -> Self:
        problem = _unguarded(self.dsn) if self.environment == "production" and self.dsn else None
        if problem is None:
            return self
        raise ValueError(f"ROWCAST_ENVIRONMENT is production, where there is {problem}")

    @model_validator(mode="after")
    def _a_port_for_each_worker(self) -> Self:
        if self.metrics_listen is None or self.metrics_listen.port + self.workers - 1 <= 65535:
            return self
        raise ValueError("ROWCAST_METRICS_LISTEN needs as many ports from its own on as ROWCAST_WORKERS says")

    @property
    def dsn(self) -> str | None:
        """The URL of the configured database, with its password; None if there is none."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        parts = (self.postgres_host, self.postgres_db, self.postgres_user, self.postgres_password)
        if parts == (None, None, None, None):
            return None
        # What is missing is what the postgres image makes of the same variables.
        host, user = self.postgres_host or "localhost", self.postgres_user or "postgres"
        password = f":{_quoted(self.postgres_password.get_secret_value())}" if self.postgres_password else ""
        account, database = f"{_quoted(user)}{password}", _quoted(self.postgres_db or user)
        if host.startswith("/"):
            return f"postgresql://{account}@/{database}?host={_quoted(host)}&port={self.postgres_port}"
        place = quote(str(Address(host.strip("[]"), self.postgres_port)), safe="[]:")
        return f"postgresql://{account}@{place}/{database}"

    def require_dsn(self) -> str:
        """The URL of the configured database, with its password. Raises BadSettings if there is none."""
        if self.dsn is None:
            raise BadSettings(
                "No database is configured: set DATABASE_URL, or POSTGRES_HOST, _DB, _USER and _PASSWORD."
            )
        return self.dsn

    def require_secret(self) -> bytes:
        """The key that signs tokens. Raises BadSettings if there is none."""
        if self.secret is None:
            raise BadSettings("No key for tokens is configured: set ROWCAST_SECRET or ROWCAST_SECRET_FILE.")
        return self.secret.get_secret_value().encode()

    def require_token_keys(self) -> list[str]:
        """The keys that encrypt OAuth tokens, the newest first. Raises BadSettings if there is none."""
        if self.token_keys is None:
            raise BadSettings(
                "No keys for OAuth tokens are configured: set ROWCAST_TOKEN_KEYS_FILE, or ROWCAST_TOKEN_KEYS."
            )
        return self.token_keys.get_secret_value().split()

    def as_environment(self) -> dict[str, str]:
        """The environment for another process of ours that is to have the same settings, but for the secret."""
        given = {
            str(type(self).model_fields[field].validation_alias): ",".join(value) if field == "packs" else str(value)
            for field, value in self
            if field in self.model_fields_set and not isinstance(value, SecretStr | None)
        }
        return {**os.environ, **given, "DATABASE_URL": self.dsn or ""}


def _quoted(text: str) -> str:
    return quote(text, safe="")


VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        str(field.validation_alias).removeprefix("ROWCAST_").lower(): str(field.validation_alias)
        for field in Settings.model_fields.values()
    }
)
"""Each setting's name, as `load` and the file given by --config have it, and its environment variable."""


_IN_FILES: Final[Mapping[str, str]] = MappingProxyType(
    {"ROWCAST_SECRET": "secret", "ROWCAST_TOKEN_KEYS": "token_keys"}
)
"""Secrets that may lie in a file, and what it is called among the credentials of a unit."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One of the places that settings come from: what it sets, by environment variable, and where it is."""

    values: dict[str, Any]
    where: str = ""
    by_variable: bool = True

    @classmethod
    def of_variables(cls, found: Mapping[str, str | None], where: str = "") -> Self:
        known = set(VARIABLES.values())
        ours = (name for name in found if name.startswith("ROWCAST_") and not _NOT_OURS.fullmatch(name))
        return cls({name: found[name] for name in {*ours, *known & found.keys()} if found[name]}, where)

    @classmethod
    def of_names(cls, found: Mapping[str, Any], where: str) -> Self:
        values = {VARIABLES.get(name, name): value for name, value in found.items() if value not in (None, "", ())}
        return cls(values, where, by_variable=False)

    def problem(self, variable: str, problem: str | None) -> str:
        """One line. `problem` None: there is no such setting."""
        names = {variable: name for name, variable in VARIABLES.items()}
        name = variable if self.by_variable else names.get(variable, variable)
        if problem is None:
            problem = "there is no such setting"
            if nearest := get_close_matches(variable.removeprefix("ROWCAST_").lower(), VARIABLES, n=1):
                problem += f"; did you mean {VARIABLES[nearest[0]] if self.by_variable else nearest[0]}?"
        return f"{name}{self.where}: {problem}"


def load(config: Path | None = None, **options: Any) -> Settings:  # noqa: ANN401 - they are validated here
    """The settings. `config` is a TOML file; `options` come from the command line, None or () for what was not given.

    Raises BadSettings, which has a line for each problem.
    """
    places = [
        _Place.of_names(options, " (option)"),
        _Place.of_variables(os.environ),
        *(_Place.of_variables(_dotenv(Path(name)), f" in {name}") for name in (".env.local", ".env")),
    ]
    if config is not None:
        places.append(_Place.of_names(_toml(config), f" in {config}"))
    for variable, credential in _IN_FILES.items():
        if secret := _secret_file(variable, credential, ChainMap(*(place.values for place in places))):
            places.append(secret)
    try:
        return Settings(**ChainMap(*(place.values for place in places)))
    except ValidationError as error:
        # Not chained: the error holds what was given, which may be a secret.
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    raise BadSettings(*(_sentence(problem, places) for problem in problems))


def _sentence(problem: ErrorDetails, places: Sequence[_Place]) -> str:
    """What a problem says to the operator: where it is, what is wrong, and what the setting is for."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message  # of two settings, both of which it names
    variable = str(problem["loc"][0])
    place = next(place for place in places if variable in place.values)
    if problem["type"] == "extra_forbidden":
        return place.problem(variable, None)
    if problem["type"] != "value_error":
        field = next(field for field in Settings.model_fields.values() if field.validation_alias == variable)
        message = f"{message[0].lower()}{message[1:]} ({field.description})"
    return place.problem(variable, message)


def _secret_file(variable: str, credential: str, values: Mapping[str, Any]) -> _Place | None:
    """A secret that is not set but lies in a file; `credential` is the file's name among systemd's."""
    file = values.get(f"{variable}_FILE")
    if variable in values:
        if file:
            raise BadSettings(f"{variable} and {variable}_FILE are both set: keep one of them")
        return None
    if not file:
        file = Path(os.environ.get("CREDENTIALS_DIRECTORY", ""), credential)
        if not (file.is_absolute() and file.exists()):
            return None
    try:
        return _Place({variable: Path(str(file)).read_text().strip()}, f" in {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _dotenv(path: Path) -> Mapping[str, str | None]:
    try:
        return DotEnvSettingsSource(Settings, path).env_vars
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _toml(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{path}: this is not TOML: {error}") from None


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> BadSettings:
    reason = error.strerror if isinstance(error, OSError) else "this is not UTF-8"
    return BadSettings(f"{path}: cannot be read: {reason}")
