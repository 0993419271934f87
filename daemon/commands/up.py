"""The first run: a database if there is none, the DDL, sample data, a key; then the daemon, and where to look."""

import asyncio
import json
import os
import random
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path

import click
from pydantic import SecretStr

from daemon.app import Running, serve
from daemon.commands.seed import seed, statements
from daemon.core.errors import OperatorFault
from daemon.embedded.server import EmbeddedPostgres
from daemon.gateway.auth import Authenticator
from daemon.logs import get_logger
from daemon.packs import Pack, bundled
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.settings import Settings
from daemon.settings.local import DataDirUnusable, connection_file, with_local_instance

log = get_logger()

TOKEN_TTL = 7 * 86400.0  # seconds that a sample user's token is good for
BOT_PAUSE = (1.5, 5.0)  # seconds between two things that the demo's bot does, at random
STEP_TIMEOUT = 10.0  # seconds for one thing that it does


class SetupFailed(OperatorFault):
    """The DDL could not be applied; see the line above."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code  # type: ignore[misc]


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)


async def up(settings: Settings, *, demo: bool) -> None:
    """Serve out of the data directory until SIGINT or SIGTERM. Raises an OperatorFault."""
    data_dir = settings.data_dir
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if settings.secret is None and not (data_dir / "secret").exists():
            _write_private(data_dir / "secret", secrets.token_urlsafe(48))
    except OSError as error:
        raise DataDirUnusable(data_dir, error.strerror or str(error)) from None

    async with AsyncExitStack() as stack:
        if settings.dsn is None:
            postgres = await stack.enter_async_context(EmbeddedPostgres(data_dir))
            settings = settings.model_copy(update={"database_url": SecretStr(postgres.dsn)})
        settings = with_local_instance(settings)
        await _apply_ddl(settings)
        sample = await seed(settings) if demo else []
        authenticator = Authenticator(settings.require_secret())

        def users() -> list[dict[str, str]]:
            return [user | {"token": authenticator.issue(user["id"], TOKEN_TTL)} for user in sample]

        async def began(daemon: Running) -> None:
            facts = {
                "database_url": settings.require_dsn(),
                "websocket_url": daemon.websocket_url,
                "http_url": daemon.http_url,
                "users": users(),
            }
            _write_private(connection_file(data_dir), json.dumps(facts, indent=2))
            _greet(settings, daemon, sample)
            if demo:
                await _bot(settings, daemon.pool)

        await serve(settings, demo=(lambda: {"users": users()}) if demo else None, beside=began)
    click.echo("Stopped.")


async def _apply_ddl(settings: Settings) -> None:
    """In a process of its own: what applies the DDL takes memory that a daemon would keep for ever."""
    command = [sys.executable, "-m", "daemon", "--apply-ddl"]
    process = await asyncio.create_subprocess_exec(
        *command, env=settings.as_environment(), stdout=asyncio.subprocess.DEVNULL
    )
    if await process.wait():
        raise SetupFailed(process.returncode or 1)


async def _bot(settings: Settings, pool: Pool) -> None:
    """Write something now and then, so that something moves."""
    steps = statements(settings, "demo_step.sql")
    while steps:
        await asyncio.sleep(random.uniform(*BOT_PAUSE))  # noqa: S311
        for step in steps:
            try:
                async with acquired(pool, STEP_TIMEOUT) as connection:
                    await connection.execute(step)
            except DRIVER_ERRORS as error:
                log.debug("demo_step_failed", reason=str(explain(error)))


def _bold(text: str) -> str:
    return click.style(text, bold=True)


def a_topic(pack: Pack, users: Sequence[Mapping[str, str]]) -> str:
    """One that everybody can follow right away, as far as the pack has such a one: a plain name, or a user's own."""
    kinds = [shape.partition(":")[0] for shape in pack.topics]
    names = [*pack.topics, *(f"{kind}:{user['id']}" for user in users for kind in kinds)]
    return next(filter(pack.serves, names), f"{kinds[0]}:...")


def _greet(settings: Settings, daemon: Running, sample: Sequence[Mapping[str, str]]) -> None:
    """Say where to look and what to type next."""
    file = connection_file(settings.data_dir)
    home = (
        ""
        if settings.data_dir == Settings.model_fields["data_dir"].get_default(call_default_factory=True)
        else (f" --data-dir {settings.data_dir}")
    )
    lines = [
        "",
        f"  {_bold('Rowcast is running.')}  {click.style(daemon.http_url, fg='cyan', underline=True)}",
        "",
        f"  websocket   {daemon.websocket_url}",
        f"  database    in {file}" + (", with the sample users' tokens" if sample else ""),
        "",
        "  Open the page, or follow along in another terminal:",
        f"    {_bold(f'{_command()} tail {a_topic(bundled()[settings.packs[0]], sample)}{home}')}",
    ]
    if sample and not _is_local(daemon.host):
        lines[-3:-3] = [
            "",
            "  Anyone who can reach this port can sign in as any sample user; use --no-demo to prevent that.",
        ]
    if shutil.which("psql"):
        read_url = f'import json;print(json.load(open("{file}"))["database_url"])'
        lines.append("    " + _bold(f"psql \"$(python3 -c '{read_url}')\""))
    click.echo("\n".join([*lines, "", "  Ctrl-C stops everything.", ""]))


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _command() -> str:
    """What the person has typed to get here."""
    script = Path(sys.argv[0])
    if script.name != "daemon":
        return f"{Path(sys.executable).name} -m daemon"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
