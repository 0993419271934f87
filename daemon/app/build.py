"""Composition: makes every part and connects them; nothing runs yet."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from ipaddress import ip_network

from daemon import metrics
from daemon.app.site import site
from daemon.core.close_history import CloseHistory
from daemon.core.hub import Hub
from daemon.core.ports import OpenClient
from daemon.delivery.acks import Acks
from daemon.delivery.canary import CANARY, Canary
from daemon.delivery.client import ClientContext
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.own_tables import OwnTables
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.presence import Presence
from daemon.delivery.pump import Pump
from daemon.delivery.replay import RetryingLogReader
from daemon.delivery.rights import Rights
from daemon.delivery.signals import Signals
from daemon.delivery.snapshots import Snapshots
from daemon.gateway.door import UNIX, Door
from daemon.gateway.http import Page, Site, json_page
from daemon.gateway.identity import Identity
from daemon.gateway.key_source import KeySource
from daemon.gateway.server import Gateway, Limits, encode
from daemon.gateway.tls import Tls
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
from daemon.logs import count_dropped_lines
from daemon.packs import Pack
from daemon.pages.console import Console, ConsoleOptions
from daemon.pages.demo import Demo
from daemon.postgres.connect import SESSION, Connect, Connection, OnUnusable, Pool, connect
from daemon.schema.health import SchemaHealth
from daemon.settings import Settings

POOL_SIZE = 12  # connections: 4 for replays, 4 for rights, 2 for snapshots, which leaves some to the pump
DAEMON_CONNECTIONS = POOL_SIZE + 5  # the listener, the sequencer, the wakeup lock, the retention and the jobs


@dataclass(frozen=True)
class Parts:
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
    use_door: Callable[[Settings], None]


@dataclass(frozen=True)
class _Sharing:
    """What clients of different processes share beside the log."""

    signals: Signals
    presence: Presence
    acks: Acks


def build(
    settings: Settings,
    packs: Mapping[str, Pack],
    pool: Pool,
    schema: SchemaHealth,
    demo: Demo | None,
    tunnel_problems: Check,
    on_unusable: OnUnusable,
    identity: Identity,
    tls: Tls,
) -> Parts:
    """Make every part and connect them; nothing runs yet."""
    router = PackRouter({**packs, CANARY.name: CANARY} if settings.canary_every else packs)
    hub = Hub(encode, router.with_exact_numbers)
    own_tables = OwnTables(PgOwnTableReader(pool), router)
    events, numbers = asyncio.Event(), asyncio.Event()
    pump, live = _build_pump(settings, pool, hub, router, own_tables, numbers)
    log_cache = live.log_cache
    sharing = _build_sharing(pool, hub, router)
    notifier, sequencer, retention = _build_log(
        settings, pool, pump, log_cache, events, numbers, sharing, on_unusable
    )
    notify_watch = NotifyWatch(pool, lambda: notifier.is_blocked)
    backlog = Backlog(pool, sequencer, lambda: hub.position.seq)
    scheduler = _scheduler(settings, pool, on_unusable)
    canary = Canary(hub, CanaryWriter(pool).write, settings.canary_every) if settings.canary_every else None
    warnings = [each.warnings for each in (notify_watch, retention, scheduler, identity.keys, tls)]
    readiness = _readiness(tunnel_problems, schema, notifier, pump, backlog, retention, canary, warnings)
    limits = gateway_limits(settings)
    context = ClientContext(
        hub=hub,
        log_reader=log_cache,
        replay_reader=RetryingLogReader(log_cache, pump.readable.wait),
        rights=Rights(hub, PgGrants(pool, router.schema_of, router.own_table_of), live.wait_until_delivered),
        snapshots=_snapshots(settings, pool, live),
        columns=PgColumns(pool, router.schema_of),
        signals=sharing.signals,
        presence=sharing.presence,
        acks=sharing.acks,
        router=router,
        authenticate=identity.at_once,
        identify=identity.identify,
        wait_until_delivered=live.wait_until_delivered,
        delivery_age=lambda: max(pump.read_age, backlog.age),
        close_history=CloseHistory(),
        encode=encode,
        clock=time.monotonic,
        heartbeat=settings.heartbeat,
        schema=lambda: own_tables.contract,
        max_topics=limits.topics,
        frame_bytes=limits.message_bytes,
        queue_bytes=settings.queue_bytes,
        chunk=settings.read_chunk,
    )
    console = Console(live, pump, log_cache, backlog, readiness, pool, _console_options(settings, identity, demo))
    pages = site(readiness, lambda: router.all_packs, console, demo, pool, identity.verify, lambda: gateway.door)
    console.gateway = gateway = _build_gateway(settings, context.open_client, pages, tls)
    _connect_metrics(hub, log_cache, notifier, backlog, gateway, limits, identity.keys, readiness)
    of_the_log = notifier, notify_watch, sequencer, backlog, retention
    use_door = partial(_use_door, gateway, context)
    return Parts(*of_the_log, schema, pump, sharing, canary, gateway, scheduler, readiness, identity.keys, use_door)


def _build_pump(
    settings: Settings, pool: Pool, hub: Hub, router: PackRouter, own_tables: OwnTables, numbers: asyncio.Event
) -> tuple[Pump, Live]:
    log_reader = PgLogReader(pool, settings.transaction_changes, settings.transaction_bytes)
    live = Live(hub, router, LogCache(log_reader, settings.recent_bytes))
    pump = Pump(
        log_reader,
        numbers,
        live,
        DeadLetters(pool).store_dead_letters,
        refresh=own_tables.refresh,
        poll_every=settings.poll_every,
        chunk=settings.read_chunk,
    )
    return pump, live


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


def _build_gateway(settings: Settings, open_client: OpenClient, whole: Site, tls: Tls) -> Gateway:
    """The gateway; if there is a listener for metrics, what is for operators is only there."""
    public = whole if settings.metrics_listen is None else whole.without(_FOR_OPERATORS, {"/readyz": _bare_readiness})
    limits, door = gateway_limits(settings), door_of(settings)
    return Gateway(open_client, public, admin_site=whole, limits=limits, door=door, tls=tls)


def _use_door(gateway: Gateway, context: ClientContext, settings: Settings) -> None:
    """Let new requests and connections have the door and the limits of these settings."""
    limits = gateway_limits(settings)
    context = replace(
        context, max_topics=limits.topics, frame_bytes=limits.message_bytes, queue_bytes=settings.queue_bytes
    )
    gateway.use(context.open_client, limits, door_of(settings))
    metrics.CLIENTS_LIMIT.set(limits.max_clients())


_FOR_OPERATORS = "/metrics", "/console"


def _bare_readiness(page: Page) -> Page:
    """The status of /readyz, without the reasons."""
    return json_page({"ready": page.status == HTTPStatus.OK}, page.status)


def _console_options(settings: Settings, identity: Identity, demo: Demo | None) -> ConsoleOptions:
    is_local_trusted = settings.environment != "production"
    return ConsoleOptions(identity.verify, is_local_trusted, settings.workers, demo is not None)


def _scheduler(settings: Settings, pool: Pool, on_unusable: OnUnusable) -> Scheduler:
    connect_for_jobs = partial(_open, settings, on_unusable, "rowcast jobs", JOB_SESSION)
    return Scheduler(pool, connect_for_jobs, settings, scheduled_jobs(settings))


def _snapshots(settings: Settings, pool: Pool, live: Live) -> Snapshots:
    largest = settings.transaction_bytes
    reader = PgRowReader(pool, live.router.schema_of, settings.snapshot_rows, largest)
    return Snapshots(reader, live.hub, live.router, encode, live.wait_until_delivered, max_bytes=4 * largest)


def _readiness(
    tunnel_problems: Check,
    schema: SchemaHealth,
    notifier: Notifier,
    pump: Pump,
    backlog: Backlog,
    retention: Retention,
    canary: Canary | None,
    warnings: Iterable[Check],
) -> Readiness:
    return Readiness(
        tunnel_problems,
        lambda: schema.problems,
        lambda: () if notifier.is_healthy else ("the listener has no heartbeat",),
        pump.problems,
        backlog.reasons,
        retention.problems,
        *([canary.problems] if canary else ()),
        warnings=warnings,
    )


def gateway_limits(settings: Settings) -> Limits:
    """What the gateway of one process allows its peers."""
    return Limits(
        connections=settings.max_clients,
        pending=settings.max_unauthenticated,
        per_user=settings.max_clients_per_user,
        per_address=settings.max_clients_per_address,
        user_unread_bytes=settings.user_unread_bytes,
        user_rate=settings.user_rate,
        topics=settings.max_topics,
        message_bytes=settings.frame_bytes,
        deflate_bytes=settings.deflate_bytes,
    )


def door_of(settings: Settings) -> Door:
    """Who may come in."""
    return Door(
        origins=frozenset(settings.origins),
        admits_local_pages=settings.environment != "production",
        hosts=frozenset(settings.hosts),
        proxies=tuple(UNIX if proxy == UNIX else ip_network(proxy) for proxy in settings.trusted_proxies),
        proxy_header=settings.proxy_header,
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
