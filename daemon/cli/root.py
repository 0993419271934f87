"""The command `daemon`: its global options and its subcommands. Faults become one line and an exit code."""

import errno
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click
from click.types import StringParamType

from daemon import __version__, extensions
from daemon.cli.contracts import types
from daemon.cli.data import backup, reset, restore, seed
from daemon.cli.dead_letters import dead_letters
from daemon.cli.jobs import jobs
from daemon.cli.live import tail, token, up
from daemon.cli.options import Options, configure_logs, run
from daemon.cli.schema import apply, check, migrate, rollback
from daemon.cli.service import config, doctor, explain, status
from daemon.cli.watch import unwatch, watch, watches
from daemon.core.errors import OperatorFault, RowcastError, fault_in
from daemon.logs import get_logger
from daemon.settings import Settings

if TYPE_CHECKING:
    from daemon.app.serve import Serving

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoRoom(OperatorFault):
    """Nothing more can be written ({reason}): make room where the output goes."""

    exit_code: ClassVar[int] = 74

    def __init__(self, reason: str) -> None:
        self.reason = reason


_WHOLE_DATABASE = ("backup", "restore", "dead-letters", "tail", "token", "watch", "unwatch", "watches", "status")
"""The commands for which --schema would mean nothing."""


class _Faults(click.Group):
    """Prints an OperatorFault in one line, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        try:
            return super().invoke(ctx)
        except (OperatorFault, ExceptionGroup) as error:
            fault = fault_in(error)
            if fault is None:
                raise
            click.echo(f"daemon: {fault}", err=True)
            ctx.exit(fault.exit_code)


@click.group(cls=_Faults, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rowcast")
@click.option("--apply-ddl", is_flag=True, help="Apply Rowcast's schema, the packs and their triggers, then exit.")
@click.option("--sql", is_flag=True, help="With --apply-ddl: print the SQL instead of running it.")
@click.option("--dry-run", is_flag=True, help="With --apply-ddl: try it in a transaction that is rolled back.")
@click.option(
    "--grant-to", metavar="ROLE", help="With --apply-ddl: grant ROLE what a daemon needs, and nothing else."
)
@click.option("--owner", metavar="ROLE", help="Role that owns the schemas, which commands that change them take on.")
@click.option("--pack", "packs", multiple=True, metavar="NAME", help="Pack to apply or serve, or all; repeatable.")
@click.option("--schema", metavar="NAME", help="Schema of the pack (default: its name).")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML file with settings."
)
@click.option(
    "--database-url", metavar="URL", help="Database URL. Prefer DATABASE_URL: other users can see the command line."
)
@click.option("--listen", metavar="HOST:PORT", help="Address for clients (default 127.0.0.1:8787).")
@click.option("--workers", metavar="N", help="Number of processes, one per core to use (default 1).")
@click.pass_context
def cli(
    ctx: click.Context,
    *,
    apply_ddl: bool,
    sql: bool,
    dry_run: bool,
    grant_to: str | None,
    owner: str | None,
    packs: tuple[str, ...],
    schema: str | None,
    config: Path | None,
    database_url: str | None,
    listen: str | None,
    workers: str | None,
) -> None:
    """Rowcast sends committed changes in Postgres to websocket clients.

    Without a command it runs the daemon. To try it out, use `daemon up`. To serve a table of yours, use
    `daemon --apply-ddl`, `daemon watch`, `daemon`.
    """
    ctx.obj = options = Options(config, {}).having(
        packs=packs or None, schema=schema, owner=owner, database_url=database_url, listen=listen, workers=workers
    )
    modes = {"--sql": sql, "--dry-run": dry_run, "--grant-to": grant_to is not None}
    chosen = [mode for mode, is_chosen in modes.items() if is_chosen]
    if chosen and not apply_ddl:
        raise click.UsageError(f"{chosen[0]} requires --apply-ddl")
    if len(chosen) > 1:
        raise click.UsageError(f"choose one of {', '.join(modes)}")
    if ctx.invoked_subcommand is not None:
        if schema is not None and ctx.invoked_subcommand in _WHOLE_DATABASE:
            raise click.UsageError(
                f"--schema cannot be combined with {ctx.invoked_subcommand}: it reads every schema"
            )
        if apply_ddl:
            raise click.UsageError("--apply-ddl cannot be combined with a command")
        return
    if apply_ddl:
        apply(options.settings, offline=sql, dry_run=dry_run, grant_to=grant_to)
    else:
        _serve(options)


def _serve(options: Options) -> None:
    """Run the daemon with one process or more, after the migrations of packs that want them at the start."""
    from daemon.commands.set_up import migrate_on_start, migrating_packs

    _hold_hangup()
    settings = options.settings
    configure_logs(settings)
    if packs := migrating_packs(settings):
        run(settings, migrate_on_start(settings, packs))
    _run(options, settings)


def _hold_hangup() -> None:
    """Let a SIGHUP that arrives during the start wait until it is handled: by default, it would end the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def _run(options: Options, settings: Settings, serving: "Serving | None" = None) -> None:
    """Serve with one process or more."""
    from daemon.app.serve import running, serve

    serving = serving or running
    if settings.workers == 1:
        run(settings, serve(settings, read_settings=options.read_settings, serving=serving))
    else:
        from daemon.supervisor import supervise

        sys.exit(supervise(settings, options.read_settings, serving))


