"""The model of the settings: one frozen object, with its validation."""

import os
from collections.abc import Container
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import (
    AfterValidator,
    AliasGenerator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    create_model,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from daemon.packs import bundled_jobs, default_packs, pack_secrets
from daemon.settings.database_url import DatabaseUrl, check_database_url, production_problem
from daemon.settings.errors import BadSettings
from daemon.settings.parameters import BadParameter, check_parameters, parameters_of
from daemon.settings.ssh import (
    DEFAULT_ATTEMPTS,
    DEFAULT_DELAYS,
    DEFAULT_KEYS,
    DEFAULT_PORT,
    KNOWN_HOSTS,
    SshRoute,
    database_of,
    expanded,
    tunnel_directory,
    url_through,
)
from daemon.settings.values import (
    Address,
    Count,
    Name,
    Seconds,
    SecondsOrOff,
    Share,
    check_hosts,
    check_jwks,
    check_origins,
    check_proxies,
    check_secret,
    check_secrets,
    check_subject,
    expand_all,
    lower,
    read_address,
    read_duration,
    read_listen,
    read_names,
    read_port,
    state_home,
    without_repeats,
    write_duration,
)


def _variable(field: str) -> str:
    """The environment variable of a field."""
    return field.upper() if field.startswith(("database_", "postgres_", "ssh_")) else f"ROWCAST_{field.upper()}"


class BaseRowcastSettings(BaseSettings):
    """The settings that do not belong to a pack. The descriptions make up the table in docs/operate.md."""

    model_config = SettingsConfigDict(
        alias_generator=AliasGenerator(validation_alias=_variable),
        case_sensitive=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[SecretStr, AfterValidator(check_database_url)] | None = Field(
        None, description="the database as postgresql://USER:PASSWORD@HOST:PORT/DATABASE; POSTGRES_* is then ignored"
    )
    database_url_file: Path | None = Field(
        None, description="file that contains it; if neither is set, $CREDENTIALS_DIRECTORY/database_url"
    )
    postgres_host: str | None = Field(
        None,
        description="database host, or the directory of its socket; localhost if another POSTGRES_* is set",
    )
    postgres_port: Annotated[int, BeforeValidator(read_port), Field(ge=1, le=65535)] = Field(
        5432, description="database port"
    )
    postgres_db: str | None = Field(None, description="database name; defaults to the name of the user")
    postgres_user: str | None = Field(None, description="database user; postgres if another POSTGRES_* is set")
    postgres_password: SecretStr | None = Field(None, description="password of that user, unquoted and unescaped")
    postgres_password_file: Path | None = Field(
        None, description="file that contains it; if neither is set, $CREDENTIALS_DIRECTORY/postgres_password"
    )
    ssh_host: str | None = Field(
        None, description="SSH host through which to reach the database, whose host is then as seen from there"
    )
    ssh_port: Annotated[int, Field(ge=1, le=65535)] = Field(DEFAULT_PORT, description="SSH port")
    ssh_user: str | None = Field(None, description="SSH user; required with SSH_HOST")
    ssh_key_path: Path | None = Field(
        None, description="SSH private key; ~/.ssh/id_rsa by default, in production /etc/ssh/private_key"
    )
    ssh_key_passphrase: SecretStr | None = Field(None, description="passphrase of that key, if it is encrypted")
    ssh_key_passphrase_file: Path | None = Field(
        None,
        description="file that contains it; if neither is set, $CREDENTIALS_DIRECTORY/ssh_key_passphrase",
    )
    ssh_known_hosts: Path | None = Field(
        None,
        description="file with the host keys to trust; ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts by default",
    )
    ssh_attempts: Count | None = Field(
        None, description="number of attempts to open the SSH tunnel at startup; 3 by default, in production 5"
    )
    ssh_retry_delay: Seconds | None = Field(
        None, description="pause between these attempts (seconds); 1 by default, in production 2"
    )
    packs: Annotated[
        Annotated[tuple[Name, ...], Field(min_length=1)],
        BeforeValidator(read_names),
        AfterValidator(without_repeats),
        AfterValidator(expand_all),
    ] = Field(default_packs(), description="packs to apply and serve, separated by commas, or `all`, or `none`")
    schema_name: Name | None = Field(
        None,
        validation_alias="ROWCAST_SCHEMA",
        description="Postgres schema of the pack, if you serve only one; defaults to its name",
    )
    owner: Name | None = Field(
        None,
        description="role that owns what Rowcast has in the database; commands that change schemas or rows take it "
        "on (SET ROLE), the daemon does not",
    )
    environment: Annotated[Literal["development", "production"], BeforeValidator(lower)] = Field(
        "development",
        description="development or production; production refuses sample data, superusers, and TCP "
        "connections to a database on localhost or without TLS",
    )
    notifications: bool = Field(
        True,
        description="whether the packs' tables are captured; if false, `daemon --apply-ddl` removes their captures, "
        "and the daemon does not serve",
    )
    soft_deletes: bool = Field(
        True,
        description="whether rows can be deleted softly; if false, `daemon --apply-ddl` makes the packs' tables "
        "refuse it",
    )
    data_dir: Path = Field(
        default_factory=state_home,
        description="directory in which `daemon up` keeps its database; for root /var/lib/rowcast-up",
    )
    listen: Annotated[Address, BeforeValidator(read_listen)] = Field(
        Address("127.0.0.1", 8787),
        description="HOST:PORT for websockets and pages, with an IPv6 address in brackets; or unix:/PATH",
    )
    workers: Count = Field(1, description="number of serving processes; one per core to use")
    worker_silence: Seconds = Field(
        10.0, description="seconds without a sign of life after which a worker is killed and replaced"
    )
    metrics_listen: Annotated[Address, BeforeValidator(read_address)] | None = Field(
        None,
        description="additional HOST:PORT for pages; each worker has its own port, counting up from PORT",
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file with the certificate for ROWCAST_LISTEN, followed by those of its issuers; without it, "
        "there is no TLS",
    )
    tls_key: Path | None = Field(None, description="PEM file with the key of that certificate, unencrypted")
    origins: Annotated[tuple[str, ...], BeforeValidator(read_names), AfterValidator(check_origins)] = Field(
        (),
        description="origins of other pages that may connect, such as https://chat.example.com, separated by commas; "
        "`null` for files, `*` for all",
    )
    hosts: Annotated[tuple[str, ...], BeforeValidator(read_names), AfterValidator(check_hosts)] = Field(
        (),
        description="names of this daemon, without a port, separated by commas; requests for others are refused. "
        "Addresses and localhost are always allowed",
    )
    trusted_proxies: Annotated[tuple[str, ...], BeforeValidator(read_names), AfterValidator(check_proxies)] = Field(
        (),
        description="addresses or networks of proxies that say who the client is, separated by commas; `unix` for "
        "the peers of a Unix socket",
    )
    proxy_header: Annotated[Literal["x-forwarded-for", "forwarded"], BeforeValidator(lower)] = Field(
        "x-forwarded-for", description="header in which they say it: x-forwarded-for or forwarded"
    )
    secret: Annotated[SecretStr, AfterValidator(check_secret)] | None = Field(
        None, description="HS256 key that signs tokens, 32 bytes or more"
    )
    secret_file: Path | None = Field(
        None, description="file that contains that key; if neither is set, $CREDENTIALS_DIRECTORY/secret"
    )
    more_secrets: Annotated[SecretStr, AfterValidator(check_secrets)] | None = Field(
        None, description="further keys whose tokens are valid, one on each line; none of them signs"
    )
    more_secrets_file: Path | None = Field(
        None, description="file that contains them; if neither is set, $CREDENTIALS_DIRECTORY/more_secrets"
    )
    public_keys: Annotated[tuple[Path, ...], BeforeValidator(read_names)] = Field(
        (),
        description="PEM files with public keys or certificates whose tokens are valid (RS256, ES256, EdDSA), "
        "separated by commas",
    )
    jwks: Annotated[str, AfterValidator(check_jwks)] | None = Field(
        None, description="JSON Web Key Set whose tokens are valid: a path, or a URL that is fetched every 5 minutes"
    )
    nats_url: SecretStr | None = Field(
        None,
        description="NATS servers of all nodes, as nats://USER:PASSWORD@HOST:PORT, separated by commas; "
        "members then publish to gateways, which need it",
    )
    nats_url_file: Path | None = Field(
        None, description="file that contains them; if neither is set, $CREDENTIALS_DIRECTORY/nats_url"
    )
    nats_prefix: Annotated[str, Field(max_length=64), AfterValidator(check_subject)] = Field(
        "rowcast", description="first part of all NATS subjects: one for each database"
    )
    nats_content: Literal["inline", "topic"] = Field(
        "inline",
        description="how contents reach gateways: inline, all to every one; topic, to those whose clients follow it. "
        "For members only",
    )
    nats_creds_file: Path | None = Field(None, description="file with the credentials of this node for NATS (.creds)")
    nats_ca_file: Path | None = Field(
        None,
        description="certificates that NATS servers are checked against (PEM); nothing is sent without TLS",
    )
    nats_cert_file: Path | None = Field(None, description="file with this node's certificate for NATS")
    nats_key_file: Path | None = Field(None, description="file with the private key of that certificate")
    issuer: Annotated[str, Field(min_length=1)] = Field("rowcast", description="`iss` of every token")
    audience: Annotated[str, Field(min_length=1)] = Field(
        "rowcast", description="what `aud` of every token is or contains"
    )
    token_lifetime: Annotated[timedelta, BeforeValidator(read_duration), Field(gt=timedelta(0))] = Field(
        timedelta(days=30), description="how far ahead `exp` of a token may be (90m, 12h, 7d)"
    )
    map_subjects: bool = Field(
        False,
        description="whether the pack looks up whom `sub` means in tokens signed with a private key; if false, it is "
        "the user",
    )
    log_format: Annotated[Literal["auto", "json", "pretty"], BeforeValidator(lower)] = Field(
        "auto", description="log format: auto, json or pretty; auto is pretty on a terminal and JSON elsewhere"
    )
    log_level: Annotated[Literal["debug", "info", "warn", "error"], BeforeValidator(lower)] = Field(
        "info", description="lowest level that is logged: debug, info, warn or error"
    )
    beat_every: Seconds = Field(
        5.0, description="interval between two heartbeats through Postgres to the listener (seconds)"
    )
    beat_limit: Seconds = Field(
        15.0,
        description="seconds without a heartbeat after which the listener reconnects; must exceed ROWCAST_BEAT_EVERY",
    )
    poll_every: Seconds = Field(1.0, description="polling interval when no notification arrives (seconds)")
    heartbeat: Seconds = Field(20.0, description="interval between two `head` frames to a client (seconds)")
    canary_every: SecondsOrOff = Field(
        0.0,
        description="interval between two canary rows, which time the whole path (seconds); 0 turns them off",
    )
    order_commit: Annotated[Literal["async", "sync"], BeforeValidator(lower)] = Field(
        "async",
        description="how numbering is committed; with sync, clients never see what a crash of Postgres could undo",
    )
    retention: Annotated[timedelta, BeforeValidator(read_duration), Field(ge=timedelta(minutes=1))] = Field(
        timedelta(days=7),
        description="how long the log is kept (90m, 12h, 7d); clients that were away for longer get a `reset`",
    )
    jobs: Annotated[tuple[Name, ...], BeforeValidator(read_names), AfterValidator(without_repeats)] = Field(
        (), description="jobs that the daemon runs when they are due, separated by commas, or `all`; see Jobs"
    )
    backup_dir: Path | None = Field(
        None, description="directory for the backups that the job `backup`, or `daemon backup` without FILE, writes"
    )
    backup_keep: Count = Field(7, description="number of backups that are kept in ROWCAST_BACKUP_DIR")
    archive_dir: Path | None = Field(
        None, description="directory for the files of `daemon archive` and of jobs that archive rows"
    )
    lock_timeout: Seconds = Field(5.0, description="seconds that the DDL waits for a lock before it gives up")
    connect_attempts: Count = Field(5, description="number of attempts to reach the database at startup")
    drain_seconds: SecondsOrOff = Field(
        5.0, description="seconds that clients have to disconnect when the daemon stops"
    )
    queue_bytes: Count = Field(
        1024 * 1024,
        description="bytes that may be queued for a client before a batch; with more it is served from the log",
    )
    deflate_bytes: int = Field(
        0,
        ge=0,
        le=2**40,
        description="smallest frame that is compressed, for clients that offer it (bytes); 0 turns it off",
    )
    max_clients: Count = Field(
        10_000, description="maximum clients per process; fewer if the open files limit does not allow them"
    )
    max_clients_per_user: Count | None = Field(
        None,
        description="maximum connections of one user per process; by default a quarter of ROWCAST_MAX_CLIENTS",
    )
    max_clients_per_address: Count | None = Field(
        None,
        description="maximum connections from one address (IPv6: one /64) per process; by default any number, since "
        "all clients behind a proxy have its address",
    )
    max_unauthenticated: Count = Field(
        2_048,
        description="maximum connections per process that are not authenticated, at most a quarter of the open files "
        "limit; the oldest gives way to a newcomer",
    )
    unauthenticated_cpu: Share = Field(
        0.1,
        description="share of one processor that all connections to one process may take that are not authenticated; "
        "beyond that, newcomers wait",
    )
    max_topics: Annotated[int, Field(ge=1, le=4096)] = Field(
        128, description="maximum topics that one connection may follow"
    )
    max_filter: Annotated[Count, Field(ge=256)] = Field(
        65_536, description="maximum characters of all filters of one connection"
    )
    max_present: Count = Field(1_000, description="maximum devices that can be present in one topic")
    max_present_per_user: Count = Field(
        32, description="maximum devices of one user that can be present in one topic"
    )
    signal_rate: Count = Field(
        10, description="signals per second that one connection may send; what exceeds it is dropped"
    )
    frame_bytes: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = Field(
        64 * 1024, description="largest frame that a client may send, in bytes"
    )
    user_unread_bytes: int = Field(
        128 * 1024 * 1024,
        ge=1024 * 1024,
        le=2**40,
        description="bytes that all connections of one user to one process may leave unread; beyond that, those with "
        "most are cut",
    )
    user_rate: Count = Field(
        1_000,
        description="frames per second that one user may send to one process; what exceeds it waits",
    )
    user_cpu: Share = Field(
        0.1,
        description="share of one processor that the frames of one user may take; what exceeds it waits",
    )
    transaction_ids: bool = Field(
        True,
        description="whether changes tell clients in `tx` which transaction made them; if false at a member, "
        "gateways do not tell it either",
    )
    read_chunk: Count = Field(1000, description="maximum number of changes in one read of the log")
    transaction_changes: Count = Field(
        100_000, description="largest transaction delivered change by change; a larger one sends `reset`"
    )
    transaction_bytes: int = Field(
        32 * 1024 * 1024,
        ge=1024 * 1024,
        le=2**40,
        description="largest transaction delivered change by change, in bytes of its records; a larger one sends "
        "`reset`",
    )
    snapshot_rows: Count = Field(
        10_000, description="maximum number of rows in a snapshot; a topic that has more needs `limit`"
    )
    recent_bytes: int = Field(
        32 * 1024 * 1024,
        ge=0,
        le=2**40,
        description="memory for the newest changes, for clients that reconnect (bytes); 0 turns it off",
    )

    _role: str | None = PrivateAttr(None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the arguments: `load` reads the other sources itself, to name the source of a problem."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _prefer_the_url(cls, given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("DATABASE_URL"):
            return given
        return {name: value for name, value in given.items() if not name.startswith("POSTGRES_")}

    @model_validator(mode="after")
    def _check_beat_limit(self) -> Self:
        if self.beat_every < self.beat_limit:
            return self
        raise ValueError("ROWCAST_BEAT_LIMIT must be more than ROWCAST_BEAT_EVERY")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) == (self.tls_key is None):
            return self
        raise ValueError("ROWCAST_TLS_CERTIFICATE and ROWCAST_TLS_KEY need each other: set both, or neither")

    @model_validator(mode="after")
    def _check_jobs(self) -> Self:
        known = bundled_jobs()
        if unknown := [name for name in self.jobs if name != "all" and name not in known]:
            raise ValueError(f"ROWCAST_JOBS: there is no job {unknown[0]}: choose among {', '.join(known)}, or `all`")
        return self

    @model_validator(mode="after")
    def _check_schema_name(self) -> Self:
        if self.schema_name is None or len(self.packs) == 1:
            return self
        raise ValueError(
            "ROWCAST_SCHEMA requires a single pack, but ROWCAST_PACKS lists several: remove one of the two settings"
        )

    @model_validator(mode="after")
    def _check_tunnel(self) -> Self:
        if self.ssh_host is None:
            return self
        if self._url is None:
            raise ValueError(
                "SSH_HOST requires a database: set DATABASE_URL, or POSTGRES_HOST, _DB, _USER and _PASSWORD"
            )
        if self.ssh_user is None:
            raise ValueError("SSH_HOST requires SSH_USER")
        database_of(self._url)
        return self

    @model_validator(mode="after")
    def _check_production_database(self) -> Self:
        problem = production_problem(self.dsn) if self.environment == "production" and self.dsn else None
        if problem is None:
            return self
        raise ValueError(f"ROWCAST_ENVIRONMENT is production, which does not allow {problem}")

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        try:
            check_parameters(parameters_of(self._url or ""))
        except BadParameter as problem:
            raise ValueError(f"DATABASE_URL: {problem}") from None
        return self

    @model_validator(mode="after")
    def _check_metrics_ports(self) -> Self:
        if self.metrics_listen is None or self.metrics_listen.port + self.workers - 1 <= 65535:
            return self
        raise ValueError(
            "ROWCAST_METRICS_LISTEN needs one port per worker, counting up from its own: choose a lower one"
        )

    def as_owner(self) -> Self:
        """These settings, but whoever connects takes on the role in ROWCAST_OWNER, if there is one."""
        return self._taking(self.owner)

    def as_login(self) -> Self:
        """These settings, but whoever connects stays the role of the database URL."""
        return self._taking(None)

    def _taking(self, role: str | None) -> Self:
        made = self.model_copy()
        made._role = role
        return made

    @property
    def schemas(self) -> dict[str, str]:
        """The schema of each configured pack."""
        return {pack: self.schema_name or pack for pack in self.packs}

    @property
    def trigger_settings(self) -> dict[str, str]:
        """The session settings that the files of triggers/ read."""
        return {
            "rowcast.notifications": "on" if self.notifications else "off",
            "rowcast.soft_deletes": "on" if self.soft_deletes else "off",
        }

    @property
    def dsn(self) -> str | None:
        """The URL of the configured database, with its password; None if there is none.

        With SSH_HOST it leads to the socket of the tunnel, which `through_tunnel` opens.
        """
        url, route = self._url, self.ssh_route
        if url is None:
            return None
        in_production = self.environment == "production"
        if route is None:
            return DatabaseUrl(url, in_production=in_production, role=self._role)
        through = url_through(url, route.directory)
        return DatabaseUrl(through, in_production=in_production, address=str(route), role=self._role)

    @property
    def ssh_route(self) -> SshRoute | None:
        """The way to the database through SSH; None without SSH_HOST. It differs between processes."""
        if self.ssh_host is None or self.ssh_user is None or self._url is None:
            return None
        host, port, user = self.ssh_host.strip("[]"), self.ssh_port, self.ssh_user
        known_hosts = KNOWN_HOSTS if self.ssh_known_hosts is None else (self.ssh_known_hosts,)
        return SshRoute(
            host,
            port,
            user,
            expanded(self.ssh_key_path or DEFAULT_KEYS[self.environment]),
            self.ssh_key_passphrase,
            tuple(map(expanded, known_hosts)),
            self.ssh_attempts or DEFAULT_ATTEMPTS[self.environment],
            self.ssh_retry_delay or DEFAULT_DELAYS[self.environment],
            database_of(self._url),
            tunnel_directory(host, port, user, self._url),
        )

    @property
    def _url(self) -> str | None:
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        parts = (self.postgres_host, self.postgres_db, self.postgres_user, self.postgres_password)
        if parts == (None, None, None, None):
            return None
        # The defaults are those of the postgres image for the same variables.
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
        """The key that signs tokens. Raises BadSettings if it is not set."""
        if self.secret is None:
            raise BadSettings("No key for tokens is configured: set ROWCAST_SECRET or ROWCAST_SECRET_FILE.")
        return self.secret.get_secret_value().encode()

    @property
    def secrets(self) -> list[bytes]:
        """The keys that verify tokens and could sign them; the first one does."""
        found = [] if self.secret is None else [self.secret.get_secret_value()]
        if self.more_secrets is not None:
            found += filter(None, map(str.strip, self.more_secrets.get_secret_value().splitlines()))
        return [secret.encode() for secret in found]

    def pack_secret(self, name: str) -> SecretStr | None:
        """A secret that a pack declares, or None if it is not set."""
        secret: SecretStr | None = getattr(self, name)
        return secret

    def as_environment(self, but_for: Container[str] = ()) -> dict[str, str]:
        """The environment that gives a child process the same settings, but no secrets except the database URL.

        A child reads the fields `but_for` where this process did, unless an option gave them.
        """
        given = {
            str(type(self).model_fields[field].validation_alias): _written(value)
            or ("none" if field == "packs" else "")
            for field, value in self
            if field in self.model_fields_set and field not in but_for and not isinstance(value, SecretStr | None)
        }
        return {**os.environ, **given, "DATABASE_URL": self._url or "", "DATABASE_URL_FILE": ""}


def _written(value: object) -> str:
    """A value as its environment variable takes it."""
    match value:
        case tuple():
            return ",".join(map(str, value))
        case timedelta():
            return write_duration(value)
    return str(value)


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _pack_fields() -> dict[str, Any]:
    """The settings that packs declare: for each secret, one for its value and one for a file that contains it."""
    fields: dict[str, Any] = {}
    for name, secret in pack_secrets().items():
        kind = Annotated[SecretStr, AfterValidator(secret.validate)] | None
        fields[name] = (kind, Field(None, description=secret.description))
        fields[f"{name}_file"] = (Path | None, Field(None, description=secret.file_description))
    return fields


if TYPE_CHECKING:
    Settings = BaseRowcastSettings
else:
    Settings = create_model("Settings", __base__=BaseRowcastSettings, **_pack_fields())
    Settings.__doc__ = """All settings, including those of packs. Use `load` to create them."""
