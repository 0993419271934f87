"""Files: where those lie that are not Python, and how to write one that is there for good, or not at all."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """Where `ddl`, `triggers`, `web` or `systemd` is: beside daemon/ in a checkout, inside it in a wheel."""
    # Inside comes first: beside an installed daemon/ lie other people's packages, perhaps one called `web`.
    packaged = _PACKAGE / "_files" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def partial_path(path: Path) -> Path:
    """Where a file is until it is whole: beside its place, hidden."""
    return path.with_name(f".{path.name}.part")


def create_partial(path: Path) -> int:
    """A new file beside the place of `path`, which only its owner may read, as a descriptor. Raises OSError."""
    return os.open(partial_path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)


def commit_partial(path: Path) -> None:
    """Put what was begun in its place, where a power cut leaves it. Raises OSError."""
    _sync(partial_path(path), os.O_RDONLY)
    partial_path(path).replace(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # the name of a file is in its directory


def make_private_directory(path: Path) -> None:
    """Make a directory that only its owner may enter, with those above it, if they are not there. Raises OSError."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for directory in missing:
        _sync(directory.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
