"""The live end of the log in this process: what has been published, to whom, and who waits for it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from operator import itemgetter

from daemon import metrics
from daemon.core import wire
from daemon.core.batch import LogBatch, concerning, heads_of
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.hub import Hub
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pack_router import PackRouter, reset_for
from daemon.logs import get_logger

log = get_logger()

OnPublish = Callable[[Sequence[Change], int], None]
"""Gets changes that have just been published, and how many frames with them were written to clients."""


class Live:
    """Moves the hub and the cache of the log in one step, so that they always agree.

    Whoever knows what comes next in the log calls `publish` and `move`: the pump of a daemon with a database, the
    feed of a gateway without one. `on_batch` gets each batch that has been published, `on_move` each position that
    does not follow, and `on_forget` how far the log is past retention.
    """

    def __init__(self, hub: Hub, router: PackRouter, log_cache: LogCache) -> None:
        self.hub = hub
        self.router = router
        self.on_publish: OnPublish | None = None  # while somebody looks at the console
        self.on_batch: Callable[[LogBatch], None] | None = None
        self.on_move: Callable[[Position], None] | None = None
        self.on_forget: Callable[[Seq], None] | None = None
        self.floor = Seq(0)  # up to here, the log is past retention
        self.moved_at = float("-inf")  # when the hub last moved
        self.log_cache = log_cache
        self._deliveries: list[asyncio.Future[None]] = []  # done when the hub has moved

    @property
    def position(self) -> Position:
        """How far the hub has come."""
        return self.hub.position

    def wants(self, change: Change) -> bool:
        """Whether the record of this change is wanted here, large as it is: for clients, gateways or validation."""
        is_sent = self.on_batch is not None or change.topic in self.hub.topics
        return is_sent or self.router.needs_record(change)

    async def wait_until_delivered(self, seq: Seq) -> None:
        """Wait until everything up to this position has been delivered to the live followers.

        Also returns once the hub is in another epoch, whose numbers may be lower: a discontinuity, then.
        """
        epoch = self.hub.position.epoch
        while self.hub.position.seq < seq and epoch in {"", self.hub.position.epoch}:
            delivery = asyncio.get_running_loop().create_future()
            self._deliveries.append(delivery)
            await delivery

    def move(self, position: Position, reason: str) -> None:
        """Continue from a position that does not follow the last one; `reason` is that of the resets."""
        self.moved_at = time.monotonic()
        self.floor = Seq(0)  # of this epoch, it is not known yet
        self.hub.move(position, reason)
        self.log_cache.restart(position)
        if self.on_move is not None:
            self.on_move(position)
        self._wake()

    def forget(self, floor: Seq) -> None:
        """Everything up to here is past retention."""
        self.floor = floor
        self.log_cache.forget(floor)
        if self.on_forget is not None:
            self.on_forget(floor)

    def publish(self, batch: LogBatch) -> list[Change]:
        """Publish a batch that follows the hub's position.

        Returns the changes that no frame can hold: their topics get a reset instead.
        """
        self.moved_at = time.monotonic()
        unsendable: list[Change] = []
        try:
            built, delivered = self._deliver(batch)
        except Exception:
            log.exception("internal_error")
            batch, unsendable = _without_unsendable(batch)
            built, delivered = self._deliver(batch)
        if self.on_batch is not None:  # first, since other nodes wait for it
            self.on_batch(batch)
        self.log_cache.add(batch)
        if self.on_publish is not None:
            self.on_publish(batch.changes, delivered)
        metrics.FRAMES.inc(built)
        metrics.DELIVERIES.inc(delivered)
        if delivered and batch.changes:
            self._observe_age(batch.changes[-1])
        _count(batch.changes)
        self._wake()
        return unsendable

    def _deliver(self, batch: LogBatch) -> tuple[int, int]:
        return self.hub.publish(
            concerning(batch.changes, self.hub.topics),
            Position(batch.epoch, batch.upto),
            self._topics_to_reset,
            self.router.right_ends(batch.ends),
        )

    def _topics_to_reset(self, change: Change) -> Sequence[Topic]:
        return self.router.topics_to_reset(change, self.hub.topics)

    def _wake(self) -> None:
        deliveries, self._deliveries = self._deliveries, []
        for delivery in deliveries:
            if not delivery.done():
                delivery.set_result(None)

    def _observe_age(self, change: Change) -> None:
        """Observe the time since the statement that wrote this change, by the clocks of both machines."""
        pack = self.router.pack_of(change)
        if pack is not None and not pack.is_internal:
            with suppress(ValueError):
                written = datetime.fromisoformat(change.at).timestamp()
                metrics.DELIVERY_SECONDS.observe(max(0.0, time.time() - written))


def _without_unsendable(batch: LogBatch) -> tuple[LogBatch, list[Change]]:
    """The same batch, with a reset for each change that no frame can hold; for all if each of them fits into one."""
    unsendable = [change for change in batch.changes if not _is_sendable(change)] or list(batch.changes)
    replaced = {change.seq for change in unsendable}
    changes = [reset_for(change) if change.seq in replaced else change for change in batch.changes]
    return batch._replace(changes=changes), unsendable


def _is_sendable(change: Change) -> bool:
    try:
        wire.changes(change.topic, Position("", change.seq), [change])
    except Exception:  # noqa: BLE001 - whatever the reason, one change must not stop the others
        return False
    return True


_KIND_AND_TABLE = itemgetter(*map(Change._fields.index, ("kind", "schema", "table")))  # by name it takes longer


def _count(changes: Sequence[Change]) -> None:
    """Count what was published, and log what an operator should see."""
    has_lost = False
    for (kind, schema, table), count in Counter(map(_KIND_AND_TABLE, heads_of(changes))).items():
        metrics.CHANGES.labels(kind=kind.value).inc(count)
        metrics.CAPTURED.labels(table=f"{schema}.{table}").inc(count)
        has_lost |= kind is Kind.LOST
    for change in changes if has_lost else ():
        if change.kind is Kind.LOST and change.actor is None:  # else somebody asked for the reset
            log.error("trigger_error", seq=change.seq, table=change.table)
