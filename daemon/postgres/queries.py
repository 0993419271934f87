"""The statements of queries.sql, by name."""

import re
from functools import cache
from pathlib import Path

_BLOCK = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


@cache
def _blocks() -> dict[str, str]:
    text = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    return {name: body.strip() for name, body in _BLOCK.findall(text)}


def query(name: str) -> str:
    """The text of one named statement. Raises KeyError for a name that the file does not hold."""
    return _blocks()[name]
