"""Frames as server-sent events, and the id of each: where a client resumes that has processed it."""

import re
from collections.abc import Sequence
from typing import Final

from pydantic_core import from_json

from daemon.core.change import Position, Topic

MEMBERS_OF_HELLO: Final = frozenset({"numbers"})
MEMBERS_OF_SUBSCRIBE: Final = frozenset({"snapshot", "where", "columns"})
"""The parameters of a request that are members of `hello`, and those that are members of each `subscribe`."""

_POSITION: Final = re.compile(rb'"pos":"([^"\\]+)"')
_MOVES: Final = frozenset({b"changes", b"head", b"resumed"})
"""The frames whose `pos` becomes a client's position, unless a topic is pending."""


def op_of(payload: bytes) -> bytes:
    """The `op` of a frame, which is its first member."""
    return payload[7 : payload.index(b'"', 7)]


def event(payload: bytes, place: bytes | None = None, retry_ms: int | None = None) -> bytes:
    """The frame as an event, with `place` as its id.

    `retry_ms`: how long the client waits before it reconnects.
    """
    if b"\n" in payload or b"\r" in payload:  # blanks of a json column: JSON has no line breaks within a string
        payload = b"\ndata: ".join(payload.splitlines())
    head = b"" if place is None else b"id: %b\n" % place
    if retry_ms is not None:
        head += b"retry: %d\n" % retry_ms
    return b"%bevent: %b\ndata: %b\n\n" % (head, op_of(payload), payload)


def live_event(payload: bytes) -> bytes:
    """The frame as the event of a client whose topics are all live: equal for every such client."""
    op = op_of(payload)
    return event(
        payload,
        _position(payload) if op in _MOVES else None,
        from_json(payload)["retry_ms"] if op == b"bye" else None,
    )


def _position(payload: bytes) -> bytes | None:
    found = _POSITION.search(payload)
    return found[1] if found else None


def parse_place(text: str) -> tuple[str, str | None]:
    """The `since` and the `seen` of an id. What is malformed in them is left to the frame `hello`."""
    since, _, seen = text.partition("/")
    return since, seen or None


class Place:
    """Where a client resumes whose topics are not all live yet, by the rules of docs/protocol.md.

    While a topic is pending, the position stands still: the id of an event is the position, and behind a slash the
    greatest position that the client has seen. There is no id as long as the rows of a snapshot are missing, so that
    a client which reconnects gets the snapshot again.
    """

    def __init__(self, topics: Sequence[Topic], since: str, seen: str | None, *, snapshot: bool) -> None:
        """`topics` are subscribed to with their index as the id of the frame; the rest is as in `hello`."""
        self._unanswered = set(range(len(topics)))
        self._index = {topic: index for index, topic in enumerate(topics)}
        self._since = since
        self._snapshot = snapshot
        self._position = Position.parse(since) if since else None
        self._seen = Position.parse(seen) if seen else None
        self._replaying = False

    @property
    def is_live(self) -> bool:
        """Whether every topic is live, or not followed."""
        return not self._unanswered and not self._replaying

    def after(self, payload: bytes) -> bytes | None:
        """The id of this event, which comes after those before; None: it has none, and the last one stays valid."""
        op = op_of(payload)
        match op:
            case b"welcome" if self._position is None and not self._snapshot:
                self._position = Position.parse(from_json(payload)["pos"])
                return str(self._position).encode()
            case b"subscribed":
                frame = from_json(payload)
                self._unanswered.discard(frame["id"])
                if "snapshot" in frame or frame["pos"] == self._since:
                    self._replaying = True
            case b"error":
                self._unanswered.discard(from_json(payload).get("id"))
            case b"revoked":
                self._unanswered.discard(self._index[from_json(payload)["topic"]])
            case b"resumed":
                self._replaying = False
        reached = _position(payload) if op in _MOVES else None
        if reached is None or self.is_live or self._position is None:
            return reached if self.is_live else None
        return self._pending(Position.parse(reached.decode()))

    def _pending(self, reached: Position) -> bytes:
        """The id while a topic is pending."""
        assert self._position
        if self._seen is None or _is_beyond(reached, self._seen):
            self._seen = reached
        seen = f"/{self._seen}" if _is_beyond(self._seen, self._position) else ""
        return f"{self._position}{seen}".encode()


def _is_beyond(position: Position, other: Position) -> bool:
    """Whether it is after the other, or of another epoch."""
    return position.epoch != other.epoch or position.seq > other.seq
