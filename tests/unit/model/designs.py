"""The real design, and mutants of it that each make one decision wrong."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from daemon.core.batch import Beat, Contents, EndedRight, LogBatch
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.hub import Hub, RightsQuery
from daemon.core.ports import LogReader
from daemon.core.session import Follow
from daemon.delivery.client import Client
from daemon.delivery.contents import AtHand
from daemon.delivery.feed import Feed
from daemon.delivery.pack_router import Invalid, PackRouter
from daemon.delivery.pump import Pump
from tests.support.feeds import NoEnds, NoFill, NoJumpCheck, NoMissing, NoPrev, ReadOnArrival
from tests.unit.model.postgres import Entry, Event, SelectNew, Snapshot, by_snapshot_difference


class ModelHub(Hub):
    """The hub, which also remembers the position it left at its last discontinuity."""

    position_before_move: Position | None = None

    def move(self, position: Position, reason: str) -> None:
        self.position_before_move = self.position
        super().move(position, reason)


@dataclass(frozen=True)
class Design:
    """The parts of a daemon, and the rules by which Postgres numbers and hides content."""

    name: str = "the design"
    select_new: SelectNew = by_snapshot_difference
    term_gap: int = 1000
    hides_deleted: bool = True
    waits_until_delivered: bool = True
    hub: type[ModelHub] = ModelHub
    router: type[PackRouter] = PackRouter
    client: type[Client] = Client
    pump: type[Pump] = Pump
    feed: type[Feed] = Feed
    by_topic: bool = False  # how contents travel to gateways


def after_last_id(visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]) -> list[Event]:
    """Events with a greater id than every numbered event."""
    cursor = max((entry.event.id for entry in log), default=0)
    return sorted((event for event in visible if event.id > cursor), key=lambda event: event.id)


def below_xmin(visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]) -> list[Event]:
    """Events of transactions older than every running one, by transaction id."""
    new = [event for event in visible if last.xmin <= event.xid < now.xmin]
    return sorted(new, key=lambda event: (event.xid, event.topic, event.id))


def by_event_id(visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]) -> list[Event]:
    """The right events, ordered by their ids: transactions interleave."""
    return sorted(by_snapshot_difference(visible, last, now, log), key=lambda event: event.id)


class IgnoresRevocations(PackRouter):
    """A right, once looked up, never ends."""

    def ended_rights(self, changes: Iterable[Change]) -> list[EndedRight]:
        return []


class LeavesOutInvalidChanges(PackRouter):
    """Nothing is sent in the place of a change that its row model refuses."""

    def validate(self, changes: Iterable[Change]) -> tuple[list[Change], list[Invalid]]:
        sendable, invalid = super().validate(changes)
        return [change for change in sendable if change.kind is not Kind.INVALID], invalid


class MissesRevocationsDuringLookup(ModelHub):
    """A revocation during the lookup of a right is missed."""

    def end_rights_query(self, query: RightsQuery) -> None:
        super().end_rights_query(query)
        query.revoked_at = Seq(0)


class ResumesFromHead(Client):
    """A client that resumes receives only later changes."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        head = Position(since.epoch, self._context.hub.position.seq)
        await super()._resume(follow, max(since, head), start)


class RepeatsLastChange(Client):
    """A client that resumes receives its last change again."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        await super()._resume(follow, since, start)
        if self._replay is not None and follow.topic in self._replay:
            self._replay.add(follow.topic, Seq(max(self._replay._places[follow.topic] - 1, 0)))


class IgnoresSeen(Client):
    """`seen` in `hello`, how far topics are beyond the position, is ignored."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        self._session.seen = None
        await super()._resume(follow, since, start)


