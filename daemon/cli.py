"""The command line: arguments to one call, and errors to one line and an exit code."""

import asyncio
import re
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daemon import __version__
from daemon.core.errors import OperatorFault, RowcastError, fault_in
from daemon.logs import configure, get_logger
from daemon.settings import Settings, load

if TYPE_CHECKING:
    from daemon.dead_letters import Selection

log = get_logger()


@dataclass(frozen=True)
class Options:
    """What stands before the verb."""

    config: Path | None
    overrides: dict[str, Any]

    def having(self, **more: Any) -> "Options":  # noqa: ANN401
        """The same with what an option of a verb says; None says nothing."""
        return Options(
            self.config, self.overrides | {name: value for name, value in more.items() if value is not None}
        )

    def quiet(self) -> "Options":
        """The same for a verb whose terminal is for a person: only warnings are logged, unless a level was set."""
        return self if "log_level" in self.settings.model_fields_set else self.having(log_level="warn")

    @cached_property
    def settings(self) -> Settings:
        """The settings, with what the command line says. Raises BadSettings."""
        return load(self.config, **self.overrides)


class _Faults(click.Group):
    """Ends with one line and the fault's own exit code where the operator can mend it."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        try:
            return super().invoke(ctx)
        except (OperatorFault, ExceptionGroup) as error:
            fault = fault_in(error)
            if fault is None:
                raise
            click.echo(f"daemon: {fault}", err=True)
            ctx.exit(fault.exit_code)


def _run(work: Coroutine[Any, Any, object]) -> None:
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        sys.exit(130)


@click.group(cls=_Faults, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rowcast")
@click.option("--apply-ddl", is_flag=True, help="Apply Rowcast's schema, the packs and their triggers; then exit.")
@click.option("--sql", is_flag=True, help="With --apply-ddl: print the SQL instead of running it.")
@click.option("--pack", "packs", multiple=True, metavar="NAME", help="A pack to apply or serve, or all; repeatable.")
@click.option("--schema", metavar="NAME", help="The schema that the pack lives in (default: its name).")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A TOML file.")
@click.option("--database-url", metavar="URL", help="Better in the environment: a command line is visible to all.")
@click.option("--listen", metavar="HOST:PORT", help="Where clients connect (default 127.0.0.1:8787).")
@click.option("--workers", metavar="N", help="How many processes serve, one for each core (default 1).")
@click.pass_context
def cli(
    ctx: click.Context,
    *,
    apply_ddl: bool,
    sql: bool,
    packs: tuple[str, ...],
    schema: str | None,
    config: Path | None,
    database_url: str | None,
    listen: str | None,
    workers: str | None,
) -> None:
    """Rowcast: from a committed row in Postgres to every subscribed client.

    Without a command it serves. `daemon up` is the way to try it.
    """
    ctx.obj = options = Options(config, {}).having(
        packs=packs or None, schema=schema, database_url=database_url, listen=listen, workers=workers
    )
    if sql and not apply_ddl:
        raise click.UsageError("--sql goes with --apply-ddl")
    if ctx.invoked_subcommand is not None:
        if apply_ddl:
            raise click.UsageError("--apply-ddl stands alone, without a command")
        return
    if apply_ddl:
        _apply(options.settings, offline=sql)
    elif options.settings.workers == 1:
        from daemon.app import serve

        _configure(options.settings)
        _run(serve(options.settings))
    else:
        from daemon.workers import supervise

        _configure(options.settings)
        sys.exit(supervise(options.settings))


def _configure(settings: Settings) -> None:
    configure(settings.log_format, settings.log_level)


def _report(line: str) -> None:
    """Say what was done: to whoever reads the output, and in a service's log."""
    click.echo(line)
    if not sys.stderr.isatty():
        name = "schema_warning" if line.lower().startswith("warning") else "schema_migration"
        (log.warning if name == "schema_warning" else log.info)(name, done=line)


def _apply(settings: Settings, *, offline: bool) -> None:
    from daemon.app import schemas_of
    from daemon.postgres import ddl

    _configure(settings)
    if offline:
        ddl.offline(settings.packs, sys.stdout, schemas=schemas_of(settings))
        return
    _run(
        ddl.apply(
            settings.require_dsn(),
            settings.packs,
            schemas=schemas_of(settings),
            lock_timeout=settings.lock_timeout,
            attempts=settings.connect_attempts,
            report=_report,
        )
    )


