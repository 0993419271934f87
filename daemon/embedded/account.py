"""The account that Postgres runs as. Postgres refuses to run as root, so root needs another account for it."""

import os
import pwd
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from daemon.core.errors import OperatorFault


class PathNotAccessible(OperatorFault):
    """Postgres runs as {account}, which cannot enter {barrier}: `chmod a+x` it, or use another directory."""

    exit_code: ClassVar[int] = 77

    def __init__(self, account: str, barrier: Path) -> None:
        self.account, self.barrier = account, barrier


@dataclass(frozen=True, slots=True)
class Account:
    """The account that the server runs as."""

    uid: int
    gid: int

    @classmethod
    def of(cls, cluster: Path) -> Self:
        """The account of this process; for root, the owner of the cluster, or else `postgres` or `nobody`."""
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid())
        if cluster.exists():
            owner = cluster.stat()
            return cls(owner.st_uid, owner.st_gid)
        for name in ("postgres", "nobody"):
            with suppress(KeyError):
                entry = pwd.getpwnam(name)
                return cls(entry.pw_uid, entry.pw_gid)
        return cls(65534, 65534)

    def __str__(self) -> str:
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"user {self.uid}"

    def take_ownership(self, path: Path) -> None:
        """Make this account own `path`, which lies in a directory of ours, so no other user can have replaced it."""
        os.chown(path, self.uid, self.gid)

    def check_access(self, path: Path) -> None:
        """Raises PathNotAccessible if this account may not enter `path`, or one of its parents."""
        for step in (*reversed(path.parents), path):
            if not step.exists():
                return
            if not self._may_enter(step):
                raise PathNotAccessible(str(self), step)

    def _may_enter(self, path: Path) -> bool:
        if self.uid == os.geteuid():
            return os.access(path, os.X_OK)
        status = path.stat()
        if self.uid == status.st_uid:
            return bool(status.st_mode & stat.S_IXUSR)
        return bool(status.st_mode & (stat.S_IXGRP if self.gid == status.st_gid else stat.S_IXOTH))
