"""The faults that driver errors become: one line, one exit code, no secrets."""

import socket
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import stamina

from daemon.core.errors import OperatorFault
from daemon.postgres import connect
from daemon.postgres.connect import retry
from daemon.postgres.errors import (
    TRANSIENT,
    BadDatabaseUrl,
    ConnectionRefused,
    DatabaseFault,
    LockContention,
    TemporarilyUnavailable,
    UnknownHost,
    address_of,
    explain,
)

SECRET = "hunter2"


def server_error(sqlstate: str, message: str = "message of the server", **fields: str) -> asyncpg.PostgresError:
    """The error that the driver creates from a message of the server."""
    codes = {"detail": "D", "position": "P", "constraint": "n"}
    named = {codes[name]: text for name, text in fields.items()}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new({"C": sqlstate, "M": message, **named})
    return error


@pytest.mark.parametrize(
    ("sqlstate", "exit_code", "transient"),
    [
        ("28P01", 11, False),
        ("28000", 11, False),
        ("3D000", 13, False),
        ("42501", 14, False),
        ("42P04", 15, False),
        ("42P07", 16, False),
        ("42710", 16, False),
        ("42P06", 16, False),
        ("23505", 17, False),
        ("23503", 18, False),
        ("57P03", 19, True),
        ("53300", 19, True),
        ("40001", 19, True),
        ("40P01", 19, True),
        ("55P03", 19, True),
        ("08006", 19, True),
        ("08P01", 19, True),
        ("2BP01", 25, False),
        ("42601", 20, False),
        ("22012", 20, False),
        ("XX000", 20, False),
        ("ZZ999", 20, False),
    ],
)
def test_every_error_of_the_server_has_its_exit_code(sqlstate: str, exit_code: int, transient: bool) -> None:
    fault = explain(server_error(sqlstate), place=" in shop/0001_part.up.sql")
    assert exit_code == fault.exit_code
    assert transient == isinstance(fault, TRANSIENT)
    assert "message of the server" in str(fault)
    assert "\n" not in str(fault)


