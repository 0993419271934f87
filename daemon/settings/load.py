"""Loading of settings from options, the environment, .env.local, .env and a TOML file; the first source wins.

Apart from this, only daemon/systemd.py and the other modules of this package read the environment.
"""

import os
import re
import tomllib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import DotEnvSettingsSource

from daemon.packs import pack_secrets
from daemon.settings.errors import BadSettings
from daemon.settings.model import Settings
from daemon.settings.values import write_duration

# Kubernetes and Docker set the addresses of a service named "rowcast" in the environment of other containers, and
# ROWCAST_TEST_* is for the tests. These are not mistyped settings.
_NOT_OURS: Final = re.compile(r"ROWCAST_(SERVICE_(HOST|PORT)|PORT|TEST)(_\w+)?")

VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        str(field.validation_alias).removeprefix("ROWCAST_").lower(): str(field.validation_alias)
        for field in Settings.model_fields.values()
    }
)
"""The environment variable of each setting, by its name in `load` and in the file of --config."""

_IN_FILES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "DATABASE_URL": "database_url",
        "POSTGRES_PASSWORD": "postgres_password",
        "ROWCAST_SECRET": "secret",
        "ROWCAST_MORE_SECRETS": "more_secrets",
        "SSH_KEY_PASSPHRASE": "ssh_key_passphrase",
        "ROWCAST_NATS_URL": "nats_url",
    }
    | {f"ROWCAST_{name.upper()}": name for name in pack_secrets()}
)
"""The variables of secrets that may be in a file, and the name of that file among systemd's credentials."""


_SECRET_FILE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of settings: its values by environment variable, and its description for messages."""

    values: dict[str, Any]
    where: str = ""
    by_variable: bool = True

    @classmethod
    def of_variables(cls, found: Mapping[str, str | None], where: str = "") -> Self:
        known = set(VARIABLES.values())
        ours = (name for name in found if name.startswith("ROWCAST_") and not _NOT_OURS.fullmatch(name))
        return cls({name: found[name] for name in {*ours, *known & found.keys()} if found[name]}, where)

    @classmethod
    def of_names(cls, found: Mapping[str, Any], where: str) -> Self:
        values = {VARIABLES.get(name, name): value for name, value in found.items() if value not in (None, "", ())}
        return cls(values, where, by_variable=False)

    @property
    def name(self) -> str:
        """What it is called in a list: `option`, `environment`, or the file."""
        return self.where.strip(" ()").removeprefix("in ") or "environment"

    def problem(self, variable: str, problem: str | None) -> str:
        """One line for a problem with a variable. None means that there is no such setting."""
        names = {variable: name for name, variable in VARIABLES.items()}
        name = variable if self.by_variable else names.get(variable, variable)
        if problem is None:
            problem = "there is no such setting"
            if nearest := get_close_matches(variable.removeprefix("ROWCAST_").lower(), VARIABLES, n=1):
                problem += f"; did you mean {VARIABLES[nearest[0]] if self.by_variable else nearest[0]}?"
        return f"{name}{self.where}: {problem}"


def load(config: Path | None = None, **options: Any) -> Settings:  # noqa: ANN401 - they are validated here
    """Load the settings. `config` is a TOML file; `options` are those of the command line, None or () if not given.

    Raises BadSettings with a line for each problem.
    """
    return _validated(_sources(config, options))


def load_with_sources(config: Path | None = None, **options: Any) -> tuple[Settings, dict[str, str]]:  # noqa: ANN401
    """The settings, and where the value of each variable that was given comes from. Raises BadSettings.

    The arguments are those of `load`.
    """
    sources = _sources(config, options)
    found = {variable: source.name for source in reversed(sources) for variable in source.values}
    return _validated(sources), found


def _sources(config: Path | None, options: Mapping[str, Any]) -> list[_Source]:
    """All sources, the one that wins first. Raises BadSettings."""
    sources = [
        _Source.of_names(options, " (option)"),
        _Source.of_variables(os.environ),
        *(_Source.of_variables(_dotenv(Path(name)), f" in {name}") for name in (".env.local", ".env")),
    ]
    if config is not None:
        sources.append(_Source.of_names(_toml(config), f" in {config}"))
    for source in sources:
        for variable, value in source.values.items():
            if not _is_unicode(value):
                raise BadSettings(source.problem(variable, "this is not UTF-8"))
    for variable, credential in _IN_FILES.items():
        if secret := _secret_file(variable, credential, ChainMap(*(source.values for source in sources))):
            sources.append(secret)
    return sources


def _validated(sources: Sequence[_Source]) -> Settings:
    """Raises BadSettings with a line for each problem."""
    try:
        return Settings(**ChainMap(*(source.values for source in sources)))
    except ValidationError as error:
        # Raised below, outside this block: a chained error would contain the input, which may be a secret.
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    wrong = {problem["loc"][0] for problem in problems if problem["loc"] and problem["type"] != "too_short"}
    raise BadSettings(
        *(
            _describe(problem, sources)
            for problem in problems
            # A list whose only item is wrong counts as empty besides.
            if problem["type"] != "too_short" or problem["loc"][0] not in wrong
        )
    )


def _describe(problem: ErrorDetails, sources: Sequence[_Source]) -> str:
    """One line for the operator: the setting and its source, the problem, and what the setting is for."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message  # it is about several settings, and names them
    variable = str(problem["loc"][0])
    source = next(source for source in sources if variable in source.values)
    if problem["type"] == "extra_forbidden":
        return source.problem(variable, None)
    if problem["type"] != "value_error":
        field = next(field for field in Settings.model_fields.values() if field.validation_alias == variable)
        message = re.sub(r"datetime\.timedelta\((?:(\w+)=)?(\d+)\)", _as_written, message)
        message = f"{message[0].lower()}{message[1:]} ({field.description})"
    return source.problem(variable, message)


