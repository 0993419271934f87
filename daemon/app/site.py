"""The pages that are served beside the websocket."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from daemon import __version__, metrics
from daemon.contracts.asyncapi import asyncapi
from daemon.contracts.schema import json_schema
from daemon.files import folder
from daemon.gateway.http import Handler, Page, Site, json_page, script_page, static_pages, text_page
from daemon.gateway.identity import Identity
from daemon.health import Readiness
from daemon.packs import Pack
from daemon.pages.console import ConsoleOptions
from daemon.settings import Settings

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
        "/metrics": _metrics_page,
        "/asyncapi.json": _contract_page(asyncapi, packs),
        "/schema.json": _contract_page(json_schema, packs),
    }
    return Site(pages, handlers)


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


def _metrics_page() -> Page:
    body, content_type = metrics.exposition()
    return Page(200, body, content_type)