@click.command()
@click.option("--demo", is_flag=True, hidden=True, help="Pass on what the sample users of `daemon up` do.")
@click.option("--open", "is_open", is_flag=True, hidden=True, help="Have the pages for operators at both addresses.")
@click.pass_obj
def gateway(options: Options, *, demo: bool, is_open: bool) -> None:
    """Serve clients without a database, over NATS.

    Everything is asked of daemons with the same ROWCAST_NATS_URL.
    """
    _hold_hangup()
    from daemon.app.serve import gateway_running

    settings = options.settings
    configure_logs(settings)
    samples = []
    if demo:
        from daemon.commands.seed import demo_actions
        from daemon.pages.demo import requests

        samples = requests(demo_actions(settings))
    _run(options, settings, partial(gateway_running, samples=samples, is_open=is_open))


_COMMANDS = (
    up,
    gateway,
    watch,
    unwatch,
    watches,
    seed,
    migrate,
    rollback,
    check,
    backup,
    restore,
    reset,
    token,
    tail,
    types,
    dead_letters,
    jobs,
    doctor,
    config,
    status,
    explain,
)

for _command in (*_COMMANDS, *extensions.commands()):
    cli.add_command(_command)


class _Text(StringParamType):
    """A text whose bytes are UTF-8. Python keeps others as halves of surrogate pairs, which nothing else takes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail("this is not UTF-8", param, ctx)
        return super().convert(value, param, ctx)


def _expect_text(command: click.Command) -> None:
    """Let the command, and those in it, take texts only; a path may have any bytes."""
    for parameter in command.params:
        if isinstance(parameter.type, StringParamType):
            parameter.type = _Text()
    if isinstance(command, click.Group):
        for part in command.commands.values():
            _expect_text(part)


_expect_text(cli)


def main() -> None:
    """Run the command line. An unexpected error is logged with its traceback, and exits with 70 (EX_SOFTWARE)."""
    _occupy_standard_streams()
    try:
        _run_cli()
    except (click.Abort, RowcastError) as error:
        click.echo(f"daemon: {error}", err=True)
        sys.exit(1)
    except Exception:  # noqa: BLE001 - the outermost handler
        get_logger().exception("internal_error")
        sys.exit(70)


def _run_cli() -> None:
    """Run the command line; a full disk is one line, whichever command meets it."""
    try:
        cli()
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        fault = NoRoom(os.strerror(error.errno or 0))
        click.echo(f"daemon: {fault}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of the output would fail once more at the exit
        sys.exit(fault.exit_code)


def _occupy_standard_streams() -> None:
    """Let no connection get the descriptor of a standard stream that is closed: what is printed would go there."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
