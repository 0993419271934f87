"""What processes tell each other about their clients: signals, and where presence has changed.

A message is split into pieces that NOTIFY can carry. Postgres delivers the notifications of one transaction together
and in order, so there is at most one incomplete message at a time, and a piece that does not continue it replaces it.
"""

import base64
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import from_json, to_json

from daemon.core.change import MAX_TOPIC, TOPIC_PATTERN

MAX_DATA: Final = 16 * 1024  # bytes of a signal's data
MAX_MESSAGE: Final = 256 * 1024  # bytes of a message
TEXT: Final = 5700  # bytes of a message in one piece: in base64, and with the other members, it has less than 8,000

_MODEL = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

Text = Annotated[str, Field(min_length=1, max_length=MAX_TOPIC, pattern=TOPIC_PATTERN)]
SignalName = Annotated[str, Field(min_length=1, max_length=64)]


def _json(text: str) -> str:
    return to_json(from_json(text, allow_inf_nan=False), inf_nan_mode="null").decode()


# As text: parsers limit how deep a message may nest, and what a client may send must never make one that is refused.
JsonText = Annotated[str, AfterValidator(_json)]


class Signal(BaseModel):
    """A signal of a client."""

    model_config = _MODEL

    topic: Text
    name: SignalName
    user: str
    data: JsonText = "null"


class Message(BaseModel):
    """Signals, and the topics in which somebody has come, gone or changed their data."""

    model_config = _MODEL

    signals: list[Signal] = []
    present: list[Text] = []


class Piece(BaseModel):
    """A part of a message: `place` counts from 0 to `count` - 1."""

    model_config = _MODEL

    process: Annotated[str, Field(min_length=1, max_length=64)]
    number: Annotated[int, Field(ge=0)]
    place: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=1, le=MAX_MESSAGE // TEXT + 1)]
    text: Annotated[str, Field(max_length=TEXT * 4 // 3)]


def pieces(process: str, number: int, message: Message) -> list[str]:
    """The pieces of message `number` of a process, in ASCII, whatever the encoding of the database."""
    text = message.model_dump_json(exclude_defaults=True).encode()
    parts = [text[start : start + TEXT] for start in range(0, len(text), TEXT)]
    return [
        Piece(
            process=process, number=number, place=place, count=len(parts), text=base64.b64encode(part).decode()
        ).model_dump_json()
        for place, part in enumerate(parts)
    ]


class Assembler:
    """Puts the pieces of other processes together."""

    def __init__(self, process: str) -> None:
        """`process` is this one, whose own pieces come back to it."""
        self._process = process
        self._expected: tuple[str, int, int, int] | None = (
            None  # the process, number, place and count of the next piece
        )
        self._parts: list[bytes] = []

    def add(self, text: str) -> Message | None:
        """The message that this piece completes, or None. Raises ValueError if it is malformed or continues none.

        Any role of the database can send anything.
        """
        piece = Piece.model_validate_json(text)
        if piece.process == self._process:
            return None
        here = piece.process, piece.number, piece.place, piece.count
        if piece.place == 0:
            self._parts = []
        elif here != self._expected:
            self._expected, self._parts = None, []
            raise ValueError("a piece is missing")
        self._parts.append(base64.b64decode(piece.text, validate=True))
        if piece.place + 1 < piece.count:
            self._expected = piece.process, piece.number, piece.place + 1, piece.count
            return None
        self._expected, parts, self._parts = None, self._parts, []
        return Message.model_validate(from_json(b"".join(parts), allow_inf_nan=False))
