"""The values that everything else is about: topics, positions, rights and changes."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, NewType, Self

from daemon.core.errors import BadPosition

Topic = NewType("Topic", str)
"""What a client follows, e.g. ``channel:01J...``."""

Seq = NewType("Seq", int)
"""A number in the log. Compare only numbers of one epoch."""

MAX_EPOCH = 64  # characters: those of this version have 12
MAX_SEQ = 2**53 - 1  # the largest integer that a JavaScript client can hold exactly


class Kind(StrEnum):
    """What happened to a row in a topic: the labels of the SQL type ``rowcast.kind``, and ``invalid``."""

    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"
    RESTORE = "restore"
    LEAVE = "leave"  # the row moved to another topic: a delete with `left` on the wire
    TRUNCATE = "truncate"  # the table was truncated: a reset on the wire
    LOST = "lost"  # capture of a lenient table failed: a reset on the wire
    LIMIT = "limit"  # a change or a transaction that cannot be sent: a reset on the wire
    INVALID = "invalid"  # in the place of a change that its row model refuses: a reset on the wire


RESET_KINDS = frozenset({Kind.TRUNCATE, Kind.LOST, Kind.LIMIT, Kind.INVALID})
"""The kinds that name no row, but reset whole topics; each is the reason of its `reset` frame."""

ALL_TOPICS = Topic("*")
"""The topic of a `limit` whose transaction touched too many topics to name each."""


class Numbers(StrEnum):
    """How the frames of a client show the values of int8 and numeric columns."""

    JSON = "json"  # as JSON numbers
    STRING = "string"  # as strings with exactly their digits, for clients whose numbers are doubles


MAX_TOPIC: Final = 128  # characters

TOPIC_PATTERN: Final = r"^[^\x00-\x20\x7f*][^\x00-\x20\x7f]*$"
"""What a client can name: no blanks, no control characters, and nothing that stands for many topics."""

_is_topic = re.compile(TOPIC_PATTERN.removesuffix("$")).fullmatch


def can_be_named(topic: str) -> bool:
    """Can a client subscribe to this topic?"""
    return len(topic) <= MAX_TOPIC and _is_topic(topic) is not None


CONTENT = frozenset({Kind.INSERT, Kind.UPDATE, Kind.RESTORE})
"""The kinds that carry a record, unless the row has been deleted since."""


class Position(NamedTuple):
    """A number in the log of one epoch; ``"<epoch>:<seq>"`` on the wire."""

    epoch: str
    seq: Seq

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a position as a client sends it. Raises BadPosition."""
        epoch, colon, seq = text.rpartition(":")
        if not (colon and 0 < len(epoch) <= MAX_EPOCH and seq.isdigit() and len(seq) <= 16):
            raise BadPosition
        if not (text.isascii() and text.isprintable()):  # every database can store it
            raise BadPosition
        if int(seq) > MAX_SEQ:
            raise BadPosition
        return cls(epoch, Seq(int(seq)))


@dataclass(frozen=True, slots=True)
class Right:
    """This user may read this topic. None means every user, and every topic of the pack."""

    user: str | None
    topic: Topic | None


class Outline(NamedTuple):
    """A large record with its long values replaced by empty ones of their type: those of the columns `emptied`."""

    text: str
    emptied: tuple[str, ...]


class Change(NamedTuple):
    """One row's change in one topic, as the log holds it.

    ``key`` and ``record`` are JSON text exactly as Postgres wrote it. It is validated, and copied into the frame
    as it is. ``record`` is None for kinds without content, and once the row was deleted. ``at`` is the time of the
    writing statement, RFC 3339 in UTC. ``ends`` is the right that ended with this change. ``model`` is the name of
    the row model that validates it, if that is not the table's. ``unreadable`` says why this change could not be
    read, if it is the ``limit`` that stands for it. ``outline`` is that of a large record. If there is one and no
    record, the record was left in the log, because nobody here wanted it.
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
    unreadable: str | None = None
    outline: Outline | None = None

    @property
    def is_emptied(self) -> bool:
        """Whether the row has been deleted since, and its content with it."""
        return self.record is None and self.outline is None and self.kind in CONTENT

    @property
    def is_left(self) -> bool:
        """Whether the record was left in the log."""
        return self.record is None and self.outline is not None
