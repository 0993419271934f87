"""The commands for data: seed, backup, restore and reset."""

from pathlib import Path

import click

from daemon.cli.options import Options, data_dir_option, run


@click.command()
@data_dir_option("Data directory of the `daemon up` to fill.")
@click.pass_obj
def seed(options: Options, *, data_dir: Path | None) -> None:
    """Load the packs' sample data (refused in production)."""
    from daemon.commands.seed import seed

    settings = options.having(data_dir=data_dir).quiet().local_settings.as_owner()
    run(settings, seed(settings))
    click.echo(f"sample data of {', '.join(settings.packs)} is loaded")


@click.command()
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@data_dir_option("Data directory of the `daemon up` to back up.")
@click.pass_obj
def backup(options: Options, *, file: Path | None, data_dir: Path | None) -> None:
    """Write the whole database to FILE, with its roles. Do this before applying new DDL.

    Without FILE, write a new file to ROWCAST_BACKUP_DIR, and keep the ROWCAST_BACKUP_KEEP newest ones there.
    """
    from daemon.commands.backup import backup, keep_backups

    settings = options.having(data_dir=data_dir).quiet().local_settings.as_owner()
    work = keep_backups(settings, report=click.echo) if file is None else backup(settings, file, report=click.echo)
    run(settings, work)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--replace", is_flag=True, help="First drop everything that the database contains.")
@data_dir_option("Data directory of the `daemon up` to restore to.")
@click.pass_obj
def restore(options: Options, *, file: Path, replace: bool, data_dir: Path | None) -> None:
    """Restore FILE of `daemon backup` to an empty database. Its roles are created if they are missing."""
    from daemon.commands.restore import restore

    settings = options.having(data_dir=data_dir).quiet().local_settings
    run(settings, restore(settings, file, replace=replace, report=click.echo))


@click.command()
@click.argument("target", metavar="TOPIC|TABLE")
@data_dir_option("Data directory of the `daemon up` to reset.")
@click.pass_obj
def reset(options: Options, *, target: str, data_dir: Path | None) -> None:
    """Make clients read a topic anew. For a SCHEMA.TABLE that was not captured: all topics of its pack."""
    from daemon.commands.reset import reset

    settings = options.having(data_dir=data_dir).quiet().local_settings.as_owner()
    run(settings, reset(settings, target, click.echo))
