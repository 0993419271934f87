"""Files that are there for good, or not at all."""

import os
from pathlib import Path


def part(path: Path) -> Path:
    """Where a file is until it is whole: beside its place, hidden."""
    return path.with_name(f".{path.name}.part")


def begin(path: Path) -> int:
    """A new file beside the place of `path`, which only its owner may read, as a descriptor. Raises OSError."""
    return os.open(part(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)


def finish(path: Path) -> None:
    """Put what was begun in its place, where a power cut leaves it. Raises OSError."""
    _sync(part(path), os.O_RDONLY)
    part(path).replace(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # the name of a file is in its directory


def make_directory(path: Path) -> None:
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
