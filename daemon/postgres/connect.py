"""Connections and pools."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar, cast

import asyncpg
import stamina
from stamina.instrumentation import set_on_retry_hooks

from daemon.core.errors import OperatorFault
from daemon.postgres.errors import DRIVER_ERRORS, TRANSIENT, BadDatabaseUrl, DatabaseFault, address_of, explain

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection, Pool = asyncpg.Connection, asyncpg.Pool

Record = asyncpg.Record
T = TypeVar("T")


Connect = Callable[[], Awaitable[Connection]]
"""Opens a connection of its own."""

# A leader that is waiting must not be cut off for being idle, and a transaction that hangs must not hold others up.
SESSION: Final[Mapping[str, str]] = MappingProxyType(
    {
        "idle_session_timeout": "0",
        "idle_in_transaction_session_timeout": "5s",
        "lock_timeout": "5s",
        "statement_timeout": "0",
        "timezone": "UTC",
        # Few rows are looked for among many, by an index, and always in the same way: no plan may depend on whether
        # statistics are fresh, and none has to be made anew each time, which would cost more than the statement.
        "plan_cache_mode": "force_generic_plan",
        "enable_seqscan": "off",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
        "max_parallel_workers_per_gather": "0",
        "jit": "off",
    }
)
"""The server settings of every session that serves, whatever the database or the role has set."""

OnRetry = Callable[[DatabaseFault, int], None]
"""Called before each retry with what happened and the number of the attempt that failed, from 1."""

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
    min_size: int = 1,
    max_size: int = 10,
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
                min_size=min_size,
                max_size=max_size,
                timeout=time_limit,
                init=_keep_alive,
                reset=_leave_as_it_is,
                server_settings=_settings(application_name, server_settings),
            )
        except (*DRIVER_ERRORS, ValueError) as error:
            raise _explain_connecting(error, dsn) from None

    return await retry(once, attempts=attempts, on_retry=on_retry)


@asynccontextmanager
async def acquired(pool: Pool, within: float) -> AsyncIterator[Connection]:
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
