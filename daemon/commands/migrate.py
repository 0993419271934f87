"""`daemon migrate`: backs up, tries the pending revisions, applies them at once, and undoes all on failure."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from daemon.commands.backup import backup
from daemon.commands.restore import restore
from daemon.schema.migrate import NotRestored, upgrade
from daemon.settings import Settings


def backup_in(directory: Path | None) -> Path:
    """A file in this directory, or else in the current one, named after this moment."""
    return (directory or Path()) / f"before-migration-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.sql"


async def migrate(
    settings: Settings,
    path: Path | None,
    *,
    dry_run: bool = False,
    restore_on_failure: bool = False,
    report: Callable[[str], None],
) -> None:
    """Apply what is pending, after a backup to `path` unless that is None. Raises an OperatorFault.

    With `restore_on_failure`, the backup replaces the database if a step outside a transaction could not be undone.
    What was written since is then lost.
    """

    async def back_up() -> None:
        if path is not None:
            report(f"backing up to {path}")
            await backup(settings, path, report=report)

    try:
        await upgrade(
            settings.require_dsn(),
            settings.packs,
            report=report,
            back_up=back_up,
            dry_run=dry_run,
            schemas=settings.schemas,
            trigger_settings=settings.trigger_settings,
            lock_timeout=settings.lock_timeout,
            attempts=settings.connect_attempts,
        )
    except NotRestored as fault:
        if not restore_on_failure or path is None:
            raise
        report(f"failed: {fault}")
        report(f"restoring {path}")
        await restore(settings, path, replace=True, report=report)
        raise fault.fault from None
