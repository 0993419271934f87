"""What every node has that serves clients, with a database or without: the hub, its clients, and the gateway."""

import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from ipaddress import ip_network

from daemon import metrics
from daemon.core.close_history import CloseHistory
from daemon.core.hub import Hub
from daemon.core.ports import (
    AckStore,
    Age,
    Broadcast,
    ColumnReader,
    Grants,
    LogReader,
    OpenClient,
    OwnTableReader,
    PeopleStore,
    RowReader,
    SignalRights,
)
from daemon.core.presence import Room
from daemon.delivery.acks import Acks
from daemon.delivery.client import ClientContext
from daemon.delivery.contents import Interest
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.own_tables import OwnTables
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.presence import Presence
from daemon.delivery.replay import RetryingLogReader
from daemon.delivery.rights import Rights
from daemon.delivery.signals import Signals
from daemon.delivery.snapshots import Snapshots
from daemon.gateway.door import UNIX, Door
from daemon.gateway.fan_out import fan_out
from daemon.gateway.http import Page, Site, json_page
from daemon.gateway.identity import Identity
from daemon.gateway.key_source import KeySource
from daemon.gateway.server import Gateway, Limits, encode
from daemon.gateway.tls import Tls
from daemon.health import Readiness, Refusals
from daemon.logs import count_dropped_lines
from daemon.packs import Pack
from daemon.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Ports:
    """How a node knows the database: a member asks Postgres, a gateway asks a member.

    `process` is the name of this process among all that share what clients do.
    """

    process: str
    log_reader: LogReader
    grants: Grants
    own_tables: OwnTableReader
    rows: RowReader
    columns: ColumnReader
    people: PeopleStore
    acks: AckStore
    signal_rights: SignalRights
    broadcast: Broadcast


@dataclass(frozen=True)
class Sharing:
    """What clients of different processes share beside the log."""

    signals: Signals
    presence: Presence
    acks: Acks


@dataclass(frozen=True)
class Node:
    """The parts of every node, connected but not started."""

    live: Live
    own_tables: OwnTables
    sharing: Sharing
    ports: Ports
    refusals: Refusals = field(default_factory=Refusals)

    @property
    def router(self) -> PackRouter:
        """What is served."""
        return self.live.router


def process_name() -> str:
    """A name that no other process has."""
    return secrets.token_hex(8)


def schema_functions(packs: Mapping[str, Pack], name: Callable[[Pack], str | None]) -> dict[str, str]:
    """The qualified names of the functions of this kind, by schema, of the packs that have one."""
    return {schema: f"{schema}.{name(pack)}" for schema, pack in packs.items() if name(pack)}


def build_node(settings: Settings, router: PackRouter, ports: Ports, interest: Interest | None = None) -> Node:
    """The parts of a node that knows the database through these ports. With `interest`, not all topics are here."""
    hub = Hub(encode, router.with_exact_numbers, fan_out, has_tx=settings.transaction_ids)
    log_cache = LogCache(ports.log_reader, settings.recent_bytes)
    if interest is not None:
        hub.interest, log_cache.covers = interest, interest.covers
    live = Live(hub, router, log_cache)
    signals = Signals(ports.process, hub, encode, ports.broadcast, ports.signal_rights)
    has_hooks = bool(schema_functions(router.packs, lambda pack: pack.presence_hook))
    presence = Presence(ports.people, encode, signals.announce, time.monotonic, has_hooks=has_hooks)
    presence.room = room_of(settings)
    signals.on_present = presence.changed_elsewhere
    return Node(live, OwnTables(ports.own_tables, router), Sharing(signals, presence, Acks(ports.acks)), ports)


def client_context(
    settings: Settings,
    node: Node,
    identity: Identity,
    wait_until_readable: Callable[[], Awaitable[object]],
    delivery_age: Age,
    schema: Callable[[], str],
) -> ClientContext:
    """What the clients of a node share. `schema` returns the hash of the row models of what is served."""
    live, ports, sharing, limits = node.live, node.ports, node.sharing, gateway_limits(settings)
    wait_until_delivered = live.wait_until_delivered
    return ClientContext(
        hub=live.hub,
        log_reader=live.log_cache,
        replay_reader=RetryingLogReader(live.log_cache, wait_until_readable),
        rights=Rights(live.hub, ports.grants, wait_until_delivered),
        snapshots=Snapshots(
            ports.rows,
            live.hub,
            node.router,
            encode,
            wait_until_delivered,
            max_bytes=4 * settings.transaction_bytes,
        ),
        columns=ports.columns,
        signals=sharing.signals,
        presence=sharing.presence,
        acks=sharing.acks,
        router=node.router,
        authenticate=identity.at_once,
        identify=identity.identify,
        wait_until_delivered=wait_until_delivered,
        delivery_age=delivery_age,
        close_history=CloseHistory(),
        encode=encode,
        clock=time.monotonic,
        heartbeat=settings.heartbeat,
        schema=schema,
        refusals=node.refusals,
        max_topics=limits.topics,
        max_filter=settings.max_filter,
        signal_rate=settings.signal_rate,
        frame_bytes=limits.message_bytes,
        queue_bytes=settings.queue_bytes,
        chunk=settings.read_chunk,
    )


