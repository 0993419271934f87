"""Composition: makes every part and connects them; nothing runs yet."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from daemon import metrics
from daemon.app.node import (
    Node,
    Ports,
    Sharing,
    build_gateway,
    build_node,
    client_context,
    connect_metrics,
    door_setter,
    gateway_limits,
    process_name,
    schema_functions,
)
from daemon.app.site import KEPT, console_options, site
from daemon.core.ports import PeopleStore
from daemon.delivery.canary import CANARY, Canary
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.pump import Pump
from daemon.gateway.identity import Identity
from daemon.gateway.key_source import KeySource
from daemon.gateway.server import Gateway
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
from daemon.packs import Pack
from daemon.pages.console import Console, Lag
from daemon.pages.demo import Demo
from daemon.pages.demo import handlers as demo_handlers
from daemon.pages.kept import PgKept
from daemon.postgres.connect import SESSION, Connect, Connection, OnUnusable, Pool, connect
from daemon.schema.health import SchemaHealth
from daemon.settings import Settings

if TYPE_CHECKING:
    from daemon.app.relay import MemberRelay

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
    sharing: Sharing
    canary: Canary | None
    gateway: Gateway
    scheduler: Scheduler
    readiness: Readiness
    keys: KeySource
    use_door: Callable[[Settings], None]
    relay: "MemberRelay | None"


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
    relay = _relay(settings)
    node = build_node(settings, router, _ports(settings, pool, router, relay))
    live = node.live
    events, numbers = asyncio.Event(), asyncio.Event()
    pump = _build_pump(settings, pool, node, numbers)
    notifier, sequencer, retention = _build_log(settings, pool, pump, node, events, numbers, on_unusable)
    notify_watch = NotifyWatch(pool, lambda: notifier.is_blocked)
    backlog = Backlog(pool, sequencer, lambda: live.position.seq)
    scheduler = _scheduler(settings, pool, on_unusable)
    canary = Canary(live.hub, CanaryWriter(pool).write, settings.canary_every) if settings.canary_every else None

    def delivery_age() -> float:
        return max(pump.read_age, backlog.age)

    warned_of = notify_watch, retention, scheduler, identity.keys, tls, node.refusals
    warnings: list[Check] = [each.warnings for each in warned_of]
    if relay is not None:
        warnings.append(relay.warnings)
        metrics.RELAY_CONNECTED.set_function(relay.link.connected.is_set)
    readiness = _readiness(tunnel_problems, schema, notifier, pump, backlog, retention, canary, warnings)
    context = client_context(
        settings,
        node,
        identity,
        pump.readable.wait,
        delivery_age,
        lambda: node.own_tables.contract,
    )
    kept = PgKept(pool)
    options = console_options(settings, identity, has_samples=demo is not None)
    console = Console(live, lambda: Lag(backlog.age, pump.read_age), readiness, kept.read, kept.replay, options)
    handlers = console.handlers()
    if demo is not None:
        handlers |= demo_handlers(demo, pool, identity.verify, lambda: gateway.door)
    if relay is not None:
        people, for_gateways = people_of(pool, router), {**handlers, KEPT: kept.page}
        relay.connect(node, sequencer.leading.is_set, delivery_age, people, identity.user_of, for_gateways)
    pages = site(readiness, lambda: router.all_packs, handlers)
    console.gateway = gateway = build_gateway(settings, context.open_client, pages, tls)
    connect_metrics(live, gateway, gateway_limits(settings), identity.keys, readiness)
    metrics.UNNUMBERED_AGE.set_function(lambda: backlog.age)
    metrics.BEAT_AGE.set_function(lambda: notifier.silence)
    of_the_log = notifier, notify_watch, sequencer, backlog, retention
    use_door = door_setter(gateway, context)
    return Parts(
        *of_the_log, schema, pump, node.sharing, canary, gateway, scheduler, readiness, identity.keys, use_door, relay
    )


def _relay(settings: Settings) -> "MemberRelay | None":
    """What connects this member with gateways, if there are any."""
    if settings.nats_url is None:
        return None
    from daemon.app.relay import MemberRelay  # noqa: PLC0415 - most daemons have no gateways

    return MemberRelay(settings)


def _ports(settings: Settings, pool: Pool, router: PackRouter, relay: "MemberRelay | None") -> Ports:
    """The ports of a member."""
    process = process_name()
    functions = partial(schema_functions, router.packs)
    return Ports(
        process=process,
        log_reader=PgLogReader(pool, settings.transaction_changes, settings.transaction_bytes),
        grants=PgGrants(pool, router.schema_of, router.own_table_of),
        own_tables=PgOwnTableReader(pool),
        rows=PgRowReader(pool, router.schema_of, settings.snapshot_rows, settings.transaction_bytes),
        columns=PgColumns(pool, router.schema_of),
        people=people_of(pool, router)(process),
        acks=PgAcks(pool, functions(lambda pack: pack.ack_hook)),
        signal_rights=PgSignalRights(pool, router.schema_of, functions(lambda pack: pack.may_signal)),
        broadcast=PgBroadcast(pool) if relay is None else relay.broadcast,
    )


def people_of(pool: Pool, router: PackRouter) -> Callable[[str], PeopleStore]:
    """What returns the store of the people of a process, by its name."""
    hooks = schema_functions(router.packs, lambda pack: pack.presence_hook)
    return lambda process: PgPeople(pool, process, router.schema_of, hooks)


def _build_pump(settings: Settings, pool: Pool, node: Node, numbers: asyncio.Event) -> Pump:
    sizes = settings.transaction_changes, settings.transaction_bytes
    return Pump(
        PgLogReader(pool, *sizes, wants=node.live.wants),
        numbers,
        node.live,
        DeadLetters(pool).store_dead_letters,
        refresh=node.own_tables.refresh,
        poll_every=settings.poll_every,
        chunk=settings.read_chunk,
    )


def _scheduler(settings: Settings, pool: Pool, on_unusable: OnUnusable) -> Scheduler:
    connect_for_jobs = partial(_open, settings, on_unusable, "rowcast jobs", JOB_SESSION)
    return Scheduler(pool, connect_for_jobs, settings, scheduled_jobs(settings))


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


def _build_log(
    settings: Settings,
    pool: Pool,
    pump: Pump,
    node: Node,
    events: asyncio.Event,
    numbers: asyncio.Event,
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
        receivers={SIGNALS_CHANNEL: node.sharing.signals.receive},
        is_own=sequencer.is_own_notification,
        beat_every=settings.beat_every,
        beat_limit=settings.beat_limit,
    )
    retention = Retention(
        pool,
        opener("rowcast retention", {**SESSION, **DROP_SETTINGS}),
        sequencer,
        settings.retention,
        node.live.forget,
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
