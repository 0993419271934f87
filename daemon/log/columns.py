"""The columns of the watched tables, as filters compare them: the ColumnReader port."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from daemon.core.change import Topic
from daemon.core.column_types import Column
from daemon.core.filters import Tables
from daemon.log.queries import query
from daemon.log.reader import ANSWER_TIMEOUT, translated
from daemon.postgres.connect import Pool, acquired

OWN_TABLES: Final = "rowcast"  # stands for the schemas of all tables that are served without a pack
KNOWN_FOR: Final = 1.0  # seconds for which what was read serves everybody: a crowd that reconnects reads once


class PgColumns:
    """Reads the columns of the schema that serves a topic, which `schema_of` returns."""

    def __init__(self, pool: Pool, schema_of: Callable[[Topic], str | None]) -> None:
        self._pool = pool
        self._schema_of = schema_of
        self._reads: dict[tuple[str, Topic | None], tuple[float, asyncio.Task[Tables]]] = {}

    async def columns(self, topic: Topic) -> Tables:
        """The published columns of each table that a topic is made of. Raises LogUnavailable."""
        schema = self._schema_of(topic)
        if schema is None:
            return {}
        place = (schema, topic if schema == OWN_TABLES else None)  # a pack's topics are made of all its tables
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._reads = {
            known: (begun, task)
            for known, (begun, task) in self._reads.items()
            if now - begun < KNOWN_FOR and not (task.done() and (task.cancelled() or task.exception()))
        }
        if place not in self._reads:
            read = loop.create_task(self._read(schema, topic))
            read.add_done_callback(_look)
            self._reads[place] = now, read
        return await asyncio.shield(self._reads[place][1])

    async def _read(self, schema: str, topic: Topic) -> Tables:
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                rows = await connection.fetch(query("compared_columns"), schema, topic)
        tables: defaultdict[str, dict[str, Column]] = defaultdict(dict)
        for table, name, type_, labels in rows:
            tables[table][name] = Column(name, type_, frozenset(labels or ()))
        return tables


def _look(task: asyncio.Task[Tables]) -> None:
    """Look at how a read ended, also if nobody waits for it any more."""
    if not task.cancelled():
        task.exception()
