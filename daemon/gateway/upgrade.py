"""The server side of the websocket handshake: RFC 6455, section 4.2."""

import base64
import hashlib
import re
from typing import Final, NamedTuple

from websockets.extensions import Extension

from daemon.core.wire import SUBPROTOCOL
from daemon.gateway.deflate import negotiate
from daemon.gateway.http import Page, Request, text_page

_GUID: Final = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY: Final = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes

_HTTP_1_1: Final = text_page("A WebSocket handshake needs HTTP/1.1.", 505)
_UPGRADE: Final = text_page("This is a WebSocket endpoint: use a WebSocket client.", 426, {"Upgrade": "websocket"})
_NO_KEY: Final = text_page("Sec-WebSocket-Key must occur once, with 16 bytes in base64.", 400)
_VERSION: Final = text_page("Sec-WebSocket-Version must be 13.", 400, {"Sec-WebSocket-Version": "13"})
_SUBPROTOCOL: Final = text_page(f'The subprotocol "{SUBPROTOCOL}" must be among those offered.', 400)


class Accepted(NamedTuple):
    """The 101 response, and the extensions that were negotiated."""

    response: bytes
    extensions: list[Extension]


def upgrade(request: Request, *, deflate: bool) -> Accepted | Page:
    """Accept a websocket handshake, or return the Page that refuses it.

    `deflate`: accept permessage-deflate if the client offers it.
    """
    headers = request.headers
    key = headers.get("sec-websocket-key", "")
    if request.version != "1.1":
        return _HTTP_1_1
    if not request.lists("connection", "upgrade") or headers.get("upgrade", "").lower() != "websocket":
        return _UPGRADE
    if not _KEY.fullmatch(key):
        return _NO_KEY
    if headers.get("sec-websocket-version") != "13":
        return _VERSION
    if SUBPROTOCOL not in map(str.strip, headers.get("sec-websocket-protocol", "").split(",")):
        return _SUBPROTOCOL
    accepted = base64.b64encode(hashlib.sha1((key + _GUID).encode(), usedforsecurity=False).digest()).decode()
    response = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accepted}\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n"
    )
    extensions = []
    if deflate and (agreed := negotiate(headers.get("sec-websocket-extensions", ""))):
        response += f"Sec-WebSocket-Extensions: {agreed[0]}\r\n"
        extensions.append(agreed[1])
    return Accepted(f"{response}\r\n".encode(), extensions)
