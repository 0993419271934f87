"""Which packs and tables this daemon serves: which changes of the log its clients may get, and in which topics."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final, NamedTuple

from daemon.core.batch import EndedRight, LogBatch, gone_in, heads_of, jumps_in
from daemon.core.change import ALL_TOPICS, CONTENT, RESET_KINDS, Change, Kind, Position, Seq, Topic, can_be_named
from daemon.core.hub import RightEnd
from daemon.core.ports import Batch
from daemon.packs import Pack

OWN_TABLES: Final = "rowcast"
"""The schema that stands for all tables that are served without a pack."""

MAX_FORMS: Final = 5000
"""Forms of changes that are remembered from batch to batch; there is one for each topic that a table writes to."""

_Form = tuple[str, str, Topic, str | None]
"""What decides how a change is validated: schema, table, topic, and the name of its row model."""

_IsValid = Callable[[str, str], bool]
"""Whether a key and a record are valid."""

_OUTDATING: Final = frozenset({Kind.LOST, Kind.LIMIT})
"""The kinds with which the log says that tables are served otherwise from there on."""

_kind, _ends = map(itemgetter, map(Change._fields.index, ("kind", "ends")))


class Invalid(NamedTuple):
    """A change that must not be sent: its row model refused it, its topic cannot be followed, or it is unreadable."""

    change: Change
    pack: str
    reason: str


@dataclass
class PackRouter:
    """The packs by the schema that each lives in, and the tables that are served without one, by schema and name.

    Each of these tables counts as a pack of its own; `former` are such that are served otherwise by now, or not at
    all. The log may hold changes of other tables, which are ignored.
    """

    packs: Mapping[str, Pack] = field(default_factory=dict)
    own: Mapping[tuple[str, str], Pack] = field(default_factory=dict)
    former: Mapping[tuple[str, str], Pack] = field(default_factory=dict)
    _validators: tuple[object, object, dict[_Form, _IsValid | None]] = field(
        default=(None, None, {}), init=False, repr=False, compare=False
    )

    def schema_of(self, topic: Topic) -> str | None:
        """The schema whose pack serves this topic, or OWN_TABLES; None if no client can follow it."""
        if not can_be_named(topic):
            return None
        for schema, pack in self.packs.items():
            if pack.serves(topic) and not pack.is_internal:
                return schema
        return OWN_TABLES if any(pack.serves(topic) for pack in self.own.values()) else None

    def own_table_of(self, topic: Topic) -> str | None:
        """The first of the tables without a pack that serves this topic; None if a pack does, or nothing."""
        if not self.own or self.schema_of(topic) != OWN_TABLES:
            return None
        return next(pack.name for pack in self.own.values() if pack.serves(topic))

    def pack_of(self, change: Change) -> Pack | None:
        """The pack whose row models and topics hold for this change."""
        own = self.own.get((change.schema, change.table)) if self.own else None
        return own or self.packs.get(change.schema)

    def is_outdated(self, changes: Sequence[Change], invalid: Iterable[Invalid]) -> bool:
        """Whether `own` may not be what holds for these changes: the log says so, or they do not fit."""
        return not _OUTDATING.isdisjoint(map(_kind, heads_of(changes))) or any(
            (found.change.schema, found.change.table) in self.own for found in invalid
        )

    @property
    def all_packs(self) -> Iterable[Pack]:
        """The packs that clients may follow, and the tables that are served without one."""
        return [pack for pack in (*self.packs.values(), *self.own.values()) if not pack.is_internal]

    def validate(self, changes: Iterable[Change]) -> tuple[list[Change], list[Invalid]]:
        """What may be sent, and the changes that must not be.

        An `invalid` takes the place of each change that must not be sent, so that its topic is reset; nobody needs
        that in a topic that nobody can follow. Left out of both: changes of other schemas, and changes without
        content because their row was deleted since. A `limit` of the log stands for changes of any schema, and may be
        sent in every topic that is served.
        """
        sendable: list[Change] = []
        invalid: list[Invalid] = []
        topics: dict[tuple[str, str, Topic], str | None] = {}  # what is wrong with each
        validators = self._known_validators()
        last: _Form | None = None
        is_valid: _IsValid | None = None
        for change in changes:
            _, _, _, schema, table, topic, kind, key, record, _, _, _, model, _, outline = change
            record = record if outline is None else None  # a large one is seen to below
            if record is not None and kind in CONTENT:
                form = (schema, table, topic, model)
                if form != last:  # to compare takes a third of the time of looking up
                    if form not in validators:
                        validators[form] = self._validator(change)
                    last, is_valid = form, validators[form]
                if is_valid is not None and is_valid(key, record):
                    sendable.append(change)
                    continue
            pack, place = self.pack_of(change), (change.schema, change.table, change.topic)
            if change.kind is Kind.LIMIT and (self._packs_reset_by(change) or self.schema_of(change.topic)):
                sendable.append(change)
                if pack and change.unreadable:
                    invalid.append(Invalid(change, pack.name, f"unreadable: {change.unreadable}"))
                continue
            if pack is None or change.is_emptied:
                continue
            if place not in topics:
                topics[place] = self._problem_of_topic(pack, change)
            is_wildcard = change.kind in RESET_KINDS and self._packs_reset_by(change)
            if (problem := topics[place]) and not is_wildcard:
                invalid.append(Invalid(change, pack.name, problem))
            elif problem := _problem_of_row(pack, change):
                invalid.append(Invalid(change, pack.name, problem))
                sendable.append(reset_for(change))
            else:
                sendable.append(change)
        return sendable, invalid

    def batch_of(self, after: Position, changes: Sequence[Change]) -> tuple[LogBatch, list[Invalid]]:
        """What is to be published of these changes, which follow `after`, and those that must not be sent."""
        sendable, invalid = self.validate(changes)
        ends, gone = self.ended_rights(changes), gone_in(changes)
        upto, jumps = changes[-1].seq, jumps_in(after.seq, changes)
        return LogBatch(after.epoch, after.seq, upto, sendable, ends, gone, jumps), invalid

    def deliverable(self, batch: Batch) -> Sequence[Change]:
        """What of a batch may be sent. The pump reports the invalid changes when it reads them."""
        return batch if batch.validated else self.validate(batch)[0]

    def needs_record(self, change: Change) -> bool:
        """Whether its outline is not enough to validate this change."""
        pack = self.pack_of(change)
        return pack is not None and pack.needs_record(change)

    def with_exact_numbers(self, change: Change) -> Change:
        """The change as clients get it that chose Numbers.STRING."""
        pack = self.pack_of(change)
        return pack.with_exact_numbers(change) if pack is not None else change

    def ended_rights(self, changes: Sequence[Change]) -> list[EndedRight]:
        """The rights that end with these whole transactions, and where. Invalid changes end rights too.

        A right ends where the transaction begins that takes it away: who loses it gets nothing of that transaction.
        """
        ended: list[EndedRight] = []
        if not any(map(_ends, changes)):
            return ended
        begun: dict[str, Seq] = {}  # where each transaction begins
        for change in changes:
            begin = begun.setdefault(change.tx, change.seq)
            if change.ends:
                ended.append(EndedRight(begin, change.ends, change.schema, change.table))
        return ended

    def right_ends(self, ended: Iterable[EndedRight]) -> list[RightEnd]:
        """The same for the hub: each with the topics that it is about."""
        found: list[RightEnd] = []
        for seq, right, schema, table in ended:
            own, former = self.own.get((schema, table)), self.former.get((schema, table))
            packs = (own or self.packs.get(schema), former)
            found += [RightEnd(seq, right, pack.serves) for pack in packs if pack]
        return found

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
        return [pack for pack in self.all_packs if change.topic in (ALL_TOPICS, f"*{pack.name}")]

    def wildcard_topics(self, topics: Iterable[Topic]) -> set[Topic]:
        """The log topics in which changes stand that reset all topics of the packs that serve these topics."""
        return {Topic(f"*{pack.name}") for pack in self.all_packs if any(pack.serves(topic) for topic in topics)}

    def _known_validators(self) -> dict[_Form, _IsValid | None]:
        """What `_validator` has returned since other packs or tables were served, for a limited number of forms."""
        packs, own, validators = self._validators
        if packs is not self.packs or own is not self.own or len(validators) > MAX_FORMS:
            validators = {}
            self._validators = self.packs, self.own, validators
        return validators

    def _validator(self, change: Change) -> _IsValid | None:
        """What tells the valid changes of this form, of which nearly all are valid; None if there are none."""
        pack = self.pack_of(change)
        if pack is None or self._problem_of_topic(pack, change):
            return None
        try:
            return pack.validator(change)
        except Exception:  # noqa: BLE001 - a pack that fails is looked at change by change
            return None

    def _problem_of_topic(self, pack: Pack, change: Change) -> str | None:
        """Why no client can follow the change's topic as one of this pack; None if clients can."""
        if not can_be_named(change.topic):
            return "topic: cannot_be_named"
        is_served = pack.serves(change.topic)
        if is_served and (change.schema, change.table) in self.own:
            # Who may read a topic is asked of one pack only, and bundled ones come first.
            is_served = self.schema_of(change.topic) == OWN_TABLES
        return None if is_served else "topic: not_served"


def reset_for(change: Change) -> Change:
    """What is sent in place of a change that must not be."""
    return change._replace(kind=Kind.INVALID, key="{}", record=None, changed=(), actor=None, ends=None, outline=None)


def _problem_of_row(pack: Pack, change: Change) -> str | None:
    try:
        return pack.problem(change)
    except Exception as error:  # noqa: BLE001 - one change must not stop the others
        return f"record: {type(error).__name__}"
