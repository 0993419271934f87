"""What a row costs: CPU by process, bytes of WAL, and bytes on disk."""

import asyncpg

from bench.peers import Service
from bench.rig import Server, cpu, tree

LEADER = """
select pid from pg_stat_activity where (datname, application_name) = (current_database(), 'rowcast sequencer')
"""
WAL_WRITER = "select pid from pg_stat_activity where backend_type = 'walwriter'"
BYTES_OF_LOG = """
select sum(pg_total_relation_size(part.relid))
from unnest('{rowcast.events, rowcast.log}'::regclass[]) as log (name) cross join pg_partition_tree(log.name) as part
"""


class Costs:
    """Measures from `begin` on. A service of its own accounts for `daemon_us`, everything else for Postgres."""

    def __init__(self, server: Server, dsn: str, service: Service | None) -> None:
        self._server = server
        self._dsn = dsn
        self._service = service
        self._before: dict[str, float] = {}
        self._others: dict[int, float] = {}  # CPU of the processes of Postgres that were there before the writers

    async def begin(self) -> None:
        """What follows is measured. The writers are not connected yet."""
        self._before = await self._read()
        self._others = {pid: cpu(pid) for pid in tree(self._server.pid)[1:]}

    async def per_row(self, rows: int) -> dict[str, float]:
        """The costs since `begin`, divided by the number of rows.

        `postgres_us` is the CPU of all of Postgres. Parts of it are `writer_us`, of the processes that came after
        `begin`, `leader_us`, of the backend that numbers, and `wal_us`, of the WAL writer. `wal` is bytes, and so is
        `disk`, that of the log with its indexes.
        """
        after = await self._read()
        costs = {name: after[name] - before for name, before in self._before.items()}
        others = sum(max(0.0, cpu(pid) - before) for pid, before in self._others.items())
        costs["writer_us"] = costs["postgres_us"] - others * 1e6
        return {name: cost / rows for name, cost in costs.items()}

    async def _read(self) -> dict[str, float]:
        connection = await asyncpg.connect(self._dsn)
        try:
            found = {
                "postgres_us": cpu(self._server.pid) * 1e6,
                "wal_us": cpu(await connection.fetchval(WAL_WRITER)) * 1e6,
                "wal": float(await connection.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")),
            }
            if self._service is not None:
                found["daemon_us"] = cpu(self._service.pid) * 1e6
            leader = await connection.fetchval(LEADER)
            if leader is not None:
                found["leader_us"] = cpu(leader) * 1e6
                found["disk"] = float(await connection.fetchval(BYTES_OF_LOG))
        finally:
            await connection.close()
        return found
