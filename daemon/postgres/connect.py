"""Connections and pools, and what the driver's errors mean to the operator."""

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

import asyncpg
import stamina
from stamina.instrumentation import set_on_retry_hooks

from daemon.core.errors import OperatorFault

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection, Pool = asyncpg.Connection, asyncpg.Pool

T = TypeVar("T")


class DatabaseFault(OperatorFault):
    """The database refused it{place}: {reason} (SQLSTATE {sqlstate})."""

    exit_code: ClassVar[int] = 20

    def __init__(self, reason: str = "", *, sqlstate: str = "", address: str = "", place: str = "") -> None:
        self.reason, self.sqlstate, self.address, self.place = reason, sqlstate, address, place

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # one line, also where the server's message has several


class Unreachable(DatabaseFault):
    """{address} cannot be reached ({reason}): correct the database URL, or open the way to it."""

    exit_code = 10


class ConnectionRefused(Unreachable):
    """Nothing answers at {address} ({reason}): start Postgres there, or correct the database URL."""


class AuthenticationFailed(DatabaseFault):
    """{reason}: correct user and password in the database URL, or admit this user in pg_hba.conf."""

    exit_code = 11


class UnknownHost(DatabaseFault):
    """The host of {address} is not known ({reason}): correct the database URL, or the name service."""

    exit_code = 12


class NoSuchDatabase(DatabaseFault):
    """{reason}: create it (createdb), or correct the database URL."""

    exit_code = 13


class NotAllowed(DatabaseFault):
    """{reason}{place}: grant that right, or connect as a role that has it."""

    exit_code = 14


class DatabaseExists(DatabaseFault):
    """{reason}: use it as it is, or choose another name."""

    exit_code = 15


class ObjectExists(DatabaseFault):
    """{reason}{place}: rename or drop what is there, or choose another schema with --schema."""

    exit_code = 16


class NotUnique(DatabaseFault):
    """{reason}{place}: remove the duplicate rows, then try again."""

    exit_code = 17


class BrokenReference(DatabaseFault):
    """{reason}{place}: mend the rows that point to nothing, then try again."""

    exit_code = 18


class NotNow(DatabaseFault):
    """The database cannot serve at the moment ({reason}){place}: try again later."""

    exit_code = 19


class Contended(NotNow):
    """Other transactions were in the way ({reason}){place}: try again later."""


class TimedOut(DatabaseFault):
    """No answer from {address} in time: look at the network and the server's load, then try again."""

    exit_code = 19


class StillUsed(DatabaseFault):
    """{reason}{place}; {users}: drop these first."""

    exit_code = 25

    def __init__(self, reason: str = "", *, sqlstate: str = "", address: str = "", place: str = "") -> None:
        super().__init__(reason, sqlstate=sqlstate, address=address, place=place)
        self.users = "other objects use it"


class BadDatabaseUrl(DatabaseFault):
    """The database URL cannot be read: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, each special \
character of the password as %XX."""

    exit_code = 78


TRANSIENT: Final[tuple[type[DatabaseFault], ...]] = (ConnectionRefused, NotNow)
"""What may be gone a moment later, and is tried again. An unknown host or a wrong password is not."""