class ReplaysFromBeforeRight(Client):
    """A replay also contains changes from before the right began."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        await super()._resume(follow, since, Seq(0))


class KeepsOldRights(Client):
    """Rights looked up before a discontinuity stay valid after it."""

    __slots__ = ()

    async def readable_topics(self) -> dict[Topic, Seq]:
        return {}


class IgnoresGaps(Pump):
    """After a gap in the numbers, the pump does not check whether delivered changes were lost."""

    async def _check_gap(self, first: Seq) -> None:
        pass


class DeliversEveryOffer(Pump):
    """Offered changes are delivered even if they do not follow the last delivered one."""

    def offer(self, after: Seq, changes: Sequence[Change]) -> None:
        if self.started.is_set():
            self._publish(changes, *self._router.batch_of(self._live.position, changes))


class NoFloor(Feed):
    """What is past retention stays in memory."""

    def record_beat(self, beat: Beat) -> None:
        super().record_beat(beat._replace(floor=Seq(0)))


class _ContentsByEnd(AtHand):
    def put(self, batch: LogBatch | Contents, found: Mapping[int, Collection[Change]]) -> None:
        super().put(batch._replace(after=Seq(0)), found)

    def of(self, batch: LogBatch) -> Mapping[int, Collection[Change]]:
        return super().of(batch._replace(after=Seq(0)))


class KnowsContentsByTheirEnd(Feed):
    """Contents are known by the end of their batch: two leaders may cut different batches that end there."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._at_hand = _ContentsByEnd()


class TrustsPositions(Client):
    """The log is replayed from any position that a client sends, without a check."""

    __slots__ = ()

    async def _reset_reason(self, since: Position) -> str | None:
        context = self._context
        self._context = replace(context, log_reader=_TrustingLogReader(context.log_reader))
        try:
            return await super()._reset_reason(since)
        finally:
            self._context = context


class _TrustingLogReader:
    def __init__(self, log_reader: LogReader) -> None:
        self._log = log_reader
        self.head, self.read, self.read_topics = log_reader.head, log_reader.read, log_reader.read_topics

    async def continuity(self, since: Position) -> str | None:
        return None


DESIGN = Design()
SEEN_IGNORED = Design("seen in hello is ignored", client=IgnoresSeen)
"""A mutant with a known history that shows the violation; a search would take long."""

MUTANTS = {
    mutant.name: (mutant, invariants)
    for mutant, invariants in (
        (Design("numbering by a cursor on event ids", select_new=after_last_id), {"I7"}),
        (Design("numbering below the horizon of xmin", select_new=below_xmin), {"I2"}),
        (Design("numbering in the order of event ids", select_new=by_event_id), {"atomic"}),
        (Design("revocations are ignored", router=IgnoresRevocations), {"I4"}),
        (Design("invalid changes are left out", router=LeavesOutInvalidChanges), {"I7"}),
        (Design("revocations during a lookup are missed", hub=MissesRevocationsDuringLookup), {"I4"}),
        (Design("replays from before the right began", client=ReplaysFromBeforeRight), {"I4"}),
        (Design("rights survive a discontinuity", client=KeepsOldRights), {"I4", "I7"}),
        (Design("resuming from the head", client=ResumesFromHead), {"I7"}),
        (Design("resuming with the last change again", client=RepeatsLastChange), {"I1"}),
        (Design("numbers are reused", term_gap=0), {"I1", "I5", "I7"}),
        (Design("content of deleted rows stays", hides_deleted=False), {"I4"}),
        (Design("gaps between terms are not checked", pump=IgnoresGaps), {"I1", "I5", "I7", "atomic"}),
        (Design("every offer is delivered", pump=DeliversEveryOffer), {"I1", "I7"}),
        (Design("positions are not checked", client=TrustsPositions), {"I1", "I5", "I7", "atomic"}),
        (Design("a lagging daemon is not waited for", waits_until_delivered=False), {"I1", "I7"}),
    )
}

BY_TOPIC = Design("contents by topic", by_topic=True)

MUTANTS_OF_GATEWAYS = {
    "no_prev": (Design(feed=NoPrev), {"I1", "I2", "I4", "I7", "atomic"}, 1),
    "no_fill": (Design(feed=NoFill), {"I1", "I2", "I4", "I7", "atomic"}, 0),
    "no_ends": (Design(feed=NoEnds), {"I4"}, 3),
    "no_prev, by topic": (Design(feed=NoPrev, by_topic=True), {"I1", "I2", "I4", "I7", "atomic"}, 0),
    "no_jump_check": (Design(feed=NoJumpCheck), {"I1", "I5", "I7", "atomic"}, 3),
    "read_on_arrival": (Design(feed=ReadOnArrival), {"I7"}, 0),
    "no_missing": (Design(feed=NoMissing, by_topic=True), {"I7"}, 2),
    "no_ends, by topic": (Design(feed=NoEnds, by_topic=True), {"I4"}, 4),
}
"""Each with the invariants that it endangers, and the seed of a search that finds a history which violates one."""
