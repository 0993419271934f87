"""The command dead-letters and its subcommands."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from daemon.cli.options import Options, data_dir_option, run

if TYPE_CHECKING:
    from daemon.log.dead_letters import Selection


@click.group("dead-letters")
@data_dir_option("Data directory of the `daemon up` to inspect.")
@click.pass_context
def dead_letters(ctx: click.Context, *, data_dir: Path | None) -> None:
    """List, show, replay or drop dead letters. These are changes that did not fit their row model."""
    options: Options = ctx.obj
    ctx.obj = options.having(data_dir=data_dir).quiet()


# Dead letters are selected by SEQ ..., or by --all, which --pack and --table narrow down.
_SEQ = click.IntRange(0, 2**63 - 1)
_pack_filter = click.option("--pack", metavar="NAME", help="Only this pack.")
_table_filter = click.option("--table", metavar="NAME", help="Only this table.")


def _selection(seqs: tuple[int, ...], *, all_of_them: bool, pack: str | None, table: str | None) -> "Selection":
    from daemon.log.dead_letters import Selection

    if bool(seqs) == all_of_them:
        raise click.UsageError("give one or more SEQ, or --all")
    if seqs and (pack or table):
        raise click.UsageError("--pack and --table require --all")
    return Selection(seqs or None, pack, table)


@dead_letters.command("list")
@_pack_filter
@_table_filter
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def list_(options: Options, *, pack: str | None, table: str | None, limit: int | None, as_json: bool) -> None:
    """Print one line per dead letter, newest last, without its record."""
    from daemon.commands.dead_letters import show_list
    from daemon.log.dead_letters import Selection

    settings = options.local_settings.as_owner()
    run(settings, show_list(settings, Selection(None, pack, table, limit), as_json=as_json))


@dead_letters.command()
@click.argument("seq", type=_SEQ)
@click.pass_obj
def show(options: Options, *, seq: int) -> None:
    """Print one whole dead letter as JSON, including its record."""
    from daemon.commands.dead_letters import show

    settings = options.local_settings.as_owner()
    run(settings, show(settings, seq))


@dead_letters.command()
@click.argument("seqs", type=_SEQ, nargs=-1, metavar="[SEQ]...")
@click.option("--all", "all_of_them", is_flag=True, help="All dead letters.")
@_pack_filter
@_table_filter
@click.pass_obj
def replay(
    options: Options, *, seqs: tuple[int, ...], all_of_them: bool, pack: str | None, table: str | None
) -> None:
    """Replay dead letters as new changes; stale ones are skipped."""
    from daemon.commands.dead_letters import replay

    selection = _selection(seqs, all_of_them=all_of_them, pack=pack, table=table)
    settings = options.local_settings.as_owner()
    run(settings, replay(settings, selection))


@dead_letters.command()
@click.argument("seqs", type=_SEQ, nargs=-1, metavar="[SEQ]...")
@click.option("--all", "all_of_them", is_flag=True, help="All dead letters.")
@_pack_filter
@_table_filter
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def drop(
    options: Options, *, seqs: tuple[int, ...], all_of_them: bool, pack: str | None, table: str | None, yes: bool
) -> None:
    """Delete dead letters permanently."""
    from daemon.commands.dead_letters import drop

    selection = _selection(seqs, all_of_them=all_of_them, pack=pack, table=table)
    if not yes and sys.stdin.isatty():
        click.confirm("Delete these dead letters permanently?", abort=True)
    elif not yes and all_of_them:
        raise click.UsageError("--all requires --yes when there is no terminal to ask on")
    settings = options.local_settings.as_owner()
    run(settings, drop(settings, selection))