DRIVER_ERRORS: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What the driver raises when the database or the way to it is at fault."""

OnRetry = Callable[[DatabaseFault, int], None]
"""Called before each retry with what happened and the number of the attempt that failed, from 1."""

# By SQLSTATE, or its class where all of it means the same.
_ANSWERS: Final[Mapping[str, type[DatabaseFault]]] = {
    "08": NotNow,  # the connection was lost
    "2BP01": StillUsed,
    "28000": AuthenticationFailed,
    "28P01": AuthenticationFailed,
    "3D000": NoSuchDatabase,
    "23503": BrokenReference,
    "23505": NotUnique,
    "40001": Contended,
    "40P01": Contended,
    "42501": NotAllowed,
    "42701": ObjectExists,
    "42710": ObjectExists,
    "42723": ObjectExists,
    "42P04": DatabaseExists,
    "42P06": ObjectExists,
    "42P07": ObjectExists,
    "53300": NotNow,
    "55P03": Contended,
    "57P01": NotNow,  # the server stops, has crashed, starts
    "57P02": NotNow,
    "57P03": NotNow,
}

# A socket file that is not there is a server that does not run; one that nobody serves likewise.
_REFUSED: Final = {errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET}

# The kernel of this end asks a silent peer after 10 s, and gives it up 9 s later. The peer's kernel does the
# same, so that a lock does not outlive the machine that held it.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 19_000}
_SERVER_KEEPALIVE: Final = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "3",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "19000",
}

set_on_retry_hooks(())  # who retries here is told by his own callback, and logs it under a name of ours


def explain(error: BaseException, *, address: str = "the database", place: str = "") -> OperatorFault:
    """What an error of the driver, or one that it caused, means to the operator.

    `place` is where in our files it happened, e.g. " in chatgenius/0001_tables.up.sql, line 3". The answer
    names constraints and objects, never a row's value, a password or the URL.
    """
    for cause in _causes(error):
        if isinstance(cause, OperatorFault):
            return cause
        if isinstance(cause, asyncpg.PostgresError):
            return _explain_answer(cause, address, place)
        if isinstance(cause, asyncpg.ClientConfigurationError):
            return BadDatabaseUrl()
        if isinstance(cause, OSError):
            return _explain_network(cause, address)
        # The second is what the driver says of a connection that died while nobody used it.
        closed = isinstance(cause, asyncpg.InterfaceError) and "closed" in str(cause)
        if closed or isinstance(cause, asyncpg.InternalClientError):
            return NotNow("the connection was lost", address=address, place=place)
    return DatabaseFault(type(error).__name__, sqlstate="none", address=address, place=place)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _explain_answer(error: asyncpg.PostgresError, address: str, place: str) -> DatabaseFault:
    """Translate what the server answered. The message of a server never names a password."""
    sqlstate = error.sqlstate or "none"
    reason = str(error.args[0])
    if sqlstate.startswith("22"):  # data exceptions quote the value
        reason = re.sub(r'"[^"]*"', '"..."', reason)
    kind = _ANSWERS.get(sqlstate) or _ANSWERS.get(sqlstate[:2], DatabaseFault)
    fault = kind(reason, sqlstate=sqlstate, address=address, place=place)
    if isinstance(fault, StillUsed) and error.detail:
        fault.users = "; ".join(error.detail.splitlines())  # objects, and no rows
    return fault


def _explain_network(error: OSError, address: str) -> DatabaseFault:
    """Translate a connection that did not come about, or broke."""
    if isinstance(error, socket.gaierror):
        return UnknownHost(error.strerror or "no address", address=address)
    if isinstance(error, TimeoutError):
        return TimedOut(address=address)
    if isinstance(error, ssl.SSLError):
        return Unreachable(f"TLS: {error.reason or 'handshake failed'}", address=address)
    if "SSL upgrade" in str(error):
        return Unreachable("the server offers no TLS", address=address)
    # asyncio joins the errors of a host's several addresses to one that has no number, only their texts.
    numbers = {error.errno} if error.errno else {int(n) for n in re.findall(r"\[Errno (\d+)]", str(error))}
    reason = ", ".join(sorted(errno.errorcode.get(n, str(n)) for n in numbers)) or "connection lost"
    fault = ConnectionRefused if numbers & _REFUSED or isinstance(error, ConnectionError) else Unreachable
    return fault(reason, address=address)


def address_of(dsn: str) -> str:
    """Host and port of a database URL, the only parts of it that may be shown."""
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


async def retry(
    work: Callable[[], Awaitable[T]],
    *,
    on: tuple[type[DatabaseFault], ...] = TRANSIENT,
    attempts: int = 5,
    on_retry: OnRetry | None = None,
) -> T:
    """Call `work` until it does not raise one of `on`, at most `attempts` times, with backoff and jitter.

    Raises what the last attempt raised.
    """
    async for attempt in stamina.retry_context(
        on=on, attempts=attempts, timeout=None, wait_initial=0.1, wait_max=5.0, wait_jitter=0.5
    ):
        with attempt:
            try:
                return await work()
            except on as fault:
                if on_retry and attempt.num < attempts:
                    on_retry(fault, attempt.num)
                raise
    raise AssertionError("the last attempt returns or raises")


async def connect(
    dsn: str,
    *,
    application_name: str,
    server_settings: Mapping[str, str] | None = None,
    statement_cache_size: int = 100,
    time_limit: float = 10.0,
    attempts: int = 5,
    on_retry: OnRetry | None = None,
) -> Connection:
    """One connection. Each attempt may take `time_limit` seconds. Raises a DatabaseFault."""

    async def once() -> Connection:
        try:
            connection = await asyncpg.connect(
                dsn,
                timeout=time_limit,
                statement_cache_size=statement_cache_size,
                server_settings=_settings(application_name, server_settings),
            )
        except (*DRIVER_ERRORS, ValueError) as error:
            raise _explain_connecting(error, dsn) from None
        await _keep_alive(connection)
        return connection

    return await retry(once, attempts=attempts, on_retry=on_retry)


async def open_pool(
    dsn: str,
    *,
    application_name: str,
    server_settings: Mapping[str, str] | None = None,
    least: int = 1,
    most: int = 10,
    time_limit: float = 10.0,
    attempts: int = 5,
    on_retry: OnRetry | None = None,
) -> Pool:
    """A pool with `least` connections open, up to `most`; close it when done. Raises a DatabaseFault.

    What a user of a connection sets in its session stays set for the next: nobody should set anything.
    Connections that it opens later fail with the driver's own errors, DRIVER_ERRORS.
    """

    async def once() -> Pool:
        try:
            return await asyncpg.create_pool(
                dsn,
                min_size=least,
                max_size=most,
                timeout=time_limit,
                init=_keep_alive,
                reset=_leave_as_it_is,
                server_settings=_settings(application_name, server_settings),
            )
        except (*DRIVER_ERRORS, ValueError) as error:
            raise _explain_connecting(error, dsn) from None

    return await retry(once, attempts=attempts, on_retry=on_retry)


@asynccontextmanager
async def lent(pool: Pool, within: float) -> AsyncIterator[Connection]:
    """A connection of the pool, for a statement that is given up after `within` seconds: that raises TimeoutError.

    Then no connection that is open now is used again: what has not come through one of them will not through others.
    """
    async with asyncio.timeout(within) as limit:
        connection = await pool.acquire()
        try:
            yield cast("Connection", connection)
        except asyncio.CancelledError:
            connection.terminate()  # the driver would wait until the server has heard that it shall stop
            if limit.expired():
                await pool.expire_connections()
            raise
        finally:
            await pool.release(connection)


def _settings(application_name: str, more: Mapping[str, str] | None) -> dict[str, str]:
    return {"application_name": application_name, **_SERVER_KEEPALIVE, **(more or {})}


def _explain_connecting(error: Exception, dsn: str) -> OperatorFault:
    # The driver reads a port where a password has a slash, and says what it could not read as a number.
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return BadDatabaseUrl()
    return explain(error, address=address_of(dsn))


async def _leave_as_it_is(_: Connection) -> None:
    """The driver would spend a round trip on resetting a session that nobody has changed."""


async def _keep_alive(connection: Connection) -> None:
    """Let the kernel notice a peer that has gone without a word; asyncpg asks for nothing of the kind."""
    peer = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    if peer.family == socket.AF_UNIX:
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # Linux has them all
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
