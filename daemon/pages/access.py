"""Who may use a handler: same-origin pages, and peers with a token or on this machine."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from daemon.core.errors import BadToken
from daemon.gateway.auth import Claims
from daemon.gateway.door import host_name, is_this_machine
from daemon.gateway.http import Call, Page, Request, text_page

Verify = Callable[[str], Claims]
"""The claims of a token. Raises BadToken."""

_AUTHENTICATE: Final = {"WWW-Authenticate": "Bearer"}
NO_TOKEN: Final = text_page(
    "The console is for operators: give a token that `daemon token --operator` printed.", 401, _AUTHENTICATE
)
NOT_OPERATOR: Final = text_page(
    "This token is a user's: give one that `daemon token --operator` printed.", 403, _AUTHENTICATE
)
BAD_TOKEN: Final = text_page("The token is invalid or has expired.", 401, _AUTHENTICATE)
OTHER_SITE: Final = text_page("Requests from other sites are refused.", 403)
BAD_BODY: Final = text_page("Send a JSON object, with Content-Type: application/json.", 400)

# Any of these shows that a proxy has passed the request on: then the peer's address says nothing about its origin.
_FORWARDED: Final = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


def is_same_origin(request: Request) -> bool:
    """Whether the request is from a page of this origin, or from no page at all, as far as browsers tell."""
    if request.headers.get("sec-fetch-site", "none") not in {"same-origin", "none"}:
        return False
    origin = request.headers.get("origin")
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


def claims_of(request: Request, verify: Verify) -> Claims | Page:
    """The claims of the request's bearer token, or why it is refused."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        return BAD_TOKEN
    try:
        return verify(token.strip())
    except BadToken:
        return BAD_TOKEN


def refusal(call: Call, verify: Verify, *, trusts_local: bool) -> Page | None:
    """Why this request may not use the console; None if it may.

    With `trusts_local`, a peer on this machine needs no token. It must name this machine as the host, or any site
    could point a name of its own here; and no proxy must have passed it on.
    """
    request = call.request
    if not is_same_origin(request):
        return OTHER_SITE
    if "authorization" in request.headers:
        claims = claims_of(request, verify)
        if isinstance(claims, Page):
            return claims
        return None if claims.operator else NOT_OPERATOR
    proxied = any(header in request.headers for header in _FORWARDED)
    if trusts_local and call.is_local and not proxied and _names_this_machine(request.headers):
        return None
    return NO_TOKEN


def json_body(call: Call) -> Mapping[str, Any] | None:
    """The JSON object in the body; None if there is none.

    The content type is required because a form of another site cannot send it.
    """
    if call.request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return None
    try:
        found = json.loads(call.body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _names_this_machine(headers: Mapping[str, str]) -> bool:
    return is_this_machine(host_name(headers.get("host", "")))
