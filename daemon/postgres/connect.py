"""Opens connections and pools, with retries, keepalive and timeouts."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, TypeVar, cast

import asyncpg
import stamina
from stamina.instrumentation import set_on_retry_hooks

from daemon.core.errors import OperatorFault
from daemon.postgres.arguments import Arguments, read_url, several_hosts
from daemon.postgres.errors import (
    DATABASE_ERRORS,
    TRANSIENT,
    UNUSABLE,
    BadDatabaseUrl,
    DatabaseFault,
    OwnerUnusable,
    ReadOnlyDatabase,
    StandbyDatabase,
    SuperuserRefused,
    TransactionPooler,
    UnsupportedEncoding,
    UnsupportedPostgres,
    address_of,
    cancellation_first,
    explain,
)
from daemon.postgres.queries import Queries, measure
from daemon.settings.database_url import DatabaseUrl
from daemon.settings.parameters import BadParameter, parameters_of

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection, Pool = asyncpg.Connection, asyncpg.Pool

Record = asyncpg.Record

MIN_MAJOR_VERSION: Final = 14
"""The oldest major version with everything that Rowcast needs, in particular DETACH PARTITION CONCURRENTLY."""

T = TypeVar("T")


Connect = Callable[[], Awaitable[Connection]]
"""Opens a new connection, which the caller owns."""

PINNED: Final[Mapping[str, str]] = MappingProxyType(
    {
        # Otherwise a role that may create in `public`, or in another schema of the path, could put a function,
        # operator, type or table of its own in the place of the one that a statement means.
        "search_path": "pg_catalog, pg_temp",
        "default_transaction_isolation": "read committed",
        "default_transaction_deferrable": "off",
        # How text is read.
        "standard_conforming_strings": "on",
        "transform_null_equals": "off",
        "array_nulls": "on",
        "xmloption": "content",
        # How values are written.
        "timezone": "UTC",
        "datestyle": "ISO, MDY",
        "intervalstyle": "postgres",
        "extra_float_digits": "1",
        "bytea_output": "hex",
        "quote_all_identifiers": "off",
    }
)
"""Settings of every session of every command: what the meaning of a statement depends on. Nothing overrides them."""

# An idle leader must not be disconnected, and a transaction that hangs must not block others.
SESSION: Final[Mapping[str, str]] = MappingProxyType(
    {
        "idle_session_timeout": "0",
        "idle_in_transaction_session_timeout": "5s",
        "lock_timeout": "5s",
        "statement_timeout": "0",
        # Every statement looks up few rows among many by an index. The settings below keep plans from depending on
        # fresh statistics, and reuse them: planning would cost more than the statement.
        "plan_cache_mode": "force_generic_plan",
        "enable_seqscan": "off",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
        "max_parallel_workers_per_gather": "0",
        "jit": "off",
    }
)
"""Settings of every session of a running daemon, besides PINNED."""

Target = Literal["writable", "primary", "any"]
"""What a session is for: to write; to read from the primary; or anything that a standby can do as well."""

OnUnusable = Callable[[DatabaseFault], None]
"""Called with a fault that will not pass by itself."""

OnRetry = Callable[[DatabaseFault, int], None]
"""Called before each retry with the fault and the number of the attempt that failed, from 1."""

# Our kernel probes a silent peer after 10 s and gives up 9 s later. The server's kernel does the same, so a lock does
# not outlive the machine that held it.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 19_000}
_SERVER_KEEPALIVE: Final = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "3",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "19000",
}

_POOLER_PROBES: Final = 8  # in transaction mode, a busy pooler may give a session the same process again by chance
_POOLER_TIMEOUT: Final = 2.0  # seconds that a second session waits for a process of its own

_NO_SETTINGS: Final[Mapping[str, str]] = MappingProxyType({})


def _ignore(_: DatabaseFault) -> None:
    """Do nothing about a fault that is raised as well."""


query: Final = Queries(Path(__file__).with_name("session.sql"))

set_on_retry_hooks(())  # callers log retries through `on_retry`


async def retry(
    work: Callable[[], Awaitable[T]],
    *,
    on: tuple[type[DatabaseFault], ...] = TRANSIENT,
    attempts: int = 5,
    delay: float = 0.1,
    jitter: float = 0.5,
    on_retry: OnRetry | None = None,
) -> T:
    """Call `work` until it raises none of `on`, at most `attempts` times.

    The pauses begin with `delay` seconds and double, up to 5 seconds; a random part of `jitter` seconds is added to
    each. Raises the last attempt's fault if all fail.
    """
    async for attempt in stamina.retry_context(
        on=on, attempts=attempts, timeout=None, wait_initial=delay, wait_max=5.0, wait_jitter=jitter
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
    server_settings: Mapping[str, str] = _NO_SETTINGS,
    target: Target = "writable",
    on_unusable: OnUnusable = _ignore,
    statement_cache_size: int = 100,
    time_limit: float = 10.0,
    attempts: int = 5,
    on_retry: OnRetry | None = None,
) -> Connection:
    """Open a connection. Each attempt may take `time_limit` seconds. Raises a DatabaseFault.

    `on_unusable` is also called with a fault that is one of UNUSABLE.
    """
    opening = _Opening(dsn, application_name, server_settings, target, on_unusable, time_limit, statement_cache_size)
    return await retry(opening.open, attempts=attempts, on_retry=on_retry)


async def open_pool(
    dsn: str,
    *,
    application_name: str,
    server_settings: Mapping[str, str] = _NO_SETTINGS,
    target: Target = "writable",
    on_unusable: OnUnusable = _ignore,
    min_size: int = 1,
    max_size: int = 10,
    time_limit: float = 10.0,
    attempts: int = 5,
    on_retry: OnRetry | None = None,
) -> Pool:
    """Open a pool of `min_size` to `max_size` connections; close it when done. Raises a DatabaseFault.

    A session is not reset between uses, so its users must not change its settings. Using a connection fails with
    DATABASE_ERRORS. The other parameters are those of `connect`.
    """
    opening = _Opening(dsn, application_name, server_settings, target, on_unusable, time_limit)

    async def once() -> Pool:
        return await asyncpg.create_pool(
            min_size=min_size, max_size=max_size, connect=lambda *_, **__: opening.open(), reset=_skip_reset
        )

    return await retry(once, attempts=attempts, on_retry=on_retry)


async def open_application_pool(
    dsn: str, *, search_path: str, application_name: str, max_size: int = 10, attempts: int = 5
) -> Pool:
    """Open a pool whose sessions have this `search_path`; close it when done. Raises a DatabaseFault.

    A session is reset between uses, so its users may change its settings.
    """
    opening = _Opening(dsn, application_name, _NO_SETTINGS, "writable", _ignore, 10.0, search_path=search_path)

    async def reset(connection: Connection) -> None:
        await connection.reset()
        await opening.set_settings(connection)

    async def once() -> Pool:
        return await asyncpg.create_pool(
            min_size=1, max_size=max_size, connect=lambda *_, **__: opening.open(), reset=reset
        )

    return await retry(once, attempts=attempts)


def role_of(dsn: str) -> str | None:
    """The role that the sessions of this database take on."""
    return dsn.role if isinstance(dsn, DatabaseUrl) else None


@asynccontextmanager
async def acquired(pool: Pool, time_limit: float) -> AsyncIterator[Connection]:
    """Acquire a connection of the pool for at most `time_limit` seconds. Raises TimeoutError.

    After a timeout no open connection of the pool is used again, since the others are likely dead too.
    """
    with cancellation_first():
        async with asyncio.timeout(time_limit) as limit:
            connection = await pool.acquire()
            try:
                yield cast("Connection", connection)
            except asyncio.CancelledError:
                with suppress(asyncpg.InterfaceError):  # lost meanwhile
                    connection.terminate()  # release() would wait for the server to cancel the statement
                if limit.expired():
                    await pool.expire_connections()
                raise
            finally:
                await pool.release(connection)


@dataclass(frozen=True, slots=True)
class _Opening:
    """Opens sessions: each with the settings that it must have, on a server that can be used."""

    dsn: str
    application_name: str
    server_settings: Mapping[str, str]
    target: Target
    on_unusable: OnUnusable
    time_limit: float
    statement_cache_size: int = 100
    search_path: str = PINNED["search_path"]

    async def open(self) -> Connection:
        """Open a session within the time limit. Raises a DatabaseFault."""
        try:
            arguments = read_url(self.dsn, self.time_limit)
            with cancellation_first():
                async with asyncio.timeout(arguments.time_limit):
                    connection = await self._connect(arguments)
                    try:
                        await self._begin(connection, arguments)
                    except BaseException:
                        connection.terminate()
                        raise
        except (*DATABASE_ERRORS, ValueError) as error:
            fault = _explain_connecting(error, self.dsn)
            if isinstance(fault, UNUSABLE):
                self.on_unusable(fault)
            raise fault from None
        return connection

    async def _connect(self, arguments: Arguments) -> Connection:
        driver = {**arguments.driver}
        # Poolers refuse other parameters at startup, or ignore them.
        name = arguments.application_name or self.application_name
        driver["server_settings"] = {**driver["server_settings"], "application_name": name}
        if self.target != "any" and several_hosts(arguments):
            driver["target_session_attrs"] = "primary"
        driver["timeout"] = arguments.time_limit
        connection: Connection = await asyncpg.connect(**driver, statement_cache_size=self.statement_cache_size)
        if arguments.keepalive:
            _enable_keepalive(connection, {**_KEEPALIVE, **arguments.keepalive_options})
        return connection

    async def _begin(self, connection: Connection, arguments: Arguments) -> None:
        """Check the server, and set the session's settings. Raises a DatabaseFault or one of DRIVER_ERRORS."""
        major = connection.get_server_version().major
        if major < MIN_MAJOR_VERSION:
            raise UnsupportedPostgres(str(major), address=address_of(self.dsn))
        async with connection.transaction():
            server = await _identify(connection)
        if server["pid"] != connection.get_server_pid():  # poolers give out process ids of their own
            await self._check_pooler(connection, server["pid"], arguments)
        self._check_server(server)
        connection.add_query_logger(measure)
        await self.set_settings(connection)

    async def set_settings(self, connection: Connection) -> None:
        """Set the session's settings. Raises one of DRIVER_ERRORS."""
        settings = {**_SERVER_KEEPALIVE, **self.server_settings, **PINNED, "search_path": self.search_path}
        async with connection.transaction():
            await _fetch(connection, "set_session", list(settings), list(settings.values()))
        if (role := role_of(self.dsn)) is not None:
            await self._take_on(connection, role)

    async def _take_on(self, connection: Connection, role: str) -> None:
        """Take on this role. Raises OwnerUnusable or one of DRIVER_ERRORS."""
        try:
            async with connection.transaction():
                await _fetch(connection, "set_session", ["role"], [role])
                [server] = await _fetch(connection, "identify")
        except (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidParameterValueError) as error:
            raise OwnerUnusable(role, str(error)) from None
        self._check_server(server)

    def _check_server(self, server: Record) -> None:
        if server["encoding"] == "SQL_ASCII":  # it stores any bytes, so nobody knows which text they are
            raise UnsupportedEncoding(server["encoding"])
        if server["superuser"] == "on" and isinstance(self.dsn, DatabaseUrl) and self.dsn.in_production:
            raise SuperuserRefused
        if server["in_recovery"] and self.target != "any":
            raise StandbyDatabase
        if server["read_only"] == "on" and self.target == "writable":
            raise ReadOnlyDatabase

    async def _check_pooler(self, connection: Connection, pid: int, arguments: Arguments) -> None:
        """Raises TransactionPooler unless the server's process `pid` is this session's alone.

        While a second session has a transaction open, the first one uses its process. In transaction mode the two
        get the same process, or the first one gets another.
        """
        other = await self._connect(arguments)
        try:
            for _ in range(_POOLER_PROBES):
                transaction = other.transaction()
                try:
                    async with asyncio.timeout(_POOLER_TIMEOUT):
                        await transaction.start()
                        taken = await _identify(other)
                except TimeoutError:
                    break  # it has no process left: each belongs to a session, or others keep all of them busy
                if taken["pid"] == pid:
                    raise TransactionPooler(address=address_of(self.dsn))
                await self._check_process(connection, pid)
                await transaction.rollback()
        finally:
            other.terminate()
        for _ in range(_POOLER_PROBES):
            await self._check_process(connection, pid)

    async def _check_process(self, connection: Connection, pid: int) -> None:
        """Raises TransactionPooler if a transaction of this session gets another process of the server."""
        async with connection.transaction():
            own = await _identify(connection)
        if own["pid"] != pid:
            raise TransactionPooler(address=address_of(self.dsn))


