"""`daemon up`: sets up a database, the DDL, sample data and a key as needed, and runs the daemon."""

import asyncio
import json
import random
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import click
from pydantic import SecretStr

from daemon.app.serve import Running, serve
from daemon.commands.nodes import Nodes, prepare_nodes
from daemon.commands.seed import SeedRefused, demo_actions, seed, statements
from daemon.commands.set_up import apply_in_child
from daemon.embedded.server import EmbeddedPostgres
from daemon.files import write_private
from daemon.gateway.auth import Authenticator
from daemon.logs import get_logger
from daemon.packs import Pack, bundled
from daemon.pages.demo import Demo
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, explain
from daemon.settings import Address, Settings
from daemon.settings.local import (
    DataDirUnusable,
    Node,
    as_service,
    connection_file,
    remembered_nodes,
    service_file,
    with_local_instance,
)

log = get_logger()

TOKEN_TTL = 7 * 86400.0  # seconds that the token of a sample user is valid
BOT_DELAY = (1.5, 5.0)  # seconds: the range of the random delay between two steps of the demo bot
STEP_TIMEOUT = 10.0  # seconds for one step


async def up(
    settings: Settings,
    *,
    demo: bool,
    gateways: int,
    options: Sequence[str],
    read_settings: Callable[[], Settings],
) -> None:
    """Set everything up and serve until SIGINT or SIGTERM. Raises an OperatorFault.

    With `gateways`, so many of them serve clients at `settings.listen`, and this daemon is their member. `options`
    are those of the command line that tell where the settings are read from. The role in ROWCAST_OWNER is taken on
    throughout: whoever may only apply the DDL could neither load the data nor serve.
    """
    if demo and settings.environment == "production":
        raise SeedRefused
    data_dir = settings.data_dir
    _prepare(data_dir, needs_secret=settings.secret is None)
    async with AsyncExitStack() as stack:
        nodes, of_member = (
            await prepare_nodes(stack, settings, gateways, options, demo=demo) if gateways else (None, {})
        )
        settings = settings.model_copy(update=of_member)
        postgres = None
        if settings.dsn is None:
            postgres = await stack.enter_async_context(EmbeddedPostgres(data_dir))
            # Its only role is a superuser, whatever environment this is.
            embedded = {"database_url": SecretStr(postgres.dsn), "environment": "development"}
            settings = settings.model_copy(update=embedded)
        settings = with_local_instance(settings).as_owner()
        await apply_in_child(settings, settings.packs)
        sample = await seed(settings) if demo else []
        authenticator = Authenticator.configured(settings, settings.require_secret())
        ttl = min(TOKEN_TTL, settings.token_lifetime.total_seconds())

        def users() -> list[dict[str, str]]:
            return [user | {"token": authenticator.issue(user["id"], ttl)} for user in sample]

        async def on_ready(daemon: Running) -> None:
            clients = daemon if nodes is None else nodes.address_of(daemon)
            places = nodes.places(daemon) if nodes is not None else []
            _write_connection(data_dir, settings.require_dsn(), clients, users())
            stack.enter_context(remembered_nodes(data_dir, places))
            _print_welcome(settings, daemon, clients, places, sample)
            async with asyncio.TaskGroup() as group:
                if postgres is not None:
                    group.create_task(postgres.run())
                if nodes is not None:
                    group.create_task(nodes.run(settings))
                if demo and daemon.pool is not None:
                    group.create_task(_bot(settings, daemon.pool))

        served = Demo(lambda: {"users": users()}, demo_actions(settings)) if demo else None
        reread = partial(_read_again, read_settings, of_member, nodes)
        await serve(settings, demo=served, on_ready=on_ready, read_settings=reread)
    click.echo("Stopped.")


