"""The commands for schemas: --apply-ddl, rollback and check."""

import sys
from pathlib import Path

import click

from daemon.cli.options import Options, configure_logs, data_dir_option, report, run
from daemon.settings import Settings


def apply(settings: Settings, *, offline: bool) -> None:
    """Apply the DDL, or print it."""
    from daemon.schema import migrate

    if offline:
        configure_logs(settings)
        migrate.offline(
            settings.packs, sys.stdout, schemas=settings.schemas, trigger_settings=settings.trigger_settings
        )
        return
    run(
        settings,
        migrate.apply(
            settings.require_dsn(),
            settings.packs,
            schemas=settings.schemas,
            trigger_settings=settings.trigger_settings,
            lock_timeout=settings.lock_timeout,
            attempts=settings.connect_attempts,
            report=report,
        ),
    )


@click.command()
@click.argument("pack")
@click.option("--to", metavar="REV", help="Revision to return to (default: before the first).")
@click.pass_obj
def rollback(options: Options, *, pack: str, to: str | None) -> None:
    """Roll back the revisions of PACK."""
    from daemon.schema import migrate

    settings = options.settings
    run(
        settings,
        migrate.rollback(
            settings.require_dsn(),
            pack,
            to=to,
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
    """Compare the schemas and the capture triggers with the files; exit with 1 if something differs."""
    settings = options.having(data_dir=data_dir).quiet().local_settings
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
    click.echo(f"nothing has drifted: {findings.watched} tables are watched")
