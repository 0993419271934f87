from typing import cast

import pytest

from daemon.core.errors import BadToken
from daemon.gateway.auth import Claims
from daemon.gateway.door import OTHER_HOST, Door
from daemon.gateway.http import Call, Request
from daemon.pages.access import OTHER_SITE
from daemon.pages.demo import Demo, handlers
from daemon.postgres.connect import Pool


def verify(token: str) -> Claims:
    raise BadToken


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("127.0.0.1:8787", True),
        ("192.0.2.1:8787", True),
        ("[2001:db8::1]:8787", True),
        ("localhost:8787", True),
        ("demo.example.com", True),
        ("rebound.example:8787", False),
        ("127.0.0.1.nip.example", False),
        ("", False),
    ],
)
async def test_sample_users_are_only_for_who_names_this_daemon(host: str, is_allowed: bool) -> None:
    door = Door(hosts=frozenset({"demo.example.com"}))
    get = handlers(Demo(lambda: {"users": []}), cast("Pool", None), verify, lambda: door)["GET", "/demo.json"]

    def call(**headers: str) -> Call:
        return Call(Request("GET", "/demo.json", "", "1.1", {"host": host, **headers}, 0), b"", is_local=True)

    if is_allowed:
        assert (await get(call())).body == b'{"users":[]}'
        assert OTHER_SITE == await get(call(origin="http://elsewhere.example"))
    else:
        assert OTHER_HOST == await get(call(origin=f"http://{host}"))
