"""What the operator decides: one frozen object, validated whole."""

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import (
    AfterValidator,
    AliasGenerator,
    BeforeValidator,
    Field,
    SecretStr,
    create_model,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from daemon.packs import default_packs, pack_secrets
from daemon.settings.database_url import check_database_url, production_problem
from daemon.settings.errors import BadSettings
from daemon.settings.values import (
    Address,
    Count,
    Name,
    Seconds,
    check_secret,
    expand_all,
    lower,
    read_address,
    read_duration,
    read_names,
    read_port,
    state_home,
    without_repeats,
)


def _variable(field: str) -> str:
    """The environment variable of a field."""
    return field.upper() if field.startswith(("database_", "postgres_")) else f"ROWCAST_{field.upper()}"


class BaseRowcastSettings(BaseSettings):
    """Every setting that belongs to no pack. The descriptions are the table in docs/operate.md."""

    model_config = SettingsConfigDict(
        alias_generator=AliasGenerator(validation_alias=_variable),
        case_sensitive=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[SecretStr, AfterValidator(check_database_url)] | None = Field(
        None, description="the database as postgresql://USER:PASSWORD@HOST:PORT/DATABASE; POSTGRES_* is then not read"
    )
    postgres_host: str | None = Field(
        None,
        description="the database's host, or the directory of its socket; localhost if another POSTGRES_* is set",
    )
    postgres_port: Annotated[int, BeforeValidator(read_port), Field(ge=1, le=65535)] = Field(
        5432, description="the database's port"
    )
    postgres_db: str | None = Field(None, description="the database's name; that of the user if it is not set")
    postgres_user: str | None = Field(None, description="the database's user; postgres if another POSTGRES_* is set")
    postgres_password: SecretStr | None = Field(None, description="the password of that user, as it is")
    packs: Annotated[
        tuple[Name, ...], BeforeValidator(read_names), AfterValidator(without_repeats), AfterValidator(expand_all)
    ] = Field(
        default_packs(), min_length=1, description="the packs to apply and to serve, separated by commas, or `all`"
    )
    schema_name: Name | None = Field(
        None,
        validation_alias="ROWCAST_SCHEMA",
        description="the Postgres schema of the pack, if there is only one; that of its name if it is not set",
    )
    environment: Annotated[Literal["development", "production"], BeforeValidator(lower)] = Field(
        "development",
        description="development or production, which loads no sample data, and takes no database on localhost or "
        "without TLS but through its socket",
    )
    data_dir: Path = Field(
        default_factory=state_home, description="the directory in which `daemon up` keeps its database"
    )
    listen: Annotated[Address, BeforeValidator(read_address)] = Field(
        Address("127.0.0.1", 8787), description="the HOST:PORT for websockets and pages, an IPv6 address in brackets"
    )
    workers: Count = Field(1, description="the number of processes that serve; more than one for more than one core")
    worker_silence: Seconds = Field(
        10.0, description="the seconds without a sign of life until one of several processes is killed and replaced"
    )
    metrics_listen: Annotated[Address, BeforeValidator(read_address)] | None = Field(
        None,
        description="a HOST:PORT beside ROWCAST_LISTEN; of several processes each has its own port, from PORT on",
    )
    secret: Annotated[SecretStr, AfterValidator(check_secret)] | None = Field(
        None, description="the HS256 key that signs tokens, 32 bytes or more"
    )
    secret_file: Path | None = Field(
        None, description="a file that holds that key; if neither is set, $CREDENTIALS_DIRECTORY/secret"
    )
    log_format: Annotated[Literal["auto", "json", "pretty"], BeforeValidator(lower)] = Field(
        "auto", description="the form of a log line; auto is pretty on a terminal and JSON elsewhere"
    )
    log_level: Annotated[Literal["debug", "info", "warn", "error"], BeforeValidator(lower)] = Field(
        "info", description="the least that is logged: debug, info, warn or error"
    )
    beat_every: Seconds = Field(5.0, description="the seconds between two beats through Postgres to the listener")
    beat_limit: Seconds = Field(
        15.0, description="the seconds without a beat until the listener connects anew; more than ROWCAST_BEAT_EVERY"
    )
    poll_every: Seconds = Field(1.0, description="the seconds until the log is read although nothing rang")
    heartbeat: Seconds = Field(20.0, description="the seconds between two `head` frames to a client")
    order_commit: Annotated[Literal["async", "sync"], BeforeValidator(lower)] = Field(
        "async",
        description="how the order is committed; with sync no client sees what a crash of Postgres could take back",
    )
    retention: Annotated[timedelta, BeforeValidator(read_duration), Field(ge=timedelta(minutes=1))] = Field(
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
        problem = production_problem(self.dsn) if self.environment == "production" and self.dsn else None
        if problem is None:
            return self
        raise ValueError(f"ROWCAST_ENVIRONMENT is production, where there is {problem}")

    @model_validator(mode="after")
    def _a_port_for_each_worker(self) -> Self:
        if self.metrics_listen is None or self.metrics_listen.port + self.workers - 1 <= 65535:
            return self
        raise ValueError("ROWCAST_METRICS_LISTEN needs as many ports from its own on as ROWCAST_WORKERS says")

    @property
    def schemas(self) -> dict[str, str]:
        """The chosen packs, each with the schema that it lives in."""
        return {pack: self.schema_name or pack for pack in self.packs}

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

    def pack_secret(self, name: str) -> SecretStr | None:
        """A secret that a pack declares; None if it is not set."""
        secret: SecretStr | None = getattr(self, name)
        return secret

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


def _pack_fields() -> dict[str, Any]:
    """The settings that packs declare: each a secret, and a file that may hold it."""
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
    Settings.__doc__ = """Everything that can be set. Made by `load`."""
