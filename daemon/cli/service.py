"""The commands doctor, config, status and explain: what whoever runs a daemon wants to know."""

import sys
from pathlib import Path

import click

from daemon.cli.options import Options, configure_logs, data_dir_option, run
from daemon.core.errors import OperatorFault
from daemon.settings import BadSettings

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")


@click.command()
@_as_json
@data_dir_option("Data directory of the `daemon up` to look at.")
@click.pass_obj
def doctor(options: Options, *, as_json: bool, data_dir: Path | None) -> None:
    """Say what is wrong here, and what to do about it.

    Looks at settings, certificate, database, rights, captures, clocks and limits; exits with 1 if something fails.
    """
    from daemon.commands.doctor import doctor, has_failed, show
    from daemon.commands.findings import Finding, failed

    found: list[Finding] = []
    try:
        settings = options.having(data_dir=data_dir).quiet().local_settings
        run(settings, doctor(settings, found, as_json=as_json))
    except OperatorFault as fault:
        for finding in failed("settings" if isinstance(fault, BadSettings) else "database", fault):
            found.append(finding)
            show(finding, as_json=as_json)
    if has_failed(found):
        sys.exit(1)


@click.command()
@_as_json
@click.pass_obj
def config(options: Options, *, as_json: bool) -> None:
    """Print every setting in effect, and where it comes from. Secrets are not shown."""
    from daemon.commands.config import show

    show(*options.settings_with_sources, as_json=as_json)


@click.command()
@click.option("--watch", is_flag=True, help="Look again every 2 seconds, until interrupted.")
@_as_json
@data_dir_option("Data directory of the `daemon up --nodes` whose nodes to show.")
@click.pass_obj
def status(options: Options, *, watch: bool, as_json: bool, data_dir: Path | None) -> None:
    """Show how the running daemon is, from its own pages. Exit with 1 if it is not ready."""
    from daemon.commands.status import status

    settings = options.having(data_dir=data_dir).quiet().settings
    configure_logs(settings)
    try:
        if not status(settings, watch=watch, as_json=as_json):
            sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@click.command()
@click.option("--topic", required=True, metavar="TOPIC", help="The topic that the user wants to follow.")
@click.option("--user", required=True, metavar="ID", help="The user, as the `sub` of the token names it.")
@click.option("--seq", type=click.IntRange(min=0), metavar="N", help="The number of one change in the log.")
@data_dir_option("Data directory of the `daemon up` to look at.")
@click.pass_obj
def explain(options: Options, *, topic: str, user: str, seq: int | None, data_dir: Path | None) -> None:
    """Say why a user gets a topic or a change, or does not. Exit with 1 if not."""
    from daemon.commands.explain import explain

    settings = options.having(data_dir=data_dir).quiet().local_settings
    run(settings, explain(settings, topic, user, seq))
