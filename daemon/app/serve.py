"""Starts the parts, serves, and stops them in order."""

import asyncio
import faulthandler
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Protocol

from daemon import __version__, systemd
from daemon.app.build import POOL_SIZE, Parts, build
from daemon.app.keys import load_certificate, load_keys, users_statement
from daemon.core.errors import LogUnreadable, OperatorFault
from daemon.delivery.client import bye
from daemon.gateway.identity import Identity
from daemon.gateway.server import Gateway, bind, encode
from daemon.health import Readiness
from daemon.log.sequencer import Sequencer
from daemon.log.users import PgUsers
from daemon.logs import get_logger
from daemon.packs import by_schema
from daemon.pages.demo import Demo
from daemon.postgres.connect import SESSION, Pool, open_pool
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, address_of, explain
from daemon.postgres.tunnel import through_tunnel
from daemon.schema.health import SchemaHealth, SchemaNotCurrent
from daemon.settings import Address, BadSettings, Reloads, Settings

log = get_logger()

START_TIMEOUT = 30.0  # seconds to wait for the first heartbeat, and between two reports of a long start
MEMBER_TIMEOUT = 5.0  # seconds between two reports that a gateway waits for a member
CLOSE_TIMEOUT = 2.0  # seconds for the database connections to close

# When 10,000 clients follow ten topics each, a full garbage collection stops the process for 0.3 s. Frequent work
# leaves it nothing to collect, so it runs a hundred times less often than by default.
GC_THRESHOLDS = 700, 10, 1000


class NotifyUnavailable(OperatorFault):
    """NOTIFY does not work on this connection: connect to Postgres directly, not through a transaction pooler."""

    exit_code: ClassVar[int] = 33


class NotificationsOff(OperatorFault):
    """ROWCAST_NOTIFICATIONS is off, so no change is captured and there is nothing to serve: turn it on, and run \
`daemon --apply-ddl`."""

    exit_code: ClassVar[int] = 78


class SequencingFailed(OperatorFault):
    """Cannot sequence events ({reason}). Fix the database; captured writes are safe."""

    exit_code: ClassVar[int] = 39

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclass(frozen=True)
class Running:
    """A daemon or gateway that serves: its addresses, its pool and its readiness."""

    host: str
    port: int
    pool: Pool | None  # None in a gateway
    readiness: Readiness
    metrics_url: str | None
    has_tls: bool = False

    @property
    def http_url(self) -> str:
        """The URL of the live page; for a Unix socket in the form that nginx takes."""
        address = Address(self.host, self.port)
        if address.is_unix:
            return f"http://{address}:/"
        return f"{'https' if self.has_tls else 'http'}://{address}/"

    @property
    def websocket_url(self) -> str:
        """The URL that clients connect to."""
        return f"ws{self.http_url.removeprefix('http')}v1"


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    demo: Demo | None = None,
    inherited: Sequence[socket.socket] = (),
    should_accept: Callable[[int], bool] = lambda _: True,
    reloads: Reloads | None = None,
) -> AsyncIterator[Running]:
    """Serve while the block runs, and say bye to the clients at its end. Raises an OperatorFault.

    Listens on the `inherited` sockets if there are any, else at `settings.listen`; `should_accept` is passed to the
    gateway, and what can be reloaded is registered with `reloads`. When the block begins, the schema is current, the
    listener receives notifications, the log has been read and the port is open.
    """
    if not settings.notifications:
        raise NotificationsOff
    dsn = settings.require_dsn()
    packs = by_schema(settings.schemas)
    users_of = users_statement(settings)
    authenticator, keys = await load_keys(settings, reloads)
    tls = await load_certificate(settings, reloads)
    unusable: asyncio.Queue[DatabaseFault] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        tunnel_problems = await stack.enter_async_context(through_tunnel(settings))
        pool = await open_pool(
            dsn,
            application_name="rowcast",
            server_settings=SESSION,
            on_unusable=unusable.put_nowait,
            max_size=POOL_SIZE,
            attempts=settings.connect_attempts,
            on_retry=lambda fault, attempt: log.warning("database_retry", reason=str(fault), attempt=attempt),
        )
        stack.push_async_callback(_close, pool)
        schema = SchemaHealth(pool, settings)
        await _check_database(settings, pool, schema)
        identity = Identity(authenticator, keys, PgUsers(pool, users_of).user_of if users_of else None)
        parts = build(settings, packs, pool, schema, demo, tunnel_problems, unusable.put_nowait, identity, tls)
        if reloads is not None:
            reloads.use_door = parts.use_door
        run_in_background = await stack.enter_async_context(_in_background())
        run_in_background(_end_if_unusable(unusable))
        await _start(parts, run_in_background)
        yield await _open_ports(stack, settings, parts, pool, inherited, should_accept)


