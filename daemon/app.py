"""Composition: builds the parts, connects them, runs them and stops them in order."""

import asyncio
import faulthandler
import gc
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, ClassVar

from daemon import __version__, metrics, systemd
from daemon.contracts.asyncapi import asyncapi
from daemon.contracts.schema import json_schema
from daemon.core.close_history import CloseHistory
from daemon.core.errors import LogUnreadable, OperatorFault
from daemon.core.hub import Hub
from daemon.delivery.acks import Acks
from daemon.delivery.canary import CANARY, Canary
from daemon.delivery.client import ClientContext, bye
from daemon.delivery.log_cache import LogCache
from daemon.delivery.own_tables import OwnTables
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.presence import Presence
from daemon.delivery.pump import Pump
from daemon.delivery.replay import RetryingLogReader
from daemon.delivery.rights import Rights
from daemon.delivery.signals import Signals
from daemon.delivery.snapshots import Snapshots
from daemon.files import folder
from daemon.gateway.auth import Authenticator
from daemon.gateway.http import Page, Site, json_page, script_page, static_pages, text_page
from daemon.gateway.identity import Identity
from daemon.gateway.key_source import KeyPlaces, KeySource
from daemon.gateway.server import Gateway, Limits, bind, encode
from daemon.health import Check, Readiness
from daemon.jobs.scheduler import JOB_SESSION, Scheduler
from daemon.jobs.selection import scheduled_jobs
from daemon.log.backlog import Backlog
from daemon.log.canary import CanaryWriter
from daemon.log.columns import PgColumns
from daemon.log.dead_letters import DeadLetters
from daemon.log.grants import PgGrants
from daemon.log.notifier import Notifier
from daemon.log.notify_watch import NotifyWatch
from daemon.log.own_tables import PgOwnTableReader
from daemon.log.reader import PgLogReader
from daemon.log.retention import DROP_SETTINGS, Retention
from daemon.log.rows import PgRowReader
from daemon.log.sequencer import Sequencer
from daemon.log.sharing import SIGNALS_CHANNEL, PgAcks, PgBroadcast, PgPeople, PgSignalRights
from daemon.log.users import PgUsers
from daemon.logs import count_dropped_lines, get_logger
from daemon.packs import Pack, by_schema
from daemon.pages.access import Verify
from daemon.pages.console import Console, ConsoleOptions
from daemon.pages.demo import Demo
from daemon.pages.demo import handlers as demo_handlers
from daemon.postgres.connect import SESSION, Connect, Connection, OnUnusable, Pool, connect, open_pool
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, address_of, explain
from daemon.postgres.tunnel import through_tunnel
from daemon.schema import sql_files
from daemon.schema.health import SchemaHealth, SchemaNotCurrent
from daemon.settings import Address, BadSettings, Reloads, Settings

log = get_logger()

START_TIMEOUT = 30.0  # seconds to wait for the first heartbeat, and between two reports of a long start
POOL_SIZE = 12  # connections: 4 for replays, 4 for rights, 2 for snapshots, which leaves some to the pump
DAEMON_CONNECTIONS = POOL_SIZE + 5  # the listener, the sequencer, the wakeup lock, the retention and the jobs
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
    """A serving daemon: its addresses, its pool and its readiness."""

    host: str
    port: int
    pool: Pool
    readiness: Readiness
    metrics_url: str | None

    @property
    def http_url(self) -> str:
        """The URL of the live page; for a Unix socket in the form that nginx takes."""
        address = Address(self.host, self.port)
        return f"http://{address}:/" if address.is_unix else f"http://{address}/"

    @property
    def websocket_url(self) -> str:
        """The URL that clients connect to."""
        return f"ws{self.http_url.removeprefix('http')}v1"


@dataclass(frozen=True)
class _Parts:
    """The parts, connected but not started."""

    notifier: Notifier
    notify_watch: NotifyWatch
    sequencer: Sequencer
    backlog: Backlog
    retention: Retention
    schema: SchemaHealth
    pump: Pump
    sharing: "_Sharing"
    canary: Canary | None
    gateway: Gateway
    scheduler: Scheduler
    readiness: Readiness
    keys: KeySource


