"""The wheel, installed in an environment without this checkout."""

import asyncio
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.folders import value

ROOT = Path(__file__).parents[2]


# Keeps tools away from the user's home and from the network.
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": "/nonexistent",
    "PIP_NO_INDEX": "1",
    "UV_OFFLINE": "1",
    "UV_NO_CACHE": "1",
}


def run(*command: str | Path, directory: Path = Path("/")) -> str:
    """Run a program, which must succeed, and return its output."""
    process = subprocess.run(command, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True)
    assert 0 == process.returncode, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, directory=ROOT)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `daemon` command of an environment with the wheel and its dependencies."""
    home = tmp_path_factory.mktemp("empty")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    if find_spec("pip"):
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    else:  # `make install` had uv
        run("uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel)
    # Python adds the directories in a .pth file, but ignores the .pth files in these, such as an editable install's.
    libraries = next((home / "lib").glob("python*")) / "site-packages" / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib"))
    return home / "bin" / "daemon"


def test_the_wheel_contains_every_file_of_the_folders_and_nothing_else(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"daemon/_files/{path.relative_to(ROOT).as_posix()}"
        for folder in ("ddl", "triggers", "web", "systemd", "monitoring")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {"daemon/_files/clients/javascript/rowcast.js"}
    assert expected
    assert expected == {name for name in packed if name.startswith("daemon/_files/")}
    assert [] == [name for name in packed if not re.match(r"daemon/|rowcast-[^/]+\.dist-info/", name)]


def test_the_installed_package_comes_from_the_wheel_and_finds_its_files(program: Path) -> None:
    source = "import daemon.files as f; print(f.__file__); print(f.folder('ddl')); print(f.folder('triggers'))"
    module, ddl, triggers = (Path(line) for line in run(program.with_name("python"), "-c", source).splitlines())
    assert module.is_relative_to(program.parents[1])
    assert module.with_name("_files") / "ddl" == ddl
    assert module.with_name("_files") / "triggers" == triggers
    assert (ddl / "rowcast").is_dir()


async def test_the_installed_program_applies_the_ddl(program: Path, empty_database: str) -> None:
    command = (program, "--apply-ddl", "--database-url", empty_database)
    output = await asyncio.to_thread(run, *command)
    assert "rowcast: nothing -> rowcast_" in output
    assert "chatgenius: nothing -> chatgenius_" in output
    assert await value(empty_database, "select to_regclass('chatgenius.messages') is not null")
    assert "chatgenius: already at chatgenius_" in await asyncio.to_thread(run, *command)
