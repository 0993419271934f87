"""What the sample users of `daemon up` can do on the page at `/`: one statement of their pack for each action."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from daemon.gateway.door import OTHER_HOST, Door
from daemon.gateway.http import Call, Handler, Page, json_page, text_page
from daemon.pages.access import BAD_BODY, OTHER_SITE, Verify, claims_of, is_same_origin, json_body
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe, is_about_data

USERS: Final = "GET", "/demo.json"
ACTION_TIMEOUT: Final = 5.0  # seconds for one statement
CONSTRAINT_VIOLATED: Final = "23"  # the class of SQLSTATEs
_REFUSED: Final = text_page("You may not do that.", 403)


@dataclass(frozen=True)
class Demo:
    """Sample users: `users` makes the response of `/demo.json`; `actions` is the SQL of what they can do, by name.

    An action's parameters are the id of the user and the body of the request as JSON text; it returns whether it was
    done.
    """

    users: Callable[[], Mapping[str, Any]]
    actions: Mapping[str, str] = field(default_factory=dict)


def requests(actions: Iterable[str]) -> list[tuple[str, str]]:
    """The methods and paths that `handlers` answers."""
    return [USERS, *(("POST", f"/demo/{name}") for name in actions)]


def handlers(demo: Demo, pool: Pool, verify: Verify, door: Callable[[], Door]) -> dict[tuple[str, str], Handler]:
    """The handlers of `/demo.json`, and of all actions: POST to `/demo/NAME`, with the token of the user."""

    async def users(call: Call) -> Page:
        if not door().is_named_in(call.request):
            return OTHER_HOST
        return json_page(demo.users()) if is_same_origin(call.request) else OTHER_SITE

    def handler(statement: str) -> Handler:
        async def handle(call: Call) -> Page:
            return await _act(call, statement, pool, verify)

        return handle

    actions = {("POST", f"/demo/{name}"): handler(statement) for name, statement in demo.actions.items()}
    return {USERS: users, **actions}


async def _act(call: Call, statement: str, pool: Pool, verify: Verify) -> Page:
    if not is_same_origin(call.request):
        return OTHER_SITE
    claims = claims_of(call.request, verify)
    if isinstance(claims, Page):
        return claims
    if json_body(call) is None:
        return BAD_BODY
    try:
        async with acquired(pool, ACTION_TIMEOUT) as connection:
            done = await connection.fetchval(statement, claims.user, call.body.decode())
    except Exception as error:
        if is_about_data(error) or str(getattr(error, "sqlstate", "")).startswith(CONSTRAINT_VIOLATED):
            return text_page("This cannot be stored.", 400)
        if not isinstance(error, DATABASE_ERRORS):
            raise
        return text_page(f"The database does not answer: {describe(error)}", 503)
    return json_page({"done": True}) if done else _REFUSED
