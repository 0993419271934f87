"""Files: the folders of files that are not Python, and durable, atomic writes."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """The folder `ddl`, `triggers`, `web`, `systemd`, `monitoring` or `clients/javascript`.

    It is beside daemon/ in a checkout, and inside it in a wheel.
    """
    # Inside comes first: beside an installed daemon/ are other packages, perhaps one called `web`.
    packaged = _PACKAGE / "_files" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def partial_path(path: Path) -> Path:
    """The path of a file while it is incomplete: hidden, in the same directory."""
    return path.with_name(f".{path.name}.part")


def create_partial(path: Path) -> int:
    """Create the incomplete file, which only its owner may read, and return its descriptor. Raises OSError."""
    return os.open(partial_path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)


def commit_partial(path: Path) -> None:
    """Rename the incomplete file to `path`, and sync both, so it survives a power failure. Raises OSError."""
    _sync(partial_path(path), os.O_RDONLY)
    partial_path(path).replace(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # the directory holds the file's name


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, atomically. Raises OSError."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)


def make_private_directory(path: Path) -> None:
    """Create a directory that only its owner may enter, and missing parents; sync the new names. Raises OSError."""
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
