"""Which packs this daemon serves, and so which changes of the log its clients may get, and in which topics."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.core.change import ALL_TOPICS, CONTENT, RESET_KINDS, Change, Kind, Seq, Topic, can_be_named
from daemon.core.hub import RightEnd
from daemon.core.ports import Batch
from daemon.packs import Pack


class Invalid(NamedTuple):
    """A change that must not be sent: its row model refused it, its topic cannot be followed, or it is unreadable."""

    change: Change
    pack: str
    reason: str


@dataclass(frozen=True)
class PackRouter:
    """The packs by the schema that each lives in. The log may hold changes of other schemas, which are ignored."""

    packs: Mapping[str, Pack] = field(default_factory=dict)

    def schema_of(self, topic: Topic) -> str | None:
        """The schema whose pack serves this topic; None if no pack does, or no client can name it."""
        if not can_be_named(topic):
            return None
        return next((schema for schema, pack in self.packs.items() if pack.serves(topic)), None)

    def validate(self, changes: Iterable[Change]) -> tuple[list[Change], list[Invalid]]:
        """What may be sent, and the changes that must not be.

        An `invalid` takes the place of each change that must not be sent, so that its topic is reset; nobody needs
        that in a topic that nobody can follow. Left out of both: changes of other schemas, and changes without
        content because their row was deleted since. A `limit` of the log stands for changes of any schema, and may be
        sent in every topic that is served.
        """
        sendable: list[Change] = []
        invalid: list[Invalid] = []
        topics: dict[tuple[str, Topic], str | None] = {}  # what is wrong with each
        for change in changes:
            pack, place = self.packs.get(change.schema), (change.schema, change.topic)
            if change.kind is Kind.LIMIT and (self._packs_reset_by(change) or self.schema_of(change.topic)):
                sendable.append(change)
                if pack and change.unreadable:
                    invalid.append(Invalid(change, pack.name, f"unreadable: {change.unreadable}"))
                continue
            if pack is None or (change.record is None and change.kind in CONTENT):
                continue
            if place not in topics:
                topics[place] = _problem_of_topic(pack, change.topic)
            is_wildcard = change.kind in RESET_KINDS and self._packs_reset_by(change)
            if (problem := topics[place]) and not is_wildcard:
                invalid.append(Invalid(change, pack.name, problem))
            elif problem := _problem_of_row(pack, change):
                invalid.append(Invalid(change, pack.name, problem))
                sendable.append(reset_for(change))
            else:
                sendable.append(change)
        return sendable, invalid

    def deliverable(self, batch: Batch) -> Sequence[Change]:
        """What of a batch may be sent. The pump reports the invalid changes when it reads them."""
        return batch if batch.validated else self.validate(batch)[0]

    def with_exact_numbers(self, change: Change) -> Change:
        """The change as clients get it that chose Numbers.STRING."""
        pack = self.packs.get(change.schema)
        return pack.with_exact_numbers(change) if pack is not None else change

    def ended_rights(self, changes: Sequence[Change]) -> list[RightEnd]:
        """The rights that end with these whole transactions, and where. Invalid changes end rights too.

        A right ends where the transaction begins that takes it away: who loses it gets nothing of that transaction.
        """
        ended: list[RightEnd] = []
        if not any(change.ends for change in changes):
            return ended
        begun: dict[str, Seq] = {}  # where each transaction begins
        for change in changes:
            begin = begun.setdefault(change.tx, change.seq)
            if change.ends and change.schema in self.packs:
                ended.append(RightEnd(begin, change.ends, self.packs[change.schema].serves))
        return ended

    def topics_to_reset(self, change: Change, topics: Collection[Topic]) -> Sequence[Topic]:
        """Those of `topics` that a change of one of RESET_KINDS resets; none for other changes."""
        if change.kind not in RESET_KINDS:
            return ()
        if change.topic in topics:
            return [change.topic]
        packs = self._packs_reset_by(change)
        return [topic for topic in topics if any(pack.serves(topic) for pack in packs)]

    def _packs_reset_by(self, change: Change) -> list[Pack]:
        """The packs whose topics are all reset by a change in a wildcard topic."""
        return [pack for pack in self.packs.values() if change.topic in (ALL_TOPICS, f"*{pack.name}")]

    def wildcard_topics(self, topics: Iterable[Topic]) -> set[Topic]:
        """The log topics in which changes stand that reset all topics of the packs that serve these topics."""
        return {Topic(f"*{pack.name}") for pack in self.packs.values() if any(pack.serves(topic) for topic in topics)}


def reset_for(change: Change) -> Change:
    """What is sent in place of a change that must not be."""
    return change._replace(kind=Kind.INVALID, key="{}", record=None, changed=(), actor=None, ends=None)


def _problem_of_topic(pack: Pack, topic: Topic) -> str | None:
    """Why no client can follow a topic of this pack; None if clients can."""
    if not can_be_named(topic):
        return "topic: cannot_be_named"
    return None if pack.serves(topic) else "topic: not_served"


def _problem_of_row(pack: Pack, change: Change) -> str | None:
    try:
        return pack.problem(change)
    except Exception as error:  # noqa: BLE001 - one change must not stop the others
        return f"record: {type(error).__name__}"
