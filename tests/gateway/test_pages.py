import math
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import pytest

from daemon.files import folder
from daemon.gateway.http import Call, Page, Site, html_page, json_page, static_pages, text_page


def policy(page: Page) -> dict[str, list[str]]:
    directives = [directive.split() for directive in page.headers["Content-Security-Policy"].split("; ")]
    return {name: sources for name, *sources in directives}


def test_every_response_has_the_security_headers() -> None:
    head = text_page("hello").serialize().decode()
    assert "X-Content-Type-Options: nosniff\r\n" in head
    assert "Referrer-Policy: no-referrer\r\n" in head
    assert "Cache-Control: no-cache\r\n" in head
    assert "Connection: close\r\n" in head
    assert "Server:" not in head


def test_a_pages_own_headers_override_the_common_ones() -> None:
    page = Page(200, b"", "text/javascript", {"Cache-Control": "max-age=60"})
    head = page.serialize().decode()
    assert "Cache-Control: max-age=60\r\n" in head
    assert "no-cache" not in head


def test_text_ends_in_one_newline() -> None:
    assert text_page("ok").body == b"ok\n"
    assert text_page("ok\n").body == b"ok\n"
    assert text_page("ok", 503, {"Retry-After": "1"}).headers == {"Retry-After": "1"}


def test_json_is_compact_and_nan_is_refused() -> None:
    assert json_page({"name": "Grüße", "n": [1, None]}, 503) == Page(
        503, '{"name":"Grüße","n":[1,null]}'.encode(), "application/json"
    )
    with pytest.raises(ValueError, match="JSON"):
        json_page(math.nan)


def test_html_may_load_scripts_and_styles_of_its_own_origin_only() -> None:
    page = html_page("<p>hello</p>")
    assert policy(page)["script-src"] == ["'self'"]
    assert policy(page)["style-src"] == ["'self'"]


def test_html_may_open_websockets_and_cannot_be_framed() -> None:
    page = html_page("<p>hello</p>")
    assert policy(page)["connect-src"] == ["'self'", "ws:", "wss:"]
    assert policy(page)["frame-ancestors"] == ["'none'"]
    assert policy(page)["default-src"] == ["'none'"]
    assert policy(page)["base-uri"] == ["'none'"]
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert page.content_type == "text/html; charset=utf-8"


def test_static_pages_are_html_scripts_and_style_sheets(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    for name in ("index.html", "more.html", "chat/app.js", "style.css", "notes.txt", "app.js~", ".hidden"):
        (tmp_path / name).write_text(f"{name}: Grüße", encoding="utf-8")
    pages = static_pages(tmp_path)
    assert pages == {
        "/": html_page("index.html: Grüße"),
        "/more": html_page("more.html: Grüße"),
        "/chat/app.js": Page(200, "chat/app.js: Grüße".encode(), "text/javascript; charset=utf-8"),
        "/style.css": Page(200, "style.css: Grüße".encode(), "text/css; charset=utf-8"),
    }
    (tmp_path / "chat/app.js").write_text("changed")
    assert Site(pages).answer("GET", "/chat/app.js").body == "chat/app.js: Grüße".encode()


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        static_pages(tmp_path)


def test_each_page_and_module_loads_only_what_is_served() -> None:
    pages = static_pages(folder("web"))
    served = {*pages, "/rowcast.js"}
    loaded = set()
    for path, page in pages.items():
        text = page.body.decode()
        found = re.findall(r'<(?:script|link)\b[^>]*(?:src|href)="(?!data:)([^"]+)"', text)
        found += re.findall(r'^import .* from "([^"]+)";', text, re.MULTILINE)
        loaded |= {urljoin(path, link) for link in found}
    assert {"/chat/main.js", "/console/main.js", "/rowcast.js"} <= loaded
    assert set() == loaded - served
    assert {"/", "/console"} == served - loaded, "no file is left over"


def test_a_site_knows_its_paths_and_nothing_else() -> None:
    site = Site({"/": lambda: text_page("root"), "/fixed": text_page("fixed")})
    assert site.answer("GET", "/fixed").body == b"fixed\n"
    assert site.answer("GET", "/").body == b"root\n"
    assert site.answer("HEAD", "/").body == b"root\n"
    assert [site.answer(method, path).status for method, path in [("GET", "/x"), ("POST", "/"), ("POST", "/x")]] == [
        404,
        405,
        404,
    ]


def test_a_site_without_some_pages_has_the_others_and_changes_what_is_asked() -> None:
    async def handle(call: Call) -> Page:
        return text_page("handled")

    ready = [json_page({"ready": False, "reasons": ["secret"]}, 503)]
    pages: dict[str, Page | Callable[[], Page]] = {
        "/": text_page("home"),
        "/console": text_page("console"),
        "/console/main.js": text_page("script"),
        "/consoles": text_page("another"),
        "/readyz": lambda: ready[0],
    }
    whole = Site(pages, {("GET", "/console/state"): handle, ("POST", "/demo/say"): handle})
    public = whole.without(["/console"], {"/readyz": lambda page: text_page("bare", page.status)})
    for path, status in {
        "/": 200,
        "/console": 404,
        "/console/main.js": 404,
        "/consoles": 200,
        "/readyz": 503,
    }.items():
        assert public.answer("GET", path).status == status
    assert b"ROWCAST_METRICS_LISTEN" in public.answer("GET", "/console").body
    assert public.answer("GET", "/readyz").body == b"bare\n"
    assert public.handler("GET", "/console/state") is None
    assert b"ROWCAST_METRICS_LISTEN" in public.answer("GET", "/console/state").body
    assert public.handler("POST", "/demo/say") is handle
    assert whole.handler("GET", "/console/state") is handle
    assert whole.answer("GET", "/readyz") is ready[0]
    ready[0] = json_page({"ready": True})
    assert public.answer("GET", "/readyz").status == 200, "it is made afresh"
