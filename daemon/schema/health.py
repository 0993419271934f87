"""Whether the schemas are current and the watched tables captured, for /readyz and `daemon check`."""

import asyncio
from contextlib import suppress
from typing import ClassVar

from daemon import metrics
from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.postgres.connect import SESSION, Connection, Pool, acquired, connect
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema import migrate
from daemon.schema.capture_check import Problem, check_captures, check_rules, count_watched
from daemon.settings import Settings

log = get_logger()

CHECK_TIMEOUT = 30.0  # seconds


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
        self._pool, self._settings = pool, settings

    @property
    def problems(self) -> list[str]:
        """One line for each problem."""
        return [*filter(None, [self.stale]), *map(str, self.captures)]

    async def refresh(self) -> None:
        """Check again, and log changes of the captures. Raises a DatabaseFault or one of DRIVER_ERRORS."""
        async with acquired(self._pool, CHECK_TIMEOUT) as connection:
            self.stale, problems = await examine(connection, self._settings)
        for problem in problems:
            if problem not in self.captures:
                log.error("trigger_error", table=problem.table, problem=problem.problem, remedy=problem.remedy)
        if self.captures and not problems and not self.stale:
            log.info("capture_restored")
        self.captures = problems
        metrics.CAPTURE_DRIFT.set(len({problem.table for problem in problems}))

    async def watch(self, every: float = 60.0) -> None:
        """Refresh every `every` seconds, forever. While the database does not answer, the last result is kept."""
        while True:
            await asyncio.sleep(every)
            with suppress(OperatorFault, *DRIVER_ERRORS):
                await self.refresh()


async def examine(connection: Connection, settings: Settings) -> tuple[str | None, list[Problem]]:
    """Why the schemas are not current, or None; and the capture problems. Raises an OperatorFault or driver error."""
    stale = await migrate.stale(connection, settings.packs, schemas=settings.schemas)
    present = await migrate.current(connection, migrate.ROWCAST) is not None
    return stale, await check_captures(connection) if present else []


async def check(settings: Settings) -> tuple[list[str], int]:
    """A line for each problem, and the number of watched tables (0 if there are problems).

    Besides the problems that `examine` finds, these are those of the packs' check.sql. Raises an OperatorFault.
    """
    connection = await connect(
        settings.require_dsn(),
        application_name="rowcast check",
        server_settings=SESSION,
        attempts=settings.connect_attempts,
    )
    try:
        stale, problems = await examine(connection, settings)
        lines = [str(SchemaNotCurrent(stale))] if stale else []
        lines += map(str, problems)
        for pack, schema in settings.schemas.items():
            if await migrate.current(connection, schema) is not None:
                lines += map(str, await check_rules(connection, pack, schema))
        return lines, 0 if lines else await count_watched(connection)
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        connection.terminate()
