"""The peers: Rowcast and the servers it is compared with, each with its own kind of database."""

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from bench import data
from bench.load import Load, load
from bench.rig import (
    HERE,
    MeasurementError,
    Server,
    accepts,
    clean_environment,
    daemon_settings,
    free_port,
    process,
    python,
    readiness,
)
from daemon.core.wire import SUBPROTOCOL
from daemon.gateway.auth import Authenticator

SECRET = secrets.token_urlsafe(48)


@dataclass(frozen=True)
class Service:
    """A running server: its process, and how clients connect."""

    pid: int
    port: int
    path: str = "/"
    rowcast: bool = False
    by_topic: bool = False  # do clients of a relay subscribe? Otherwise they receive everything

    def clients(
        self,
        topics: Sequence[Sequence[int]],
        since: str | None = None,
        subscribe: Callable[[int], Mapping[str, object]] = lambda _: {},
    ) -> AbstractAsyncContextManager[Load]:
        """A client for each row of `topics`, none of them open yet; the n-th is user n and follows these channels.

        `subscribe` gives further members of each `subscribe` of the n-th.
        """
        if not (self.rowcast or self.by_topic):
            return load(self.port, [()] * len(topics), path=self.path)
        issue = Authenticator(SECRET.encode()).issue

        def hello(number: int) -> Mapping[str, object]:
            return {"op": "hello", "token": issue(data.user(number), 86_400)} | ({"since": since} if since else {})

        openings = [
            [
                *([json.dumps(hello(number))] if self.rowcast else []),
                *(
                    json.dumps({"op": "subscribe", "topic": f"channel:{data.channel(one)}", **subscribe(number)})
                    for one in channels
                ),
            ]
            for number, channels in enumerate(topics)
        ]
        return load(self.port, openings, path=self.path, subprotocol=SUBPROTOCOL if self.rowcast else None)


class Peer(Protocol):
    """One of the servers that are compared."""

    @property
    def name(self) -> str:
        """Its name in the results."""

    async def template(self, server: Server) -> str:
        """The name of the template for its database."""

    def serving(self, dsn: str) -> AbstractAsyncContextManager[Service | None]:
        """Serve a database while the block lasts; None if there is no server. Raises MeasurementError."""


@dataclass(frozen=True)
class NoTrigger:
    """The table without a trigger, and no server."""

    name: str = "no trigger"

    async def template(self, server: Server) -> str:
        return await data.plain(server)

    @asynccontextmanager
    async def serving(self, dsn: str) -> AsyncIterator[None]:
        yield None


@asynccontextmanager
async def daemon(settings: Mapping[str, str], *command: str, files: int | None = None) -> AsyncIterator[Service]:
    """A daemon that is ready, or what else this command of it serves, with so many descriptors if that is given.

    Raises MeasurementError.
    """
    port = free_port()
    few = ["/bin/sh", "-c", f'ulimit -n {files}; exec "$0" "$@"'] if files is not None else []
    async with readiness() as (notify, ready):
        environment = clean_environment(
            **{
                **daemon_settings(),
                **settings,
                "ROWCAST_SECRET": SECRET,
                "ROWCAST_LISTEN": f"127.0.0.1:{port}",
                "NOTIFY_SOCKET": notify,
            }
        )
        async with process([*few, *python("daemon"), *command], environment, ready) as pid:
            yield Service(pid, port, "/v1", rowcast=True)


@dataclass(frozen=True)
class Rowcast:
    """The daemon as shipped, except for `settings` and those from the environment of the bench."""

    name: str = "Rowcast"
    settings: Mapping[str, str] = field(default_factory=dict)

    async def template(self, server: Server) -> str:
        return await data.chat(server)

    @asynccontextmanager
    async def serving(self, dsn: str) -> AsyncIterator[Service]:
        async with daemon({**self.settings, "DATABASE_URL": dsn}) as service:
            yield service


@dataclass(frozen=True)
class Relay:
    """A trigger that notifies with the row, and a program that forwards the payloads to websockets."""

    name: str = "NOTIFY relay"
    command: Sequence[str | Path] = field(default_factory=lambda: python("bench.relay"))
    environment: Mapping[str, str] = field(default_factory=dict)
    port: str = "PORT"  # the variable that gives it its port
    path: str = "/"
    by_topic: bool = False

    async def template(self, server: Server) -> str:
        return await data.notifying(server)

    @asynccontextmanager
    async def serving(self, dsn: str) -> AsyncIterator[Service]:
        port = free_port()
        environment = clean_environment(**{**self.environment, "DATABASE_URL": dsn, self.port: str(port)})
        async with process(self.command, environment, partial(accepts, port)) as pid:
            yield Service(pid, port, self.path, by_topic=self.by_topic)


NODE = Relay("Node relay", ["node", HERE / "relay.mjs"], by_topic=True)
STARLETTE = Relay(
    "Starlette relay",
    [*python("uvicorn"), "bench.relay_starlette:app", "--log-level", "warning", "--timeout-graceful-shutdown", "1"],
    port="UVICORN_PORT",
    path="/relay",
)


def eventserv(program: Path) -> Relay:
    """CrunchyData's relay in Go. Raises MeasurementError if there is no such program."""
    if not program.is_file():
        raise MeasurementError(f"PG_EVENTSERV names {program}, which is no file")
    return Relay("pg_eventserv", [program], {"ES_HTTPHOST": "127.0.0.1"}, port="ES_HTTPPORT", path="/listen/relay")


RELAYS = (Relay().name, "pg_eventserv", NODE.name, STARLETTE.name)


def relays() -> list[Peer]:
    """The peers that relay payloads of NOTIFY: always relay.py first, and each other one that can run here."""
    given = os.environ.get("PG_EVENTSERV")
    return [
        Relay(),
        *([eventserv(Path(given).absolute())] if given else []),
        *([NODE] if node_versions() else []),
        *([STARLETTE] if starlette_versions() else []),
    ]


def left_out() -> list[str]:
    """What to do for each relay that cannot run here, in a line each."""
    return [
        *([] if os.environ.get("PG_EVENTSERV") else ["pg_eventserv: name its program in PG_EVENTSERV"]),
        *([] if node_versions() else [f"{NODE.name}: install Node and run npm install in {HERE.name}/"]),
        *([] if starlette_versions() else [f"{STARLETTE.name}: run make install"]),
    ]


@cache
def node_versions() -> str:
    """What the relay in Node runs with; empty if it cannot run here."""
    packages = [HERE / "node_modules" / name / "package.json" for name in ("pg", "ws")]
    if shutil.which("node") is None or not all(package.is_file() for package in packages):
        return ""
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    found = (json.loads(package.read_text(encoding="utf-8")) for package in packages)
    return ", ".join([f"Node {node.removeprefix('v')}", *(f"{one['name']} {one['version']}" for one in found)])


def starlette_versions() -> str:
    """What the relay with Starlette runs with; empty if it cannot run here."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in ("starlette", "broadcaster", "uvicorn", "uvloop"))
    except PackageNotFoundError:
        return ""