@cli.command()
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Default: the user's state folder."
)
@click.option("--listen", metavar="HOST:PORT", help="Default 127.0.0.1:8787.")
@click.option("--demo/--no-demo", default=True, help="Sample data, sample tokens and a small bot that writes.")
@click.pass_obj
def up(options: Options, *, data_dir: Path | None, listen: str | None, demo: bool) -> None:
    """First run: find or start Postgres, apply the DDL, load sample data, serve."""
    from daemon.up import up

    options = options.having(data_dir=data_dir, listen=listen)
    options = options.quiet()
    _configure(options.settings)
    _run(up(options.settings, demo=demo))


@cli.command()
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Of the `daemon up` to fill.")
@click.pass_obj
def seed(options: Options, *, data_dir: Path | None) -> None:
    """Load the sample data of the packs; refused in production."""
    from daemon.seed import seed
    from daemon.up import at_home

    settings = at_home(options.having(data_dir=data_dir).quiet().settings)
    _configure(settings)
    _run(seed(settings))
    click.echo(f"sample data of {', '.join(settings.packs)} is loaded")


@cli.command()
@click.argument("pack")
@click.option("--to", metavar="REV", help="The revision to stop at (default: before the first).")
@click.pass_obj
def rollback(options: Options, *, pack: str, to: str | None) -> None:
    """Run the down files of PACK in reverse order."""
    from daemon.postgres import ddl

    settings = options.settings
    _configure(settings)
    _run(
        ddl.rollback(
            settings.require_dsn(),
            pack,
            to=to,
            schema=settings.schema_name or pack,
            lock_timeout=settings.lock_timeout,
            attempts=settings.connect_attempts,
            report=_report,
        )
    )


@cli.command()
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Of the `daemon up` to check.")
@click.pass_obj
def check(options: Options, *, data_dir: Path | None) -> None:
    """Say what is wrong with the schemas and the captures; 1 if anything is."""
    from daemon.app import check
    from daemon.up import at_home

    settings = at_home(options.having(data_dir=data_dir).quiet().settings)
    _configure(settings)
    _run(_print_problems(check(settings)))


async def _print_problems(checking: Coroutine[Any, Any, tuple[list[str], int]]) -> None:
    problems, watched = await checking
    for problem in problems:
        click.echo(problem)
    if problems:
        sys.exit(1)
    click.echo(f"nothing has drifted: {watched} tables are watched")


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Of the `daemon up` to back up.")
@click.pass_obj
def backup(options: Options, *, file: Path, data_dir: Path | None) -> None:
    """Write the whole database to FILE as SQL, by means of pg_dump; best before a new DDL."""
    from daemon.data.backup import backup
    from daemon.up import at_home

    settings = at_home(options.having(data_dir=data_dir).quiet().settings)
    _configure(settings)
    _run(backup(settings, file, report=click.echo))


@cli.command()
@click.argument("pack", type=click.Choice(["antone"]))
@click.option(
    "--to",
    "directory",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the files go; made if it is not there.",
)
@click.option("--dry-run", is_flag=True, help="Say what is old enough, and write nothing.")
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Of the `daemon up` to archive.")
@click.pass_obj
def archive(options: Options, *, pack: str, directory: Path, dry_run: bool, data_dir: Path | None) -> None:
    """Move rows of PACK that are old enough to files; they are deleted once these have been read back."""
    from daemon.data import antone
    from daemon.up import at_home

    settings = at_home(options.having(packs=(pack,), data_dir=data_dir).quiet().settings)
    _configure(settings)
    _run(antone.archive(settings, directory, dry_run=dry_run, report=click.echo))


@cli.command()
@click.option("--user", required=True, metavar="ID", help="Whose token: the `sub` of the token.")
@click.option("--ttl", default="1h", metavar="TIME", help="How long it is good: 90s, 15m, 1h, 7d (default 1h).")
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Where `daemon up` keeps its secret."
)
@click.pass_obj
def token(options: Options, *, user: str, ttl: str, data_dir: Path | None) -> None:
    """Print a development token."""
    from daemon.gateway.auth import Authenticator
    from daemon.up import at_home

    settings = at_home(options.having(data_dir=data_dir).settings)
    try:
        click.echo(Authenticator(settings.require_secret()).issue(user, _seconds(ttl)))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--user") from None


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if not found or int(found[1]) == 0:
        raise click.BadParameter("write 90s, 15m, 1h or 7d", param_hint="--ttl")
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