def build_gateway(
    settings: Settings, open_client: OpenClient, whole: Site, tls: Tls, *, is_open: bool = False
) -> Gateway:
    """The gateway; if there is a listener for metrics, what is for operators is only there, unless `is_open`."""
    is_whole = is_open or settings.metrics_listen is None
    public = whole if is_whole else whole.without(_FOR_OPERATORS, {"/readyz": _bare_readiness})
    limits, door = gateway_limits(settings), door_of(settings)
    return Gateway(open_client, public, admin_site=whole, limits=limits, door=door, tls=tls)


_FOR_OPERATORS = "/metrics", "/console"


def _bare_readiness(page: Page) -> Page:
    """The status of /readyz, without the reasons."""
    return json_page({"ready": page.status == HTTPStatus.OK}, page.status)


def door_setter(gateway: Gateway, context: ClientContext) -> Callable[[Settings], None]:
    """What lets new requests and connections have the door and the limits of other settings."""
    return partial(_use_door, gateway, context)


def _use_door(gateway: Gateway, context: ClientContext, settings: Settings) -> None:
    limits = gateway_limits(settings)
    context = replace(
        context,
        max_topics=limits.topics,
        max_filter=settings.max_filter,
        signal_rate=settings.signal_rate,
        frame_bytes=limits.message_bytes,
        queue_bytes=settings.queue_bytes,
    )
    context.presence.room = room_of(settings)
    gateway.use(context.open_client, limits, door_of(settings))
    metrics.CLIENTS_LIMIT.set(limits.max_clients())


def gateway_limits(settings: Settings) -> Limits:
    """What the gateway of one process allows its peers."""
    return Limits(
        connections=settings.max_clients,
        pending=settings.max_unauthenticated,
        per_user=settings.max_clients_per_user,
        per_address=settings.max_clients_per_address,
        user_unread_bytes=settings.user_unread_bytes,
        pending_cpu=settings.unauthenticated_cpu,
        user_rate=settings.user_rate,
        user_cpu=settings.user_cpu,
        topics=settings.max_topics,
        message_bytes=settings.frame_bytes,
        deflate_bytes=settings.deflate_bytes,
    )


def room_of(settings: Settings) -> Room:
    """How many devices can be present in a topic."""
    return Room(settings.max_present, settings.max_present_per_user)


def door_of(settings: Settings) -> Door:
    """Who may come in."""
    return Door(
        origins=frozenset(settings.origins),
        admits_local_pages=settings.environment != "production",
        has_tls=settings.tls_certificate is not None and not settings.listen.is_unix,
        hosts=frozenset(settings.hosts),
        proxies=tuple(UNIX if proxy == UNIX else ip_network(proxy) for proxy in settings.trusted_proxies),
        proxy_header=settings.proxy_header,
    )


def connect_metrics(live: Live, gateway: Gateway, limits: Limits, keys: KeySource, readiness: Readiness) -> None:
    """Let the gauges read what the parts know at the moment, and count dropped lines."""
    count_dropped_lines(metrics.LOG_LINES_DROPPED.inc)
    metrics.CLIENTS_LIMIT.set(limits.max_clients())
    metrics.READY.set_function(lambda: not readiness.reasons())
    metrics.CLIENTS.set_function(lambda: gateway.clients)
    metrics.UNAUTHENTICATED.set_function(lambda: gateway.pending)
    metrics.SUBSCRIPTIONS.set_function(lambda: live.hub.subscriptions)
    metrics.RECENT_BYTES.set_function(lambda: live.log_cache.size)
    metrics.LOG_POSITION.set_function(lambda: live.position.seq)
    metrics.KEY_FETCH_DELAY.set_function(lambda: keys.age)
