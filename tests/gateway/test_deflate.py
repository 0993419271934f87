"""permessage-deflate: real clients that offer it, and peers that misuse it."""

import json
import zlib

import pytest
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Opcode

from daemon.gateway.connection import encode
from daemon.gateway.deflate import Deflate, negotiate
from tests.gateway.peers import UPGRADE, RawPeer, Served, frame, request, serving, silence
from tests.support.browser import browser_page

LEAST = 100
LARGE = json.dumps({"op": "changes", "changes": [{"seq": seq, "kind": "insert"} for seq in range(500)]}).encode()
SMALL = b'{"op":"pong"}'
OFFER = "permessage-deflate; client_max_window_bits"


async def deflating(served: Served, offer: str = OFFER) -> tuple[RawPeer, bytes]:
    """A peer that has shaken hands with this offer, and the answer."""
    peer = await served.raw()
    await peer.send(request("GET /v1", UPGRADE | {"Sec-WebSocket-Extensions": offer}))
    return peer, await peer.read_head()


async def read_deflated(peer: RawPeer) -> tuple[bool, bytes]:
    """The next frame: whether it is compressed, and its payload as it came."""
    first, size = await peer._exactly(2)
    if size >= 126:
        size = int.from_bytes(await peer._exactly(2 if size == 126 else 8), "big")
    return bool(first & 0x40), await peer._exactly(size)


def marked(data: bytes) -> bytes:
    """The same frame, said to be compressed."""
    return bytes([data[0] | 0x40]) + data[1:]


def inflated(payload: bytes) -> bytes:
    return zlib.decompressobj(wbits=-12).decompress(payload + b"\0\0\xff\xff")


async def test_nothing_is_compressed_unless_the_operator_says_so() -> None:
    async with serving() as served, served.connect(compression="deflate") as client:
        await client.send(LARGE.decode())
        assert LARGE.decode() == await client.recv()
        assert client.protocol.extensions == []


async def test_a_client_that_offers_it_sends_and_gets_compressed_messages() -> None:
    async with serving(deflate_bytes=LEAST) as served, served.connect(compression="deflate") as client:
        assert ["permessage-deflate"] == [extension.name for extension in client.protocol.extensions]
        for text in (LARGE, SMALL, LARGE):
            await client.send(text.decode())
            assert text.decode() == await client.recv()


async def test_a_client_that_does_not_offer_it_gets_what_it_can_read() -> None:
    async with serving(deflate_bytes=LEAST) as served, served.connect(compression=None) as client:
        await client.send(LARGE.decode())
        assert LARGE.decode() == await client.recv()
        assert client.protocol.extensions == []


async def test_large_frames_of_a_batch_are_compressed_and_small_ones_are_as_they_were() -> None:
    async with serving(deflate_bytes=LEAST) as served:
        peer, head = await deflating(served)
        assert b"server_no_context_takeover" in head
        assert b"client_no_context_takeover" in head
        recorder = await served.attendants.get()
        huge = LARGE * 20
        batch = b"".join(map(encode, [SMALL, LARGE, SMALL, huge, bytes(range(32, 127))]))
        queued = recorder.socket.write(batch)
        found = [await read_deflated(peer) for _ in range(5)]
    assert 0 == queued
    assert [False, True, False, True, False] == [compressed for compressed, _ in found]
    texts = [inflated(payload) if compressed else payload for compressed, payload in found]
    assert [SMALL, LARGE, SMALL, huge, bytes(range(32, 127))] == texts
    assert len(found[1][1]) < len(LARGE) / 3


def test_a_batch_is_compressed_once_for_all_who_are_handed_it() -> None:
    deflate = Deflate(LEAST)
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
async def test_an_offer_that_cannot_be_met_is_declined_and_the_client_served(offer: str, *, accepted: bool) -> None:
    async with serving(deflate_bytes=LEAST) as served:
        peer, head = await deflating(served, offer)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert accepted == (b"Sec-WebSocket-Extensions: permessage-deflate" in head)
        recorder = await served.attendants.get()
        recorder.socket.write(encode(LARGE))
        compressed, payload = await read_deflated(peer)
    assert accepted == compressed
    assert LARGE == (inflated(payload) if compressed else payload)


def test_what_is_negotiated_is_what_a_client_asked_for() -> None:
    for bits in (12, 13, 15):
        factory = ClientPerMessageDeflateFactory(server_max_window_bits=bits, client_max_window_bits=None)
        agreed = negotiate(f"permessage-deflate; server_max_window_bits={bits}")
        assert agreed is not None
        assert f"server_max_window_bits={min(bits, 12)}" in agreed[0]
        assert factory.name in agreed[0]


@pytest.mark.parametrize("fragments", [1, 2])
async def test_a_message_that_becomes_too_large_ends_its_connection_with_1009(fragments: int) -> None:
    bomb = zlib.compressobj(9, wbits=-15)
    data = bomb.compress(bytes(50_000_000)) + bomb.flush(zlib.Z_SYNC_FLUSH)
    async with serving(deflate_bytes=LEAST, answer=silence) as served:
        peer, _ = await deflating(served)
        recorder = await served.attendants.get()
        half = len(data) // fragments
        await peer.send(marked(frame(Opcode.TEXT, data[:half], fin=fragments == 1)))
        if fragments == 2:
            await peer.send(frame(Opcode.CONT, data[half:]))
        assert 1009 == await peer.read_close()
    assert recorder.texts == []


async def test_a_compressed_message_without_an_agreement_ends_its_connection_with_1002() -> None:
    async with serving() as served:
        peer, _ = await served.open()
        await peer.send(marked(frame(Opcode.TEXT, b"\xca\x48\xcd\xc9\xc9\x07\x00")))
        assert 1002 == await peer.read_close()


async def test_a_browser_reads_what_is_compressed() -> None:
    script = """([url, text]) => new Promise((resolve, reject) => {
        const socket = new WebSocket(url, "rowcast.v1");
        socket.onopen = () => socket.send(text);
        socket.onerror = () => reject(new Error("the socket failed"));
        socket.onmessage = (event) => resolve([socket.extensions, event.data]);
    })"""
    async with serving(deflate_bytes=LEAST) as served, browser_page() as (page, _):
        extensions, text = await page.evaluate(script, [served.url, LARGE.decode()])
    assert extensions.startswith("permessage-deflate")
    assert LARGE.decode() == text
