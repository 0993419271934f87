"""Which packs this daemon serves, and so which changes of the log its clients may get, and in which topics."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.core.change import ALL_TOPICS, CONTENT, RESET_KINDS, Change, Kind, Topic
from daemon.core.hub import RightEnd
from daemon.core.ports import Batch
from daemon.packs import Pack


class Invalid(NamedTuple):
    """A change that its row model refused."""

    change: Change
    pack: str
    reason: str


@dataclass(frozen=True)
class PackRouter:
    """The packs by the schema that each lives in. The log may hold changes of other schemas, which are ignored."""

    packs: Mapping[str, Pack] = field(default_factory=dict)

    def schema_of(self, topic: Topic) -> str | None:
        """The schema whose pack serves this topic; None if no pack does."""
        return next((schema for schema, pack in self.packs.items() if pack.serves(topic)), None)

    def validate(self, changes: Iterable[Change]) -> tuple[list[Change], list[Invalid]]:
        """What may be sent, and the changes that their models refuse. These are sent as `invalid`: a reset.

        Left out of both: changes of other schemas, and changes without content because their row was deleted since.
        A `limit` stands for changes of any schema, and may be sent in every topic that is served.
        """
        sendable: list[Change] = []
        invalid: list[Invalid] = []
        for change in changes:
            if change.kind is Kind.LIMIT:
                if self._packs_reset_by(change) or self.schema_of(change.topic):
                    sendable.append(change)
                continue
            pack = self.packs.get(change.schema)
            if pack is None or (change.record is None and change.kind in CONTENT):
                continue
            problem = pack.problem(change)
            if problem is None:
                sendable.append(change)
            else:
                invalid.append(Invalid(change, pack.name, problem))
                sendable.append(change._replace(kind=Kind.INVALID, key="{}", record=None, changed=()))
        return sendable, invalid

    def deliverable(self, batch: Batch) -> Sequence[Change]:
        """What of a batch may be sent. The pump reports the invalid changes when it reads them."""
        return batch.changes if batch.validated else self.validate(batch.changes)[0]

    def with_exact_numbers(self, change: Change) -> Change:
        """The change as clients get it that chose Numbers.STRING."""
        pack = self.packs.get(change.schema)
        return pack.with_exact_numbers(change) if pack is not None else change

    def ended_rights(self, changes: Iterable[Change]) -> list[RightEnd]:
        """The rights that end with these changes, and where. Invalid changes end rights too."""
        return [
            RightEnd(change.seq, change.ends, self.packs[change.schema].serves)
            for change in changes
            if change.ends and change.schema in self.packs
        ]

    def topics_to_reset(self, change: Change, topics: Collection[Topic]) -> Sequence[Topic]:
        """Those of `topics` that a change of one of RESET_KINDS resets; none for other changes."""
        if change.kind not in RESET_KINDS:
            return ()
        if change.kind in (Kind.LIMIT, Kind.INVALID) and change.topic in topics:
            return [change.topic]
        packs = self._packs_reset_by(change)
        return [topic for topic in topics if any(pack.serves(topic) for pack in packs)]

    def _packs_reset_by(self, change: Change) -> list[Pack]:
        """The packs whose topics are all reset by a change in a wildcard topic."""
        return [pack for pack in self.packs.values() if change.topic in (ALL_TOPICS, f"*{pack.name}")]

    def wildcard_topics(self, topics: Iterable[Topic]) -> set[Topic]:
        """The log topics in which changes stand that reset all topics of the packs that serve these topics."""
        return {Topic(f"*{pack.name}") for pack in self.packs.values() if any(pack.serves(topic) for topic in topics)}
