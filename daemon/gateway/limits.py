"""The limits of one gateway: sizes, counts and timeouts."""

import resource
from dataclasses import dataclass

MIN_DRAIN_BYTES = 64 * 1024  # bytes that a peer has to acknowledge per `drain_timeout` while its queue is full
SPARE = 64  # descriptors kept for other uses: the database, the listener, health checks when all sessions are taken


def _default_connections() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10_000 if allowed == resource.RLIM_INFINITY else max(1, min(10_000, allowed - SPARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a gateway allows its peers. Times are in seconds, sizes in bytes."""

    connections: int | None = None  # websocket sessions; None: 10,000, or the descriptor limit minus SPARE if lower
    message_bytes: int = 64 * 1024  # of one inbound message, all fragments together
    fragments: int = 128  # of one inbound message
    frames: int = 4096  # inbound frames of any kind between two ticks
    deflate_bytes: int = 0  # smallest frame compressed for clients that negotiate it; 0: never compress
    open_timeout: float = 5.0  # from accept to the end of the request
    answer_timeout: float = 30.0  # from an HTTP response until the peer has read it and closed
    ping_every: float = 20.0
    ping_timeout: float = 10.0  # from a ping until a peer that sends nothing is cut
    drain_timeout: float = 30.0  # for each MIN_DRAIN_BYTES, while the peer's queue is full
    close_timeout: float = 2.0  # from a close frame until the connection is cut
    tick_every: float = 1.0

    def max_connections(self) -> int:
        """The maximum number of concurrent websocket sessions."""
        return _default_connections() if self.connections is None else self.connections
