"""The pages that are served beside the websocket."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST

from daemon import __version__, metrics
from daemon.contracts.asyncapi import asyncapi
from daemon.contracts.schema import json_schema
from daemon.files import folder
from daemon.gateway.http import Call, Handler, Page, Site, json_page, script_page, static_pages, text_page
from daemon.gateway.identity import Identity
from daemon.health import Readiness
from daemon.packs import Pack
from daemon.pages.console import ConsoleOptions
from daemon.settings import Settings

STEP: Final = 0.0005  # seconds after which the page of metrics lets others have their turn
KEPT: Final = "GET", "/console/kept"
"""Where a gateway asks a member for what its own console shows of the database. No listener has it."""


def console_options(settings: Settings, identity: Identity, *, has_samples: bool) -> ConsoleOptions:
    """Who may see the console."""
    is_local_trusted = settings.environment != "production"
    return ConsoleOptions(identity.verify, is_local_trusted, settings.workers, has_samples)


def site(
    readiness: Readiness,
    packs: Callable[[], Iterable[Pack]],
    handlers: Mapping[tuple[str, str], Handler],
) -> Site:
    """The pages that are served beside the websocket, and what answers other requests."""
    pages: dict[str, Page | Callable[[], Page]] = {
        **static_pages(folder("web")),
        "/rowcast.js": script_page(folder("clients/javascript") / "rowcast.js"),
        "/healthz": lambda: text_page(f"ok {__version__}\n"),
        "/readyz": partial(_readiness_page, readiness),
        "/asyncapi.json": _contract_page(asyncapi, packs),
        "/schema.json": _contract_page(json_schema, packs),
    }
    return Site(pages, {**handlers, **dict.fromkeys([("GET", "/metrics"), ("HEAD", "/metrics")], _metrics_page())})


def _readiness_page(readiness: Readiness) -> Page:
    """200 when ready, else 503 with the reasons. Warnings, if any, are in both."""
    reasons, warnings = readiness.reasons(), readiness.warnings()
    more = {"warnings": warnings} if warnings else {}
    return json_page({"ready": not reasons, "reasons": reasons, **more}, 503 if reasons else 200)


def _contract_page(make: Callable[[Iterable[Pack]], Any], packs: Callable[[], Iterable[Pack]]) -> Callable[[], Page]:
    """A page that is made when it is first asked for, and again after the packs have changed: it takes a while."""
    made: tuple[list[Pack], Page] | None = None

    def page() -> Page:
        nonlocal made
        served = list(packs())
        if made is None or made[0] != served:
            made = served, json_page(make(served))
        return made[1]

    return page


def _metrics_page() -> Handler:
    """It is written in steps, and for one request after the other: all at once would hold up every client."""
    turn = asyncio.Lock()

    async def page(call: Call) -> Page:
        async with turn:
            pieces, began = list[bytes](), time.thread_time()
            for piece in metrics.exposition():
                pieces.append(piece)
                spent = time.thread_time() - began
                if spent > STEP:
                    call.charge(spent)
                    await asyncio.sleep(0)
                    began = time.thread_time()
            call.charge(time.thread_time() - began)
        return Page(200, b"".join(pieces), CONTENT_TYPE_LATEST)

    return page
