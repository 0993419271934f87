"""Feeds that each lack one of the safeguards of a gateway: histories of several kinds have to find them."""

from collections.abc import Sequence

from daemon.core.batch import NONE_ABSENT, LogBatch, concerning
from daemon.delivery.feed import Feed


class NoPrev(Feed):
    """A batch is published whatever it continues from."""

    def _fits(self, batch: LogBatch) -> bool:
        after = min(batch.after, self._live.position.seq)
        return super()._fits(batch._replace(after=after, absent=NONE_ABSENT)) and not self._missing(batch)


class NoFill(Feed):
    """What is missing before a batch is not asked for."""

    async def _publish_queued(self) -> None:
        if self._queue and self._queue[0].after > self._live.position.seq:
            self._queue[0] = self._queue[0]._replace(after=self._live.position.seq)
        await super()._publish_queued()


class ReadOnArrival(Feed):
    """Changes that nobody follows when they arrive are left unread, although somebody may once they are published."""

    def receive(self, batch: LogBatch | None) -> None:
        super().receive(batch and batch._replace(changes=concerning(batch.changes, self._live.hub.topics)))


class NoEnds(Feed):
    """Ends of rights are not passed on."""

    def _publish(self, batch: LogBatch) -> None:
        super()._publish(batch._replace(ends=()))


class NoGone(Feed):
    """Deleted rows are not passed on."""

    def _publish(self, batch: LogBatch) -> None:
        super()._publish(batch._replace(gone=()))


class NoJumpCheck(Feed):
    """Nobody is asked whether the position has survived a new term."""

    async def _take(self, batch: LogBatch) -> None:
        await super()._take(batch._replace(jumps=()))


class NoMissing(Feed):
    """A batch is published whatever is missing of its contents."""

    def _missing(self, batch: LogBatch) -> Sequence[int]:
        return ()


class WantedSeenOnce(Feed):
    """After an answer, nobody looks whether more is wanted by then."""

    _answered: LogBatch | None = None

    def _missing(self, batch: LogBatch) -> Sequence[int]:
        return () if batch is self._answered else super()._missing(batch)

    async def _fetch(self, batch: LogBatch, missing: Sequence[int]) -> bool:
        is_answered = await super()._fetch(batch, missing)
        self._answered = batch if is_answered else None
        return is_answered


class NoLingerRule(Feed):
    """A topic that only lingers stays wanted, although its contents are missing."""

    def _missing(self, batch: LogBatch) -> Sequence[int]:
        lingering = dict.fromkeys(self._interest._lingering, ())
        return self._interest.missing(batch.absent, {**lingering, **self._at_hand.of(batch)})
