"""The nouns of Rowcast: what changed, where it stands in the log, and who hears of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType, Self

from daemon.core.errors import BadPosition

Topic = NewType("Topic", str)
"""What a client follows, e.g. ``channel:01J...``."""

Seq = NewType("Seq", int)
"""A place in the log. Numbers of different epochs cannot be compared."""

MAX_SEQ = 2**53 - 1  # the largest integer that a JavaScript client can hold exactly


class Kind(StrEnum):
    """What happened to a row in a topic; the labels of the SQL type ``rowcast.kind``, and ``limit``."""

    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"
    RESTORE = "restore"
    LEAVE = "leave"  # the row lives on, in another topic: a delete with `left` on the wire
    TRUNCATE = "truncate"  # every row of the table went at once: a reset on the wire
    LOST = "lost"  # a lenient table's capture failed: a reset on the wire
    LIMIT = "limit"  # a transaction has more changes than are told one by one: a reset on the wire


RESET_KINDS = (Kind.TRUNCATE, Kind.LOST, Kind.LIMIT)
"""What names no row, but puts the state of whole topics in doubt; the reasons of a reset."""

EVERYTHING = Topic("*")
"""Where a `limit` stands that concerns every topic: its transaction touched too many of them to name each."""


CONTENT = frozenset({Kind.INSERT, Kind.UPDATE, Kind.RESTORE})
"""The kinds that carry a record, as long as the row has not been deleted."""


class Position(NamedTuple):
    """A place in the log of one epoch; ``"<epoch>:<seq>"`` on the wire."""

    epoch: str
    seq: Seq

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a position as a client sends it. Raises BadPosition."""
        epoch, colon, seq = text.rpartition(":")
        if not (colon and epoch and seq.isascii() and seq.isdigit() and len(seq) <= 16):
            raise BadPosition
        if int(seq) > MAX_SEQ:
            raise BadPosition
        return cls(epoch, Seq(int(seq)))


@dataclass(frozen=True, slots=True)
class Right:
    """Who may read what: this user this topic. None stands for every user, and for every topic of the pack."""

    user: str | None
    topic: Topic | None


class Change(NamedTuple):
    """One row's change in one topic, as the log holds it.

    ``key`` and ``record`` are JSON text exactly as Postgres wrote it: it is validated, and spliced into the
    frame without being built anew. A kind that carries a record has none once the row was deleted. ``at`` is the
    time of the writing statement, RFC 3339 in UTC. ``ends`` is the right that ended with the row. ``model`` is the
    name of the row model that checks it, where that is not the table's.
    """

    seq: Seq
    tx: str
    at: str
    schema: str
    table: str
    topic: Topic
    kind: Kind
    key: str
    record: str | None
    changed: tuple[str, ...] = ()
    actor: str | None = None
    ends: Right | None = None
    model: str | None = None
