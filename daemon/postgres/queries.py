"""The statements of queries.sql, and of other files of that form, by name."""

import re
from functools import cache
from pathlib import Path

_BLOCK = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


@cache
def statements(file: Path) -> dict[str, str]:
    """The statements of a file, each of which stands below a line `-- name: NAME`."""
    return {name: body.strip() for name, body in _BLOCK.findall(file.read_text(encoding="utf-8"))}


def _blocks() -> dict[str, str]:
    return statements(Path(__file__).with_suffix(".sql"))


def query(name: str) -> str:
    """The text of one named statement. Raises KeyError for a name that the file does not hold."""
    return _blocks()[name]
