"""Which pages may connect, which names this daemon has, and whose word counts about a client's address."""

from collections.abc import Mapping
from ipaddress import ip_network

import pytest
from websockets.frames import Opcode

from daemon.gateway.door import OTHER_HOST, OTHER_ORIGIN, Door, ProxyHeader
from daemon.gateway.http import Request, text_page
from tests.gateway.peers import UPGRADE, Server, request, serving

PROXY = ip_network("127.0.0.0/8")


def asking(headers: Mapping[str, str]) -> Request:
    return Request("GET", "/v1", "", "1.1", headers, 0)


def test_a_page_may_connect_if_its_origin_is_ours_or_listed() -> None:
    door = Door(origins=frozenset({"https://chat.example.com", "app://x"}), admits_local_pages=False)
    allowed = (
        ("https://ours.example.com", "ours.example.com"),
        ("https://ours.example.com", "OURS.example.com:443"),
        ("http://ours.example.com", "ours.example.com:80"),
        ("http://ours.example.com:8787", "ours.example.com:8787"),
        ("http://[::1]:8787", "[::1]:8787"),
        ("https://chat.example.com", "ours.example.com"),
        ("app://x", "ours.example.com"),
    )
    refused = (
        ("null", "127.0.0.1:8787"),
        ("http://localhost:5173", "127.0.0.1:8787"),
        ("https://chat.example.com:8443", "ours.example.com"),
        ("http://chat.example.com", "ours.example.com"),
        ("https://chat.example.com.evil.example", "ours.example.com"),
        ("https://evilours.example.com", "ours.example.com"),
        ("http://ours.example.com:80", "ours.example.com:8787"),
        ("https://ours.example.com", "ours.example.com:80"),
        ("", ""),
        ("://", ""),
        ("*", "ours.example.com"),
    )

    for expected, cases in ((None, allowed), (OTHER_ORIGIN, refused)):
        for origin, host in cases:
            assert expected == door.wrong_origin(asking({"origin": origin, "host": host})), (origin, host)
    assert door.wrong_origin(asking({"host": "ours.example.com"})) is None, "not a browser"
    everybody = Door(origins=frozenset({"*"}), admits_local_pages=False)
    assert everybody.wrong_origin(asking({"origin": "null", "host": "x"})) is None


def test_a_page_that_came_without_tls_is_not_a_page_of_a_daemon_that_has_it() -> None:
    door = Door(has_tls=True, admits_local_pages=False)
    for host in ("ours.example.com", "ours.example.com:80", "ours.example.com:443"):
        for origin in ("http://ours.example.com", "http://ours.example.com:443", "http://ours.example.com:80"):
            assert OTHER_ORIGIN == door.wrong_origin(asking({"origin": origin, "host": host}))
    assert door.wrong_origin(asking({"origin": "https://ours.example.com", "host": "ours.example.com:443"})) is None
    listed = Door(has_tls=True, origins=frozenset({"http://ours.example.com"}))
    assert listed.wrong_origin(asking({"origin": "http://ours.example.com", "host": "ours.example.com"})) is None


@pytest.mark.parametrize("origin", ["null", "http://localhost:5173", "http://127.0.0.1", "http://[::1]:80"])
def test_pages_of_this_machine_may_connect_to_what_they_call_this_machine(origin: str) -> None:
    assert Door().wrong_origin(asking({"origin": origin, "host": "127.0.0.1:8787"})) is None
    for host in ("192.0.2.1:8787", "rowcast.example.com", "127.0.0.1.example.com"):
        assert OTHER_ORIGIN == Door().wrong_origin(asking({"origin": origin, "host": host}))
    for other in (
        "http://x.example",
        "http://localhost:80.x.example",
        "http://localhost.x.example:80",
        "localhost:80",
    ):
        assert OTHER_ORIGIN == Door().wrong_origin(asking({"origin": other, "host": "127.0.0.1:8787"}))


def test_only_names_of_ours_and_addresses_name_this_daemon() -> None:
    door = Door(hosts=frozenset({"chat.example.com"}))
    for host in ("chat.example.com", "CHAT.example.com:8787", "localhost:1", "192.0.2.1:80", "[2001:db8::1]:80"):
        assert door.wrong_host(asking({"host": host})) is None
    for host in ("", "x.chat.example.com", "chat.example.com.", "rebound.example:8787", "127.0.0.1.nip.example"):
        assert OTHER_HOST == door.wrong_host(asking({"host": host}))
        assert Door().wrong_host(asking({"host": host})) is None, "without names, any will do"
        assert not Door().is_named_in(asking({"host": host})), "but it is not trusted"