@dataclass(frozen=True)
class _Sharing:
    """What clients of different processes share beside the log."""

    signals: Signals
    presence: Presence
    acks: Acks


def site(
    readiness: Readiness,
    packs: Callable[[], Iterable[Pack]],
    console: Console,
    demo: Demo | None,
    pool: Pool,
    verify: Verify,
) -> Site:
    """The pages that are served beside the websocket."""
    pages: dict[str, Page | Callable[[], Page]] = {
        **static_pages(folder("web")),
        "/rowcast.js": script_page(folder("clients/javascript") / "rowcast.js"),
        "/healthz": lambda: text_page(f"ok {__version__}\n"),
        "/readyz": partial(_readiness_page, readiness),
        "/metrics": _metrics_page,
        "/asyncapi.json": _contract_page(asyncapi, packs),
        "/schema.json": _contract_page(json_schema, packs),
    }
    handlers = console.handlers()
    if demo is not None:
        pages["/demo.json"] = lambda: json_page(demo.users())
        handlers |= demo_handlers(demo, pool, verify)
    return Site(pages, handlers)


def _readiness_page(readiness: Readiness) -> Page:
    """200 when ready, else 503 with the reasons. Warnings, if any, are in both."""
    reasons, warnings = readiness.reasons(), readiness.warnings()
    more = {"warnings": warnings} if warnings else {}
    return json_page({"ready": not reasons, "reasons": reasons, **more}, 503 if reasons else 200)


def _contract_page(make: Callable[[Iterable[Pack]], Any], packs: Callable[[], Iterable[Pack]]) -> Callable[[], Page]:
    """A page that is made when it is first asked for, and again after the packs have changed: it takes a while."""
    made: tuple[list[Pack], Page] | None = None

    def page() -> Page:
        nonlocal made
        served = list(packs())
        if made is None or made[0] != served:
            made = served, json_page(make(served))
        return made[1]

    return page


def _metrics_page() -> Page:
    body, content_type = metrics.exposition()
    return Page(200, body, content_type)


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
    users_of = _users_statement(settings)
    authenticator, keys = await _load_keys(settings, reloads)
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
        parts = _build(settings, packs, pool, schema, demo, tunnel_problems, unusable.put_nowait, identity)
        run_in_background = await stack.enter_async_context(_in_background())
        run_in_background(_end_if_unusable(unusable))
        await _start(parts, run_in_background)
        own, (host, port) = await _listen(settings, parts.gateway, inherited, should_accept)
        stack.push_async_callback(parts.gateway.drain, lambda: encode(bye("restart")), within=settings.drain_seconds)
        metrics_url = f"http://{Address(*own[0].getsockname()[:2])}/metrics" if own else None
        yield Running(host, port, pool, parts.readiness, metrics_url)


async def _load_keys(settings: Settings, reloads: Reloads | None) -> tuple[Authenticator, KeySource]:
    """What verifies tokens, with all keys, and what keeps these current. Raises an OperatorFault."""
    authenticator = Authenticator.configured(settings)
    keys = KeySource(_key_places(settings), authenticator.use)
    await keys.load()

    async def reload(settings: Settings) -> int:
        return await keys.load(_key_places(settings))

    if reloads is not None:
        reloads.register("keys", reload)
    return authenticator, keys


def _key_places(settings: Settings) -> KeyPlaces:
    """Where the keys are. Raises BadSettings if there are none."""
    if not settings.public_keys and settings.jwks is None:
        settings.require_secret()
    return KeyPlaces(settings.secrets, settings.public_keys, settings.jwks)


def _users_statement(settings: Settings) -> str | None:
    """The statement that knows another issuer's users, if that is wanted. Raises BadSettings."""
    if not settings.map_subjects:
        return None
    files = {pack: folder("ddl") / pack / "identity.sql" for pack in settings.packs}
    found = [pack for pack, file in files.items() if file.is_file()]
    if len(found) != 1:
        raise BadSettings(
            "ROWCAST_MAP_SUBJECTS needs one pack that knows the users of another issuer, and "
            f"{len(found)} in ROWCAST_PACKS do: turn it off, or choose other packs"
        )
    return sql_files.read(files[found[0]], pack=found[0], schema=settings.schemas[found[0]]).text


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


