"""Opens connections and pools, with retries, keepalive and timeouts."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar, cast

import asyncpg
import stamina
from stamina.instrumentation import set_on_retry_hooks

from daemon.core.errors import OperatorFault
from daemon.postgres.errors import DRIVER_ERRORS, TRANSIENT, BadDatabaseUrl, DatabaseFault, address_of, explain
from daemon.postgres.queries import Queries

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection, Pool = asyncpg.Connection, asyncpg.Pool

Record = asyncpg.Record
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

query: Final = Queries(Path(__file__).with_name("session.sql"))

set_on_retry_hooks(())  # callers log retries through `on_retry`


async def retry(
    work: Callable[[], Awaitable[T]],
    *,
    on: tuple[type[DatabaseFault], ...] = TRANSIENT,
    attempts: int = 5,
    on_retry: OnRetry | None = None,
) -> T:
    """Call `work` until it raises none of `on`, at most `attempts` times, with backoff and jitter.

    Raises the last attempt's fault if all fail.
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
    """Open a connection. Each attempt may take `time_limit` seconds. Raises a DatabaseFault."""

    opening = partial(_open, dsn, application_name, server_settings or {}, time_limit, statement_cache_size)

    async def once() -> Connection:
        try:
            return await opening()
        except (*DRIVER_ERRORS, ValueError) as error:
            raise _explain_connecting(error, dsn) from None

    return await retry(once, attempts=attempts, on_retry=on_retry)


async def open_pool(
    dsn: str,
    *,
    application_name: str,
    server_settings: Mapping[str, str] | None = None,
    min_size: int = 1,
    max_size: int = 10,
    time_limit: float = 10.0,
    attempts: int = 5,
    on_retry: OnRetry | None = None,
) -> Pool:
    """Open a pool of `min_size` to `max_size` connections; close it when done. Raises a DatabaseFault.

    A session is not reset between uses, so its users must not change its settings. Connections that the pool opens
    later fail with DRIVER_ERRORS.
    """

    opening = partial(_open, dsn, application_name, server_settings or {}, time_limit, statement_cache_size=100)

    async def once() -> Pool:
        try:
            return await asyncpg.create_pool(
                min_size=min_size, max_size=max_size, connect=lambda *_, **__: opening(), reset=_skip_reset
            )
        except (*DRIVER_ERRORS, ValueError) as error:
            raise _explain_connecting(error, dsn) from None

    return await retry(once, attempts=attempts, on_retry=on_retry)


@asynccontextmanager
async def acquired(pool: Pool, time_limit: float) -> AsyncIterator[Connection]:
    """Acquire a connection of the pool for at most `time_limit` seconds. Raises TimeoutError.

    After a timeout no open connection of the pool is used again, since the others are likely dead too.
    """
    async with asyncio.timeout(time_limit) as limit:
        connection = await pool.acquire()
        try:
            yield cast("Connection", connection)
        except asyncio.CancelledError:
            connection.terminate()  # release() would wait for the server to cancel the statement
            if limit.expired():
                await pool.expire_connections()
            raise
        finally:
            await pool.release(connection)


async def _open(
    dsn: str,
    application_name: str,
    server_settings: Mapping[str, str],
    time_limit: float,
    statement_cache_size: int,
) -> Connection:
    """Open a session with its settings within `time_limit` seconds. Raises one of DRIVER_ERRORS, or a ValueError."""
    async with asyncio.timeout(time_limit):
        connection = await asyncpg.connect(
            dsn,
            timeout=time_limit,
            statement_cache_size=statement_cache_size,
            server_settings={"application_name": application_name},
        )
        try:
            _enable_keepalive(connection)
            await _set(connection, {**_SERVER_KEEPALIVE, **server_settings, **PINNED})
        except BaseException:
            connection.terminate()
            raise
    return connection


async def _set(connection: Connection, settings: Mapping[str, str]) -> None:
    """Set settings of a session."""
    async with connection.transaction():
        statement = await connection.prepare(query("set_session"), name="")
        await statement.fetch(list(settings), list(settings.values()))


def _explain_connecting(error: Exception, dsn: str) -> OperatorFault:
    # With a slash in the password, the driver takes part of it for the port, and quotes it in its ValueError.
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return BadDatabaseUrl()
    return explain(error, address=address_of(dsn))


async def _skip_reset(_: Connection) -> None:
    """Do not reset a released connection: that costs a round trip, and nothing changes the session."""


def _enable_keepalive(connection: Connection) -> None:
    """Let the kernel detect a peer that vanished. asyncpg sets no keepalive."""
    peer = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    if peer.family == socket.AF_UNIX:
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # other systems lack some
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
