"""The commands for tables without a pack: watch, unwatch and watches."""

import re
from pathlib import Path
from typing import Final

import click

from daemon.cli.options import Options, data_dir_option, run

_NAME: Final = re.compile(r'\s*(?:"((?:[^"]|"")+)"|([^,]+))\s*(?:,|\Z)')


def _names(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    """The names in a list; one that contains a comma is in double quotes, as in SQL."""
    if value is None:
        return None
    found = [quoted.replace('""', '"') or bare.strip() for quoted, bare in _NAME.findall(value)]
    return [name for name in found if name]


@click.command()
@click.argument("table", metavar="SCHEMA.TABLE")
@click.option(
    "--topic", required=True, metavar="EXPR", help="The topic of a row `r`: \"'orders:' || r.customer_id\"."
)
@click.option(
    "--read", metavar="EXPR", help="Who may read a topic: \"topic = 'orders:' || user_id\", or over rows `r`."
)
@click.option("--read-function", metavar="NAME", help="A function (user text, topic text) that says who may read.")
@click.option("--public", is_flag=True, help="Everybody with a token may read every topic of the table.")
@click.option("--columns", metavar="A,B", callback=_names, help="Columns to publish (default: all that can be).")
@click.option("--key", metavar="A,B", callback=_names, help="Columns that are the key (default: the primary key).")
@click.option("--soft-delete", metavar="COLUMN", help="A column that is not null once the row counts as deleted.")
@click.option("--revokes", metavar="EXPR", help="The right, as jsonb, that begins and ends with a row.")
@click.option(
    "--rows", metavar="EXPR", help="How to find the rows of `topic`, for snapshots (default: as --topic says)."
)
@click.option(
    "--topics", metavar="A,B:*", callback=_names, help="What the topics are, if --topic does not show how they begin."
)
@data_dir_option("Data directory of the `daemon up` whose database it is.")
@click.pass_obj
def watch(
    options: Options,
    *,
    table: str,
    topic: str,
    read: str | None,
    read_function: str | None,
    public: bool,
    columns: list[str] | None,
    key: list[str] | None,
    soft_delete: str | None,
    revokes: str | None,
    rows: str | None,
    topics: list[str] | None,
    data_dir: Path | None,
) -> None:
    """Send the changes of a table of yours to clients. If it is watched already, replace how."""
    from daemon.commands.watch import watch
    from daemon.schema.watches import Watch

    if (read is not None) + (read_function is not None) + public != 1:
        raise click.UsageError("say who may read: give one of --read, --read-function and --public")
    settings = options.having(data_dir=data_dir).quiet().local_settings.as_owner()
    wanted = Watch(table, topic, read or "true", columns, key, soft_delete, revokes, rows, topics)
    run(settings, watch(settings, wanted, click.echo, function=read_function))


@click.command()
@click.argument("table", metavar="SCHEMA.TABLE")
@data_dir_option("Data directory of the `daemon up` whose database it is.")
@click.pass_obj
def unwatch(options: Options, *, table: str, data_dir: Path | None) -> None:
    """Stop sending the changes of a table that no pack has."""
    from daemon.commands.watch import unwatch

    settings = options.having(data_dir=data_dir).quiet().local_settings.as_owner()
    run(settings, unwatch(settings, table, click.echo))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@data_dir_option("Data directory of the `daemon up` whose database it is.")
@click.pass_obj
def watches(options: Options, *, as_json: bool, data_dir: Path | None) -> None:
    """Show the watched tables, their topics and readers."""
    from daemon.commands.watch import show_watches

    settings = options.having(data_dir=data_dir).quiet().local_settings.as_owner()
    run(settings, show_watches(settings, click.echo, as_json=as_json))
