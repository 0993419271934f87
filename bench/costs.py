"""What a row costs: CPU by process, bytes of WAL, and bytes on disk."""

import asyncpg

from bench.peers import Service
from bench.rig import Server, cpu

LEADER = "rowcast sequencer"  # the application_name of the backend that numbers
LOG = ("rowcast.events", "rowcast.log")  # with their partitions


class Costs:
    """Measures from `begin` on. A service of its own accounts for `service_us`, everything else for Postgres."""

    def __init__(self, server: Server, dsn: str, service: Service | None) -> None:
        self._server = server
        self._dsn = dsn
        self._service = service
        self._before: dict[str, float] = {}

    async def begin(self) -> None:
        """What follows is measured."""
        self._before = await self._read()

    async def per_row(self, rows: int) -> dict[str, float]:
        """The costs since `begin`, divided by the number of rows.

        `postgres_us` is the CPU of all of Postgres, the leader's backend (`leader_us`) included; `wal` and `disk` are
        bytes, `disk` those of the log with its indexes.
        """
        after = await self._read()
        return {name: (after[name] - before) / rows for name, before in self._before.items()}

    async def _read(self) -> dict[str, float]:
        connection = await asyncpg.connect(self._dsn)
        try:
            found = {
                "postgres_us": cpu(self._server.pid) * 1e6,
                "wal": float(await connection.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")),
            }
            if self._service is not None:
                found["daemon_us"] = cpu(self._service.pid) * 1e6
            leader = await connection.fetchval(
                "select pid from pg_stat_activity where (datname, application_name) = (current_database(), $1)",
                LEADER,
            )
            if leader is not None:
                found["leader_us"] = cpu(leader) * 1e6
                found["disk"] = float(
                    await connection.fetchval(
                        "select sum(pg_total_relation_size(t.relid)) from unnest($1::text[]) as name (log) "
                        "cross join pg_partition_tree(name.log::regclass) as t",
                        LOG,
                    )
                )
        finally:
            await connection.close()
        return found
