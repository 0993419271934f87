"""Translates errors of the driver into faults: one for each thing that the operator can do about them."""

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Final
from urllib.parse import parse_qs, urlsplit

import asyncpg

from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.settings.database_url import DatabaseUrl

log = get_logger()


class DatabaseFault(OperatorFault):
    """The database reported an error{place}: {reason} (SQLSTATE {sqlstate})."""

    exit_code: ClassVar[int] = 20

    def __init__(self, reason: str = "", *, sqlstate: str = "", address: str = "", place: str = "") -> None:
        self.reason, self.sqlstate, self.address, self.place = reason, sqlstate, address, place
        self.constraint: str | None = None  # the one that a row violates; a column's name for NOT NULL
        self.table: str | None = None

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # one line, even if the server's message has several


class Unreachable(DatabaseFault):
    """Cannot reach {address} ({reason}): correct the database URL, or check the network and firewall."""

    exit_code = 10


class ConnectionRefused(Unreachable):
    """Nothing answers at {address} ({reason}): start Postgres there, or correct the database URL."""


class TlsFailed(Unreachable):
    """TLS with {address} failed ({reason}): correct host, sslmode or sslrootcert in the database URL."""


class AuthenticationFailed(DatabaseFault):
    """{reason}: correct user and password in the database URL, or admit this user in pg_hba.conf."""

    exit_code = 11


class UnknownHost(DatabaseFault):
    """The host of {address} is not known ({reason}): correct the database URL, or check DNS."""

    exit_code = 12


class NoSuchDatabase(DatabaseFault):
    """{reason}: create it (createdb), or correct the database URL."""

    exit_code = 13


class InsufficientPrivilege(DatabaseFault):
    """{reason}{place}: grant that right, or connect as a role that has it."""

    exit_code = 14


class OwnerUnusable(OperatorFault):
    """This role cannot take on {role}, which is in ROWCAST_OWNER ({reason}): create that role, and grant it to this \
one."""

    exit_code: ClassVar[int] = 14

    def __init__(self, role: str, reason: str) -> None:
        self.role, self.reason = role, reason


class UnqualifiedName(DatabaseFault):
    """{reason}{place}: write the name of a new object with its schema."""

    exit_code = 65


class DatabaseExists(DatabaseFault):
    """{reason}: use it as it is, or choose another name."""

    exit_code = 15


class ObjectExists(DatabaseFault):
    """{reason}{place}: rename or drop the existing object, or choose another schema with --schema."""

    exit_code = 16


class DuplicateRows(DatabaseFault):
    """{reason}{place}: remove the duplicate rows, then try again."""

    exit_code = 17


class ForeignKeyViolated(DatabaseFault):
    """{reason}{place}: fix the rows with missing references, then try again."""

    exit_code = 18


class CheckViolated(DatabaseFault):
    """{reason}{place}: correct these rows, then try again."""

    exit_code = 18


class TemporarilyUnavailable(DatabaseFault):
    """The database is temporarily unavailable ({reason}){place}: try again later."""

    exit_code = 19


class LockContention(TemporarilyUnavailable):
    """Other transactions were in the way ({reason}){place}: try again later."""


class DatabaseTimeout(DatabaseFault):
    """No answer from {address} in time: check the network and the server's load, then try again."""

    exit_code = 19


class DependentObjects(DatabaseFault):
    """{reason}{place}; {users}: drop these first."""

    exit_code = 25

    def __init__(self, reason: str = "", *, sqlstate: str = "", address: str = "", place: str = "") -> None:
        super().__init__(reason, sqlstate=sqlstate, address=address, place=place)
        self.users = "other objects use it"


class UnsupportedPostgres(DatabaseFault):
    """The server at {address} is PostgreSQL {reason}: Rowcast needs PostgreSQL 14 or newer."""

    exit_code = 26


class UnsupportedEncoding(DatabaseFault):
    """The encoding of this database is {reason}: restore a dump of it in one with the encoding UTF8, and use that."""

    exit_code = 27


class ReadOnlyDatabase(DatabaseFault):
    """This database is read-only for this role: turn default_transaction_read_only off, or use another role."""

    exit_code = 28


class SuperuserRefused(DatabaseFault):
    """This role is a superuser, which production does not allow: connect as the database's owner, \
an ordinary role."""

    exit_code = 29


class StandbyDatabase(DatabaseFault):
    """This database is a read-only standby: connect to the primary."""

    exit_code = 31