def _build(
    settings: Settings,
    packs: Mapping[str, Pack],
    pool: Pool,
    schema: SchemaHealth,
    demo: Demo | None,
    tunnel_problems: Check,
    on_unusable: OnUnusable,
    identity: Identity,
) -> _Parts:
    """Make every part and connect them; nothing runs yet."""
    keys = identity.keys
    router = PackRouter({**packs, CANARY.name: CANARY} if settings.canary_every else packs)
    hub = Hub(encode, router.with_exact_numbers)
    own_tables = OwnTables(PgOwnTableReader(pool), router)
    events, numbers = asyncio.Event(), asyncio.Event()
    pump, log_cache = _build_pump(settings, pool, hub, router, own_tables, numbers)
    sharing = _build_sharing(pool, hub, router)
    notifier, sequencer, retention = _build_log(
        settings, pool, pump, log_cache, events, numbers, sharing, on_unusable
    )
    notify_watch = NotifyWatch(pool, lambda: notifier.is_blocked)
    backlog = Backlog(pool, sequencer, lambda: hub.position.seq)
    scheduler = _scheduler(settings, pool, on_unusable)
    canary = Canary(hub, CanaryWriter(pool).write, settings.canary_every) if settings.canary_every else None
    readiness = _readiness(
        tunnel_problems, schema, notifier, notify_watch, pump, backlog, retention, canary, scheduler, keys
    )
    limits = gateway_limits(settings)
    context = ClientContext(
        hub=hub,
        log_reader=log_cache,
        replay_reader=RetryingLogReader(log_cache, pump.readable.wait),
        rights=Rights(hub, PgGrants(pool, router.schema_of), pump.wait_until_delivered),
        snapshots=_snapshots(settings, pool, hub, router, pump),
        columns=PgColumns(pool, router.schema_of),
        signals=sharing.signals,
        presence=sharing.presence,
        acks=sharing.acks,
        router=router,
        authenticate=identity.at_once,
        identify=identity.identify,
        wait_until_delivered=pump.wait_until_delivered,
        delivery_age=lambda: max(pump.read_age, backlog.age),
        close_history=CloseHistory(),
        encode=encode,
        clock=time.monotonic,
        heartbeat=settings.heartbeat,
        schema=lambda: own_tables.contract,
        frame_bytes=limits.message_bytes,
        queue_bytes=settings.queue_bytes,
        chunk=settings.read_chunk,
    )
    console = Console(hub, pump, log_cache, backlog, readiness, pool, _console_options(settings, identity, demo))
    pages = site(readiness, lambda: router.all_packs, console, demo, pool, identity.verify)
    console.gateway = gateway = Gateway(context.open_client, pages, limits=limits)
    _connect_metrics(hub, log_cache, notifier, backlog, gateway, limits, keys, readiness)
    of_the_log = notifier, notify_watch, sequencer, backlog, retention
    return _Parts(*of_the_log, schema, pump, sharing, canary, gateway, scheduler, readiness, keys)


def _build_pump(
    settings: Settings, pool: Pool, hub: Hub, router: PackRouter, own_tables: OwnTables, numbers: asyncio.Event
) -> tuple[Pump, LogCache]:
    log_reader = PgLogReader(pool, settings.transaction_changes, settings.transaction_bytes)
    log_cache = LogCache(log_reader, settings.recent_bytes)
    pump = Pump(
        log_reader,
        numbers,
        hub,
        router,
        log_cache,
        DeadLetters(pool).store_dead_letters,
        refresh=own_tables.refresh,
        poll_every=settings.poll_every,
        chunk=settings.read_chunk,
    )
    return pump, log_cache


