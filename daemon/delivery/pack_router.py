"""Which packs this daemon serves, and what of the log therefore concerns its clients."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from daemon.core.change import CONTENT, EVERYTHING, RESET_KINDS, Change, Kind, Topic
from daemon.core.hub import RightEnd
from daemon.packs import Pack


class Invalid(NamedTuple):
    """A change that its row model refused."""

    change: Change
    pack: str
    reason: str


class Sifted(list[Change]):
    """Changes that `Served.sift` has let through before, and need not be looked at again."""


@dataclass(frozen=True)
class PackRouter:
    """The packs by the schema that each lives in. One log may hold changes of other schemas too: not ours."""

    packs: Mapping[str, Pack] = field(default_factory=dict)

    def schema_of(self, topic: Topic) -> str | None:
        """The schema whose pack serves this topic; None if nobody does."""
        return next((schema for schema, pack in self.packs.items() if pack.serves(topic)), None)

    def validate(self, changes: Iterable[Change]) -> tuple[list[Change], list[Invalid]]:
        """What of these changes may be sent, and what their models refuse.

        Neither are changes of other schemas, and those whose content is gone since the row was deleted. A `limit`
        stands for changes of any schema, and may be sent in every topic that is served.
        """
        if isinstance(changes, Sifted):
            return changes, []
        valid, invalid = [], []
        for change in changes:
            if change.kind is Kind.LIMIT:
                if self._covering(change) or self.schema_of(change.topic):
                    valid.append(change)
                continue
            pack = self.packs.get(change.schema)
            if pack is None or (change.record is None and change.kind in CONTENT):
                continue
            problem = pack.problem(change)
            if problem is None:
                valid.append(change)
            else:
                invalid.append(Invalid(change, pack.name, problem))
        return valid, invalid

    def ends(self, changes: Iterable[Change]) -> list[RightEnd]:
        """The rights that end with these changes, and where; those that their models refuse count as well."""
        return [
            RightEnd(change.seq, change.ends, self.packs[change.schema].serves)
            for change in changes
            if change.ends and change.schema in self.packs
        ]

    def topics_to_reset(self, change: Change, topics: Collection[Topic]) -> Sequence[Topic]:
        """Of these topics, those whose state the change puts in doubt."""
        if change.kind not in RESET_KINDS:
            return ()
        if change.kind is Kind.LIMIT and change.topic in topics:
            return [change.topic]
        packs = self._covering(change)
        return [topic for topic in topics if any(pack.serves(topic) for pack in packs)]

    def _covering(self, change: Change) -> list[Pack]:
        """The packs all of whose topics a doubt concerns."""
        return [pack for pack in self.packs.values() if change.topic in (EVERYTHING, f"*{pack.name}")]

    def wildcard_topics(self, topics: Iterable[Topic]) -> set[Topic]:
        """The topics under which the log says what `in_doubt` asks, for the packs that serve these topics."""
        return {Topic(f"*{pack.name}") for pack in self.packs.values() if any(pack.serves(topic) for topic in topics)}
