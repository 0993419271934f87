"""Sets up a database: from Python, in a child process, and at the start of a daemon whose packs ask for it."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.packs import by_schema
from daemon.postgres.connect import Pool, connect, open_application_pool, retry
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, InsufficientPrivilege, explain, violations_logged
from daemon.postgres.tunnel import through_tunnel
from daemon.schema import migrate
from daemon.schema.health import SchemaNotCurrent
from daemon.settings import Settings, load

log = get_logger()

TEST_SCHEMA = "test"
CLOSE_TIMEOUT = 2.0  # seconds for the connections of `setup_database` to close
RETRY_DELAY = 1.0  # seconds before the second attempt of `setup_database`; the pauses double


class SetupFailed(OperatorFault):
    """The DDL could not be applied; see the line above."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code  # type: ignore[misc]


@asynccontextmanager
async def setup_database(
    test: bool = False,
    *,
    attempts: int = 3,
    max_size: int = 10,
    config: Path | None = None,
    **settings: Any,  # noqa: ANN401 - they are validated as those of the command line are
) -> AsyncIterator[Pool]:
    """Apply the DDL, and yield a pool whose sessions have the schemas of the packs on their search_path.

    The settings are those of the daemon: from the environment, `.env.local`, `.env` and `config`, a TOML file;
    `settings` come before all of them, by their names in that file. With `test`, the pack goes into the schema
    `test`. While the database does not answer, `attempts` are made, with pauses of 1, 2, ... seconds. The pool has
    at most `max_size` connections, and is closed at the end of the block. Raises an OperatorFault.
    """
    chosen = load(config, **({"schema": TEST_SCHEMA} if test else {}), **settings)
    search_path = ", ".join([*chosen.schemas.values(), "pg_temp"])

    async def once() -> Pool:
        await migrate.apply(
            chosen.as_owner().require_dsn(),
            chosen.packs,
            schemas=chosen.schemas,
            trigger_settings=chosen.trigger_settings,
            lock_timeout=chosen.lock_timeout,
            attempts=1,
            report=migrate.log_report,
        )
        return await open_application_pool(
            chosen.require_dsn(),
            search_path=search_path,
            application_name="rowcast application",
            max_size=max_size,
            attempts=1,
        )

    async with through_tunnel(chosen):
        with violations_logged():
            pool = await retry(once, attempts=attempts, delay=RETRY_DELAY, jitter=0.0, on_retry=_log_retry)
        try:
            yield pool
        finally:
            with suppress(TimeoutError, *DRIVER_ERRORS):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await pool.close()
            pool.terminate()


def _log_retry(fault: DatabaseFault, attempt: int) -> None:
    log.warning("database_retry", reason=str(fault), attempt=attempt)


async def apply_in_child(settings: Settings, packs: Sequence[str]) -> None:
    """Apply the DDL in a child process, so that the daemon does not keep the memory that Alembic takes.

    Raises SetupFailed.
    """
    options = [option for pack in packs for option in ("--pack", pack)]
    command = [sys.executable, "-m", "daemon", "--apply-ddl", *options]
    process = await asyncio.create_subprocess_exec(
        *command, env=settings.as_environment(), stdout=asyncio.subprocess.DEVNULL
    )
    if await process.wait():
        raise SetupFailed(process.returncode or 1)


def migrating_packs(settings: Settings) -> list[str]:
    """The packs whose pending revisions are applied when a daemon starts. Raises UnknownPack."""
    return [pack.name for pack in by_schema(settings.schemas).values() if pack.migrates_on_start]


async def migrate_on_start(settings: Settings, packs: Sequence[str]) -> None:
    """Apply the pending revisions of these packs before a daemon serves them.

    Raises SchemaNotCurrent if this role may not, SetupFailed if they cannot be applied, and a DatabaseFault.
    """
    why = await _why_pending(settings, packs)
    if why is None:
        return
    try:
        await apply_in_child(settings, packs)
    except SetupFailed as fault:
        if fault.exit_code == InsufficientPrivilege.exit_code:
            raise SchemaNotCurrent(why) from None
        raise


async def _why_pending(settings: Settings, packs: Sequence[str]) -> str | None:
    """Why the schemas are not current; None if they are, or if they are newer than the files."""
    connection = await connect(
        settings.require_dsn(),
        application_name="rowcast start",
        attempts=settings.connect_attempts,
        on_retry=_log_retry,
    )
    try:
        if await migrate.newer(connection, packs, schemas=settings.schemas):
            return None
        return await migrate.stale(connection, packs, schemas=settings.schemas)
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        connection.terminate()
