"""The pages that every node has."""

import asyncio

import pytest

from daemon import metrics
from daemon.app import site
from daemon.gateway.http import Call, Page, Request
from daemon.health import Readiness

REQUEST = Request("GET", "/metrics", "", "1.1", {}, 0)


async def test_while_pages_of_metrics_are_written_others_have_their_turn_and_the_cpu_is_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site, "STEP", 0.0)
    handler = site.site(Readiness(), lambda: (), {}).handler("GET", "/metrics")
    assert handler is not None
    charged: list[float] = []
    pages = [asyncio.ensure_future(handler(Call(REQUEST, b"", True, charged.append))) for _ in range(2)]
    turns = 0
    while not all(page.done() for page in pages):
        await asyncio.sleep(0)
        turns += 1
    pieces = len(list(metrics.exposition()))
    assert turns > 2 * pieces, "two pages were written in one turn"
    assert len(charged) > 2 * pieces
    assert 0 < sum(charged)
    one, two = [await page for page in pages]
    assert {(200, "text/plain")} == {(page.status, page.content_type.partition(";")[0]) for page in (one, two)}
    assert names(one) == names(two) == names(Page(200, b"".join(metrics.exposition()), ""))


def names(page: Page) -> set[bytes]:
    """The lines that name a metric."""
    return {line for line in page.body.splitlines() if line.startswith(b"# TYPE")}
