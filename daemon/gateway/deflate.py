"""permessage-deflate (RFC 7692), arranged so that a frame sent to many clients is compressed once."""

import zlib
from typing import Final

from websockets.exceptions import InvalidHeaderFormat, NegotiationError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.headers import build_extension, parse_extension

from daemon.gateway.framing import split

WINDOW: Final = 12  # bits; small enough for clients that save memory
LEVEL: Final = 6
COMPRESSED: Final = 0x40  # RSV1, in the first byte of a frame
TAIL: Final = 4  # bytes that end a flushed message and are not sent: RFC 7692, section 7.2.1

# Without context takeover each message stands alone: all peers get the same bytes, and an idle one costs no memory.
_NEGOTIATION: Final = ServerPerMessageDeflateFactory(
    server_no_context_takeover=True, client_no_context_takeover=True, server_max_window_bits=WINDOW
)


def negotiate(offers: str) -> tuple[str, Extension] | None:
    """The response to the offers in `Sec-WebSocket-Extensions`, and the decoder for the peer's frames.

    None if no offer can be accepted.
    """
    try:
        for name, parameters in parse_extension(offers):
            if name == _NEGOTIATION.name:
                try:
                    accepted, extension = _NEGOTIATION.process_request_params(parameters, [])
                except NegotiationError:
                    continue
                if extension.local_max_window_bits == WINDOW:  # a smaller window could not read the shared frames
                    return build_extension([(name, list(accepted))]), extension
    except InvalidHeaderFormat:
        pass  # the extension is optional, so a malformed offer is ignored
    return None


class Deflate:
    """Compresses frames whose payload is at least `min_size` bytes, if that makes them smaller.

    A call with the same object as the previous call returns the same result without compressing again.
    """

    def __init__(self, min_size: int) -> None:
        self._min_size = min_size
        self._plain = self._deflated = b""

    def __call__(self, frames: bytes) -> bytes:
        """Compress `frames`: one or more whole frames, each final, unmasked and uncompressed."""
        if len(frames) < self._min_size:
            return frames
        if frames is not self._plain:
            self._plain, self._deflated = frames, self._compress(frames)
        return self._deflated

    def _compress(self, frames: bytes) -> bytes:
        return b"".join(self._smaller(frame, payload) for frame, payload in split(frames))

    def _smaller(self, frame: bytes, payload: bytes) -> bytes:
        if len(payload) < self._min_size:
            return frame
        compressor = zlib.compressobj(LEVEL, wbits=-WINDOW)
        deflated = (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-TAIL]
        if len(deflated) >= len(payload):
            return frame
        frame = Frame(Opcode.TEXT, deflated).serialize(mask=False)
        return bytes([frame[0] | COMPRESSED]) + frame[1:]