def _build_sharing(pool: Pool, hub: Hub, router: PackRouter) -> _Sharing:
    process = secrets.token_hex(8)

    def functions(name: Callable[[Pack], str | None]) -> dict[str, str]:
        return {schema: f"{schema}.{name(pack)}" for schema, pack in router.packs.items() if name(pack)}

    rights = PgSignalRights(pool, router.schema_of, functions(lambda pack: pack.may_signal))
    signals = Signals(process, hub, encode, PgBroadcast(pool), rights)
    presence_hooks = functions(lambda pack: pack.presence_hook)
    presence = Presence(
        PgPeople(pool, process, router.schema_of, presence_hooks),
        encode,
        signals.announce,
        time.monotonic,
        has_hooks=bool(presence_hooks),
    )
    signals.on_present = presence.changed_elsewhere
    return _Sharing(signals, presence, Acks(PgAcks(pool, functions(lambda pack: pack.ack_hook))))


def _console_options(settings: Settings, identity: Identity, demo: Demo | None) -> ConsoleOptions:
    is_local_trusted = settings.environment != "production"
    return ConsoleOptions(identity.verify, is_local_trusted, settings.workers, demo is not None)


def _scheduler(settings: Settings, pool: Pool, on_unusable: OnUnusable) -> Scheduler:
    connect_for_jobs = partial(_open, settings, on_unusable, "rowcast jobs", JOB_SESSION)
    return Scheduler(pool, connect_for_jobs, settings, scheduled_jobs(settings))


def _snapshots(settings: Settings, pool: Pool, hub: Hub, router: PackRouter, pump: Pump) -> Snapshots:
    largest = settings.transaction_bytes
    reader = PgRowReader(pool, router.schema_of, settings.snapshot_rows, largest)
    return Snapshots(reader, hub, router, encode, pump.wait_until_delivered, max_bytes=4 * largest)


def _readiness(
    tunnel_problems: Check,
    schema: SchemaHealth,
    notifier: Notifier,
    notify_watch: NotifyWatch,
    pump: Pump,
    backlog: Backlog,
    retention: Retention,
    canary: Canary | None,
    scheduler: Scheduler,
    keys: KeySource,
) -> Readiness:
    return Readiness(
        tunnel_problems,
        lambda: schema.problems,
        lambda: () if notifier.is_healthy else ("the listener has no heartbeat",),
        pump.problems,
        backlog.reasons,
        retention.problems,
        *([canary.problems] if canary else ()),
        warnings=[notify_watch.warnings, retention.warnings, scheduler.warnings, keys.warnings],
    )


def gateway_limits(settings: Settings) -> Limits:
    """What the gateway of one process allows its peers."""
    return Limits(
        connections=settings.max_clients,
        pending=settings.max_unauthenticated,
        per_user=settings.max_clients_per_user,
        per_address=settings.max_clients_per_address,
        user_rate=settings.user_rate,
        deflate_bytes=settings.deflate_bytes,
    )


def _connect_metrics(
    hub: Hub,
    log_cache: LogCache,
    notifier: Notifier,
    backlog: Backlog,
    gateway: Gateway,
    limits: Limits,
    keys: KeySource,
    readiness: Readiness,
) -> None:
    """Let the gauges read what the parts know at the moment, and count dropped lines."""
    count_dropped_lines(metrics.LOG_LINES_DROPPED.inc)
    metrics.CLIENTS_LIMIT.set(limits.max_clients())
    metrics.READY.set_function(lambda: not readiness.reasons())
    metrics.CLIENTS.set_function(lambda: gateway.clients)
    metrics.UNAUTHENTICATED.set_function(lambda: gateway.pending)
    metrics.SUBSCRIPTIONS.set_function(lambda: hub.subscriptions)
    metrics.RECENT_BYTES.set_function(lambda: log_cache.size)
    metrics.LOG_POSITION.set_function(lambda: hub.position.seq)
    metrics.UNNUMBERED_AGE.set_function(lambda: backlog.age)
    metrics.BEAT_AGE.set_function(lambda: notifier.silence)
    metrics.KEY_FETCH_DELAY.set_function(lambda: keys.age)


