"""The design as it is, and mutants of it: each decides one thing otherwise."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from daemon.core.change import Change, Position, Seq, Topic
from daemon.core.hub import Hub, RightEnd, RightsQuery
from daemon.core.ports import LogReader
from daemon.core.session import Follow
from daemon.delivery.client import Client
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.pump import Pump
from tests.unit.model.postgres import Entry, Event, Fresh, Snapshot, by_snapshot_difference


class ModelHub(Hub):
    """The hub, which also remembers where it was when it last had to move."""

    left: Position | None = None

    def move(self, position: Position, reason: str) -> None:
        self.left = self.position
        super().move(position, reason)


@dataclass(frozen=True)
class Design:
    """What a daemon is made of, and by which rule Postgres numbers."""

    name: str = "the design"
    fresh: Fresh = by_snapshot_difference
    far: int = 1000
    purges: bool = True
    waits_for_place: bool = True
    hub: type[ModelHub] = ModelHub
    router: type[PackRouter] = PackRouter
    client: type[Client] = Client
    pump: type[Pump] = Pump


def past_a_cursor(visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]) -> list[Event]:
    """What has a greater id than everything that was numbered."""
    cursor = max((entry.event.id for entry in log), default=0)
    return sorted((event for event in visible if event.id > cursor), key=lambda event: event.id)


def below_a_horizon(visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]) -> list[Event]:
    """What older transactions than every running one have written, by transaction id."""
    fresh = [event for event in visible if last.xmin <= event.xid < now.xmin]
    return sorted(fresh, key=lambda event: (event.xid, event.topic, event.id))


def by_event_id(visible: Iterable[Event], last: Snapshot, now: Snapshot, log: Sequence[Entry]) -> list[Event]:
    """The true choice, in the order of ids: transactions are torn apart."""
    return sorted(by_snapshot_difference(visible, last, now, log), key=lambda event: event.id)


class RightsAreForEver(PackRouter):
    """Who once was allowed to subscribe hears everything."""

    def ended_rights(self, changes: Iterable[Change]) -> list[RightEnd]:
        return []


class MissesRevocations(ModelHub):
    """A right that ends while it is looked up is missed."""

    def end_rights_query(self, query: RightsQuery) -> None:
        super().end_rights_query(query)
        query.revoked_at = Seq(0)


class FromTheHead(Client):
    """Whoever comes back is told only what happens from now on."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        head = Position(since.epoch, self._context.hub.position.seq)
        await super()._resume(follow, max(since, head), start)


class FromOneBefore(Client):
    """Whoever comes back is told the last change again."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        await super()._resume(follow, since, start)
        if self._replay is not None and follow.topic in self._replay:
            self._replay.add(follow.topic, Seq(max(self._replay._places[follow.topic] - 1, 0)))


class SeesNothing(Client):
    """How far a topic has gone beyond the position does not count."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        self._session.seen = None
        await super()._resume(follow, since, start)


class FromBeforeTheRight(Client):
    """Whoever has the right now is told all that there ever was."""

    __slots__ = ()

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        await super()._resume(follow, since, Seq(0))


class NeverAsksAgain(Client):
    """Behind a break rights count that were looked up before it."""

    __slots__ = ()

    async def readable_topics(self) -> dict[Topic, Seq]:
        return {}


class NeverLooksBack(Pump):
    """A jump of the numbers is taken for granted: nothing that was delivered can have been lost."""

    async def _check_gap(self, first: Seq) -> None:
        pass


class TakesWhatComes(Pump):
    """What the leader hands over is delivered, whatever was delivered before."""

    def offer(self, after: Seq, changes: Sequence[Change]) -> None:
        if self.started.is_set():
            self._publish(changes)


class BelievesTheClient(Client):
    """A position is taken as it comes: whatever it says, the log is replayed behind it."""

    __slots__ = ()

    async def _reset_reason(self, since: Position) -> str | None:
        context = self._context
        self._context = replace(context, log_reader=_Trusting(context.log_reader))
        try:
            return await super()._reset_reason(since)
        finally:
            self._context = context


class _Trusting:
    def __init__(self, log_reader: LogReader) -> None:
        self._log = log_reader
        self.head, self.read, self.read_topics = log_reader.head, log_reader.read, log_reader.read_topics

    async def continuity(self, since: Position) -> str | None:
        return None


DESIGN = Design()
BLIND = Design("what was seen is not told", client=SeesNothing)
"""A mutant for which one life is known; a search would be long."""

MUTANTS = {
    mutant.name: (mutant, invariants)
    for mutant, invariants in (
        (Design("a naive cursor", fresh=past_a_cursor), {"I7"}),
        (Design("the horizon of xmin", fresh=below_a_horizon), {"I2"}),
        (Design("the order of event ids", fresh=by_event_id), {"whole"}),
        (Design("rights are looked up once", router=RightsAreForEver), {"I4"}),
        (Design("rights that end while they are looked up", hub=MissesRevocations), {"I4"}),
        (Design("rights reach back to the beginning", client=FromBeforeTheRight), {"I4"}),
        (Design("rights outlive a break", client=NeverAsksAgain), {"I4", "I7"}),
        (Design("resuming from the head", client=FromTheHead), {"I7"}),
        (Design("resuming from one before", client=FromOneBefore), {"I1"}),
        (Design("numbers are used again", far=0), {"I1", "I5", "I7"}),
        (Design("a deleted row's content stays", purges=False), {"I4"}),
        (Design("a new term is taken for granted", pump=NeverLooksBack), {"I1", "I5", "I7", "whole"}),
        (Design("what is handed over is not compared", pump=TakesWhatComes), {"I1", "I7"}),
        (Design("a position is believed", client=BelievesTheClient), {"I1", "I5", "I7", "whole"}),
        (Design("a daemon that lags is not waited for", waits_for_place=False), {"I1", "I7"}),
    )
}
