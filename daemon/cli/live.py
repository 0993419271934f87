"""The commands up, tail and token."""

import re
from pathlib import Path

import click

from daemon.cli.options import Options, data_dir_option, run


@click.command()
@data_dir_option("Data directory (default: in your state directory).")
@click.option("--listen", metavar="HOST:PORT", help="Address for clients (default 127.0.0.1:8787).")
@click.option(
    "--demo/--no-demo", default=True, help="Load sample data and run a small bot that writes (default: on)."
)
@click.option(
    "--nodes",
    type=click.IntRange(2, 64),
    metavar="N",
    help="Let N gateways behind one address serve clients, over a NATS server of their own.",
)
@click.pass_obj
def up(options: Options, *, data_dir: Path | None, listen: str | None, demo: bool, nodes: int | None) -> None:
    """Try Rowcast with sample data. Find or start Postgres, apply the DDL, load the data, serve."""
    from daemon.commands.up import up

    options = options.having(data_dir=data_dir, listen=listen)
    options = options.quiet()
    work = up(
        options.settings,
        demo=demo,
        gateways=nodes or 0,
        options=["--config", str(options.config)] if options.config is not None else [],
        read_settings=options.read_settings,
    )
    run(options.settings, work)


@click.command()
@click.argument("topic")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--since", metavar="POSITION", help="Start after this position (default: from now on).")
@data_dir_option("Data directory of the `daemon up` to follow.")
@click.pass_obj
def tail(options: Options, *, topic: str, as_json: bool, since: str | None, data_dir: Path | None) -> None:
    """Print the changes of TOPIC as they happen. They come straight from the log."""
    from daemon.commands.tail import tail
    from daemon.core.change import MAX_TOPIC, can_be_named

    if not can_be_named(topic):
        raise click.BadParameter(
            f"no topic can have this name: it has at most {MAX_TOPIC} characters, without blanks and control "
            "characters, and does not begin with *",
            param_hint="TOPIC",
        )
    settings = options.having(data_dir=data_dir).quiet().local_settings
    run(settings, tail(settings, topic, as_json=as_json, since=since))


@click.command()
@click.option("--user", required=True, metavar="ID", help="User of the token (its `sub`).")
@click.option("--ttl", default="1h", metavar="TIME", help="Lifetime: 90s, 15m, 1h, 7d (default 1h).")
@click.option("--operator", is_flag=True, help="Also open the console at /console.")
@data_dir_option("Data directory of the `daemon up` whose secret to use.")
@click.pass_obj
def token(options: Options, *, user: str, ttl: str, operator: bool, data_dir: Path | None) -> None:
    """Print a development token."""
    from daemon.gateway.auth import Authenticator

    settings = options.having(data_dir=data_dir).local_settings
    if (seconds := _seconds(ttl)) > settings.token_lifetime.total_seconds():
        raise click.BadParameter("no longer lifetime than ROWCAST_TOKEN_LIFETIME is accepted", param_hint="--ttl")
    try:
        authenticator = Authenticator.configured(settings, settings.require_secret())
        click.echo(authenticator.issue(user, seconds, operator=operator))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--user") from None


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if not found or int(found[1]) == 0:
        raise click.BadParameter("write 90s, 15m, 1h or 7d", param_hint="--ttl")
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
