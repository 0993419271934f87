"""What processes share about their clients through Postgres: the Broadcast, PeopleStore and AckStore ports."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final

from daemon.core.change import Position, Topic
from daemon.core.errors import GrantsUnavailable, LogUnavailable
from daemon.core.presence import Key, People, Person
from daemon.log.queries import query
from daemon.log.reader import ANSWER_TIMEOUT, translated
from daemon.postgres.connect import Connection, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe, is_about_data
from daemon.postgres.queries import named

SIGNALS_CHANNEL: Final = "rowcast_signals"
LEASE: Final = timedelta(seconds=9)
HOOKS_LOCK: Final = 0x526F7763617379  # an advisory lock of the database: packs are told one thing after another
HOOK_TIMEOUT: Final = 3.0  # seconds: the lease has to be renewed meanwhile
MAX_DEVICES: Final = 32  # of one user whose positions are kept: those that acknowledged last

Hooks = Mapping[str, str]
"""The qualified names of a pack's functions, by the schema of the pack."""


class PgBroadcast:
    """Notifies every process that listens on SIGNALS_CHANNEL."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, pieces: Collection[str]) -> None:
        """Send all pieces in one transaction, which keeps them together. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                await connection.execute(query("send_signals"), SIGNALS_CHANNEL, list(pieces))


class PgSignalRights:
    """Asks the functions of the schemas that serve topics, which `schema_of` returns. See SignalRights."""

    def __init__(self, pool: Pool, schema_of: Callable[[Topic], str | None], functions: Hooks) -> None:
        self._pool = pool
        self._schema_of = schema_of
        self._functions = functions

    def concerns(self, topic: Topic) -> bool:
        """Whether the schema that serves the topic has such a function."""
        return bool(self._functions) and self._schema_of(topic) in self._functions

    async def may_signal(self, user: str, topic: Topic) -> bool:
        """Whether the user may send signals in this topic. Raises GrantsUnavailable."""
        function = self._functions[self._schema_of(topic) or ""]
        try:
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                return bool(await connection.fetchval(_call(function), user, topic))
        except DATABASE_ERRORS as error:
            raise GrantsUnavailable(describe(error)) from error


class PgPeople:
    """Keeps the people of the process of this name in `rowcast.people`. See PeopleStore.

    `schema_of` returns the schema that serves a topic. `hooks` are called with the users who have come, and those who
    have gone.
    """

    def __init__(self, pool: Pool, process: str, schema_of: Callable[[Topic], str | None], hooks: Hooks) -> None:
        self._pool = pool
        self._process = process
        self._schema_of = schema_of
        self._hooks = hooks

    async def store(self, present: Mapping[tuple[Topic, Key], Person], gone: Collection[tuple[Topic, Key]]) -> bool:
        """Renew the lease, store and remove. False if the lease was lost. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection, connection.transaction():
                is_intact = await connection.fetchval(query("renew_presence"), self._process, LEASE)
                if not is_intact:
                    await connection.execute(query("begin_presence"), self._process, LEASE)
                if gone:
                    topics, users, devices = zip(*((topic, *key) for topic, key in gone), strict=True)
                    await connection.execute(query("remove_people"), self._process, topics, users, devices)
                if present:
                    rows = [
                        (topic, key.user, key.device, self._schema_of(topic) or "", _ascii(data), *more)
                        for (topic, key), (data, *more) in present.items()
                    ]
                    columns = list(zip(*rows, strict=True))
                    await connection.execute(query("store_people"), self._process, *columns)
        if present:
            # Once what is stored is seen: of two processes that store at the same time, the later one removes.
            # If that fails, nothing is lost: the process that waits does so to the end.
            with suppress(LogUnavailable), translated():
                async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                    await connection.execute(query("remove_who_came_back"), *columns[:3])
        return bool(is_intact)

    async def others(self, topics: Collection[Topic]) -> dict[Topic, list[People]]:
        """Who is present elsewhere, one mapping for each process. Raises LogUnavailable."""
        found: dict[Topic, dict[str, dict[Key, Person]]] = {}
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                rows = await connection.fetch(query("people"), self._process, list(topics))
        for process, topic, user, device, *person in rows:
            found.setdefault(topic, {}).setdefault(process, {})[Key(user, device)] = Person(*person)
        return {topic: list(processes.values()) for topic, processes in found.items()}

    async def call_hooks(self) -> bool:
        """Call the hooks with the difference to what they were told last. Raises LogUnavailable."""
        remains = False
        for schema, hook in self._hooks.items():
            with translated():
                async with acquired(self._pool, HOOK_TIMEOUT) as connection, connection.transaction():
                    # A statement of its own: the snapshot of the next one must see what the last holder has done.
                    await connection.execute(query("lock_hooks"), HOOKS_LOCK)
                    [news] = await connection.fetch(query("users_who_came_or_went"), schema)
                    if news["came"] or news["went"]:
                        await connection.execute(_call(hook), news["came"], news["went"])
                    remains = remains or news["remains"]
        return remains


class PgAcks:
    """Keeps acknowledged positions in `rowcast.acks`. See AckStore. `hooks` are called with the users and devices."""

    def __init__(self, pool: Pool, hooks: Hooks) -> None:
        self._pool = pool
        self._hooks = hooks

    async def store(self, acks: Mapping[Key, Position]) -> None:
        """Keep these; those that the database cannot express are left out. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                await self._store_possible(connection, list(acks.items()))

    async def stored(self, device: Key) -> Position | None:
        """The last position. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                text = await connection.fetchval(query("acknowledged"), *device)
        return None if text is None else Position.parse(text)

    async def _store_possible(self, connection: Connection, acks: Sequence[tuple[Key, Position]]) -> None:
        """Store those that can be. Each half is tried, and its halves: one that cannot be costs the others little."""
        try:
            await self._store(connection, dict(acks))
        except Exception as error:
            if not is_about_data(error):
                raise
            if len(acks) > 1:
                half = len(acks) // 2
                await self._store_possible(connection, acks[:half])
                await self._store_possible(connection, acks[half:])

    async def _store(self, connection: Connection, acks: Mapping[Key, Position]) -> None:
        users = [device.user for device in acks]
        devices = [device.device for device in acks]
        async with connection.transaction():
            await connection.execute(query("store_acks"), users, devices, list(map(str, acks.values())))
            await connection.execute(query("forget_devices"), list(set(users)), MAX_DEVICES)
            for hook in self._hooks.values():
                await connection.execute(_call(hook), users, devices)


def _call(hook: str) -> str:
    """A call of a pack's function. Its name needs no quotes: the server confirmed that when the DDL was applied."""
    return named(f"select {hook}($1, $2)", "hook")


def _ascii(data: str) -> str:
    """JSON that a database of any encoding can hold."""
    return json.dumps(json.loads(data), separators=(",", ":"))
