"""A small file system of a test's own, which can be filled."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.postgres import passable_directory

NONE = "This account may not mount a tmpfs: run the tests as root, where mounting is allowed."


class SmallDisk:
    """A mounted file system. `fill` leaves no room on it, `free` makes room again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Write a file until nothing more fits."""
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        """Remove what `fill` has written."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(megabytes: int, owner: tuple[int, int]) -> Iterator[SmallDisk]:
    """A new tmpfs of this size that belongs to a user and a group. Skips the test where mounting is not allowed."""
    uid, gid = owner
    with passable_directory() as directory:
        options = f"size={megabytes}m,mode=0700,uid={uid},gid={gid}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=False, capture_output=True
        )
        if mounted.returncode:
            if os.geteuid() == 0 and b"denied" not in mounted.stderr and b"permitted" not in mounted.stderr:
                raise OSError(mounted.stderr.decode())
            pytest.skip(NONE)
        try:
            yield SmallDisk(directory)
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
