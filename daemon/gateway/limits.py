"""The limits of one gateway: sizes, counts and timeouts."""

import resource
from dataclasses import dataclass

MIN_DRAIN_BYTES = 64 * 1024  # bytes that a peer has to acknowledge per `drain_timeout` while its queue is full
ADMIN_CONNECTIONS = 16  # on the listener for metrics and health, which no client of the other listener can take
# Descriptors that connections never get: the database connections (about 15), the listeners, the log and the event
# loop (about 10), ADMIN_CONNECTIONS, and one batch of connections that are accepted before those that they replace
# are closed.
RESERVED = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a gateway allows its peers. Times are in seconds, sizes in bytes."""

    connections: int = 10_000  # of authenticated clients
    pending: int = 2_048  # connections that are not authenticated
    grace: float = 0.1  # during which such a connection does not give way to another
    pending_cpu: float = 0.1  # of one processor, for all connections that are not authenticated
    pending_burst: float = 2.0  # seconds of `pending_cpu` that may be used at once: 440 honest handshakes under way
    per_user: int | None = None  # connections of one user; None: a quarter of `connections`
    per_address: int | None = None  # connections of one address; None: any number
    user_unread_bytes: int = 128 * 1024 * 1024  # sent on all connections of one user and not acknowledged
    user_rate: int = 1_000  # frames per second from all connections of one user; one of several KiB counts as several
    user_cpu: float = 0.1  # of one processor, for the frames from all connections of one user
    user_burst: float = 1.0  # seconds of `user_rate` and `user_cpu` that may be used at once
    user_credit: float = 600.0  # seconds of `user_cpu` that replays may take in advance, as fast as they can
    topics: int = 128  # that one connection may follow
    message_bytes: int = 64 * 1024  # of one inbound message, all fragments together
    fragments: int = 128  # of one inbound message
    frames: int = 4096  # inbound frames of any kind between two ticks
    pending_frames: int = 16  # inbound frames of any kind until the peer is authenticated
    deflate_bytes: int = 0  # smallest frame compressed for clients that negotiate it; 0: never compress
    open_timeout: float = 5.0  # from accept to the end of the request
    answer_timeout: float = 30.0  # from an HTTP response until the peer has read it and closed
    ping_every: float = 20.0
    ping_timeout: float = 10.0  # from a ping until a peer that sends nothing is cut
    drain_timeout: float = 30.0  # for each MIN_DRAIN_BYTES, while the peer's queue is full
    close_timeout: float = 2.0  # from a close frame until the connection is cut
    tick_every: float = 1.0

    def max_pending(self) -> int:
        """`pending`, but at most a quarter of the descriptors that connections can have."""
        return min(self.pending, max(1, _descriptors() // 4))

    def max_clients(self) -> int:
        """`connections`, but no more than there are descriptors beside those of `max_pending`."""
        return min(self.connections, max(1, _descriptors() - self.max_pending()))

    def max_per_user(self) -> int:
        """`per_user`, or its default."""
        return self.per_user or max(1, self.max_clients() // 4)


def _descriptors() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10**9 if allowed == resource.RLIM_INFINITY else allowed - RESERVED
