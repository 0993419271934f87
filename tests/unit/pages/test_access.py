import time
from collections.abc import Mapping

import pytest

from daemon.core.errors import BadToken
from daemon.gateway.auth import Claims
from daemon.gateway.http import Call, Request
from daemon.pages.access import BAD_TOKEN, NO_TOKEN, NOT_OPERATOR, OTHER_SITE, json_body, refusal

TOKENS = {"operator": Claims("ada", time.time() + 60, operator=True), "user": Claims("bob", time.time() + 60)}


def verify(token: str) -> Claims:
    if token not in TOKENS:
        raise BadToken
    return TOKENS[token]


def call(headers: Mapping[str, str], *, is_local: bool = True, body: bytes = b"") -> Call:
    whole = {"host": "127.0.0.1:8787", **headers}
    return Call(Request("GET", "/console/state", "", "1.1", whole, 0), body, is_local)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8787", "localhost:80", "LOCALHOST", "[::1]:8787", "[::1]"])
def test_on_this_machine_the_console_needs_no_token(host: str) -> None:
    assert refusal(call({"host": host}), verify, trusts_local=True) is None


@pytest.mark.parametrize(
    "host", ["", "rowcast.example.com", "127.0.0.1.example.com:80", "192.0.2.1", "localhost.", "::"]
)
def test_a_name_that_could_point_anywhere_is_not_this_machine(host: str) -> None:
    assert NO_TOKEN == refusal(call({"host": host}), verify, trusts_local=True)


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "x-real-ip", "via"])
def test_what_a_proxy_passed_on_is_not_from_this_machine(header: str) -> None:
    assert NO_TOKEN == refusal(call({header: "127.0.0.1"}), verify, trusts_local=True)


def test_others_need_an_operators_token_and_so_does_everybody_in_production() -> None:
    for trusts_local, is_local in ((True, False), (False, True), (False, False)):
        cases: tuple[tuple[object, dict[str, str]], ...] = (
            (NO_TOKEN, {}),
            (None, {"authorization": "Bearer operator"}),
            (None, {"authorization": "bearer  operator "}),
            (NOT_OPERATOR, {"authorization": "Bearer user"}),
            (BAD_TOKEN, {"authorization": "Bearer forged"}),
            (BAD_TOKEN, {"authorization": "Basic operator"}),
            (BAD_TOKEN, {"authorization": ""}),
        )
        for expected, headers in cases:
            assert expected == refusal(call(headers, is_local=is_local), verify, trusts_local=trusts_local)


def test_a_token_that_is_given_counts_on_this_machine_too() -> None:
    assert NOT_OPERATOR == refusal(call({"authorization": "Bearer user"}), verify, trusts_local=True)


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://elsewhere.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ],
)
def test_pages_of_other_sites_are_refused_even_with_a_token(headers: dict[str, str]) -> None:
    assert OTHER_SITE == refusal(call({"authorization": "Bearer operator", **headers}), verify, trusts_local=True)


def test_the_consoles_own_page_is_let_in() -> None:
    own = call({"origin": "http://127.0.0.1:8787", "sec-fetch-site": "same-origin"})
    assert refusal(own, verify, trusts_local=True) is None


def test_a_body_is_a_json_object_with_its_content_type() -> None:
    def read(body: bytes, content_type: str = "application/json") -> object:
        return json_body(call({"content-type": content_type}, body=body))

    assert {"seq": 1} == read(b'{"seq": 1}') == read(b'{"seq": 1}', "Application/JSON; charset=utf-8")
    for body in (b"", b"[]", b"1", b"{", b"\xff", b"[" * 10_000):
        assert read(body) is None
    for content_type in ("", "text/plain", "application/x-www-form-urlencoded"):
        assert read(b"{}", content_type) is None
