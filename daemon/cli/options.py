"""What the commands share: the global options, and how commands run and report."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click

from daemon.logs import configure
from daemon.settings import Settings, load, load_with_sources
from daemon.settings.local import with_local_instance

Command = TypeVar("Command", bound=Callable[..., Any])


def data_dir_option(help_text: str) -> Callable[[Command], Command]:
    """The option --data-dir, with a help text for one command."""
    return click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help=help_text)


@dataclass(frozen=True)
class Options:
    """The global options, which stand before the command."""

    config: Path | None
    overrides: dict[str, Any]

    def having(self, **more: Any) -> "Options":  # noqa: ANN401
        """These options with others added; those that are None are ignored."""
        return Options(
            self.config, self.overrides | {name: value for name, value in more.items() if value is not None}
        )

    def quiet(self) -> "Options":
        """These options, logging only warnings unless a level is set; for commands whose output people read."""
        return self if "log_level" in self.settings.model_fields_set else self.having(log_level="warn")

    @cached_property
    def settings(self) -> Settings:
        """The settings, including those of the command line. Raises BadSettings."""
        return self.read_settings()

    def read_settings(self) -> Settings:
        """The settings as they are now. Raises BadSettings."""
        return load(self.config, **self.overrides)

    @property
    def settings_with_sources(self) -> tuple[Settings, dict[str, str]]:
        """The settings, and where the value of each variable that was given comes from. Raises BadSettings."""
        return load_with_sources(self.config, **self.overrides)

    @property
    def local_settings(self) -> Settings:
        """The settings, completed with those of a `daemon up` in the same data directory. Raises an OperatorFault."""
        return with_local_instance(self.settings)

    def run(self, settings: Settings, work: Coroutine[Any, Any, object]) -> None:
        """See the function `run`."""
        run(settings, work)


def run(settings: Settings, work: Coroutine[Any, Any, object]) -> None:
    """Run a command with logging configured, through the SSH tunnel if there is one. Raises an OperatorFault.

    Ctrl-C ends the process with exit code 130.
    """
    from daemon.postgres.errors import violations_logged

    configure_logs(settings)
    try:
        with violations_logged():
            asyncio.run(_through_tunnel(settings, work))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        work.close()  # what never ran, since there is no tunnel, would warn about that


async def _through_tunnel(settings: Settings, work: Coroutine[Any, Any, object]) -> None:
    from daemon.postgres.tunnel import through_tunnel

    async with through_tunnel(settings):
        await work


def configure_logs(settings: Settings) -> None:
    """Configure logging as in the settings."""
    configure(settings.log_format, settings.log_level)


def report(line: str) -> None:
    """Print what was done; also log it unless stderr is a terminal."""
    from daemon.schema.migrate import log_report

    click.echo(line)
    if not sys.stderr.isatty():
        log_report(line)
