"""`daemon config`: the effective settings, and where each of them comes from. Secrets are never shown."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Final, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import click
from pydantic import SecretStr

from daemon.settings import Settings
from daemon.settings.values import write_duration

HIDDEN: Final = "(set, not shown)"
_OPEN_PARAMETERS: Final = re.compile(
    r"(host|port|dbname|user|application_name|connect_timeout|keepalives\w*|ssl(mode|rootcert)|target_session_attrs|service)=.*"
)


class Setting(NamedTuple):
    """One setting as it is in effect: its variable, its value as text, and where that comes from."""

    variable: str
    value: str
    source: str


def effective(settings: Settings, sources: Mapping[str, str]) -> Iterator[Setting]:
    """Every setting. `sources` says where the variables that were given come from."""
    has_url = "DATABASE_URL" in sources
    for name, field in type(settings).model_fields.items():
        variable = str(field.validation_alias)
        source = sources.get(variable, "default")
        if has_url and variable in sources and variable.startswith("POSTGRES_"):
            yield Setting(variable, "(ignored: DATABASE_URL is set)", source)
        else:
            yield Setting(variable, _shown(variable, getattr(settings, name)), source)


def _shown(variable: str, value: object) -> str:
    """A value as its variable takes it; a secret only as far as that reveals nothing."""
    match value:
        case None:
            return ""
        case SecretStr() if variable == "DATABASE_URL":
            return without_secrets(value.get_secret_value())
        case SecretStr():
            return HIDDEN
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case tuple():
            return ",".join(value)
        case timedelta():
            return write_duration(value)
    return str(value)


def without_secrets(url: str) -> str:
    """A database URL without its password, and with the values of those parameters only that are never secret."""
    parts = urlsplit(url)
    account, at, place = parts.netloc.rpartition("@")
    user, colon, _ = account.partition(":")
    query = "&".join(
        part if _OPEN_PARAMETERS.fullmatch(part) else f"{part.partition('=')[0]}=***"
        for part in parts.query.split("&")
    )
    shown = f"{user}{':***' if colon else ''}{at}{place}"
    return urlunsplit(parts._replace(netloc=shown, query=query if parts.query else ""))


def show(settings: Settings, sources: Mapping[str, str], *, as_json: bool) -> None:
    """Print a line for each setting."""
    found = list(effective(settings, sources))
    if as_json:
        for setting in found:
            click.echo(json.dumps(setting._asdict()))
        return
    widths = [max(map(len, column)) for column in zip(*((one.variable, one.value) for one in found), strict=True)]
    for setting in found:
        line = f"{setting.variable:{widths[0]}}  {setting.value:{min(widths[1], 40)}}  {setting.source}"
        click.echo(line.rstrip())
