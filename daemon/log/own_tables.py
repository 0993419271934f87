"""Reads which tables are served without a pack: the OwnTableReader port."""

import json

from daemon.core.own_tables import OwnColumn, OwnTable
from daemon.log.queries import query
from daemon.log.reader import ANSWER_TIMEOUT, translated
from daemon.postgres.connect import Pool, acquired


class PgOwnTableReader:
    """Reads `rowcast.own_tables`, and the columns of these tables from the catalog."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def read(self) -> list[OwnTable]:
        """The tables that are served at the moment. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                rows = await connection.fetch(query("own_tables"))
        return [
            OwnTable(
                row["schema_name"],
                row["table_name"],
                row["pack"],
                tuple(row["topics"]),
                tuple(row["key"]),
                tuple(OwnColumn(*column) for column in json.loads(row["columns"])),
            )
            for row in rows
        ]