async def _identify(connection: Connection) -> Record:
    [server] = await _fetch(connection, "identify")
    return server


async def _fetch(connection: Connection, name: str, *arguments: object) -> list[Record]:
    """Run a statement inside a transaction. Without a name it leaves nothing in a session that is not ours alone."""
    statement = await connection.prepare(query(name), name="")
    return await statement.fetch(*arguments)


def _explain_connecting(error: Exception, dsn: str) -> OperatorFault:
    # With a slash in the password, the driver takes part of it for the port, and quotes it in its ValueError.
    if isinstance(error, ValueError) and not isinstance(error, OSError | BadParameter):
        return BadDatabaseUrl()
    if isinstance(error, BadParameter):
        return BadDatabaseUrl(str(error))
    fault = explain(error, address=address_of(dsn))
    if type(fault) is DatabaseFault and "options" in parameters_of(dsn):
        return BadDatabaseUrl(f"options: {fault.reason}")
    return fault


async def _skip_reset(_: Connection) -> None:
    """Do not reset a released connection: that costs a round trip, and nothing changes the session."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a connection leaves this machine: to a server, or to a pooler in front of it."""

    is_local: bool  # a Unix socket
    encryption: str = ""  # the version of TLS and the cipher; empty without TLS
    is_verified: bool = False  # the certificate of the other side was verified, and is for its host


def link_of(connection: Connection) -> Link:
    """How this connection leaves this machine."""
    transport = connection._transport  # type: ignore[attr-defined]
    is_local = transport.get_extra_info("socket").family == socket.AF_UNIX
    tls = transport.get_extra_info("ssl_object")
    if tls is None:
        return Link(is_local)
    is_verified = tls.context.verify_mode is ssl.CERT_REQUIRED and tls.context.check_hostname
    return Link(is_local, f"{tls.version()}, {tls.cipher()[0]}", is_verified)


def _enable_keepalive(connection: Connection, options: Mapping[str, int]) -> None:
    """Let the kernel detect a peer that vanished. asyncpg sets no keepalive."""
    peer = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    if peer.family == socket.AF_UNIX:
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:  # other systems lack some
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
