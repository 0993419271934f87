"""Composition of a gateway: it serves clients like a daemon, and knows the database through members, over NATS."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from daemon import metrics
from daemon.app.node import (
    Node,
    Ports,
    build_gateway,
    build_node,
    client_context,
    connect_metrics,
    door_setter,
    gateway_limits,
    process_name,
    schema_functions,
)
from daemon.app.relay import exchange_signals, open_link, page_of_member, read_kept
from daemon.app.site import console_options, site
from daemon.core.batch import FRESH
from daemon.core.epochs import Epochs
from daemon.core.errors import RowcastError
from daemon.delivery.contents import Interest
from daemon.delivery.feed import Feed
from daemon.delivery.pack_router import PackRouter
from daemon.gateway.auth import Authenticator
from daemon.gateway.identity import Identity
from daemon.gateway.key_source import KeySource
from daemon.gateway.server import Gateway
from daemon.gateway.tls import Tls
from daemon.health import Check, Readiness
from daemon.logs import get_logger
from daemon.packs import by_schema
from daemon.pages.console import Console, Lag
from daemon.relay import codec
from daemon.relay.codec import Pull
from daemon.relay.contents import ContentSubscriptions
from daemon.relay.errors import BadMessage
from daemon.relay.link import Link
from daemon.relay.port_questions import TIMEOUTS, Ask
from daemon.relay.publisher import BEAT, LOG, NatsBroadcast
from daemon.relay.questions import MemberClient
from daemon.relay.remote import (
    RemoteAcks,
    RemoteColumns,
    RemoteGrants,
    RemoteLogReader,
    RemoteOwnTables,
    RemotePeople,
    RemoteRows,
    RemoteSignalRights,
    RemoteUsers,
)
from daemon.settings import Settings

log = get_logger()

NO_BEATS: Final = "no member sends beats: see that members run, with the same ROWCAST_NATS_PREFIX"
CHECK_INTERVAL: Final = 0.5  # seconds
NOTED: Final = 5.0  # seconds that a message which cannot be read counts: other members go on beating meanwhile


@dataclass(frozen=True)
class GatewayParts:
    """The parts of a gateway, connected but not started."""

    link: Link
    members: "Members"
    contents: ContentSubscriptions
    feed: Feed
    node: Node
    gateway: Gateway
    readiness: Readiness
    keys: KeySource
    use_door: Callable[[Settings], None]

    def why_waiting(self) -> str:
        """Why this gateway cannot begin, in one line."""
        reasons = self.link.failure, *self.members.problems(), self.feed.failure, NO_BEATS
        return next(reason for reason in reasons if reason)


MIXED_PROBLEM: Final = (
    "members of different databases send beats: give each database a ROWCAST_NATS_PREFIX of its own"
)


@dataclass
class Members:
    """What a gateway hears of members: it passes on batches and beats, and notes which of them it cannot read."""

    link: Link
    client: MemberClient
    feed: Feed
    interest: Interest
    _problem: str = field(default="", init=False)
    _noted_at: float = field(default=float("-inf"), init=False)
    _mixed_logged: bool = field(default=False, init=False)
    _beat_at: float | None = field(default=None, init=False)  # None if none has arrived since the last reconnect

    def receive_batch(self, payload: bytes) -> None:
        """A message about a batch has arrived."""
        try:
            batch = codec.MANIFEST.decode(payload)
        except BadMessage as error:
            self._note(error)
            return
        if not isinstance(batch, Pull):
            self.feed.receive(batch)
        elif self.feed.epochs.follows(batch.epoch):
            self.feed.receive(None)

    def receive_contents(self, payload: bytes) -> None:
        """Contents of a batch have arrived."""
        metrics.RELAY_CONTENTS.labels(result="arrived").inc()
        try:
            contents = codec.CONTENTS.decode(payload)
        except BadMessage as error:
            self._note(error)
            return
        self.feed.receive_contents(contents)

    def receive_beat(self, payload: bytes) -> None:
        """A beat has arrived."""
        try:
            beat = codec.BEAT.decode(payload)
        except BadMessage as error:
            self._note(error)
            return
        self._beat_at = time.monotonic()
        self.client.record_beat(beat.member)
        self.feed.record_beat(beat)

    async def run(self) -> None:
        """Look after what beats show, until cancelled.

        A connection is given up over which beats have come and come no more: something in between may have forgotten
        it. If members have really gone, one attempt is enough.
        """
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            self.interest.sweep()
            self._look_at_epochs()
            is_silent = self._beat_at is not None and time.monotonic() - self._beat_at > FRESH
            if is_silent and self.link.connected.is_set():
                self._beat_at = None
                await self.link.reconnect()

    def problems(self) -> Iterable[str]:
        """Why this gateway is not ready, as far as messages are concerned."""
        unreadable = [self._problem] if time.monotonic() - self._noted_at < NOTED else []
        epochs = self.feed.epochs
        return [*unreadable, *([MIXED_PROBLEM] if epochs.is_mixed or epochs.cannot_begin else [])]

    def _look_at_epochs(self) -> None:
        self.feed.epochs.decide(time.monotonic())
        if self.feed.epochs.is_mixed and not self._mixed_logged:
            log.error("relay_mixed", reason=MIXED_PROBLEM)
        self._mixed_logged = self.feed.epochs.is_mixed

    def _note(self, error: RowcastError) -> None:
        metrics.RELAY_BATCHES.labels(result="unreadable").inc()
        if str(error) not in self.problems():
            log.error("relay_unreadable", reason=str(error))
        self._problem, self._noted_at = str(error), time.monotonic()


def build_gateway_parts(
    settings: Settings,
    authenticator: Authenticator,
    keys: KeySource,
    tls: Tls,
    *,
    has_users: bool,
    samples: Sequence[tuple[str, str]],
    is_open: bool,
) -> GatewayParts:
    """Make every part of a gateway and connect them; nothing runs yet. Raises BadNatsSettings.

    A member answers requests with the methods and paths `samples`. With `is_open`, every listener has all pages.
    """
    process = process_name()
    link = open_link(settings, process)
    epochs = Epochs()
    client = MemberClient(link.ask, TIMEOUTS, epochs.has)
    router = PackRouter(by_schema(settings.schemas))
    reader = RemoteLogReader(client.ask, lambda: node.live.position)
    interest = Interest()
    broadcast = NatsBroadcast(link)
    node = build_node(settings, router, _ports(process, client.ask, router, reader, broadcast), interest)
    feed = Feed(reader, node.live, node.own_tables.refresh, interest, epochs)
    members = Members(link, client, feed, interest)
    contents = ContentSubscriptions(link, interest.is_wanted, members.receive_contents)
    interest.on_change = contents.update
    link.subscribe(LOG, members.receive_batch)
    link.subscribe(BEAT, members.receive_beat)
    exchange_signals(link, broadcast, node, lambda: not epochs.is_mixed)
    identity = Identity(authenticator, keys, RemoteUsers(client.ask).user_of if has_users else None)
    link_problems: Check = lambda: [link.failure] if link.failure else []  # noqa: E731
    warnings: list[Check] = [keys.warnings, tls.warnings, node.refusals.warnings]
    readiness = Readiness(link_problems, members.problems, feed.problems, warnings=warnings)
    context = client_context(
        settings,
        node,
        identity,
        feed.readable.wait,
        lambda: feed.age,
        lambda: feed.contract or node.own_tables.contract,
    )
    console = Console(
        node.live,
        lambda: Lag(feed.age if feed.age > FRESH else 0.0, feed.age),
        readiness,
        lambda: read_kept(client.ask),
        page_of_member(client.ask),
        console_options(settings, identity, has_samples=bool(samples)),
    )
    handlers = console.handlers() | dict.fromkeys(samples, page_of_member(client.ask))
    pages = site(readiness, lambda: router.all_packs, handlers)
    console.gateway = gateway = build_gateway(settings, context.open_client, pages, tls, is_open=is_open)
    connect_metrics(node.live, gateway, gateway_limits(settings), keys, readiness)
    metrics.BEAT_AGE.set_function(lambda: feed.age)
    metrics.GATEWAY.set(1)
    metrics.MEMBERS.set_function(lambda: len(client.fresh))
    metrics.RELAY_CONNECTED.set_function(link.connected.is_set)
    return GatewayParts(link, members, contents, feed, node, gateway, readiness, keys, door_setter(gateway, context))


def _ports(process: str, ask: Ask, router: PackRouter, reader: RemoteLogReader, broadcast: NatsBroadcast) -> Ports:
    may_signal = schema_functions(router.packs, lambda pack: pack.may_signal)
    return Ports(
        process=process,
        log_reader=reader,
        grants=RemoteGrants(ask, reader.epoch, router.own_table_of),
        own_tables=RemoteOwnTables(ask),
        rows=RemoteRows(ask),
        columns=RemoteColumns(ask),
        people=RemotePeople(ask, process),
        acks=RemoteAcks(ask),
        signal_rights=RemoteSignalRights(ask, lambda topic: router.schema_of(topic) in may_signal),
        broadcast=broadcast,
    )
