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

KNOWN_FOR: Final = 5.0  # seconds for which what was read serves everybody: a crowd that reconnects reads once


class PgColumns:
    """Reads the columns of the schema that serves a topic, which `schema_of` returns."""

    def __init__(self, pool: Pool, schema_of: Callable[[Topic], str | None]) -> None:
        self._pool = pool
        self._schema_of = schema_of
        self._reads: dict[str, tuple[float, asyncio.Task[Tables]]] = {}

    async def columns(self, topic: Topic) -> Tables:
        """The published columns of each table that a topic is made of. Raises LogUnavailable."""
        schema = self._schema_of(topic)
        if schema is None:
            return {}
        loop = asyncio.get_running_loop()
        begun, task = self._reads.get(schema, (0.0, None))
        if (
            task is None
            or loop.time() - begun > KNOWN_FOR
            or (task.done() and (task.cancelled() or task.exception()))
        ):
            task = loop.create_task(self._read(schema))
            task.add_done_callback(_look)
            self._reads[schema] = loop.time(), task
        return await asyncio.shield(task)

    async def _read(self, schema: str) -> Tables:
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                rows = await connection.fetch(query("compared_columns"), schema)
        tables: defaultdict[str, dict[str, Column]] = defaultdict(dict)
        for table, name, type_, labels in rows:
            tables[table][name] = Column(name, type_, frozenset(labels or ()))
        return tables


def _look(task: asyncio.Task[Tables]) -> None:
    """Look at how a read ended, also if nobody waits for it any more."""
    if not task.cancelled():
        task.exception()
