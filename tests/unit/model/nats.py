"""A network between members and gateways that loses, repeats, delays and reorders messages, and parts nodes.

What is published and answered is what the real Publisher and Service say; messages go through the real codec. The
fate of a message is that of its gateway at the time: it is told, late, lost, or has to be asked for.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from daemon.core.batch import Beat, Contents, LogBatch, hash_of
from daemon.core.change import Change, Position
from daemon.core.ports import Grants, LogReader
from daemon.delivery.live import Live
from daemon.relay import codec
from daemon.relay.codec import Pull
from daemon.relay.publisher import BEAT, LOG, Publisher
from daemon.relay.service import MemberPorts, Service
from tests.support.relay import Absent

if TYPE_CHECKING:
    from tests.unit.model.world import Gateway, Node

Message = LogBatch | Pull | Beat | Contents

ASKING: ContextVar["Node | None"] = ContextVar("ASKING", default=None)
"""The gateway whose question is being answered."""


class Nats:
    """The network. `call_soon` lets something happen after all that has begun already."""

    def __init__(self, gateways: "Sequence[Gateway]", call_soon: Callable[..., object]) -> None:
        self._gateways = gateways
        self._call_soon = call_soon

    def publish(self, subject: str, payload: bytes) -> None:
        """A member has published this."""
        message = _message(subject, payload)
        for gateway in self._gateways:
            self._send(gateway, message)

    def _send(self, gateway: "Gateway", message: Message) -> None:
        if isinstance(message, Contents) and not gateway.interest.is_wanted(hash_of(message.changes[0].topic)):
            return  # it has not subscribed, or that has not reached every server yet
        match gateway.fate:
            case "told":
                self._call_soon(gateway.receive, message)
            case "late":
                gateway.arriving.append(message)
            case "pull" if isinstance(message, LogBatch):
                self._call_soon(gateway.receive, Pull(message.epoch, message.after, message.upto))


def _message(subject: str, payload: bytes) -> Message:
    if subject == BEAT:
        return codec.BEAT.decode(payload)
    return codec.MANIFEST.decode(payload) if subject == LOG else codec.CONTENTS.decode(payload)


class _Line:
    """The link of a member. While it is `cut_off`, nothing that it publishes reaches anybody."""

    def __init__(self, nats: Nats) -> None:
        self.connected = asyncio.Event()
        self.cut_off = False
        self._nats = nats

    def publish(self, subject: str, payload: bytes) -> bool:
        if not self.cut_off:
            self._nats.publish(subject, payload)
        return not self.cut_off

    def publish_all(self, messages: Iterable[tuple[str, bytes]]) -> bool:
        return all(self.publish(subject, payload) for subject, payload in messages)


class Relay:
    """What a member does for gateways. `step` is the step of the world; `reached_at` that of the hub's last move."""

    def __init__(
        self,
        nats: Nats,
        live: Live,
        log_reader: LogReader,
        grants: Grants,
        step: Callable[[], int],
        *,
        by_topic: bool,
    ) -> None:
        self.line = _Line(nats)
        self.is_leading = False
        self.reached_at = 0
        self._live, self._step = live, step

        def batch_of(after: Position, changes: Sequence[Change]) -> LogBatch:
            return live.router.batch_of(after, changes)[0]

        self._publisher = Publisher(
            self.line,  # type: ignore[arg-type]
            log_reader,
            self.message,
            lambda: self.is_leading,
            batch_of,
            by_topic=by_topic,
        )
        live.on_batch, live.on_move, live.on_forget = self._on_batch, self._on_move, self._publisher.forget
        ports: dict[str, Any] = {field.name: Absent() for field in fields(MemberPorts)}
        ports |= {
            "position": lambda: live.position,
            "wait_until_delivered": live.wait_until_delivered,
            "log_reader": live.log_cache,
            "deliverable": live.router.deliverable,
            "batches": self._publisher.batches,
            "contents": self._publisher.contents,
            "grants": grants,
        }
        self.service = Service(MemberPorts(**ports))

    def beat(self) -> None:
        """Tell the gateways how far this member is."""
        self.line.publish(BEAT, codec.BEAT.encode(self.message()))

    def message(self) -> Beat:
        """How far this member is."""
        return Beat(*self._live.position, 0.0, "member", "model", self._live.floor)

    def _on_batch(self, batch: LogBatch) -> None:
        self.reached_at = self._step()
        self._publisher.publish(batch)

    def _on_move(self, position: Position) -> None:
        self.reached_at = self._step()
        self._publisher.restart(position)