def _write_connection(data_dir: Path, dsn: str, clients: Running, users: list[dict[str, str]]) -> None:
    """Write down how to connect, for programs and for psql."""
    connection = {
        "database_url": dsn,
        "websocket_url": clients.websocket_url,
        "http_url": clients.http_url,
        "users": users,
    }
    write_private(connection_file(data_dir), json.dumps(connection, indent=2))
    write_private(service_file(data_dir), as_service(dsn))


def _prepare(data_dir: Path, *, needs_secret: bool) -> None:
    """Make the data directory, and a secret in it. Raises DataDirUnusable."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if needs_secret and not (data_dir / "secret").exists():
            write_private(data_dir / "secret", secrets.token_urlsafe(48))
    except OSError as error:
        raise DataDirUnusable(data_dir, error.strerror or str(error)) from None


def _read_again(
    read_settings: Callable[[], Settings], of_member: Mapping[str, SecretStr | Address], nodes: Nodes | None
) -> Settings:
    """The settings of this daemon as they are now; its gateways read theirs again, too."""
    settings = with_local_instance(read_settings()).model_copy(update=of_member)
    if nodes is not None:
        nodes.reload()
    return settings


async def _bot(settings: Settings, pool: Pool) -> None:
    """Write sample changes from time to time, so that there is something to see."""
    steps = statements(settings, "demo_step.sql")
    while steps:
        await asyncio.sleep(random.uniform(*BOT_DELAY))  # noqa: S311
        for step in steps:
            try:
                async with acquired(pool, STEP_TIMEOUT) as connection:
                    await connection.execute(step)
            except DATABASE_ERRORS as error:
                log.debug("demo_step_failed", reason=str(explain(error)))


def _bold(text: str) -> str:
    return click.style(text, bold=True)


def example_topic(pack: Pack, users: Sequence[Mapping[str, str]]) -> str:
    """A topic to try out: one that needs no id, or else one of a sample user, or else a placeholder."""
    kinds = [shape.partition(":")[0] for shape in pack.topics]
    names = [*pack.topics, *(f"{kind}:{user['id']}" for user in users for kind in kinds)]
    return next(filter(pack.serves, names), f"{kinds[0]}:...")


def _print_welcome(
    settings: Settings,
    daemon: Running,
    clients: Running,
    places: Sequence[Node],
    sample: Sequence[Mapping[str, str]],
) -> None:
    """Print the addresses, and commands to try. `clients` is where clients connect to, and `places` are the nodes."""
    file = connection_file(settings.data_dir)
    data_dir_option = (
        ""
        if settings.data_dir == Settings.model_fields["data_dir"].get_default(call_default_factory=True)
        else f" --data-dir {settings.data_dir}"
    )
    topic = example_topic(bundled()[settings.packs[0]], sample) if settings.packs else "TOPIC"
    lines = [
        "",
        f"  {_bold('Rowcast is running.')}  {click.style(clients.http_url, fg='cyan', underline=True)}",
        "",
        f"  websocket   {clients.websocket_url}",
        f"  database    in {file}" + (", with the sample users' tokens" if sample else ""),
        *(f"  {place.name:11} {place.url}" for place in places),
        "",
        "  Open the page, or follow along in another terminal:",
        f"    {_bold(f'{_command()} tail {topic}{data_dir_option}')}",
    ]
    if sample and not _is_local(clients.host):
        lines[-3:-3] = [
            "",
            "  Anyone who can reach this port can sign in as any sample user; use --no-demo to prevent that.",
        ]
    if shutil.which("psql"):
        # Not with the URL as an argument: everybody on this machine can read those of a process.
        place = shlex.quote(str(service_file(settings.data_dir)))
        lines.append("    " + _bold(f"PGSERVICEFILE={place} psql service=rowcast"))
    if places:
        lines.append("    " + _bold(f"{_command()} status{data_dir_option}"))
    click.echo("\n".join([*lines, "", "  Ctrl-C stops everything.", ""]))


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("unix:")


def _command() -> str:
    """The command as the user typed it."""
    script = Path(sys.argv[0])
    if script.name != "daemon":
        return f"{Path(sys.executable).name} -m daemon"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
