"""What the verbs share: the options that stand before them, and how they run and report."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click

from daemon.logs import configure, get_logger
from daemon.settings import Settings, load
from daemon.settings.local import with_local_instance

log = get_logger()

Verb = TypeVar("Verb", bound=Callable[..., Any])


def data_dir_option(purpose: str) -> Callable[[Verb], Verb]:
    """The option --data-dir; its help text is `purpose`."""
    return click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help=purpose)


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

    @property
    def local_settings(self) -> Settings:
        """The same, completed by what a `daemon up` in the same data directory uses."""
        return with_local_instance(self.settings)

    def run(self, settings: Settings, work: Coroutine[Any, Any, object]) -> None:
        """See the function `run`."""
        run(settings, work)


def run(settings: Settings, work: Coroutine[Any, Any, object]) -> None:
    """Run what a verb does, logging as the settings say. Ctrl-C ends the process with exit code 130."""
    configure_logs(settings)
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        sys.exit(130)


def configure_logs(settings: Settings) -> None:
    """Log as the settings say."""
    configure(settings.log_format, settings.log_level)


def report(line: str) -> None:
    """Say what was done: to whoever reads the output, and in a service's log."""
    click.echo(line)
    if not sys.stderr.isatty():
        name = "schema_warning" if line.lower().startswith("warning") else "schema_migration"
        (log.warning if name == "schema_warning" else log.info)(name, done=line)