@cli.command("rotate-token-keys")
@click.pass_obj
def rotate_token_keys(options: Options) -> None:
    """Encrypt the OAuth tokens of email_unsubscribe under the first of the keys."""
    from daemon.data.email_unsubscribe import rotate_token_keys

    settings = options.quiet().settings
    _configure(settings)

    async def rotate() -> None:
        renewed = await rotate_token_keys(settings)
        click.echo(f"the tokens of {renewed} account{'' if renewed == 1 else 's'} were encrypted anew")

    _run(rotate())


@cli.command()
@click.argument("topic")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--since", metavar="POSITION", help="From this position on (default: from now).")
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Of the `daemon up` to follow.")
@click.pass_obj
def tail(options: Options, *, topic: str, as_json: bool, since: str | None, data_dir: Path | None) -> None:
    """Follow TOPIC in the terminal, straight from the log."""
    from daemon.tail import tail
    from daemon.up import at_home

    settings = at_home(options.having(data_dir=data_dir).quiet().settings)
    _configure(settings)
    _run(tail(settings, topic, as_json=as_json, since=since))


@cli.group("dead-letters")
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Of the `daemon up` to look into.")
@click.pass_context
def dead_letters(ctx: click.Context, *, data_dir: Path | None) -> None:
    """Look at changes that did not fit their row model, replay them, drop them."""
    options: Options = ctx.obj
    ctx.obj = options.having(data_dir=data_dir).quiet()


def _database_settings(options: Options) -> Settings:
    from daemon.up import at_home

    settings = at_home(options.settings)
    _configure(settings)
    return settings


# Those that are meant: as SEQ ..., or as --all, which --pack and --table narrow.
_SEQ = click.IntRange(0, 2**63 - 1)
_pack_filter = click.option("--pack", metavar="NAME", help="Only those of this pack.")
_table_filter = click.option("--table", metavar="NAME", help="Only those of this table.")


def _selection(seqs: tuple[int, ...], *, all_of_them: bool, pack: str | None, table: str | None) -> "Selection":
    from daemon.dead_letters import Selection

    if bool(seqs) == all_of_them:
        raise click.UsageError("name letters by SEQ, or all of them by --all")
    if seqs and (pack or table):
        raise click.UsageError("--pack and --table go with --all")
    return Selection(seqs or None, pack, table)


@dead_letters.command("list")
@_pack_filter
@_table_filter
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def list_(options: Options, *, pack: str | None, table: str | None, limit: int | None, as_json: bool) -> None:
    """Print a line for each letter, without its record, the newest last."""
    from daemon.dead_letters import Selection, show_list

    _run(show_list(_database_settings(options), Selection(None, pack, table, limit), as_json=as_json))


@dead_letters.command()
@click.argument("seq", type=_SEQ)
@click.pass_obj
def show(options: Options, *, seq: int) -> None:
    """Print all of one letter as JSON, its record included."""
    from daemon.dead_letters import show

    _run(show(_database_settings(options), seq))


@dead_letters.command()
@click.argument("seqs", type=_SEQ, nargs=-1, metavar="[SEQ]...")
@click.option("--all", "all_of_them", is_flag=True, help="All there are.")
@_pack_filter
@_table_filter
@click.pass_obj
def replay(
    options: Options, *, seqs: tuple[int, ...], all_of_them: bool, pack: str | None, table: str | None
) -> None:
    """Tell these changes again, under new numbers, unless they are out of date."""
    from daemon.dead_letters import replay

    selection = _selection(seqs, all_of_them=all_of_them, pack=pack, table=table)
    _run(replay(_database_settings(options), selection))


@dead_letters.command()
@click.argument("seqs", type=_SEQ, nargs=-1, metavar="[SEQ]...")
@click.option("--all", "all_of_them", is_flag=True, help="All there are.")
@_pack_filter
@_table_filter
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def drop(
    options: Options, *, seqs: tuple[int, ...], all_of_them: bool, pack: str | None, table: str | None, yes: bool
) -> None:
    """Delete these letters for ever."""
    from daemon.dead_letters import drop

    selection = _selection(seqs, all_of_them=all_of_them, pack=pack, table=table)
    if not yes and sys.stdin.isatty():
        click.confirm("Drop these dead letters for ever?", abort=True)
    elif not yes and all_of_them:
        raise click.UsageError("--all goes with --yes where there is no terminal to ask on")
    _run(drop(_database_settings(options), selection))


def main() -> None:
    """Run the command line. What nobody foresaw is logged with its traceback, and ends with 70."""
    try:
        cli()
    except (click.Abort, RowcastError) as error:
        click.echo(f"daemon: {error}", err=True)
        sys.exit(1)
    except Exception:  # noqa: BLE001 - the last one to see it
        get_logger().exception("internal_error")
        sys.exit(70)
