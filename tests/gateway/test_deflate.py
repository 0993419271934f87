"""permessage-deflate, with real clients that offer it and peers that misuse it."""

import json
import zlib

import pytest
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Opcode

from daemon.gateway.deflate import Deflate, negotiate
from daemon.gateway.framing import encode
from tests.gateway.peers import UPGRADE, RawPeer, Server, frame, request, serving, silence
from tests.support.browser import browser_page

MIN_SIZE = 100
LARGE = json.dumps({"op": "changes", "changes": [{"seq": seq, "kind": "insert"} for seq in range(500)]}).encode()
SMALL = b'{"op":"pong"}'
OFFER = "permessage-deflate; client_max_window_bits"


async def deflating(server: Server, offer: str = OFFER) -> tuple[RawPeer, bytes]:
    """A peer that has completed a handshake with this offer, and the response."""
    peer = await server.raw()
    await peer.send(request("GET /v1", UPGRADE | {"Sec-WebSocket-Extensions": offer}))
    return peer, await peer.read_head()


async def read_deflated(peer: RawPeer) -> tuple[bool, bytes]:
    """The next frame: whether it is compressed, and its raw payload."""
    first, size = await peer._exactly(2)
    if size >= 126:
        size = int.from_bytes(await peer._exactly(2 if size == 126 else 8), "big")
    return bool(first & 0x40), await peer._exactly(size)


def marked(data: bytes) -> bytes:
    """The same frame with the bit that says it is compressed."""
    return bytes([data[0] | 0x40]) + data[1:]


def inflated(payload: bytes) -> bytes:
    return zlib.decompressobj(wbits=-12).decompress(payload + b"\0\0\xff\xff")


async def test_nothing_is_compressed_unless_the_operator_enables_it() -> None:
    async with serving() as server, server.connect(compression="deflate") as client:
        await client.send(LARGE.decode())
        assert LARGE.decode() == await client.recv()
        assert client.protocol.extensions == []


async def test_a_client_that_offers_compression_sends_and_gets_compressed_messages() -> None:
    async with serving(deflate_bytes=MIN_SIZE) as server, server.connect(compression="deflate") as client:
        assert ["permessage-deflate"] == [extension.name for extension in client.protocol.extensions]
        for text in (LARGE, SMALL, LARGE):
            await client.send(text.decode())
            assert text.decode() == await client.recv()


async def test_a_client_that_does_not_offer_compression_gets_plain_messages() -> None:
    async with serving(deflate_bytes=MIN_SIZE) as server, server.connect(compression=None) as client:
        await client.send(LARGE.decode())
        assert LARGE.decode() == await client.recv()
        assert client.protocol.extensions == []


async def test_large_frames_of_a_batch_are_compressed_and_small_ones_unchanged() -> None:
    async with serving(deflate_bytes=MIN_SIZE) as server:
        peer, head = await deflating(server)
        assert b"server_no_context_takeover" in head
        assert b"client_no_context_takeover" in head
        recorder = await server.handlers.get()
        huge = LARGE * 20
        batch = b"".join(map(encode, [SMALL, LARGE, SMALL, huge, bytes(range(32, 127))]))
        queued = recorder.socket.write(batch)
        found = [await read_deflated(peer) for _ in range(5)]
    assert 0 == queued
    assert [False, True, False, True, False] == [compressed for compressed, _ in found]
    texts = [inflated(payload) if compressed else payload for compressed, payload in found]
    assert [SMALL, LARGE, SMALL, huge, bytes(range(32, 127))] == texts
    assert len(found[1][1]) < len(LARGE) / 3


def test_a_batch_is_compressed_once_for_all_clients() -> None:
    deflate = Deflate(MIN_SIZE)
    batch = encode(LARGE) + encode(SMALL)
    assert deflate(batch) is deflate(batch)
    other = encode(LARGE[::-1])
    assert deflate(other) is not deflate(batch)
    small = encode(SMALL)
    assert deflate(small) is small


@pytest.mark.parametrize(
    ("offer", "accepted"),
    [
        ("permessage-deflate", True),
        ("permessage-deflate; server_max_window_bits=12; client_max_window_bits=12", True),
        ("permessage-deflate; server_max_window_bits=15", True),
        ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", True),
        ("x-webkit-deflate-frame, permessage-deflate", True),
        ("permessage-deflate; server_max_window_bits=9, permessage-deflate", True),
        ("permessage-deflate; server_max_window_bits=9", False),
        ("permessage-deflate; server_max_window_bits=16", False),
        ("permessage-deflate; colour=red", False),
        ("permessage-bzip2", False),
        ("permessage-deflate; =", False),
        (",;,", False),
        ("", False),
    ],
)
async def test_an_offer_that_cannot_be_met_is_declined_and_the_client_still_served(
    offer: str, *, accepted: bool
) -> None:
    async with serving(deflate_bytes=MIN_SIZE) as server:
        peer, head = await deflating(server, offer)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert accepted == (b"Sec-WebSocket-Extensions: permessage-deflate" in head)
        recorder = await server.handlers.get()
        recorder.socket.write(encode(LARGE))
        compressed, payload = await read_deflated(peer)
    assert accepted == compressed
    assert LARGE == (inflated(payload) if compressed else payload)


def test_the_negotiated_window_is_at_most_what_the_client_offered() -> None:
    for bits in (12, 13, 15):
        factory = ClientPerMessageDeflateFactory(server_max_window_bits=bits, client_max_window_bits=None)
        agreed = negotiate(f"permessage-deflate; server_max_window_bits={bits}")
        assert agreed is not None
        assert f"server_max_window_bits={min(bits, 12)}" in agreed[0]
        assert factory.name in agreed[0]


@pytest.mark.parametrize("fragments", [1, 2])
async def test_a_message_that_inflates_beyond_the_limit_closes_with_1009(fragments: int) -> None:
    bomb = zlib.compressobj(9, wbits=-15)
    data = bomb.compress(bytes(50_000_000)) + bomb.flush(zlib.Z_SYNC_FLUSH)
    async with serving(deflate_bytes=MIN_SIZE, answer=silence) as server:
        peer, _ = await deflating(server)
        recorder = await server.handlers.get()
        half = len(data) // fragments
        await peer.send(marked(frame(Opcode.TEXT, data[:half], fin=fragments == 1)))
        if fragments == 2:
            await peer.send(frame(Opcode.CONT, data[half:]))
        assert 1009 == await peer.read_close()
    assert recorder.texts == []


async def test_a_compressed_message_that_was_not_negotiated_closes_with_1002() -> None:
    async with serving() as server:
        peer, _ = await server.open()
        await peer.send(marked(frame(Opcode.TEXT, b"\xca\x48\xcd\xc9\xc9\x07\x00")))
        assert 1002 == await peer.read_close()


async def test_a_browser_reads_compressed_messages() -> None:
    script = """([url, text]) => new Promise((resolve, reject) => {
        const socket = new WebSocket(url, "rowcast.v1");
        socket.onopen = () => socket.send(text);
        socket.onerror = () => reject(new Error("the socket failed"));
        socket.onmessage = (event) => resolve([socket.extensions, event.data]);
    })"""
    async with serving(deflate_bytes=MIN_SIZE) as server, browser_page() as (page, _):
        extensions, text = await page.evaluate(script, [server.url, LARGE.decode()])
    assert extensions.startswith("permessage-deflate")
    assert LARGE.decode() == text