@asynccontextmanager
async def gateway_running(
    settings: Settings,
    *,
    demo: Demo | None = None,
    inherited: Sequence[socket.socket] = (),
    should_accept: Callable[[int], bool] = lambda _: True,
    reloads: Reloads | None = None,
    samples: Sequence[tuple[str, str]] = (),
    is_open: bool = False,
) -> AsyncIterator[Running]:
    """The same as `running` for a gateway, which has no database. When the block begins, it knows the log's head.

    `samples` and `is_open` are passed to `build_gateway_parts`. Waits for a member as long as it takes, and logs
    `waiting_for_members` meanwhile. Raises an OperatorFault.
    """
    from daemon.app.gateway import build_gateway_parts  # noqa: PLC0415 - most daemons are none

    if settings.nats_url is None:
        raise BadSettings("a gateway knows the log from NATS: set ROWCAST_NATS_URL, as its members have it")
    has_users = users_statement(settings) is not None
    authenticator, keys = await load_keys(settings, reloads)
    tls = await load_certificate(settings, reloads)
    parts = build_gateway_parts(
        settings, authenticator, keys, tls, has_users=has_users, samples=samples, is_open=is_open
    )
    if reloads is not None:
        reloads.use_door = parts.use_door
    async with AsyncExitStack() as stack:
        run_in_background = await stack.enter_async_context(_in_background())
        run_in_background(parts.link.run())
        run_in_background(parts.members.run())
        run_in_background(parts.contents.run())
        run_in_background(parts.keys.run())
        run_in_background(parts.feed.run())
        while not parts.feed.started.is_set():
            try:
                async with asyncio.timeout(MEMBER_TIMEOUT):
                    await parts.feed.started.wait()
            except TimeoutError:
                log.warning("waiting_for_members", reason=parts.why_waiting())
        for sharing in (parts.node.sharing.signals, parts.node.sharing.presence, parts.node.sharing.acks):
            run_in_background(sharing.run())
        yield await _open_ports(stack, settings, parts, None, inherited, should_accept)


Serving = Callable[..., AbstractAsyncContextManager[Running]]
"""`running`, or `gateway_running`."""


class _Serves(Protocol):
    """What the parts of daemons and gateways have in common."""

    @property
    def gateway(self) -> Gateway: ...

    @property
    def readiness(self) -> Readiness: ...


async def _open_ports(
    stack: AsyncExitStack,
    settings: Settings,
    parts: _Serves,
    pool: Pool | None,
    inherited: Sequence[socket.socket],
    should_accept: Callable[[int], bool],
) -> Running:
    """Serve until the stack is closed; then ask the clients to reconnect."""
    own, (host, port) = await _listen(settings, parts.gateway, inherited, should_accept)
    stack.push_async_callback(_drain, parts.gateway, settings.drain_seconds)
    metrics_url = f"http://{Address(*own[0].getsockname()[:2])}/metrics" if own else None
    has_tls = settings.tls_certificate is not None
    return Running(host, port, pool, parts.readiness, metrics_url, has_tls=has_tls)


