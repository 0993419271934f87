"""Why connections are closed and what their clients do next: one table. A code never changes its meaning."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple


class ComeBack(StrEnum):
    """What a client does after a close."""

    AT_ONCE = "at once, with jitter, and resume"
    LATER = "later, with a growing delay, and resume"
    FRESH_TOKEN = "with a fresh token"  # noqa: S105 - advice, not a password
    NEVER = "not before the client or its rights have changed"


@dataclass(frozen=True, slots=True)
class Closing:
    """One reason to close: the code on the wire, its name, what it means, and what to do next."""

    code: int
    name: str
    meaning: str
    come_back: ComeBack


class Close(NamedTuple):
    """Why this side ended a connection: what its close frame said, or would have said."""

    code: int
    reason: str


CLOSE_CODES: Final[Mapping[str, Closing]] = MappingProxyType(
    {
        closing.name: closing
        for closing in (
            Closing(1001, "going_away", "this server is going away", ComeBack.AT_ONCE),
            Closing(1002, "bad_framing", "the bytes violate the websocket protocol", ComeBack.NEVER),
            Closing(1003, "not_text", "a message was binary; only text is accepted", ComeBack.NEVER),
            Closing(1007, "not_utf8", "a message was not UTF-8", ComeBack.NEVER),
            Closing(1009, "too_big", "a message was too big, or had too many fragments", ComeBack.NEVER),
            Closing(1011, "internal", "internal server error", ComeBack.LATER),
            Closing(1012, "restart", "the server is restarting", ComeBack.AT_ONCE),
            Closing(1013, "overload", "the server is overloaded", ComeBack.LATER),
            Closing(4400, "protocol", "a message is not part of rowcast.v1", ComeBack.NEVER),
            Closing(4401, "token", "the token is missing, forged or expired", ComeBack.FRESH_TOKEN),
            Closing(4403, "forbidden", "this user may not connect", ComeBack.NEVER),
            Closing(4408, "too_slow", "the client reads too slowly", ComeBack.AT_ONCE),
            Closing(4409, "too_many_connections", "the user has too many connections", ComeBack.LATER),
            Closing(4410, "silent", "the client did not answer a ping", ComeBack.AT_ONCE),
            Closing(4429, "rate", "the client sends too many frames", ComeBack.LATER),
        )
    }
)
