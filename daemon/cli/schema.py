"""The commands for schemas: --apply-ddl, migrate, rollback and check."""

import sys
from pathlib import Path

import click

from daemon.cli.options import Options, configure_logs, data_dir_option, report, run
from daemon.settings import Settings


def apply(settings: Settings, *, offline: bool, dry_run: bool, grant_to: str | None) -> None:
    """Apply the DDL, or try or print it; then let a role run daemons."""
    from daemon.schema import migrate

    if offline:
        configure_logs(settings)
        migrate.offline(
            settings.packs,
            sys.stdout,
            schemas=settings.schemas,
            trigger_settings=settings.trigger_settings,
            owner=settings.owner,
        )
        return
    settings = settings.as_owner()
    run(settings, (_try if dry_run else _apply)(settings, grant_to))


async def _try(settings: Settings, _: str | None) -> None:
    from daemon.commands.migrate import migrate

    await migrate(settings, None, dry_run=True, report=report)


async def _apply(settings: Settings, grant_to: str | None) -> None:
    from daemon.packs import bundled
    from daemon.schema import migrate

    await migrate.apply(
        settings.require_dsn(),
        settings.packs,
        schemas=settings.schemas,
        trigger_settings=settings.trigger_settings,
        lock_timeout=settings.lock_timeout,
        attempts=settings.connect_attempts,
        report=report,
    )
    if grant_to is not None:
        functions = [
            f"{schema}.{function}"
            for pack, schema in settings.schemas.items()
            for function in bundled()[pack].functions
        ]
        await migrate.let_serve(
            settings.require_dsn(),
            grant_to,
            schemas=settings.schemas.values(),
            functions=functions,
            lock_timeout=settings.lock_timeout,
            attempts=settings.connect_attempts,
            report=report,
        )


@click.command()
@click.option(
    "--backup", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Back up to this new file."
)
@click.option(
    "--backup-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="DIR",
    help="Back up to a new file in this directory (default: ROWCAST_BACKUP_DIR, or the current one).",
)
@click.option("--no-backup", is_flag=True, help="Make no backup.")
@click.option("--dry-run", is_flag=True, help="Only try what is pending, in a transaction that is rolled back.")
@click.option(
    "--restore-on-failure",
    is_flag=True,
    help="Restore the backup if a step outside a transaction cannot be undone; later writes are lost.",
)
@data_dir_option("Data directory of the `daemon up` to migrate.")
@click.pass_obj
def migrate(
    options: Options,
    *,
    backup: Path | None,
    backup_dir: Path | None,
    no_backup: bool,
    dry_run: bool,
    restore_on_failure: bool,
    data_dir: Path | None,
) -> None:
    """Back up, try what is pending, apply it at once, verify. If anything fails, all is as before."""
    from daemon.commands.migrate import backup_in, migrate

    if sum(map(bool, (backup, backup_dir, no_backup))) > 1:
        raise click.UsageError("choose one of --backup, --backup-dir and --no-backup")
    if restore_on_failure and (no_backup or dry_run):
        raise click.UsageError("--restore-on-failure needs a backup")
    settings = options.having(data_dir=data_dir).local_settings.as_owner()
    path = None if no_backup else backup or backup_in(backup_dir or settings.backup_dir)
    run(settings, migrate(settings, path, dry_run=dry_run, restore_on_failure=restore_on_failure, report=report))


@click.command()
@click.argument("pack")
@click.option("--to", metavar="REV", help="Revision to return to (default: before the first).")
@click.option("--verify/--no-verify", default=True, help="Undo the rollback if its result is wrong (default: on).")
@click.pass_obj
def rollback(options: Options, *, pack: str, to: str | None, verify: bool) -> None:
    """Roll back the revisions of PACK."""
    from daemon.schema import migrate

    settings = options.settings.as_owner()
    run(
        settings,
        migrate.rollback(
            settings.require_dsn(),
            pack,
            to=to,
            verify=verify,
            schema=settings.schema_name or pack,
            lock_timeout=settings.lock_timeout,
            attempts=settings.connect_attempts,
            report=report,
        ),
    )


@click.command()
@data_dir_option("Data directory of the `daemon up` to check.")
@click.pass_obj
def check(options: Options, *, data_dir: Path | None) -> None:
    """Compare schemas and capture triggers with the files. Exit with 1 if something differs."""
    settings = options.having(data_dir=data_dir).quiet().local_settings.as_owner()
    run(settings, _print_findings(settings))


async def _print_findings(settings: Settings) -> None:
    from daemon.schema.health import check

    findings = await check(settings)
    for problem in findings.problems:
        click.echo(problem)
    for note in findings.notes:
        click.echo(f"note: {note}")
    if findings.problems:
        sys.exit(1)
    click.echo(f"nothing has drifted: {findings.captured}")
