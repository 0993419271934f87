"""The interfaces between the rooms. Each is named by its user; tests/contract checks what the docstrings promise."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, Protocol

from daemon.core.batch import LogBatch
from daemon.core.change import Change, Position, Seq, Topic
from daemon.core.close_codes import Close
from daemon.core.filters import Tables
from daemon.core.own_tables import OwnTable
from daemon.core.presence import Key, People, Person
from daemon.core.snapshot import Rows, Wanted

Encode = Callable[[bytes], bytes]
"""Turns a JSON payload into the bytes of one websocket text frame."""


Age = Callable[[], float]
"""For how many seconds changes may have been waiting to be delivered; about 0 while everything is."""


class Outlet(Protocol):
    """The end of a connection at the kernel, for frames that go to many connections as they are.

    `direct` is the file descriptor while frames may be written to it at once; -1 while they may not, because others
    wait, have to be encoded first, or do not matter any more. Who writes adds the whole size to `written`.
    """

    direct: int
    written: int

    def enqueue(self, data: bytes | memoryview) -> None:
        """Send this once there is room: what a write has left over."""


class Socket(Protocol):
    """One client's connection as delivery sees it. No method raises after the peer has gone; only `drained` waits."""

    @property
    def session(self) -> str:
        """The ULID of this connection: its name in logs and in `welcome`."""

    @property
    def outlet(self) -> Outlet | None:
        """Where frames may bypass `write`; always the same one."""

    def write(self, frames: bytes) -> int:
        """Write whole, encoded frames in order. Returns how many bytes are queued for the peer."""

    def queued(self) -> int:
        """How many bytes are queued for the peer."""

    async def drained(self) -> None:
        """Wait until the peer has taken most of what is queued. Returns at once if little is, or it has gone."""

    def authenticated(self, user: str) -> None:
        """The peer has proven to be this user. Raises TooManyConnections or Overloaded if it cannot stay."""

    def charge(self, frames: int) -> None:
        """Count work that is worth this many frames towards the user's rate: the peer's next frames wait for it."""

    def spend(self, seconds: float) -> None:
        """Count CPU that was spent on the peer towards the share of its user: the peer's next frames wait for it."""

    def lend(self, seconds: float) -> None:
        """Count CPU that the peer takes in advance: nothing of its user waits for it, as long as there is credit."""

    def has_credit(self) -> bool:
        """Whether the user of the peer may take more in advance."""

    def delay(self) -> float:
        """Seconds for which what is done for the user has to wait; 0 or less if it does not."""

    def close(self, code: int, reason: str) -> None:
        """Send a close frame after what is queued, and end. Only the first call counts."""


class ClientHandler(Protocol):
    """Answers one client. The gateway calls it from the event loop; no method waits or raises."""

    def message_received(self, text: bytes) -> None:
        """A whole text message, valid UTF-8, has arrived."""

    def tick(self, now: float) -> None:
        """About a second has passed; `now` is the gateway's monotonic clock in seconds.

        Called while the connection is open, and not after `close`. Deadlines (no `hello`, an expired token) are
        enforced from here, so that no client needs a timer of its own.
        """

    def connection_lost(self, close: Close | None) -> None:
        """The connection has ended. Called exactly once, and last.

        `close` is why this side closed it, even if the peer never learned that; None if the peer left.
        """


OpenClient = Callable[[Socket], ClientHandler]
"""Called by the gateway when a handshake for `rowcast.v1` has succeeded."""


MAX_READ_BYTES: Final = 2**20
"""Bytes of records after which one read of the log takes no further transaction."""

LARGE_RECORD: Final = 2**17
"""Bytes beyond which a record comes with its outline: to parse it would keep others waiting."""


class Batch(list[Change]):
    """What a read of the log returned: changes, in order.

    `more`: the read ended early, and another one may find more, past `reached`. `validated`: it holds what may be
    sent, so nobody has to validate it again.
    """

    __slots__ = ("_reached", "more", "validated")

    def __init__(
        self,
        changes: Iterable[Change] = (),
        *,
        more: bool = False,
        validated: bool = False,
        reached: Seq | None = None,
    ) -> None:
        """`reached` is where the read ended early, if not at the last change."""
        super().__init__(changes)
        self.more = more
        self.validated = validated
        self._reached = reached

    @property
    def reached(self) -> Seq:
        """Where a read that ended early has ended."""
        return self[-1].seq if self._reached is None else self._reached


