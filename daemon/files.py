"""Where the files that are not Python lie."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """Where `ddl`, `triggers`, `web` or `systemd` is: beside daemon/ in a checkout, inside it in a wheel."""
    # Inside comes first: beside an installed daemon/ lie other people's packages, perhaps one called `web`.
    packaged = _PACKAGE / "_files" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
