"""The seams, in the words of those who use them. Their docstrings are the contracts that tests/contract checks."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from daemon.core.change import Change, Position, Seq, Topic
from daemon.core.close_codes import Close

Encode = Callable[[bytes], bytes]
"""From a JSON payload to the bytes of one websocket text frame."""


class Socket(Protocol):
    """One client's connection, as the flow sees it. No method raises once the peer has gone; `drained` waits."""

    @property
    def session(self) -> str:
        """The ULID of this connection: its name in logs and in `welcome`."""

    def write(self, frames: bytes) -> int:
        """Hand whole, already encoded frames to the peer, in order. Returns how many bytes wait for it to read."""

    def queued(self) -> int:
        """How many bytes wait for the peer to read."""

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was written; at once if little waits, or the peer has gone."""

    def close(self, code: int, reason: str) -> None:
        """Send a close frame behind what was written, and end. The first call counts, later ones do nothing."""


class ClientHandler(Protocol):
    """Who answers one client. The gateway calls it, from the event loop, and it never waits or raises."""

    def message_received(self, text: bytes) -> None:
        """One whole text message (UTF-8, already checked) came in."""

    def tick(self, now: float) -> None:
        """A second, more or less, has passed; `now` is the gateway's monotonic clock in seconds.

        Called while the connection is open, and not after `close`: what must end by a time (no `hello`, an
        expired token) is ended from here, so that no client needs a timer of its own.
        """

    def connection_lost(self, close: Close | None) -> None:
        """The connection has ended. Called exactly once, and last.

        `close` is why this side ended it, whether or not the peer got to know; None if it went by itself.
        """


OpenClient = Callable[[Socket], ClientHandler]
"""Called by the gateway once a handshake for `rowcast.v1` has succeeded."""


class LogReader(Protocol):
    """The durable record of changes, in the one order that every client sees."""

    async def head(self) -> Position:
        """The newest position. Raises LogUnavailable."""

    async def read(self, after: Seq, limit: int) -> Sequence[Change]:
        """Whole transactions past `after`, oldest first; an empty answer means there are none.

        Reads about `most` changes, and more only to end where a transaction does. One that is too large to be told
        stands there as a `limit` in each topic that it touched, where it did so last, and one more for each right
        that ends in it; what lies behind `after` decides. Raises LogUnavailable.
        """

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Sequence[Change]:
        """The same for some topics, up to a place where a transaction ends, and without the rights that end.

        Fewer than `most` changes are all that there are. Raises LogUnavailable.
        """

    async def continuity(self, since: Position) -> str | None:
        """Why a stream cannot be continued from `since` (`epoch`, `crash`, `retention`); None if it can."""


class Grants(Protocol):
    """Who may read what."""

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        """From where in the log on the user may read the topic: where the transaction that gave the right begins.

        0 if that lies before all that the log knows; None if the user may not, or nobody serves the topic. A right
        given a moment ago is waited for, until it has its place. Raises GrantsUnavailable.
        """
