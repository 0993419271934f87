"""Each parameter of a database URL is honoured, or refused by its name in one line that says what to do."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from daemon.postgres.arguments import read_url
from daemon.settings.database_url import check_database_url
from daemon.settings.parameters import PARAMETERS, parameters_of

# Every parameter of PostgreSQL 17's libpq: values that are honoured, and values that are refused.
LIBPQ: dict[str, tuple[str, str]] = {
    "host": ("db.example /run/postgresql a,b", ""),
    "hostaddr": ("", "10.0.0.1"),
    "port": ("5432 1,2", "x 0 70000"),
    "dbname": ("chat", ""),
    "user": ("ada", ""),
    "password": ("canary", ""),
    "passfile": ("", ""),
    "require_auth": ("", "scram-sha-256 none"),
    "channel_binding": ("disable prefer", "require"),
    "connect_timeout": ("0 -1 5", "soon"),
    "client_encoding": ("auto UTF8 utf-8", "LATIN1"),
    "options": ("-c%20geqo%3Doff", ""),
    "application_name": ("chat", ""),
    "fallback_application_name": ("chat", ""),
    "keepalives": ("0 1", "yes"),
    "keepalives_idle": ("0 30", "x"),
    "keepalives_interval": ("5", "x"),
    "keepalives_count": ("3", "x"),
    "tcp_user_timeout": ("10000", "x"),
    "replication": ("false", "true database"),
    "gssencmode": ("disable prefer", "require"),
    "sslmode": ("disable allow prefer require", "on"),
    "requiressl": ("0", "1"),
    "sslnegotiation": ("postgres direct", "x"),
    "sslcompression": ("0", "1"),
    "sslcert": ("", ""),
    "sslkey": ("", ""),
    "sslpassword": ("canary", ""),
    "sslcertmode": ("allow", "require disable"),
    "sslrootcert": ("system", ""),
    "sslcrl": ("", ""),
    "sslcrldir": ("", "crls"),
    "sslsni": ("1", "0"),
    "requirepeer": ("", "postgres"),
    "ssl_min_protocol_version": ("TLSv1.2", "SSLv3"),
    "ssl_max_protocol_version": ("TLSv1.3", "SSLv3"),
    "krbsrvname": ("postgres", ""),
    "gsslib": ("gssapi", "x"),
    "gssdelegation": ("0", "1"),
    "service": ("", ""),
    "target_session_attrs": ("any primary read-write", "standby prefer-standby read-only x"),
    "load_balance_hosts": ("disable random", "x"),
}


def problem(url: str) -> str:
    """The line that refuses a URL, or nothing."""
    try:
        check_database_url(SecretStr(url))
        read_url(url, 10.0)
    except ValueError as error:
        return str(error)
    return ""


def test_every_parameter_of_libpq_has_its_fate() -> None:
    assert LIBPQ.keys() | {"ssl", "servicefile"} == PARAMETERS.keys()


@pytest.mark.parametrize("name", LIBPQ)
def test_a_parameter_is_honoured_or_refused_by_its_name(name: str) -> None:
    honoured, refused = LIBPQ[name]
    for value in honoured.split():
        assert "" == problem(f"postgresql://u@db.example/d?{name}={value}"), value
    for value in refused.split():
        line = problem(f"postgresql://u@db.example/d?{name}={value}")
        assert name in line
        assert "\n" not in line
        assert "canary" not in line


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("search_path=public", "the parameter search_path does not exist: put a setting of the session into options"),
        ("sslmode=verify-full", "the parameter sslmode=verify-full requires sslrootcert: name a file, or system"),
        ("sslmode=require&sslrootcert=system", "the parameter sslrootcert=system requires sslmode=verify-full"),
        ("sslrootcert=missing.crt", "the file of the parameter sslrootcert cannot be read (No such file"),
        ("sslcert=missing.crt", "the file of the parameter sslcert cannot be read (No such file"),
        ("sslcrl=missing.crl", "the file of the parameter sslcrl cannot be read (No such file"),
        ("passfile=missing", "the file of the parameter passfile cannot be read (No such file"),
        ("service=missing", "the service is not defined"),
    ],
)
def test_a_url_that_cannot_be_used_says_why(
    query: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert words in problem(f"postgresql://u:canary@db.example/d?{query}")


def test_a_service_completes_a_url_and_is_checked_like_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "services"
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    file.write_text("[chat]\nhost=db.example\ndbname=chat\napplication_name=a\nuser=u\n")
    arguments = read_url("postgresql://ada@/?service=chat&user=ada", 10.0)
    assert {"host": "db.example", "dbname": "chat", "user": "ada"} == parameters_of(arguments.driver["dsn"])
    assert "a" == arguments.application_name
    file.write_text("[chat]\nchannel_binding=require\n")
    assert "channel_binding" in problem("postgresql://u@/?service=chat")


def test_a_plus_in_a_password_is_no_blank() -> None:
    assert {"password": "a+b c"} == parameters_of("postgresql:///d?password=a+b%20c")


def test_parameters_of_the_connection_are_honoured() -> None:
    arguments = read_url("postgresql://u@h/d?connect_timeout=3&keepalives=0&keepalives_idle=7&options=-c%20a%3Db", 10)
    assert (3.0, False, {"TCP_KEEPIDLE": 7}) == (
        arguments.time_limit,
        arguments.keepalive,
        arguments.keepalive_options,
    )
    assert {"options": "-c a=b"} == arguments.driver["server_settings"]
    assert None is read_url("postgresql://u@h/d?connect_timeout=0", 10).time_limit
    hosts = {read_url("postgresql://u@a:1,b:2/d?load_balance_hosts=random", 10).driver["dsn"] for _ in range(50)}
    assert {"postgresql://u@a:1,b:2/d", "postgresql://u@b:2,a:1/d"} == hosts
