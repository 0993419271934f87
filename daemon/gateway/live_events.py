"""Frames as server-sent events, arranged so that what is sent to many clients is made once."""

from typing import NamedTuple

from daemon.core.event_stream import live_event, op_of
from daemon.gateway.framing import split


class Events(NamedTuple):
    """Frames as the events of a live client, and in how many topics they end its right."""

    data: bytes
    revoked: int


class LiveEvents:
    """Turns encoded frames into events. A call with the same object as the previous call returns the same result."""

    def __init__(self) -> None:
        self._frames = b""
        self._events = Events(b"", 0)

    def __call__(self, frames: bytes) -> Events:
        """`frames`: one or more whole frames."""
        if frames is not self._frames:
            payloads = [payload for _, payload in split(frames)]
            revoked = sum(op_of(payload) == b"revoked" for payload in payloads)
            self._frames, self._events = frames, Events(b"".join(map(live_event, payloads)), revoked)
        return self._events
