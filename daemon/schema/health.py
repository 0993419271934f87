"""Whether the schemas are current and the watched tables captured, for /readyz and `daemon check`."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from daemon import metrics
from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.packs import bundled
from daemon.postgres.connect import Connection, Pool, acquired, connect
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema import migrate
from daemon.schema.capture_check import (
    Problem,
    check_any_captured,
    check_captures,
    check_rules,
    count_watched,
)
from daemon.schema.queries import query
from daemon.schema.resets import reset_table
from daemon.schema.rights_check import check_rights, lacking_rights
from daemon.schema.schema_check import NOT_COMPARED, check_schemas
from daemon.settings import Settings

log = get_logger()

CHECK_TIMEOUT = 30.0  # seconds
RIGHTS_DELAY = 4.0  # seconds between two looks at the rights of this role


class SchemaNotCurrent(OperatorFault):
    """The schema is not current ({why}): run `daemon --apply-ddl` first."""

    exit_code: ClassVar[int] = 32

    def __init__(self, why: str) -> None:
        self.why = why


class SchemaHealth:
    """The problems of the schemas and the captures, checked periodically: anybody may change them at any time."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self.stale: str | None = None
        self.captures: list[Problem] = []
        self.missing = ""  # the rights that this role lacks
        self._pool, self._settings = pool, settings
        self._newer: dict[str, str] = {}
        self._faulty: set[str] | None = None  # the tables that were not captured as defined at the last look

    @property
    def problems(self) -> list[str]:
        """One line for each problem."""
        missing = f"the daemon's role lacks rights ({self.missing})" if self.missing else None
        return [*filter(None, [self.stale, missing]), *map(str, self.captures)]

    async def refresh(self) -> None:
        """Check again, and log changes of the captures. Raises a DatabaseFault or one of DRIVER_ERRORS."""
        reset: set[str] = set()
        async with acquired(self._pool, CHECK_TIMEOUT) as connection:
            self.stale, problems = await examine(connection, self._settings)
            newer = await migrate.newer(connection, self._settings.packs, schemas=self._settings.schemas)
            if not self.stale:
                await _count(connection, list(self._settings.schemas.values()))
                reset = await _reset_missed(connection)
        for schema in newer.keys() - self._newer.keys():
            log.info("schema_newer", schema=schema, revision=newer[schema])
        self._newer = newer
        problems = [problem for problem in problems if not problem.is_note]
        for problem in problems:
            if problem not in self.captures:
                log.error("trigger_error", table=problem.table, problem=problem.problem, remedy=problem.remedy)
        if self.captures and not problems and not self.stale:
            log.info("capture_restored")
        await self._reset_uncaptured({problem.table for problem in problems}, reset)
        self.captures = problems
        metrics.CAPTURE_DRIFT.set(len({problem.table for problem in problems}))

    async def _reset_uncaptured(self, faulty: set[str], reset: set[str]) -> None:
        """Reset the packs of tables whose capture has broken or been mended: something may have been missed.

        Those of the tables in `reset` have just been reset.
        """
        for table in sorted((faulty ^ self._faulty) - reset) if self._faulty is not None else ():
            async with acquired(self._pool, CHECK_TIMEOUT) as connection:
                await reset_table(connection, table)
        self._faulty = faulty

    async def watch(self, every: float = 60.0) -> None:
        """Refresh every `every` seconds, forever. While the database does not answer, the last result is kept."""
        while True:
            await asyncio.sleep(every)
            with suppress(OperatorFault, *DRIVER_ERRORS):
                await self.refresh()

    async def watch_rights(self, every: float = RIGHTS_DELAY) -> None:
        """Look every `every` seconds, forever, whether this role lacks a right, and log when that changes."""
        schemas = self._settings.schemas
        functions = [f"{schema}.{name}" for pack, schema in schemas.items() for name in bundled()[pack].functions]
        while True:
            with suppress(OperatorFault, *DRIVER_ERRORS):  # what a database that is away means, others tell
                async with acquired(self._pool, every) as connection:
                    missing = await lacking_rights(connection, schemas.values(), functions)
                if missing and missing != self.missing:
                    log.warning("rights_missing", rights=missing, remedy="run `daemon --apply-ddl --grant-to ROLE`")
                elif self.missing and not missing:
                    log.info("rights_restored")
                self.missing = missing
            await asyncio.sleep(every)


