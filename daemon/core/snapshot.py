"""Snapshots: the rows of a topic at one moment, and which changes they contain already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from daemon.core.change import Change, Position, Seq, Topic
from daemon.core.filters import View


class Visible(NamedTuple):
    """Which transactions a Postgres snapshot shows: `pg_visible_in_snapshot`, without asking Postgres.

    Every transaction before `xmin` has ended, none from `xmax` on had begun, and of those in between the ones in
    `running` had not ended.
    """

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a `pg_snapshot`."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, filter(None, running.split(",")))))

    def shows(self, change: Change) -> bool:
        """Whether rows that were read in this snapshot contain the change."""
        xid = int(change.tx)
        return xid < self.xmin or (xid < self.xmax and xid not in self.running)


class Wanted(NamedTuple):
    """A snapshot that clients ask for: a topic's rows that a view shows; of each table at most `limit`, or all."""

    topic: Topic
    limit: int | None
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a topic, as Postgres showed them in one snapshot.

    `position` is the newest one that the snapshot shows. Changes past it may be contained too: those that `visible`
    shows. `upto` is the last number that one of these has. The rows are inserts without a transaction; `omitted` has
    every table that was read, with the number of rows that are too large to be sent. `validated`: the rows are what
    may be sent, so nobody has to validate them again; `omitted` counts the others too.
    """

    position: Position
    visible: Visible
    upto: Seq
    rows: Sequence[Change]
    omitted: Mapping[str, int]
    validated: bool = False
