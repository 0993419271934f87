"""The verb `archive`."""

from pathlib import Path
from typing import Final

import click

from daemon.extensions import CommandOptions


@click.command()
@click.argument("pack", type=click.Choice(["antone"]))
@click.option(
    "--to",
    "directory",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the files; created if missing (default: ROWCAST_ARCHIVE_DIR).",
)
@click.option("--dry-run", is_flag=True, help="Report what is old enough, but write nothing.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Data directory of the `daemon up` to archive.",
)
@click.pass_obj
def archive(
    options: CommandOptions, *, pack: str, directory: Path | None, dry_run: bool, data_dir: Path | None
) -> None:
    """Move old rows of PACK to files. Rows are deleted after their file has been read back."""
    from daemon.extensions.antone.archive import archive

    settings = options.having(packs=(pack,), data_dir=data_dir, archive_dir=directory).quiet().local_settings
    if settings.archive_dir is None:
        raise click.UsageError("give a directory with --to, or set ROWCAST_ARCHIVE_DIR")
    options.run(settings, archive(settings, settings.archive_dir, dry_run=dry_run, report=click.echo))


COMMANDS: Final = (archive,)