async def examine(connection: Connection, settings: Settings) -> tuple[str | None, list[Problem]]:
    """Why the schemas are not current, or None; and the capture problems. Raises an OperatorFault or driver error."""
    stale = await migrate.stale(connection, settings.packs, schemas=settings.schemas)
    if await migrate.current(connection, migrate.ROWCAST) is None:
        return stale, []
    problems = await check_captures(connection)
    if settings.notifications and not stale:
        problems += await check_any_captured(connection, settings.schemas.values())
    return stale, problems


async def _reset_missed(connection: Connection) -> set[str]:
    """Reset the packs of tables whose rows changed without a trigger. Returns the tables. Raises DRIVER_ERRORS."""
    vanished = [row["table_name"] for row in await connection.fetch(query("reset_vanished"))]
    for table in vanished:
        log.warning("rows_vanished", table=table)
    altered = [row["table_name"] for row in await connection.fetch(query("reset_altered"))]
    for table in altered:
        log.warning("rows_altered", table=table)
    return {*vanished, *altered}


async def _count(connection: Connection, schemas: list[str]) -> None:
    """Read the counters of Postgres for the metrics. Raises DRIVER_ERRORS."""
    scans = await connection.fetch(query("index_scans"), schemas)
    executions = await connection.fetch(query("trigger_executions"), schemas)
    counters = metrics.POSTGRES_COUNTERS
    counters.index_scans = {(row["table_name"], row["index_name"]): row["scans"] for row in scans}
    counters.trigger_executions = {(row["table_name"],): row["calls"] for row in executions}


@dataclass(frozen=True, slots=True)
class Findings:
    """What `daemon check` tells: a line for each problem and each note, and the number of watched tables."""

    problems: list[str]
    notes: list[str]
    watched: int

    @property
    def captured(self) -> str:
        """How many tables are watched, in words."""
        return "1 table is watched" if self.watched == 1 else f"{self.watched} tables are watched"


async def check(settings: Settings) -> Findings:
    """Compare the schemas and the captures with the files, and run the packs' check.sql. Raises an OperatorFault."""
    connection = await connect(
        settings.require_dsn(),
        application_name="rowcast check",
        server_settings={**migrate.SESSION, "lock_timeout": f"{settings.lock_timeout * 1000:.0f}"},
        statement_cache_size=0,
        attempts=settings.connect_attempts,
    )
    try:
        stale, found = await examine(connection, settings)
        problems = [str(SchemaNotCurrent(stale))] if stale else []
        problems += [str(one) for one in found if not one.is_note]
        notes = [str(one) for one in found if one.is_note]
        newer = await migrate.newer(connection, settings.packs, schemas=settings.schemas)
        notes += [
            f"schema {schema}: it was not compared: {at} is newer than this version" for schema, at in newer.items()
        ]
        if not stale and migrate.ROWCAST not in newer:
            known = {problem.table for problem in found}
            packs = [pack for pack, schema in settings.schemas.items() if schema not in newer]
            problems += map(
                str,
                await check_schemas(
                    connection,
                    packs,
                    schemas=settings.schemas,
                    known=known,
                    trigger_settings=settings.trigger_settings,
                ),
            )
            problems += map(str, await check_rights(connection))
        for pack, schema in settings.schemas.items():
            if await migrate.current(connection, schema) is not None:
                problems += map(str, await check_rules(connection, pack, schema))
        watched = await count_watched(connection) if {*problems} <= {str(NOT_COMPARED)} else 0
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        connection.terminate()
    return Findings(problems, notes, watched)