@pytest.mark.parametrize(
    ("error", "exit_code", "transient"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"), 10, True),
        (FileNotFoundError(2, "No such file or directory"), 10, True),
        (OSError("Multiple exceptions: [Errno 111] Connect call ..., [Errno 99] Cannot assign ..."), 10, True),
        (ConnectionError("unexpected connection_lost() call"), 10, True),
        (OSError(113, "No route to host"), 10, False),
        (PermissionError(13, "Permission denied"), 10, False),
        (ConnectionError('PostgreSQL server at "h:1" rejected SSL upgrade'), 10, False),
        (socket.gaierror(-2, "Name or service not known"), 12, False),
        (TimeoutError(), 19, False),
        (asyncpg.InterfaceError("connection is closed"), 19, True),
        (asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"), 19, True),
        (asyncpg.ClientConfigurationError("invalid DSN"), 78, False),
        (asyncpg.InterfaceError("something else"), 20, False),
    ],
)
def test_every_failure_to_connect_has_its_exit_code(error: Exception, exit_code: int, transient: bool) -> None:
    fault = explain(error, address="db.example:5432")
    assert exit_code == fault.exit_code
    assert transient == isinstance(fault, TRANSIENT)


def test_a_fault_says_where_it_happened_and_what_to_do() -> None:
    refused = explain(ConnectionRefusedError(111, ""), address="db.example:5432")
    assert (
        "Nothing answers at db.example:5432 (ECONNREFUSED): start Postgres there, or correct the database URL."
    ) == str(refused)
    denied = explain(server_error("42501", "permission denied for schema x"), place=" in a.sql, line 3")
    assert (
        "permission denied for schema x in a.sql, line 3: grant that right, or connect as a role that has it."
    ) == str(denied)


def test_a_fault_contains_no_values_of_rows() -> None:
    duplicate = server_error(
        "23505",
        'duplicate key value violates unique constraint "users_email_key"',
        detail=f"Key (email)=({SECRET}) already exists.",
        constraint="users_email_key",
    )
    assert "users_email_key" in str(explain(duplicate))
    assert SECRET not in str(explain(duplicate))
    assert SECRET not in str(explain(server_error("22P02", f'invalid input syntax for type integer: "{SECRET}"')))


def test_a_fault_lists_the_dependent_objects() -> None:
    fault = explain(
        server_error("2BP01", "cannot drop table t", detail="view v depends on table t\nview w depends on table t")
    )
    assert "view v depends on table t; view w depends on table t" in str(fault)


def test_an_error_that_another_library_wrapped_is_explained() -> None:
    wrapped, middle = RuntimeError("(sqlalchemy) [SQL: insert ...]"), RuntimeError("adapter")
    wrapped.__cause__, middle.__cause__ = middle, server_error("42501")
    assert 14 == explain(wrapped).exit_code


def test_a_wrapped_fault_is_returned_unchanged() -> None:
    fault = UnknownHost("gone", address="h:1")
    wrapped = RuntimeError()
    wrapped.__cause__ = fault
    assert fault is explain(wrapped)


@pytest.mark.parametrize(
    ("dsn", "address"),
    [
        (f"postgresql://app:{SECRET}@db.example:6543/app", "db.example:6543"),
        (f"postgresql://app:{SECRET}@db.example/app", "db.example:5432"),
        (f"postgresql://app:{SECRET}@/app?host=%2Frun%2Fpg&port=5433", "/run/pg/.s.PGSQL.5433"),
        (f"postgresql://app:{SECRET}@/app", "the default address"),
        (f"postgresql://app:{SECRET}@a:1,b:2/app", "the database"),
        (f"postgresql://app:{SECRET}/x@db.example/app", "the database"),
    ],
)
def test_only_the_address_of_a_url_is_shown(dsn: str, address: str) -> None:
    assert address == address_of(dsn)


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://app:{SECRET}/x@localhost/app",
        f"mysql://app:{SECRET}@localhost/app",
        f"postgresql://app:{SECRET}@localhost:port/app",
        f"app:{SECRET}@localhost",
    ],
)
async def test_an_invalid_url_is_refused_without_being_shown(dsn: str) -> None:
    with pytest.raises(BadDatabaseUrl) as caught:
        await connect.connect(dsn, application_name="test", attempts=1)
    assert 78 == caught.value.exit_code
    assert SECRET not in f"{caught.value}{caught.value!r}{caught.value.__cause__}"


@pytest.fixture
def no_delay() -> Iterator[None]:
    """Retries without a delay."""
    with stamina.set_testing(True, attempts=10, cap=True):
        yield


class Flaky:
    """Raises each of its faults once, and then returns."""

    def __init__(self, *faults: DatabaseFault) -> None:
        self.faults, self.calls = list(faults), 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)
        return "done"


@pytest.mark.usefixtures("no_delay")
async def test_a_transient_fault_is_retried_and_reported_each_time() -> None:
    work, reported = Flaky(TemporarilyUnavailable("starts"), ConnectionRefused("no")), []
    assert "done" == await retry(work, on_retry=lambda fault, attempt: reported.append((type(fault), attempt)))
    assert [(TemporarilyUnavailable, 1), (ConnectionRefused, 2)] == reported


async def test_a_permanent_fault_is_raised_at_once() -> None:
    work: Any = Flaky(UnknownHost("x"), UnknownHost("x"))
    with pytest.raises(UnknownHost):
        await retry(work)
    assert 1 == work.calls


@pytest.mark.usefixtures("no_delay")
async def test_the_last_attempt_raises_its_fault() -> None:
    work, reported = Flaky(*(TemporarilyUnavailable(str(n)) for n in range(5))), []
    with pytest.raises(TemporarilyUnavailable, match="2"):
        await retry(work, attempts=3, on_retry=lambda _, attempt: reported.append(attempt))
    assert [1, 2] == reported


async def test_a_caller_chooses_which_faults_are_retried() -> None:
    with pytest.raises(TemporarilyUnavailable):
        await retry(Flaky(TemporarilyUnavailable("x")), on=(LockContention,))


def test_every_database_fault_is_an_operator_fault() -> None:
    assert issubclass(DatabaseFault, OperatorFault)