class TransactionPooler(DatabaseFault):
    """A pooler at {address} shares sessions (transaction mode): connect to Postgres directly, or set \
pool_mode = session."""

    exit_code = 33


class BadDatabaseUrl(DatabaseFault):
    """The database URL cannot be used: {reason}."""

    exit_code = 78

    def __init__(self, reason: str = "", **facts: str) -> None:
        malformed = (
            "write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with each special character in the password as %XX"
        )
        super().__init__(reason or malformed, **facts)


TRANSIENT: Final[tuple[type[DatabaseFault], ...]] = (ConnectionRefused, TemporarilyUnavailable)
"""Faults that may pass by themselves, and are retried. An unknown host or a wrong password is not."""

UNUSABLE: Final = (UnsupportedPostgres, UnsupportedEncoding, SuperuserRefused, TransactionPooler)
"""Faults of a server that answers and cannot be used. A running daemon that meets one of them ends."""

DRIVER_ERRORS: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What the driver raises when the database or the connection to it fails."""

# By SQLSTATE, or by its class (the first two characters) where the whole class means the same.
_FAULTS: Final[Mapping[str, type[DatabaseFault]]] = {
    "08": TemporarilyUnavailable,  # the connection was lost
    "25006": ReadOnlyDatabase,
    "26000": TransactionPooler,  # another session has, or lacks, the statement that this one prepared
    "42P05": TransactionPooler,
    "2BP01": DependentObjects,
    "28000": AuthenticationFailed,
    "28P01": AuthenticationFailed,
    "3D000": NoSuchDatabase,
    "23503": ForeignKeyViolated,
    "23505": DuplicateRows,
    "23514": CheckViolated,
    "40001": LockContention,
    "40P01": LockContention,
    "42501": InsufficientPrivilege,
    "42701": ObjectExists,
    "42710": ObjectExists,
    "42723": ObjectExists,
    "42P04": DatabaseExists,
    "42P06": ObjectExists,
    "42P07": ObjectExists,
    "53300": TemporarilyUnavailable,
    "55P03": LockContention,
    "57P01": TemporarilyUnavailable,  # the server is stopping, has crashed, or is starting
    "57P02": TemporarilyUnavailable,
    "57P03": TemporarilyUnavailable,
}

# A missing socket file (ENOENT) means that the server is not running, as does a refused connection.
_REFUSED: Final = {errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET}


def explain(error: BaseException, *, address: str = "the database", place: str = "") -> OperatorFault:
    """Translate an error of the driver, or one that it caused, into a fault.

    `place` is where in our files it happened, e.g. " in shop/0001_tables.up.sql, line 3". The fault names
    constraints and objects, never a row's value, a password or the URL.
    """
    for cause in _causes(error):
        if isinstance(cause, OperatorFault):
            return cause
        if isinstance(cause, asyncpg.PostgresError):
            return _explain_server_error(cause, address, place)
        if isinstance(cause, asyncpg.TargetServerAttributeNotMatched):
            return StandbyDatabase()
        if isinstance(cause, asyncpg.ClientConfigurationError):
            return BadDatabaseUrl()
        if isinstance(cause, OSError):
            return _explain_network_error(cause, address)
        # InternalClientError: the connection died while it was idle.
        closed = isinstance(cause, asyncpg.InterfaceError) and "closed" in str(cause)
        if closed or isinstance(cause, asyncpg.InternalClientError):
            return TemporarilyUnavailable("the connection was lost", address=address, place=place)
    return DatabaseFault(type(error).__name__, sqlstate="none", address=address, place=place)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _explain_server_error(error: asyncpg.PostgresError, address: str, place: str) -> DatabaseFault:
    """Translate an error reported by the server. Its message never contains a password."""
    sqlstate = error.sqlstate or "none"
    reason = str(error.args[0])
    if sqlstate.startswith("22"):  # data exceptions quote the value
        reason = re.sub(r'"[^"]*"', '"..."', reason)
    kind = _FAULTS.get(sqlstate) or _FAULTS.get(sqlstate[:2], DatabaseFault)
    if kind is InsufficientPrivilege and re.search(r'(to create "|for schema )pg_catalog\b', reason):
        kind = UnqualifiedName  # the first schema of the path is where new objects go
    if sqlstate.startswith("08") and "statement pooling" in reason:
        kind = TransactionPooler
    if sqlstate.startswith("08") and (refused := re.search(r"unsupported startup parameter: (\w+)", reason)):
        kind, reason = BadDatabaseUrl, f"the pooler refuses the parameter {refused[1]}: leave it out"
    if sqlstate == "0A000" and "UTF8" in reason:  # the server cannot convert the database's encoding
        kind, reason = UnsupportedEncoding, "one that PostgreSQL does not convert to UTF8"
    if sqlstate == "22P05" and place:  # a file has a character that it cannot express
        kind, reason = UnsupportedEncoding, f"one that lacks a character which is needed{place}"
    fault = kind(reason, sqlstate=sqlstate, address=address, place=place)
    if sqlstate.startswith("23"):
        names = {name: getattr(error, f"{name}_name", None) for name in ("constraint", "column", "schema", "table")}
        fault.constraint = names["constraint"] or names["column"] or "none"
        fault.table = ".".join(filter(None, (names["schema"], names["table"])))
    if isinstance(fault, DependentObjects) and error.detail:
        fault.users = "; ".join(error.detail.splitlines())  # names objects, not rows
    return fault


def _explain_network_error(error: OSError, address: str) -> DatabaseFault:
    """Translate a failure to connect, or a broken connection."""
    if isinstance(error, socket.gaierror):
        return UnknownHost(error.strerror or "no address", address=address)
    if isinstance(error, TimeoutError):
        return DatabaseTimeout(address=address)
    if isinstance(error, ssl.SSLError):
        return TlsFailed(error.reason or "the handshake failed", address=address)
    if "SSL upgrade" in str(error):
        return TlsFailed("the server offers none", address=address)
    # For a host with several addresses, asyncio raises one error without an errno that joins the texts of all.
    numbers = {error.errno} if error.errno else {int(n) for n in re.findall(r"\[Errno (\d+)]", str(error))}
    reason = ", ".join(sorted(errno.errorcode.get(n, str(n)) for n in numbers)) or "connection lost"
    fault = ConnectionRefused if numbers & _REFUSED or isinstance(error, ConnectionError) else Unreachable
    return fault(reason, address=address)


def address_of(dsn: str) -> str:
    """The host and port of a database URL, the only parts of it that may be shown; behind SSH those of both."""
    if isinstance(dsn, DatabaseUrl) and dsn.address:
        return dsn.address
    try:
        url = urlsplit(dsn)
        options = parse_qs(url.query)
        host = url.hostname or options.get("host", [""])[0]
        port = url.port or int(options.get("port", ["5432"])[0])
    except ValueError:
        return "the database"
    if not host:
        return "the default address"
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else f"{host}:{port}"


@contextmanager
def violations_logged() -> Iterator[None]:
    """Log the constraint and the table of a violation that leaves the block, and no value."""
    try:
        yield
    except DatabaseFault as fault:
        if fault.constraint:
            log.error("constraint_violation", constraint=fault.constraint, table=fault.table, sqlstate=fault.sqlstate)
        raise


DATABASE_ERRORS: Final = (*DRIVER_ERRORS, DatabaseFault)
"""What any statement can raise when Postgres restarts, the connection breaks, or an answer takes too long."""


def raise_if_cancelled() -> None:
    """Raise CancelledError if this task is being cancelled, though what it called did not say so.

    `asyncio.wait_for` of Python 3.11 swallows a cancellation if what it waits for ends at the same moment; nats-py
    and asyncssh connect with it.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@contextmanager
def cancellation_first() -> Iterator[None]:
    """Let a task that is being cancelled raise CancelledError, and none of DATABASE_ERRORS.

    What is cancelled cleans up, by a rollback perhaps, and if the connection is lost just then, that error takes the
    place of the cancellation. A task that retries would go on, and whoever waits for its end would wait for ever.
    """
    try:
        yield
    except DATABASE_ERRORS:
        raise_if_cancelled()
        raise


def describe(error: BaseException) -> str:
    """Describe an error by its type and SQLSTATE, never by its text, which may hold values of rows."""
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__} {state}" if state else type(error).__name__


def is_about_data(error: BaseException) -> bool:
    """Is this about a value that a statement touched, so that the same statement without it may succeed?

    Otherwise it is about the statement, the connection or the server.
    """
    if isinstance(error, asyncpg.PostgresError):
        sqlstate = error.sqlstate or ""
        return sqlstate.startswith(("22", "54", "XX")) or sqlstate == "53200"  # too large to allocate, or corrupted
    if isinstance(error, asyncpg.ProtocolError):
        return True
    return isinstance(error, Exception) and not isinstance(error, DATABASE_ERRORS)  # the driver could not decode it
