"""The sources of settings, how they combine, and the messages about invalid ones."""

import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import asyncpg.connect_utils
import pytest
from pydantic import ValidationError

from daemon.core.errors import OperatorFault
from daemon.extensions.email_unsubscribe.cipher import token_keys
from daemon.files import folder
from daemon.packs import bundled
from daemon.settings import SECRET_BYTES, VARIABLES, Address, BadSettings, Settings, load
from daemon.settings.local import as_service

SECRET = "s3cr3t-" * 6
Problems = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment and a current directory without any settings."""
    for name in os.environ:
        if name in VARIABLES.values() or name.startswith(("ROWCAST_", "XDG_", "CREDENTIALS_", "PG")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Problems:
    """The problems, line by line, if the environment has these variables."""

    def load_invalid(config: Path | None = None, **variables: str) -> list[str]:
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            with pytest.raises(BadSettings) as caught:
                load(config)
        return str(caught.value).splitlines()

    return load_invalid


def parsed_by_driver(dsn: str | None) -> dict[str, Any]:
    """How the driver parses a DSN."""
    parse = asyncpg.connect_utils._parse_connect_dsn_and_args  # type: ignore[attr-defined]
    addresses, found = parse(**dict.fromkeys(signature(parse).parameters) | {"dsn": dsn})
    return {"address": addresses[0], "user": found.user, "password": found.password, "database": found.database}


# Sources.


def test_every_setting_is_optional_or_has_a_default() -> None:
    settings = load()
    assert ("chatgenius",) == settings.packs
    assert Address("127.0.0.1", 8787) == settings.listen
    assert None is settings.dsn


def test_each_source_overrides_those_after_it(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bare / "rowcast.toml"
    names = ["beat_every", "poll_every", "heartbeat", "lock_timeout", "drain_seconds"]

    def write(path: Path, count: int, value: int, form: str) -> None:
        path.write_text("".join(f"{form.format(name, name.upper())} = {value}\n" for name in names[:count]))

    write(config, 5, 5, "{0}")
    write(bare / ".env", 4, 4, "ROWCAST_{1}")
    write(bare / ".env.local", 3, 3, "ROWCAST_{1}")
    monkeypatch.setenv("ROWCAST_BEAT_EVERY", "2")
    monkeypatch.setenv("ROWCAST_POLL_EVERY", "2")

    settings = load(config, beat_every=1)

    assert [1, 2, 3, 4, 5] == [getattr(settings, name) for name in names]


def test_an_omitted_option_overrides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_PACKS", "antone")
    assert ("antone",) == load(packs=(), listen=None).packs


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_LISTEN", "")
    monkeypatch.setenv("DATABASE_URL", "")
    assert Address("127.0.0.1", 8787) == load().listen


def test_the_settings_object_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_LISTEN", "127.0.0.1:1")
    assert Address("127.0.0.1", 8787) == Settings().listen


def test_settings_cannot_be_changed_after_loading() -> None:
    settings = load()
    with pytest.raises(ValidationError, match="frozen"):
        settings.read_chunk = 1  # type: ignore[misc]


@pytest.mark.parametrize("retention", ["90s", "90m", "36h", "400d"])
def test_a_child_process_can_get_the_same_settings(
    bare: Path, monkeypatch: pytest.MonkeyPatch, retention: str
) -> None:
    config = bare / "rowcast.toml"
    config.write_text('packs = ["antone"]\nschema = "test"\nlisten = "[::1]:80"\npostgres_password = "p"\n')
    monkeypatch.setenv("ROWCAST_LOCK_TIMEOUT", "3")
    given = load(config, secret=SECRET, jobs="antone_archive,backup", retention=retention, archive_dir="/srv/a b")

    environment = given.as_environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    again = load()

    assert SECRET not in environment.values()
    for field in ("packs", "schema_name", "listen", "lock_timeout", "dsn", "jobs", "retention", "archive_dir"):
        assert getattr(given, field) == getattr(again, field)


def test_a_job_that_does_not_exist_is_named_with_those_that_do(problems: Problems) -> None:
    known = "asyncops_summary, asyncops_archive, antone_archive, backup"
    [problem] = problems(ROWCAST_JOBS="backup,backups")
    assert problem.startswith("ROWCAST_JOBS: there is no job backups: choose among ")
    assert {*known.split(", ")} == {*problem.partition("among ")[2].removesuffix(", or `all`").split(", ")}
    assert ("all",) == load(jobs="all").jobs
    assert () == load().jobs


# The database.


def test_the_parts_of_a_database_become_one_url() -> None:
    settings = load(
        postgres_host="db.example",
        postgres_port="6543",
        postgres_db="a/b",
        postgres_user="u@x",
        postgres_password="p:/?#%",
    )
    assert {
        "address": ("db.example", 6543),
        "user": "u@x",
        "password": "p:/?#%",
        "database": "a/b",
    } == parsed_by_driver(settings.dsn)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("/run/postgresql", "/run/postgresql/.s.PGSQL.5432"),
        ("::1", ("::1", 5432)),
        ("[::1]", ("::1", 5432)),
        ("localhost", ("localhost", 5432)),
    ],
)
def test_a_host_may_be_a_name_an_address_or_a_socket(host: str, address: object) -> None:
    assert address == parsed_by_driver(load(postgres_host=host).dsn)["address"]


def test_missing_parts_have_the_defaults_of_the_postgres_image() -> None:
    assert {
        "address": ("localhost", 5432),
        "user": "postgres",
        "password": "p",
        "database": "postgres",
    } == parsed_by_driver(load(postgres_password="p").dsn)


def test_a_port_alone_does_not_configure_a_database() -> None:
    assert None is load(postgres_port=5433).dsn


def test_a_url_overrides_the_parts_whatever_its_source(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / ".env").write_text("DATABASE_URL=postgresql://u:p@h/d\n")
    monkeypatch.setenv("POSTGRES_HOST", "elsewhere")
    monkeypatch.setenv("POSTGRES_PORT", "tcp://10.0.0.1:5432")
    assert "postgresql://u:p@h/d" == load().dsn


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u:p@h/d",
        "postgresql://u:p%40ss@[::1]:5432/d?sslmode=require",
        "postgresql://u@h1:5432,h2:5433/d",
        "postgresql:///d?host=/run/postgresql",
    ],
)
def test_every_form_of_url_that_the_driver_reads_is_accepted(url: str) -> None:
    assert url == load(database_url=url).dsn


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:canary@x@h/d",
        "postgresql://u:canary/x@h/d",
        "postgresql://u:1#canary@h/d",
        "postgresql://u:1/canary@h/d",
        "postgresql://u:1?canary@h/d",
        "postgresql://u:1?canary=x@h/d",
        "postgresql://u:1?sslmode=canary@h/d",
        "postgresql://u:canary[@h/d",
        "postgresql://u:canary\N{DOUBLE QUESTION MARK}@h/d",
        "postgresql+asyncpg://u:canary@h/d",
        "jdbc:postgresql://u:canary@h/d",
        "canary",
    ],
)
def test_a_url_that_would_be_misread_is_refused_without_being_shown(problems: Problems, url: str) -> None:
    (problem,) = problems(DATABASE_URL=url)
    assert problem.startswith("DATABASE_URL: ")
    assert "canary" not in problem


def test_a_port_that_container_links_have_set_is_explained(problems: Problems) -> None:
    (problem,) = problems(POSTGRES_PORT="tcp://10.0.0.1:5432")
    assert problem.startswith("POSTGRES_PORT: a number such as 5432 is needed.")
    assert "Kubernetes or Docker" in problem


def test_a_missing_database_is_a_fault_that_names_the_variables() -> None:
    with pytest.raises(BadSettings, match="set DATABASE_URL, or POSTGRES_HOST"):
        load().require_dsn()


# The secret.


def test_the_secret_may_be_in_a_file(bare: Path) -> None:
    (bare / "key").write_text(f"{SECRET}\n")
    assert SECRET.encode() == load(secret_file="key").require_secret()


def test_the_secret_may_be_a_systemd_credential(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "secret").write_text(SECRET)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(bare))
    assert SECRET.encode() == load().require_secret()


def test_the_password_of_the_database_may_be_in_a_file_or_a_credential(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "postgresql://ada:pass@db.example.com/chat"  # pragma: allowlist secret
    (bare / "url").write_text(f"{url}\n")
    settings = load(database_url_file="url")
    assert url == settings.require_dsn()
    monkeypatch.setenv("DATABASE_URL_FILE", "url")
    assert (url, "") == tuple(map(settings.as_environment().get, ("DATABASE_URL", "DATABASE_URL_FILE")))
    monkeypatch.delenv("DATABASE_URL_FILE")
    (bare / "database_url").write_text(url)
    (bare / "postgres_password").write_text("p/w")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(bare))
    assert url == load().require_dsn()
    (bare / "database_url").unlink()
    assert "postgresql://ada:p%2Fw@db:5432/ada" == load(postgres_user="ada", postgres_host="db").require_dsn()


def test_a_service_file_names_what_a_database_url_does() -> None:
    url = "postgresql://a%40b:p%2Fw@one:1,[::1]:2/chat?sslmode=require"  # pragma: allowlist secret
    lines = ["sslmode=require", "host=one,::1", "port=1,2", "user=a@b", "password=p/w", "dbname=chat"]
    assert ["[rowcast]", *lines] == as_service(url).splitlines()
    assert ["[rowcast]", "host=/run/pg", "user=u", "dbname=d"] == as_service(
        "postgresql://u@/d?host=/run/pg"
    ).splitlines()


def test_a_configured_secret_overrides_the_credential(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "secret").write_text("another" * 6)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(bare))
    assert SECRET.encode() == load(secret=SECRET).require_secret()


def test_a_secret_and_a_secret_file_are_refused(problems: Problems) -> None:
    assert ["ROWCAST_SECRET and ROWCAST_SECRET_FILE are both set: keep one of them"] == problems(
        ROWCAST_SECRET=SECRET, ROWCAST_SECRET_FILE="key"
    )


def test_a_short_secret_is_refused_with_its_source(bare: Path, problems: Problems) -> None:
    (bare / "key").write_text("x" * (SECRET_BYTES - 1))
    (problem,) = problems(ROWCAST_SECRET_FILE="key")
    assert problem.startswith(f"ROWCAST_SECRET in key: {SECRET_BYTES} bytes or more are needed")


def test_a_secret_file_that_cannot_be_read_is_named(bare: Path, problems: Problems) -> None:
    assert ["key: cannot be read: No such file or directory"] == problems(ROWCAST_SECRET_FILE="key")
    (bare / "key").write_bytes(b"\xff" * 32)
    assert ["key: cannot be read: this is not UTF-8"] == problems(ROWCAST_SECRET_FILE="key")


def test_a_secret_file_that_never_ends_is_refused(problems: Problems) -> None:
    (problem,) = problems(ROWCAST_SECRET_FILE="/dev/zero")
    assert problem.startswith("/dev/zero: it has more than ")


def test_a_missing_secret_is_a_fault_that_names_the_variables() -> None:
    with pytest.raises(BadSettings, match="set ROWCAST_SECRET or ROWCAST_SECRET_FILE"):
        load().require_secret()


# The keys of OAuth tokens.

KEYS = ["b25lIGtleSBvZiB0aGlydHktdHdvIGJ5dGVzLCBubyA=", "YW5vdGhlciBrZXkgb2YgdGhpcnR5LXR3byBieXRlcyE="]


def test_several_token_keys_may_be_in_a_file_the_newest_first(bare: Path) -> None:
    (bare / "keys").write_text("\n".join(KEYS) + "\n")
    assert KEYS == token_keys(load(token_keys_file="keys"))
    assert KEYS == token_keys(load(token_keys=" ".join(KEYS)))


def test_token_keys_may_be_a_systemd_credential(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "token_keys").write_text(KEYS[0])
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(bare))
    assert KEYS[:1] == token_keys(load())


@pytest.mark.parametrize("keys", ["canary", KEYS[0][:-4], f"{KEYS[0]} canary", "b25l", "ä" * 44])
def test_an_invalid_token_key_is_refused_without_being_shown(bare: Path, problems: Problems, keys: str) -> None:
    (bare / "keys").write_text(keys)
    (problem,) = problems(ROWCAST_TOKEN_KEYS_FILE="keys")
    assert problem.startswith("ROWCAST_TOKEN_KEYS in keys: one key or more is needed, each of 32 bytes")
    assert keys not in problem
    assert "canary" not in problem


def test_token_keys_and_a_token_keys_file_are_refused(problems: Problems) -> None:
    assert ["ROWCAST_TOKEN_KEYS and ROWCAST_TOKEN_KEYS_FILE are both set: keep one of them"] == problems(
        ROWCAST_TOKEN_KEYS=KEYS[0], ROWCAST_TOKEN_KEYS_FILE="keys"
    )


def test_missing_token_keys_are_a_fault_that_names_the_variables() -> None:
    with pytest.raises(BadSettings, match="set ROWCAST_TOKEN_KEYS_FILE, or ROWCAST_TOKEN_KEYS"):
        token_keys(load())


def test_token_keys_are_not_shown_and_not_passed_to_child_processes() -> None:
    settings = load(token_keys=KEYS[0])
    assert KEYS[0] not in repr(settings)
    assert KEYS[0] not in str(settings.as_environment())


def test_secrets_appear_neither_in_the_settings_nor_in_problems(problems: Problems) -> None:
    shown = repr(load(secret=SECRET, postgres_password="hunter2", database_url="postgresql://u:hunter2@h/d"))
    shown += "".join(problems(ROWCAST_SECRET="hunter2", POSTGRES_PASSWORD="hunter2", ROWCAST_HEARTBEAT="hunter2"))
    assert SECRET not in shown
    assert "hunter2" not in shown


# Single values.


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:80", Address("0.0.0.0", 80)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:8787", Address("::1", 8787)),
        ("unix:/run/rowcast.sock", Address("unix:/run/rowcast.sock", 0)),
    ],
)
def test_an_address_is_printed_as_it_was_given(text: str, address: Address) -> None:
    assert address == load(listen=text).listen
    assert text == str(address)


@pytest.mark.parametrize("text", ["8787", ":8787", "localhost", "::1:8787", "h:65536", "h:-1", "h:80x", "[h]:80"])
def test_an_address_without_host_or_port_is_refused(problems: Problems, text: str) -> None:
    (problem,) = problems(ROWCAST_LISTEN=text)
    assert problem.startswith("ROWCAST_LISTEN: HOST:PORT is needed")


@pytest.mark.parametrize("text", ["unix:", "unix:rowcast.sock", "unix:/" + "x" * 107])
def test_a_unix_socket_without_a_usable_path_is_refused(problems: Problems, text: str) -> None:
    (problem,) = problems(ROWCAST_LISTEN=text)
    assert problem.startswith("ROWCAST_LISTEN: unix: needs an absolute path")


@pytest.mark.parametrize("text", ["antone, chatgenius", '["antone", "chatgenius"]', "antone,chatgenius,antone"])
def test_packs_are_a_list_in_either_format(text: str) -> None:
    assert ("antone", "chatgenius") == load(packs=text).packs


def test_all_means_every_bundled_pack() -> None:
    assert tuple(bundled()) == load(packs=("all",)).packs


@pytest.mark.parametrize("text", ["a,,b", "A", "1a", "a-b", "[1", '["a"', "x" * 64])
def test_an_invalid_pack_name_is_refused(problems: Problems, text: str) -> None:
    (problem,) = problems(ROWCAST_PACKS=text)
    assert problem.startswith("ROWCAST_PACKS: ")


def test_a_schema_requires_a_single_pack(problems: Problems) -> None:
    assert "test" == load(schema="test").schema_name
    (problem,) = problems(ROWCAST_SCHEMA="test", ROWCAST_PACKS="antone,chatgenius")
    assert "ROWCAST_SCHEMA" in problem
    assert "ROWCAST_PACKS" in problem


@pytest.mark.parametrize(("every", "limit"), [("15", "15"), ("20", "15")])
def test_the_heartbeat_interval_must_be_less_than_its_limit(problems: Problems, every: str, limit: str) -> None:
    assert ["ROWCAST_BEAT_LIMIT must be more than ROWCAST_BEAT_EVERY"] == problems(
        ROWCAST_BEAT_EVERY=every, ROWCAST_BEAT_LIMIT=limit
    )


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "0.0004", "1e15"])
def test_seconds_must_be_a_positive_number(problems: Problems, value: str) -> None:
    (problem,) = problems(ROWCAST_POLL_EVERY=value)
    assert problem.startswith("ROWCAST_POLL_EVERY: input should be ")
    assert problem.endswith(f"({Settings.model_fields['poll_every'].description})")


@pytest.mark.parametrize(
    ("variable", "value", "bound"), [("RETENTION", "4s", "or equal to 1m ("), ("TOKEN_LIFETIME", "0s", "than 0d (")]
)
def test_the_bound_of_a_duration_is_written_as_durations_are(
    problems: Problems, variable: str, value: str, bound: str
) -> None:
    [problem] = problems(**{f"ROWCAST_{variable}": value})
    assert bound in problem


@pytest.mark.parametrize("name", ["read_chunk", "snapshot_rows", "transaction_changes", "transaction_bytes"])
def test_a_number_that_postgres_would_not_take_is_refused_at_the_start(problems: Problems, name: str) -> None:
    variable = f"ROWCAST_{name.upper()}"
    (problem,) = problems(**{variable: str(2**63)})
    assert problem.startswith(f"{variable}: input should be less than or equal to ")


@pytest.mark.parametrize("prefix", ["*", "a b", ">", "a.", ".a", "é", "a\r\nPUB x 1"])
def test_a_prefix_that_is_no_nats_subject_is_refused(problems: Problems, prefix: str) -> None:
    (problem,) = problems(ROWCAST_NATS_PREFIX=prefix)
    assert problem.startswith("ROWCAST_NATS_PREFIX: letters, digits, _ and - are needed")
    assert "rowcast.shop-2" == load(nats_prefix="rowcast.shop-2").nats_prefix


@pytest.mark.parametrize("variable", ["ROWCAST_ORIGINS", "ROWCAST_SECRET_FILE", "DATABASE_URL", "ROWCAST_LISTEN"])
def test_a_variable_that_is_not_utf_8_is_refused(problems: Problems, variable: str) -> None:
    assert [f"{variable}: this is not UTF-8"] == problems(**{variable: os.fsdecode(b"\xff")})


def test_words_are_accepted_in_any_case() -> None:
    assert "warn" == load(log_level="WARN").log_level


def test_data_is_in_the_state_directory_of_the_user(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert Path("/home/somebody/.local/state/rowcast") == load().data_dir
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("XDG_STATE_HOME", "/var/lib")
    assert Path("/var/lib/rowcast") == load().data_dir


def test_what_root_tries_out_does_not_lie_in_the_state_directory_of_the_unit(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert Path("/var/lib/rowcast-up") == load().data_dir
    unit = (folder("systemd") / "rowcast.service").read_text().splitlines()
    assert "StateDirectory=rowcast" in unit
    assert "Environment=XDG_STATE_HOME=%S" in unit


# Problems.


def test_every_problem_has_a_line_that_names_its_source(bare: Path, problems: Problems) -> None:
    config = bare / "rowcast.toml"
    config.write_text('log_level = "loud"\nheartbeet = 1\n')
    (bare / ".env").write_text("ROWCAST_MAX_CLIENTS=none\n")
    (bare / ".env.local").write_text("ROWCAST_ORDER_COMMIT=maybe\n")

    lines = problems(config, ROWCAST_LISTN="x")

    assert {
        f"log_level in {config}",
        f"heartbeet in {config}",
        "ROWCAST_MAX_CLIENTS in .env",
        "ROWCAST_ORDER_COMMIT in .env.local",
        "ROWCAST_LISTN",
    } == {line.partition(": ")[0] for line in lines}


def test_a_mistyped_setting_gets_the_nearest_name_as_suggestion(bare: Path, problems: Problems) -> None:
    config = bare / "rowcast.toml"
    config.write_text("heartbeet = 1\nquite_another = 2\n")
    assert [
        "ROWCAST_LISTN: there is no such setting; did you mean ROWCAST_LISTEN?",
        f"heartbeet in {config}: there is no such setting; did you mean heartbeat?",
        f"quite_another in {config}: there is no such setting",
    ] == sorted(problems(config, ROWCAST_LISTN="x"))


def test_variables_of_other_programs_are_ignored(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROWCAST_SERVICE_HOST", "ROWCAST_SERVICE_PORT_WS", "ROWCAST_PORT", "ROWCAST_PORT_8787_TCP_ADDR"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8787")
    monkeypatch.setenv("POSTGRES_INITDB_ARGS", "-k")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/agent")
    (bare / ".env").write_text("VITE_TITLE=chat\n")
    assert load()


def test_a_file_that_cannot_be_read_is_named(bare: Path) -> None:
    missing, broken = bare / "missing.toml", bare / "broken.toml"
    broken.write_text("listen = canary")
    with pytest.raises(BadSettings, match=f"{missing}: cannot be read: No such file"):
        load(missing)
    with pytest.raises(BadSettings, match=f"{broken}: this is not TOML") as caught:
        load(broken)
    assert "canary" not in str(caught.value)
    for text, problem in (
        (f"max_topics = 1{'0' * 5000}", "a number in it is too long"),
        (f"origins = {'[' * 5000}", "its lists nest too deeply"),
        ('public_keys = ["a", {b = "canary\\u0000"}]', "it contains a NUL character"),
        ('secret_file = "canary\\u0000"', "it contains a NUL character"),
    ):
        broken.write_text(text)
        with pytest.raises(BadSettings, match=f"{broken}: .*{problem}") as caught:
            load(broken)
        assert "canary" not in str(caught.value)
    (bare / ".env").write_bytes(b"A=\xff\n")
    with pytest.raises(BadSettings, match=r"\.env: cannot be read: this is not UTF-8"):
        load()


def test_a_list_that_nests_without_end_is_a_bad_setting(problems: Problems) -> None:
    (problem,) = problems(ROWCAST_ORIGINS="[" * 100_000)
    assert 'ROWCAST_ORIGINS: names are given as "one,two" or as ["one", "two"]' == problem


def test_bad_settings_end_the_process_as_a_configuration_error() -> None:
    assert issubclass(BadSettings, OperatorFault)
    assert os.EX_CONFIG == BadSettings.exit_code


def test_every_setting_is_described_for_the_operator() -> None:
    assert [] == [name for name, field in Settings.model_fields.items() if not field.description]


# Databases in production.

REMOTE = "db.example"


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://u:canary@{host}/d?sslmode=require" for host in ("localhost", "LOCALHOST.", "a.localhost")),
        *(
            f"postgresql://u:canary@{host}/d?sslmode=require"
            for host in ("127.0.0.1", "127.8.9.1", "127.1", "0.0.0.0")
        ),
        *(f"postgresql://u:canary@{host}:5432/d?sslmode=require" for host in ("0x7f000001", "2130706433", "[::1]")),
        *(
            f"postgresql://u:canary@{host}/d?sslmode=verify-full"
            for host in ("[::ffff:127.0.0.1]", "[::]", "%6cocalhost")
        ),
        f"postgresql://u:canary@{REMOTE},localhost/d?sslmode=require",
        f"postgresql://u:canary@{REMOTE}:1,127.0.0.1:2/d?sslmode=require",
        "postgresql://u:canary@/d?host=localhost&sslmode=require",
        f"postgresql://u:canary@/d?host=/run/postgresql,{REMOTE},ip6-localhost&sslmode=require",
        "postgresql://u:canary@/d?sslmode=require",
        "postgresql:///d",
        "postgresql://u:canary@/d?host=::1&sslmode=require",
        "postgresql://u:canary@:5432/d?sslmode=require",
    ],
)
def test_production_refuses_a_database_on_localhost_over_tcp(problems: Problems, url: str) -> None:
    assert [
        "ROWCAST_ENVIRONMENT is production, which does not allow a database on localhost over TCP: use its host "
        "name, or the directory of its socket"
    ] == problems(ROWCAST_ENVIRONMENT="production", DATABASE_URL=url)


@pytest.mark.parametrize(
    "query", ["", "?sslmode=disable", "?sslmode=allow", "?sslmode=prefer", "?sslmode=", "?ssl=require"]
)
def test_production_refuses_a_database_without_tls(problems: Problems, query: str) -> None:
    assert [
        "ROWCAST_ENVIRONMENT is production, which does not allow a database without TLS: add sslmode=verify-full to "
        "its URL, or at least sslmode=require"
    ] == problems(ROWCAST_ENVIRONMENT="production", DATABASE_URL=f"postgresql://u:canary@{REMOTE}/d{query}")


def test_the_postgres_variables_are_checked_like_the_url(problems: Problems) -> None:
    [local] = problems(ROWCAST_ENVIRONMENT="production", POSTGRES_USER="u", POSTGRES_PASSWORD="canary")
    assert "a database on localhost" in local
    [bare] = problems(ROWCAST_ENVIRONMENT="production", POSTGRES_HOST=REMOTE, POSTGRES_PASSWORD="canary")
    assert "a database without TLS" in bare
    assert "canary" not in local + bare


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://u:p@{REMOTE}/d?sslmode={mode}" for mode in ("require", "verify-ca", "verify-full")),
        f"postgresql://u:p@{REMOTE}:6432,other.example/d?sslmode=require",
        "postgresql://u:p@[2001:db8::1]:5432/d?sslmode=require",
        "postgresql://u@/d?host=/run/postgresql",
        "postgresql://u@/d?host=%2Frun%2Fpostgresql&port=5433",
        "postgresql://u@%2Frun%2Fpostgresql/d",
        f"postgresql://u@/d?host=/run/postgresql,{REMOTE}&sslmode=require",
        "postgresql://u:p@localhost.example/d?sslmode=require",
    ],
)
def test_production_accepts_a_remote_database_with_tls_and_a_local_one_by_socket(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("ROWCAST_ENVIRONMENT", "Production")
    assert url == load(database_url=url).dsn


def test_parts_missing_from_the_url_come_from_the_variables_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, problems: Problems
) -> None:
    given = {"ROWCAST_ENVIRONMENT": "production", "DATABASE_URL": f"postgresql://u@{REMOTE}/d"}
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    with monkeypatch.context() as environment:
        for name, value in given.items():
            environment.setenv(name, value)
        assert f"postgresql://u@{REMOTE}/d" == load().dsn
    [disabled] = problems(**given | {"DATABASE_URL": f"postgresql://u@{REMOTE}/d?sslmode=disable"})
    [unknown] = problems(**given | {"DATABASE_URL": f"postgresql://u@{REMOTE}/d?service=other"})
    assert "a database without TLS" in disabled
    assert "a database without TLS" in unknown
    monkeypatch.setenv("PGHOST", "localhost")
    [local] = problems(**given | {"DATABASE_URL": "postgresql:///d"})
    assert "a database on localhost" in local


def test_development_accepts_any_database(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "postgresql://u:p@localhost/d" == load(database_url="postgresql://u:p@localhost/d").dsn