async def _drain(gateway: Gateway, within: float) -> None:
    """Ask all clients to reconnect, and wait for them to leave."""
    count = gateway.clients
    await gateway.drain(lambda: encode(bye("restart", count)), within=within)


async def _end_if_unusable(unusable: asyncio.Queue[DatabaseFault]) -> None:
    """End the daemon when a new connection meets a server that cannot be used, such as a pooler put in between."""
    raise await unusable.get()


async def _check_database(settings: Settings, pool: Pool, schema: SchemaHealth) -> None:
    """Raises an OperatorFault unless the schema is current."""
    try:
        await schema.refresh()
    except DRIVER_ERRORS as error:
        raise explain(error, address=address_of(settings.require_dsn())) from None
    if schema.stale:
        raise SchemaNotCurrent(schema.stale)


async def _start(parts: Parts, run_in_background: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """Start every part but the gateway, and wait until each works. Raises an OperatorFault."""
    run_in_background(parts.notifier.run())
    run_in_background(parts.notify_watch.run())
    run_in_background(parts.sequencer.run())
    run_in_background(parts.backlog.run())
    run_in_background(parts.schema.watch())
    run_in_background(parts.schema.watch_rights())
    run_in_background(parts.retention.run())
    run_in_background(parts.keys.run())
    try:
        async with asyncio.timeout(START_TIMEOUT):
            await parts.notifier.listening.wait()
    except TimeoutError:
        raise NotifyUnavailable from None
    # Events written while no daemon was running are history to every client that connects: they are numbered first.
    await wait_until_sequenced(parts.sequencer)
    run_in_background(parts.pump.run())
    try:
        async with asyncio.timeout(START_TIMEOUT):
            await parts.pump.started.wait()
    except TimeoutError:
        raise LogUnreadable(parts.pump.failure or "no answer") from None
    if parts.relay is not None:
        run_in_background(parts.relay.run())
    if parts.canary is not None:
        run_in_background(parts.canary.run())
    run_in_background(parts.scheduler.run())
    run_in_background(parts.sharing.signals.run())
    run_in_background(parts.sharing.presence.run())
    run_in_background(parts.sharing.acks.run())


async def _listen(
    settings: Settings,
    gateway: Gateway,
    inherited: Sequence[socket.socket],
    should_accept: Callable[[int], bool],
) -> tuple[list[socket.socket], tuple[str, int]]:
    """Open the ports. Returns the metrics sockets, and the host and port for clients. Raises ListenFailed."""
    own = [] if settings.metrics_listen is None else await bind(*astuple(settings.metrics_listen))
    try:
        sockets = inherited or await bind(*astuple(settings.listen))
    except OperatorFault:
        for listening in own:
            listening.close()
        raise
    return own, await gateway.start(sockets=sockets, admin=own, should_accept=should_accept)


async def wait_until_sequenced(sequencer: Sequencer, report_every: float = START_TIMEOUT) -> None:
    """Wait until every event written so far is numbered, however long that takes.

    Logs `catching_up` every `report_every` seconds; raises SequencingFailed if numbering fails by then.
    """
    while not sequencer.settled.is_set():
        try:
            async with asyncio.timeout(report_every):
                await sequencer.settled.wait()
        except TimeoutError:
            if sequencer.failure:
                raise SequencingFailed(sequencer.failure) from None
            log.info("catching_up")


@asynccontextmanager
async def _in_background() -> AsyncIterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Yields a function that runs a coroutine until the block ends. One that fails ends the block with its error."""
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[None]] = []
        try:
            yield lambda coroutine: tasks.append(group.create_task(coroutine))
        finally:
            for task in tasks:
                task.cancel()


async def _close(pool: Pool) -> None:
    """Close the pool; statements that still run have CLOSE_TIMEOUT to end."""
    with suppress(TimeoutError, *DRIVER_ERRORS):
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await pool.close()
    pool.terminate()


async def _feed_watchdog(
    manager: systemd.Manager, reasons: Callable[[], Sequence[str]], is_starting: Callable[[], bool]
) -> None:
    """Feed the watchdog while the event loop runs; the status is "ready", or the reasons why not."""
    interval = manager.watchdog_interval()
    while interval is not None:
        status = "; ".join(reasons()) or "ready"
        manager.notify(systemd.watchdog_message(status, interval, starting=is_starting()))
        await asyncio.sleep(interval)


def has_terminal() -> bool:
    """Whether a terminal controls this process, so that SIGHUP means that the terminal has been closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _handle_signals(stop: asyncio.Event, hangup: asyncio.Event) -> None:
    """Set these events when a signal asks to stop, or to reload; the end of a terminal asks to stop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup(1) started this process
        loop.add_signal_handler(signal.SIGHUP, (stop if has_terminal() else hangup).set)
    # Blocked in a forked worker.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


async def _reload_on(hangup: asyncio.Event, reloads: Reloads, manager: systemd.Manager) -> None:
    """Reload whenever the event is set. Signals that arrive during a reload cause one more."""
    while True:
        await hangup.wait()
        hangup.clear()
        manager.notify(systemd.reloading_message())
        try:
            await reloads.run()
        except Exception:
            # A bug costs this reload only, and never the clients.
            log.exception("internal_error")
        manager.notify("READY=1")


async def serve(
    settings: Settings,
    *,
    demo: Demo | None = None,
    on_ready: Callable[[Running], Coroutine[Any, Any, None]] | None = None,
    manager: systemd.Manager = systemd,
    should_accept: Callable[[int], bool] = lambda _: True,
    read_settings: Callable[[], Settings] | None = None,
    serving: Serving = running,
) -> None:
    """Serve until SIGTERM or SIGINT, or until the terminal is closed. Raises an OperatorFault.

    `on_ready` is started once the daemon is ready, and cancelled when it stops. `manager` is notified of the daemon's
    state and may pass listening sockets; `should_accept` is passed to the gateway; `serving` is what is to be served.
    On SIGHUP, `read_settings` returns the settings as they are then, and what can be reloaded is.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    faulthandler.enable(file=2)  # the watchdog kills with SIGABRT: stderr then says where the process hung
    stop, ready, hangup = asyncio.Event(), asyncio.Event(), asyncio.Event()
    reloads = Reloads(read_settings or (lambda: settings), settings)
    reasons: Callable[[], Sequence[str]] = lambda: ["starting"]  # noqa: E731

    async def run() -> None:
        nonlocal reasons
        async with _in_background() as run_throughout:
            run_throughout(
                _feed_watchdog(manager, lambda: reasons(), lambda: not ready.is_set())  # noqa: PLW0108 - rebound below
            )
            serves = serving(
                settings, demo=demo, inherited=manager.listen_fds(), should_accept=should_accept, reloads=reloads
            )
            async with serves as daemon, _in_background() as run_while_ready:
                ready.set()
                reasons = daemon.readiness.reasons
                urls = {"listen": daemon.http_url} | ({"metrics": daemon.metrics_url} if daemon.metrics_url else {})
                log.info("serving", **urls, packs=list(settings.packs), version=__version__)
                manager.notify("READY=1")
                if on_ready is not None:
                    run_while_ready(on_ready(daemon))
                run_while_ready(_reload_on(hangup, reloads, manager))
                await stop.wait()
                log.info("stopping")
                manager.notify(systemd.stopping_message(settings.drain_seconds))
        log.info("stopped")

    _handle_signals(stop, hangup)
    daemon_task, stop_task = asyncio.create_task(run()), asyncio.create_task(stop.wait())
    await asyncio.wait({daemon_task, stop_task}, return_when=asyncio.FIRST_COMPLETED)
    stop_task.cancel()
    if not ready.is_set() and not daemon_task.done():
        daemon_task.cancel()  # it is still starting: there are no clients to say bye to
        with suppress(asyncio.CancelledError):
            await daemon_task
        return
    await daemon_task
