import base64
import hashlib
import math

import pytest

from daemon.gateway.http import Page, Site, html_page, json_page, text_page


def policy(page: Page) -> dict[str, list[str]]:
    directives = [directive.split() for directive in page.headers["Content-Security-Policy"].split("; ")]
    return {name: sources for name, *sources in directives}


def source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_every_answer_says_what_a_browser_must_not_do_with_it() -> None:
    head = text_page("hello").serialize().decode()
    assert "X-Content-Type-Options: nosniff\r\n" in head
    assert "Referrer-Policy: no-referrer\r\n" in head
    assert "Cache-Control: no-cache\r\n" in head
    assert "Connection: close\r\n" in head
    assert "Server:" not in head


def test_a_pages_own_headers_win() -> None:
    page = Page(200, b"", "text/javascript", {"Cache-Control": "max-age=60"})
    head = page.serialize().decode()
    assert "Cache-Control: max-age=60\r\n" in head
    assert "no-cache" not in head


def test_text_ends_in_one_newline() -> None:
    assert text_page("ok").body == b"ok\n"
    assert text_page("ok\n").body == b"ok\n"
    assert text_page("ok", 503, {"Retry-After": "1"}).headers == {"Retry-After": "1"}


def test_json_is_compact_and_refuses_what_json_has_not() -> None:
    assert json_page({"name": "Grüße", "n": [1, None]}, 503) == Page(
        503, '{"name":"Grüße","n":[1,null]}'.encode(), "application/json"
    )
    with pytest.raises(ValueError, match="JSON"):
        json_page(math.nan)


def test_html_may_run_and_wear_only_what_stands_in_it() -> None:
    page = html_page(
        "<!doctype html><style>p { color: red }</style><style>\nb {}\n</style>"
        "<p>&lt;script&gt; <script>if (1 < 2 && '<b>') {}</script><script src='/a.js'></script>"
        "<!-- <script>no</script> --><script type=module>import '/b.js'</script>"
    )
    assert policy(page)["style-src"] == ["'self'", source("p { color: red }"), source("\nb {}\n")]
    assert policy(page)["script-src"] == ["'self'", source("if (1 < 2 && '<b>') {}"), source("import '/b.js'")]


def test_html_may_connect_home_and_nobody_may_frame_it() -> None:
    page = html_page("<p>hello</p>")
    assert policy(page)["connect-src"] == ["'self'", "ws:", "wss:"]
    assert policy(page)["frame-ancestors"] == ["'none'"]
    assert policy(page)["default-src"] == ["'none'"]
    assert policy(page)["base-uri"] == ["'none'"]
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert page.content_type == "text/html; charset=utf-8"


def test_the_hash_is_of_the_script_as_a_browser_reads_it() -> None:
    page = html_page("<script>\r\nrun()\r\n</script>")
    assert policy(page)["script-src"] == ["'self'", source("\nrun()\n")]
    assert b"\r" not in page.body


def test_a_site_knows_its_paths_and_nothing_else() -> None:
    site = Site({"/": lambda: text_page("root")})
    assert site.answer("GET", "/").body == b"root\n"
    assert site.answer("HEAD", "/").body == b"root\n"
    assert [site.answer(method, path).status for method, path in [("GET", "/x"), ("POST", "/"), ("POST", "/x")]] == [
        404,
        405,
        404,
    ]