@pytest.mark.parametrize(
    ("header", "value", "client"),
    [
        ("x-forwarded-for", "203.0.113.9", "203.0.113.9"),
        ("x-forwarded-for", "1.2.3.4, 203.0.113.9", "203.0.113.9"),  # the first is forged
        ("x-forwarded-for", "1.2.3.4,203.0.113.9, 127.0.0.2", "203.0.113.9"),  # through two proxies
        ("x-forwarded-for", "203.0.113.9:4711", "203.0.113.9"),
        ("x-forwarded-for", "2001:db8::1", "2001:db8::1"),
        ("x-forwarded-for", "[2001:db8::1]:4711", "2001:db8::1"),
        ("x-forwarded-for", "::ffff:203.0.113.9", "203.0.113.9"),
        ("x-forwarded-for", "1.2.3.4, nonsense", ""),
        ("x-forwarded-for", "1.2.3.4,", ""),
        ("x-forwarded-for", "127.0.0.1, 127.0.0.2", ""),
        ("x-forwarded-for", "", ""),
        ("forwarded", 'for="1.2.3.4", for=203.0.113.9;proto=https', "203.0.113.9"),
        ("forwarded", 'by=1.1.1.1; For="[2001:db8::1]:4711"', "2001:db8::1"),
        ("forwarded", 'for="1.2.3.4, for=203.0.113.9', "203.0.113.9"),  # a quote that never ends is forged
        ("forwarded", 'for=1.2.3.4, for="203.0.113.9:_hidden"', "203.0.113.9"),
        ("forwarded", "for=1.2.3.4, for=_hidden", ""),
        ("forwarded", "203.0.113.9", ""),
    ],
)
def test_the_last_address_that_is_not_a_proxys_is_the_client(header: ProxyHeader, value: str, client: str) -> None:
    door = Door(proxies=(PROXY,), proxy_header=header)
    assert client == door.client_behind_proxy({header: value})
    other = "forwarded" if header == "x-forwarded-for" else "x-forwarded-for"
    assert door.client_behind_proxy({other: value}) == "", "the other header may be the client's own"


async def connect(server: Server, **headers: str) -> int:
    peer = await server.raw()
    await peer.send(
        request("GET /v1", {**UPGRADE, **{name.replace("_", "-"): text for name, text in headers.items()}})
    )
    return int((await peer.read_head()).split()[1])


async def test_a_page_of_another_origin_gets_403_and_one_for_another_host_421() -> None:
    door = Door(hosts=frozenset({"chat.example.com"}))
    async with serving({"/": lambda: text_page("hello")}, door=door) as server:
        assert await connect(server, Origin="https://evil.example") == 403
        assert await connect(server, Origin="null") == 101
        assert await connect(server, Host="rebound.example", Origin="http://rebound.example") == 421
        assert await connect(server, Host="chat.example.com", Origin="https://chat.example.com") == 101
        peer = await server.raw()
        await peer.send(request("GET /v1/stream?topic=t", {"Origin": "https://evil.example"}))
        assert (await peer.read_head()).split()[1] == b"403"
        peer = await server.raw()
        await peer.send(request("GET /", {"Origin": "https://evil.example"}))
        assert (await peer.read_head()).split()[1] == b"200", "a page may be loaded from anywhere"


async def test_limits_of_an_address_count_the_clients_of_a_trusted_proxy() -> None:
    async with serving(door=Door(proxies=(PROXY,)), per_address=2) as server:
        for client in ("203.0.113.1", "9.9.9.9, 203.0.113.1", "203.0.113.2", "2001:db8::1", "2001:db8::2"):
            assert await connect(server, X_Forwarded_For=client) == 101
        assert await connect(server, X_Forwarded_For="1.2.3.4, 203.0.113.1") == 429
        assert await connect(server, X_Forwarded_For="2001:db8::3") == 429, "one /64"
        assert await connect(server, X_Forwarded_For="203.0.113.2") == 101
        infos = {info.peer.partition(" via 127.0.0.1:")[0] for info in server.gateway.sessions(10)}
        assert infos == {"203.0.113.1", "203.0.113.2", "2001:db8::1", "2001:db8::2"}


async def test_a_client_that_is_no_proxy_cannot_choose_its_address() -> None:
    async with serving(door=Door(proxies=(ip_network("192.0.2.0/24"),)), per_address=2) as server:
        assert await connect(server, X_Forwarded_For="203.0.113.1") == 101
        assert await connect(server, Forwarded="for=203.0.113.2") == 101
        peer = await server.raw()
        assert (await peer.read_head()).split()[1] == b"429"


async def test_a_close_frame_may_come_between_two_fragments() -> None:
    async with serving() as server:
        peer, _ = await server.open()
        await peer.send_frame(Opcode.TEXT, b"half", fin=False)
        await peer.send_frame(Opcode.CLOSE, b"\x03\xe8")
        assert await peer.read_all() == b"\x88\x02\x03\xe8"
