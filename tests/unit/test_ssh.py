"""The SSH tunnel in the settings: where it leads, the URL that leads through it, and what it excludes."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from daemon.postgres.arguments import read_url
from daemon.postgres.errors import address_of
from daemon.settings import VARIABLES, BadSettings, Settings, load
from daemon.settings.database_url import DatabaseUrl
from daemon.settings.ssh import Database, database_of, url_through

SSH = {"SSH_HOST": "bastion", "SSH_USER": "ops"}
Load = Callable[..., Settings]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """The settings in an environment with nothing but these variables."""
    for name in os.environ:
        if name in VARIABLES.values() or name.startswith(("ROWCAST_", "SSH_", "CREDENTIALS_", "PG")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def load_with(**variables: str) -> Settings:
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            return load()

    return load_with


def problem_of(loaded: Load, **variables: str) -> str:
    with pytest.raises(BadSettings) as caught:
        loaded(**variables)
    return str(caught.value)


def test_the_variables_of_ssh_clients_and_agents_are_no_settings(loaded: Load) -> None:
    others = ("SSH_AUTH_SOCK", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "SSH_AGENT_PID", "SSH_ASKPASS")
    assert None is loaded(**dict.fromkeys(others, "x"), POSTGRES_USER="u").ssh_route


def test_without_a_host_there_is_no_tunnel_and_the_url_stays_as_it_is(loaded: Load) -> None:
    settings = loaded(SSH_USER="ops", SSH_KEY_PATH="/k", DATABASE_URL="postgresql://u@db/d")
    assert (None, "postgresql://u@db/d") == (settings.ssh_route, settings.dsn)


def test_the_example_of_the_specification_leads_to_localhost_of_the_ssh_host(loaded: Load) -> None:
    settings = loaded(POSTGRES_USER="u", POSTGRES_PASSWORD="p", POSTGRES_DB="chatgenius", **SSH, SSH_KEY_PATH="~/key")
    route = settings.ssh_route
    assert route
    assert (Database("localhost", 5432), Path.home() / "key") == (route.database, route.key)
    assert isinstance(settings.dsn, DatabaseUrl)
    assert f"postgresql://u:p@/chatgenius?host={route.directory}&port=5432" == settings.dsn.replace("%2F", "/")
    assert "localhost:5432 through bastion" == address_of(settings.dsn)


def test_equal_settings_share_a_socket_and_others_have_their_own(loaded: Load) -> None:
    first, same = (loaded(**SSH, DATABASE_URL="postgresql://u@db/d") for _ in range(2))
    other = loaded(**SSH, DATABASE_URL="postgresql://u@db/other")
    assert first.dsn == same.dsn
    assert first.ssh_route
    assert other.ssh_route
    assert first.ssh_route.directory != other.ssh_route.directory


def test_a_child_process_gets_the_url_of_the_database_and_opens_its_own_tunnel(loaded: Load) -> None:
    environment = loaded(**SSH, SSH_PORT="2222", DATABASE_URL="postgresql://u@db/d").as_environment()
    assert "postgresql://u@db/d" == environment["DATABASE_URL"]
    assert {**SSH, "SSH_PORT": "2222"} == {name: environment[name] for name in (*SSH, "SSH_PORT")}


@pytest.mark.parametrize(
    ("url", "database"),
    [
        ("postgresql://u@db:5433/d", Database("db", 5433)),
        ("postgresql://u@db/d?port=5433", Database("db", 5433)),
        ("postgresql://u@[2001:db8::1]:5433/d", Database("2001:db8::1", 5433)),
        ("postgresql://u@/d?host=2001:db8::1", Database("2001:db8::1", 5432)),
        ("postgresql://u@%2Frun%2Fpostgresql/d", Database("/run/postgresql", 5432)),
        ("postgresql://u@/d?host=/run/postgresql&port=5433", Database("/run/postgresql", 5433)),
        ("postgresql:///d", Database("localhost", 5432)),
    ],
)
def test_the_database_is_the_one_that_the_driver_would_reach(loaded: Load, url: str, database: Database) -> None:
    assert database == database_of(url)
    assert str(database) in ("db:5433", "[2001:db8::1]:5433", "[2001:db8::1]:5432", "localhost:5432", database.socket)


def test_a_url_through_the_tunnel_keeps_all_but_host_port_and_tls() -> None:
    url = "postgresql://u:p%40ss@db:5433/d?sslmode=prefer&options=-c%20a%3Db&application_name=x&port=1&host=y"
    through = url_through(url, Path("/tmp/a b"))
    assert "postgresql://u:p%40ss@/d" == through.partition("?")[0]
    expected = {"options": ["-c a=b"], "application_name": ["x"], "host": ["/tmp/a b"], "port": ["5432"]}
    assert expected == parse_qs(urlsplit(through).query)
    assert "ssl" not in read_url(through, 1.0).driver


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SSH_HOST": "b", "SSH_USER": "u"}, "SSH_HOST requires a database"),
        ({"SSH_HOST": "b", "POSTGRES_USER": "u"}, "SSH_HOST requires SSH_USER"),
        ({**SSH, "DATABASE_URL": "postgresql://u@a,b/d"}, "name a single host"),
        ({**SSH, "DATABASE_URL": "postgresql:///d?service=s"}, "needs the host of the database"),
        ({**SSH, "DATABASE_URL": "postgresql://u@db/d?sslmode=require"}, "excludes TLS to the database"),
        ({**SSH, "DATABASE_URL": "postgresql://u@db/d", "PGSSLMODE": "verify-full"}, "excludes TLS"),
        ({**SSH, "DATABASE_URL": "postgresql://u@db/d?port=x"}, "DATABASE_URL: the parameter port "),
        ({**SSH, "POSTGRES_USER": "u", "SSH_PORT": "0"}, "SSH_PORT: "),
        ({**SSH, "POSTGRES_USER": "u", "SSH_KEY_PASSPHRASE": "canary", "SSH_KEY_PASSPHRASE_FILE": "f"}, "both set"),
        ({"ROWCAST_SSH_HOST": "b"}, "ROWCAST_SSH_HOST: there is no such setting; did you mean SSH_HOST?"),
    ],
)
def test_what_a_tunnel_cannot_do_is_refused_in_one_line(
    loaded: Load, variables: dict[str, str], expected: str
) -> None:
    problem = problem_of(loaded, **variables)
    assert expected in problem
    assert 1 == len(problem.splitlines())
    assert "canary" not in problem


def test_production_allows_through_the_tunnel_what_it_refuses_without(loaded: Load) -> None:
    local = {"ROWCAST_ENVIRONMENT": "production", "DATABASE_URL": "postgresql://u@localhost/d"}
    assert "does not allow" in problem_of(loaded, **local)
    dsn = loaded(**SSH, **local).dsn
    assert isinstance(dsn, DatabaseUrl)
    assert (True, "localhost:5432 through bastion") == (dsn.in_production, dsn.address)


def test_the_passphrase_may_be_in_a_file_or_a_credential(loaded: Load, tmp_path: Path) -> None:
    (tmp_path / "ssh_key_passphrase").write_text("hunter2\n")
    for more in ({"SSH_KEY_PASSPHRASE_FILE": "ssh_key_passphrase"}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}):
        passphrase = loaded(**SSH, POSTGRES_USER="u", **more).ssh_key_passphrase
        assert passphrase
        assert "hunter2" == passphrase.get_secret_value()
