"""What one gateway grants its peers."""

import resource
from dataclasses import dataclass

MIN_DRAIN_BYTES = 64 * 1024  # bytes that a peer takes in one `drain_timeout`, while as many wait for it
SPARE = 64  # descriptors that are never a session: the database, the listener, a health check at full house


def _default_connections() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10_000 if allowed == resource.RLIM_INFINITY else max(1, min(10_000, allowed - SPARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times are in seconds, sizes in bytes."""

    connections: int | None = None  # websocket sessions; None: 10,000, or what the process may open less SPARE
    message_bytes: int = 64 * 1024  # one inbound message, all its fragments together
    fragments: int = 128  # of one inbound message
    frames: int = 4096  # inbound frames of any kind between two ticks
    deflate_bytes: int = 0  # the smallest frame that is compressed for who asks for it; 0: none is
    open_timeout: float = 5.0  # from accept to the end of the request
    answer_timeout: float = 30.0  # from an HTTP answer until the peer has read it
    ping_every: float = 20.0
    ping_timeout: float = 10.0  # from a ping until the peer counts as gone
    drain_timeout: float = 30.0  # for each LEAST bytes that wait, until the peer has taken them
    close_timeout: float = 2.0  # from a close frame until the connection is cut
    tick_every: float = 1.0

    def max_connections(self) -> int:
        """How many websocket sessions there may be at once."""
        return _default_connections() if self.connections is None else self.connections