def _build_log(
    settings: Settings,
    pool: Pool,
    pump: Pump,
    log_cache: LogCache,
    events: asyncio.Event,
    numbers: asyncio.Event,
    sharing: _Sharing,
    on_unusable: OnUnusable,
) -> tuple[Notifier, Sequencer, Retention]:
    """Make the parts that maintain the log: the notifier, the sequencer and the retention."""

    def opener(name: str, server_settings: Mapping[str, str] = SESSION) -> Connect:
        return partial(_open, settings, on_unusable, name, server_settings)

    sequencer = Sequencer(
        opener("rowcast sequencer"),
        pool,
        events,
        numbers,
        pump.offer,
        max_offered=min(settings.read_chunk, settings.transaction_changes),
        poll_every=settings.poll_every,
        sync=settings.order_commit == "sync",
        is_notify_blocked=lambda: notifier.is_blocked,
    )
    lock_timeout = (settings.beat_limit - settings.beat_every) / 2
    notifier = Notifier(
        opener("rowcast listener", {**SESSION, "lock_timeout": f"{lock_timeout * 1000:.0f}ms"}),
        {"rowcast": events, "rowcast_log": numbers},
        receivers={SIGNALS_CHANNEL: sharing.signals.receive},
        is_own=sequencer.is_own_notification,
        beat_every=settings.beat_every,
        beat_limit=settings.beat_limit,
    )
    retention = Retention(
        pool,
        opener("rowcast retention", {**SESSION, **DROP_SETTINGS}),
        sequencer,
        settings.retention,
        log_cache.forget,
    )
    return notifier, sequencer, retention


async def _open(
    settings: Settings, on_unusable: OnUnusable, name: str, server_settings: Mapping[str, str]
) -> Connection:
    """Open a connection of its own for a part. Raises a DatabaseFault."""
    return await connect(
        settings.require_dsn(),
        application_name=name,
        server_settings=server_settings,
        on_unusable=on_unusable,
        attempts=1,
    )


async def _start(parts: _Parts, run_in_background: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """Start every part but the gateway, and wait until each works. Raises an OperatorFault."""
    run_in_background(parts.notifier.run())
    run_in_background(parts.notify_watch.run())
    run_in_background(parts.sequencer.run())
    run_in_background(parts.backlog.run())
    run_in_background(parts.schema.watch())
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


async def _reload_on(hangup: asyncio.Event, reloads: Reloads) -> None:
    """Reload whenever the event is set. Signals that arrive during a reload cause one more."""
    while True:
        await hangup.wait()
        hangup.clear()
        await reloads.run()


async def serve(
    settings: Settings,
    *,
    demo: Demo | None = None,
    on_ready: Callable[[Running], Coroutine[Any, Any, None]] | None = None,
    manager: systemd.Manager = systemd,
    should_accept: Callable[[int], bool] = lambda _: True,
    read_settings: Callable[[], Settings] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until the terminal is closed. Raises an OperatorFault.

    `on_ready` is started once the daemon is ready, and cancelled when it stops. `manager` is notified of the daemon's
    state and may pass listening sockets; `should_accept` is passed to the gateway. On SIGHUP, `read_settings` returns
    the settings as they are then, and what can be reloaded is.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    faulthandler.enable(file=2)  # the watchdog kills with SIGABRT: stderr then says where the process hung
    stop, ready, hangup = asyncio.Event(), asyncio.Event(), asyncio.Event()
    reloads = Reloads(read_settings or (lambda: settings))
    reasons: Callable[[], Sequence[str]] = lambda: ["starting"]  # noqa: E731

    async def run() -> None:
        nonlocal reasons
        async with _in_background() as run_throughout:
            run_throughout(
                _feed_watchdog(manager, lambda: reasons(), lambda: not ready.is_set())  # noqa: PLW0108 - rebound below
            )
            serving = running(
                settings, demo=demo, inherited=manager.listen_fds(), should_accept=should_accept, reloads=reloads
            )
            async with serving as daemon, _in_background() as run_while_ready:
                ready.set()
                reasons = daemon.readiness.reasons
                urls = {"listen": daemon.http_url} | ({"metrics": daemon.metrics_url} if daemon.metrics_url else {})
                log.info("serving", **urls, packs=list(settings.packs), version=__version__)
                manager.notify("READY=1")
                if on_ready is not None:
                    run_while_ready(on_ready(daemon))
                run_while_ready(_reload_on(hangup, reloads))
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
