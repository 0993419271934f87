"""The peers: Rowcast and the servers it is compared with, each with its own kind of database."""

import json
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from bench import data
from bench.load import Load, load
from bench.rig import (
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

    def clients(
        self,
        topics: Sequence[Sequence[int]],
        since: str | None = None,
        subscribe: Callable[[int], Mapping[str, object]] = lambda _: {},
    ) -> AbstractAsyncContextManager[Load]:
        """A client for each row of `topics`, none of them open yet; the n-th is user n and follows these channels.

        `subscribe` gives further members of each `subscribe` of the n-th.
        """
        if not self.rowcast:
            return load(self.port, [()] * len(topics), path=self.path)
        issue = Authenticator(SECRET.encode()).issue
        openings = [
            [
                json.dumps(
                    {"op": "hello", "token": issue(data.user(number), 86_400)} | ({"since": since} if since else {})
                ),
                *(
                    json.dumps({"op": "subscribe", "topic": f"channel:{data.channel(one)}", **subscribe(number)})
                    for one in channels
                ),
            ]
            for number, channels in enumerate(topics)
        ]
        return load(self.port, openings, path=self.path, subprotocol=SUBPROTOCOL)


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
    """A trigger that notifies with the row, and the relay of relay.py."""

    name: str = "NOTIFY relay"

    async def template(self, server: Server) -> str:
        return await data.notifying(server)

    @asynccontextmanager
    async def serving(self, dsn: str) -> AsyncIterator[Service]:
        port = free_port()
        environment = clean_environment(DATABASE_URL=dsn, PORT=str(port))
        async with process(python("bench.relay"), environment, partial(accepts, port)) as pid:
            yield Service(pid, port)


@dataclass(frozen=True)
class Eventserv:
    """The same trigger, and the pg_eventserv that PG_EVENTSERV names."""

    program: Path
    name: str = "pg_eventserv"

    async def template(self, server: Server) -> str:
        return await data.notifying(server)

    @asynccontextmanager
    async def serving(self, dsn: str) -> AsyncIterator[Service]:
        if not self.program.is_file():
            raise MeasurementError(f"PG_EVENTSERV names {self.program}, which is no file")
        port = free_port()
        environment = clean_environment(DATABASE_URL=dsn, ES_HTTPHOST="127.0.0.1", ES_HTTPPORT=str(port))
        async with process([self.program], environment, partial(accepts, port)) as pid:
            yield Service(pid, port, "/listen/relay")


def relays() -> list[Peer]:
    """The peers that relay payloads of NOTIFY: always relay.py, and pg_eventserv if PG_EVENTSERV names it."""
    given = os.environ.get("PG_EVENTSERV")
    return [Relay(), *([Eventserv(Path(given).absolute())] if given else [])]
