"""Rowcast as users install it: wheels and an npm package, in environments with nothing else, without a network."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag, parse_tag
from packaging.utils import canonicalize_name

from tests.support.node import npm

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, directory: Path = Path("/")) -> str:
    """Run a program, which must succeed, away from the user's home and from the network; returns its output."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "UV_OFFLINE": "1",
        "UV_NO_CACHE": "1",
        "npm_config_offline": "true",
        "npm_config_update_notifier": "false",
        "npm_config_cache": str(directory / "cache"),
    }
    process = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert 0 == process.returncode, process.stdout + process.stderr
    return process.stdout


def build_wheel(source: Path, directory: Path) -> Path:
    """Build the wheel of a project into a directory."""
    before = set(directory.glob("*.whl"))
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, directory=source)
    [wheel] = set(directory.glob("*.whl")) - before
    return wheel


def build_sdist(source: Path, directory: Path) -> Path:
    """Build the source archive of a project into a directory."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", directory, directory=source)
    [archive] = directory.glob("*.tar.gz")
    return archive


def pack(source: Path, directory: Path) -> Path:
    """Pack an npm package into a directory. Skips the test where there is no npm."""
    packed = run(npm(), "pack", "--json", "--pack-destination", directory, source, directory=directory)
    return directory / str(json.loads(packed)[0]["filename"])


def new_environment(home: Path, *wheels: Path) -> Path:
    """Install wheels in a new environment; the folder of its programs.

    What the wheels say that they require is linked from the environment of the tests: if they leave something out,
    it is not there.
    """
    venv.create(home, symlinks=True)
    programs = home / "bin"
    [libraries] = (home / "lib").glob("python*/site-packages")
    for entry in sorted({entry for wheel in wheels for one in _required_by(wheel) for entry in _entries(one)}):
        (libraries / entry.name).symlink_to(entry)
    if find_spec("pip"):
        run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", *wheels)
    else:  # `make install` had uv
        run("uv", "pip", "install", "--quiet", "--python", programs / "python", *wheels)
    return programs


def build_index(wheel: Path, directory: Path) -> None:
    """Make wheels of everything that a wheel requires, of what is installed here: an index for `pip --find-links`."""
    for one in _required_by(wheel):
        _repack(one, directory)


def _repack(installed: Distribution, directory: Path) -> None:
    tags = {tag for line in _lines(installed, "WHEEL", "Tag: ") for tag in parse_tag(line)}
    parts = (".".join(sorted({part(tag) for tag in tags})) for part in _PARTS)
    wheel = directory / "-".join([canonicalize_name(installed.name).replace("-", "_"), installed.version, *parts])
    with zipfile.ZipFile(f"{wheel}.whl", "w") as packed:
        rows = []
        for file in installed.files or ():
            if file.parts[0] != ".." and "__pycache__" not in file.parts and file.name != "RECORD":
                packed.write(str(installed.locate_file(file)), str(file))
                rows.append(f"{file},,\n")
        record = next(file for file in installed.files or () if file.name == "RECORD")
        packed.writestr(str(record), "".join([*rows, f"{record},,\n"]))


def _lines(installed: Distribution, file: str, name: str) -> list[str]:
    text = installed.read_text(file) or ""
    return [line.removeprefix(name) for line in text.splitlines() if line.startswith(name)]


_PARTS: tuple[Callable[[Tag], str], ...] = (
    lambda tag: tag.interpreter,
    lambda tag: tag.abi,
    lambda tag: tag.platform,
)


def _required_by(wheel: Path) -> list[Distribution]:
    """What a wheel requires, and what that requires."""
    found: dict[tuple[str, str], Distribution] = {}
    [itself] = distributions(path=[str(wheel)])
    waiting = [(itself, "")]
    while waiting:
        one, extra = waiting.pop()
        for requirement in map(Requirement, one.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for wanted in ("", *requirement.extras):
                    if (requirement.name, wanted) not in found:
                        found[requirement.name, wanted] = distribution(requirement.name)
                        waiting.append((found[requirement.name, wanted], wanted))
    return list(found.values())


def _entries(installed: Distribution) -> Iterator[Path]:
    """The files and folders of a distribution in site-packages."""
    for name in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
        yield Path(str(installed.locate_file(name)))
