"""permessage-deflate (RFC 7692), in such a way that what many are written is compressed once."""

import zlib
from typing import Final

from websockets.exceptions import InvalidHeaderFormat, NegotiationError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.headers import build_extension, parse_extension

WINDOW: Final = 12  # bits: what clients grant who keep their own memory small
LEVEL: Final = 6
COMPRESSED: Final = 0x40  # in the first byte of a frame
TAIL: Final = 4  # bytes at the end of a flushed message that are not sent

# No message leans on an earlier one: so all peers can have the same bytes, and none costs memory between messages.
_NEGOTIATION: Final = ServerPerMessageDeflateFactory(
    server_no_context_takeover=True, client_no_context_takeover=True, server_max_window_bits=WINDOW
)


def negotiate(offers: str) -> tuple[str, Extension] | None:
    """The answer to the offers of `Sec-WebSocket-Extensions`, and what reads the peer's frames; None if none fits."""
    try:
        for name, parameters in parse_extension(offers):
            if name == _NEGOTIATION.name:
                try:
                    answered, extension = _NEGOTIATION.process_request_params(parameters, [])
                except NegotiationError:
                    continue
                if extension.local_max_window_bits == WINDOW:  # else the peer could not read what the others can
                    return build_extension([(name, list(answered))]), extension
    except InvalidHeaderFormat:
        pass  # nobody has to be understood who offers something optional
    return None


class Deflate:
    """Compresses frames for those who take it, each that has `least` bytes or more and becomes smaller.

    Whoever is handed the same object as the one before gets the same object back.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._plain = self._deflated = b""

    def __call__(self, frames: bytes) -> bytes:
        """`frames` are whole, final, unmasked and uncompressed."""
        if len(frames) < self._least:
            return frames
        if frames is not self._plain:
            self._plain, self._deflated = frames, self._compress(frames)
        return self._deflated

    def _compress(self, frames: bytes) -> bytes:
        done: list[bytes] = []
        begin = 0
        while begin < len(frames):
            size, start = frames[begin + 1], begin + 2
            if size >= 126:
                start += 2 if size == 126 else 8
                size = int.from_bytes(frames[begin + 2 : start], "big")
            end = start + size
            done.append(self._smaller(frames[begin:end], frames[start:end]))
            begin = end
        return b"".join(done)

    def _smaller(self, frame: bytes, payload: bytes) -> bytes:
        if len(payload) < self._least:
            return frame
        compressor = zlib.compressobj(LEVEL, wbits=-WINDOW)
        deflated = (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-TAIL]
        if len(deflated) >= len(payload):
            return frame
        frame = Frame(Opcode.TEXT, deflated).serialize(mask=False)
        return bytes([frame[0] | COMPRESSED]) + frame[1:]