class BatchReader(Protocol):
    """The log as a member knows it, for a process without a database."""

    async def head(self) -> Position:
        """The newest position. Raises LogUnavailable."""

    async def batches(self, after: Position) -> tuple[Position, Sequence[LogBatch]]:
        """The newest position, and the batches that follow `after`, oldest first; none if nothing does.

        More may follow the last one. Raises LogUnavailable and LogTruncated.
        """

    async def contents(self, after: Position, upto: Seq, hashes: Collection[int]) -> Sequence[Change]:
        """All changes after `after` and up to `upto` in topics of these hashes, in order.

        Raises LogUnavailable, and LogTruncated if the member has no such batches at hand: `batches` has them.
        """

    async def continuity(self, since: Position, upto: Position) -> str | None:
        """See LogReader. The member that answers knows the log up to `upto`, or else raises LogUnavailable."""


class LogReader(Protocol):
    """The durable record of changes, in the one order that every client sees."""

    async def head(self) -> Position:
        """The newest position. Raises LogUnavailable."""

    async def read(self, after: Seq, limit: int) -> Batch:
        """Whole transactions past `after`, oldest first; empty if there are none.

        Reads about `limit` changes, or MAX_READ_BYTES of records: more only to end where a transaction ends. A
        transaction that is too large to be sent change by change appears as one `limit` change in each topic that it
        touched, at its last change there, and one more for each right that ends in it; only what lies past `after`
        counts. A change that cannot be read appears as a `limit` that says so. Raises LogUnavailable.
        """

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        """The same for some topics, up to `upto`, where a transaction must end, and without rights that end.

        Raises LogUnavailable and LogTruncated.
        """

    async def continuity(self, since: Position) -> str | None:
        """Why a stream cannot be continued from `since` (`epoch`, `crash`, `retention`); None if it can."""


Broadcast = Callable[[Collection[str]], Awaitable[None]]
"""Sends pieces of a message to every process of the database, this one too, together and in order; or not at all.

What is sent while another process does not listen is lost to it. Raises LogUnavailable.
"""


class SignalRights(Protocol):
    """Who may send signals."""

    def concerns(self, topic: Topic) -> bool:
        """Whether it has to be asked for this topic; in others, everybody who follows them may send."""

    async def may_signal(self, user: str, topic: Topic) -> bool:
        """Whether this user may, in a topic that the user may read. Raises GrantsUnavailable."""


class PeopleStore(Protocol):
    """Who is present, as all processes of the database know it. Each method raises LogUnavailable.

    Whom a process has stored counts until it removes them, or does not renew its lease.
    """

    async def store(self, present: Mapping[tuple[Topic, Key], Person], gone: Collection[tuple[Topic, Key]]) -> bool:
        """Renew the lease of this process, and store and remove some of its people.

        Who comes here has come back from every process from which they are about to leave.
        False if the lease was lost, and with it everybody who was stored before.
        """

    async def others(self, topics: Collection[Topic]) -> dict[Topic, list[People]]:
        """Who is present in these topics according to the other processes whose lease has not expired."""

    async def call_hooks(self) -> bool:
        """Tell the packs that want to know which users have come or gone. False if nobody is present to any."""


class AckStore(Protocol):
    """The positions that devices have acknowledged. Each method raises LogUnavailable."""

    async def store(self, acks: Mapping[Key, Position]) -> None:
        """Keep these, whatever was known before."""

    async def stored(self, device: Key) -> Position | None:
        """The last one that was stored; None if there is none."""


class Grants(Protocol):
    """Who may read what."""

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        """The position from which on the user may read the topic: where the transaction that granted it begins.

        0 if that is before everything the log knows; None if the user may not, or no pack serves the topic. Waits for
        a right that was granted a moment ago, until it has a position. Raises GrantsUnavailable.
        """


class OwnTableReader(Protocol):
    """Which tables are served without a pack."""

    async def read(self) -> Sequence[OwnTable]:
        """Those that are at the moment. Raises LogUnavailable."""


class RowReader(Protocol):
    """The rows of topics, as they are in the tables."""

    async def read(self, wanted: Wanted) -> Rows:
        """The rows, and where the log continues from them. Waits until every change that they contain has a number.

        Raises LogUnavailable, and SnapshotTooLarge.
        """


class ColumnReader(Protocol):
    """The columns that can be filtered."""

    async def columns(self, topic: Topic) -> Tables:
        """The published columns of each table that a topic is made of. Raises LogUnavailable."""