def _as_written(duration: re.Match[str]) -> str:
    """A duration of Python as settings have it."""
    return write_duration(timedelta(**{duration[1] or "seconds": int(duration[2])}))


def _secret_file(variable: str, credential: str, values: Mapping[str, Any]) -> _Source | None:
    """The source of a secret that is in a file instead of a variable. `credential` is its name among systemd's."""
    file = values.get(f"{variable}_FILE")
    if variable in values:
        if file:
            raise BadSettings(f"{variable} and {variable}_FILE are both set: keep one of them")
        return None
    if not file:
        file = Path(os.environ.get("CREDENTIALS_DIRECTORY", ""), credential)
        if not (file.is_absolute() and file.exists()):
            return None
    try:
        # It may be a pipe, whose size is not known, or a device that never ends.
        with Path(str(file)).open("rb") as opened:
            content = opened.read(_SECRET_FILE_BYTES + 1)
        if len(content) > _SECRET_FILE_BYTES:
            raise BadSettings(f"{file}: it has more than {_SECRET_FILE_BYTES} bytes, which is no secret")
        return _Source({variable: content.decode().strip()}, f" in {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _dotenv(path: Path) -> Mapping[str, str | None]:
    try:
        return DotEnvSettingsSource(Settings, path).env_vars
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _toml(path: Path) -> Mapping[str, Any]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{path}: this is not TOML: {error}") from None
    except (ValueError, RecursionError):
        raise BadSettings(f"{path}: a number in it is too long, or its lists nest too deeply") from None
    if _has_nul(found):
        raise BadSettings(f"{path}: it contains a NUL character, which no setting can have")
    return found


def _is_unicode(value: object) -> bool:
    """Whether the bytes of a variable or an option are UTF-8. Python keeps others as halves of surrogate pairs."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_nul(value: object) -> bool:
    """Whether a text in this value has a NUL, which neither the system nor Postgres takes."""
    match value:
        case str():
            return "\0" in value
        case list():
            return any(map(_has_nul, value))
        case dict():
            return any(map(_has_nul, value.values()))
    return False


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> BadSettings:
    reason = error.strerror if isinstance(error, OSError) else "this is not UTF-8"
    return BadSettings(f"{path}: cannot be read: {reason}")
