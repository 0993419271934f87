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
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the files; created if missing.",
)
@click.option("--dry-run", is_flag=True, help="Report what is old enough, but write nothing.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Data directory of the `daemon up` to archive.",
)
@click.pass_obj
def archive(options: CommandOptions, *, pack: str, directory: Path, dry_run: bool, data_dir: Path | None) -> None:
    """Move old rows of PACK to files; rows are deleted after their file has been read back."""
    from daemon.extensions.antone.archive import archive

    settings = options.having(packs=(pack,), data_dir=data_dir).quiet().local_settings
    options.run(settings, archive(settings, directory, dry_run=dry_run, report=click.echo))


COMMANDS: Final = (archive,)
