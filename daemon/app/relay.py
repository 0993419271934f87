"""Composition of what connects nodes: the link of each, and what a member does for the gateways."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Final

from daemon.app.node import Node, process_name
from daemon.app.site import KEPT
from daemon.core.batch import Beat, LogBatch
from daemon.core.change import Change, Position
from daemon.core.errors import LogUnavailable
from daemon.core.ports import Age, PeopleStore
from daemon.delivery.snapshots import checked
from daemon.gateway.http import NOT_FOUND, Call, Handler, Page, Request, text_page
from daemon.gateway.identity import UserOf
from daemon.pages.kept import Kept, KeptUnavailable
from daemon.relay.link import Link, LinkOptions
from daemon.relay.pages import PAGE, PageAnswer, PageCall
from daemon.relay.port_questions import Ask
from daemon.relay.publisher import SIGNALS, NatsBroadcast, Publisher
from daemon.relay.service import MemberPorts, Service
from daemon.settings import Settings

MAX_AGE: Final = 1e6  # seconds: an age is infinite before the log was first read


def open_link(settings: Settings, name: str) -> Link:
    """The link of the node of this name, not connected yet. Raises BadNatsSettings."""
    urls = settings.nats_url.get_secret_value().split(",") if settings.nats_url else []
    return Link(
        LinkOptions(
            urls=tuple(url.strip() for url in urls),
            prefix=settings.nats_prefix,
            name=name,
            creds_file=settings.nats_creds_file,
            ca_file=settings.nats_ca_file,
            cert_file=settings.nats_cert_file,
            key_file=settings.nats_key_file,
        )
    )


def exchange_signals(
    link: Link, broadcast: NatsBroadcast, node: Node, may_receive: Callable[[], bool] = lambda: True
) -> None:
    """Let the clients of this node have the signals of those of other nodes in its epoch, and the other way round.

    Nodes before 0108 name no epoch. Their signals are received while `may_receive` says so.
    """

    def epoch() -> str:
        return node.live.position.epoch

    def receive(payload: bytes, sender: str) -> None:
        if sender == epoch() if sender else may_receive():
            node.sharing.signals.receive(payload.decode(errors="replace"))

    broadcast.epoch = epoch
    link.subscribe_with_epoch(SIGNALS, receive)


async def _answer(call: PageCall, handlers: Mapping[tuple[str, str], Handler]) -> PageAnswer:
    """The page of a member for a request that a gateway has let in."""
    handler = handlers.get((call.method, call.path))
    if handler is None:
        page = NOT_FOUND
    else:
        request = Request(call.method, call.path, call.query, "1.1", call.headers, 0, len(call.body))
        page = await handler(Call(request, call.body, call.is_local))
    return PageAnswer(page.status, page.content_type, page.headers, page.body)


def page_of_member(ask: Ask) -> Handler:
    """Answers requests with what a member answers."""

    async def handle(call: Call) -> Page:
        request = call.request
        asked = PageCall(
            request.method, request.path, request.query, request.headers, call.is_local, bytes(call.body)
        )
        try:
            return Page(*await _put(ask, asked))
        except LogUnavailable as error:
            return text_page(f"A member has to answer this, and none does: {error.reason}.", 503)

    return handle


async def read_kept(ask: Ask) -> Kept:
    """See ReadKept: what a member has read."""
    try:
        status, body, *_ = await _put(ask, PageCall(*KEPT, "", {}, False, b""))
    except LogUnavailable as error:
        raise KeptUnavailable(error.reason) from None
    if status != HTTPStatus.OK:
        raise KeptUnavailable(body.decode().strip())
    return Kept(*json.loads(body))


async def _put(ask: Ask, asked: PageCall) -> tuple[int, bytes, str, Mapping[str, str]]:
    answer = await PAGE.put(ask, asked)
    return answer.status, answer.body, answer.content_type, answer.headers


class MemberRelay:
    """What a member tells the gateways, and answers them."""

    def __init__(self, settings: Settings) -> None:
        self._name = process_name()
        self._by_topic = settings.nats_content == "topic"
        self.link = open_link(settings, self._name)
        self.broadcast = NatsBroadcast(self.link)
        self._publisher: Publisher | None = None

    def connect(
        self,
        node: Node,
        is_leading: Callable[[], bool],
        age: Age,
        people: Callable[[str], PeopleStore],
        user_of: UserOf | None,
        handlers: Mapping[tuple[str, str], Handler],
    ) -> None:
        """Publish what this node publishes while it leads, and answer with its ports, and with these handlers."""
        live, router, ports = node.live, node.router, node.ports

        def beat() -> Beat:
            age_now, contract = min(age(), MAX_AGE), node.own_tables.contract
            return Beat(*live.position, age_now, self._name, contract, live.floor, live.hub.has_tx)

        def batch_of(after: Position, changes: Sequence[Change]) -> LogBatch:
            return router.batch_of(after, changes)[0]

        self._publisher = publisher = Publisher(
            self.link, ports.log_reader, beat, is_leading, batch_of, by_topic=self._by_topic
        )  # fmt: skip
        live.on_batch, live.on_move, live.on_forget = publisher.publish, publisher.restart, publisher.forget
        service = Service(
            MemberPorts(
                position=lambda: live.position,
                wait_until_delivered=live.wait_until_delivered,
                log_reader=live.log_cache,
                deliverable=router.deliverable,
                batches=publisher.batches,
                contents=publisher.contents,
                grants=ports.grants,
                own_tables=ports.own_tables,
                rows=ports.rows,
                checked=lambda rows: checked(rows, router),
                columns=ports.columns,
                people=people,
                acks=ports.acks,
                signal_rights=ports.signal_rights,
                user_of=user_of,
                page=lambda call: _answer(call, handlers),
            )
        )
        self.link.answer(self._name, service.answer)
        exchange_signals(self.link, self.broadcast, node)

    def warnings(self) -> list[str]:
        """What an operator should know: members serve their own clients without NATS."""
        return [f"gateways hear nothing of this member ({self.link.failure})"] if self.link.failure else []

    async def run(self) -> None:
        """Connect, and beat, until cancelled. Raises NatsUnavailable."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.link.run())
            if self._publisher is not None:
                group.create_task(self._publisher.run())
