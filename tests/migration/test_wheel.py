"""What a user installs: the wheel, in an environment that knows nothing of this checkout."""

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


# No tool looks into the home of whoever runs the tests, nor into the network.
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": "/nonexistent",
    "PIP_NO_INDEX": "1",
    "UV_OFFLINE": "1",
    "UV_NO_CACHE": "1",
}


def run(*command: str | Path, directory: Path = Path("/")) -> str:
    """What a program writes; it must succeed."""
    done = subprocess.run(command, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, directory=ROOT)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `daemon` command of an environment that holds the wheel, and sees what the wheel needs."""
    home = tmp_path_factory.mktemp("empty")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    if find_spec("pip"):
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    else:  # `make install` had uv
        run("uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel)
    # A path inside a .pth file is searched, but its own .pth files, such as that of an editable install, are not.
    libraries = next((home / "lib").glob("python*")) / "site-packages" / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib"))
    return home / "bin" / "daemon"


def test_the_wheel_holds_every_file_of_the_folders_and_nothing_else(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    there = {
        f"daemon/_files/{path.relative_to(ROOT).as_posix()}"
        for folder in ("ddl", "triggers", "web", "systemd")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there
    assert there == {name for name in packed if name.startswith("daemon/_files/")}
    assert [] == [name for name in packed if not re.match(r"daemon/|rowcast-[^/]+\.dist-info/", name)]


def test_the_installed_package_is_the_wheels_and_finds_its_files(program: Path) -> None:
    source = "import daemon.files as f; print(f.__file__); print(f.folder('ddl')); print(f.folder('triggers'))"
    module, ddl, triggers = (Path(line) for line in run(program.with_name("python"), "-c", source).splitlines())
    assert module.is_relative_to(program.parents[1])
    assert module.with_name("_files") / "ddl" == ddl
    assert module.with_name("_files") / "triggers" == triggers
    assert (ddl / "rowcast").is_dir()


async def test_the_installed_program_applies_the_ddl(program: Path, empty_database: str) -> None:
    command = (program, "--apply-ddl", "--database-url", empty_database)
    told = await asyncio.to_thread(run, *command)
    assert "rowcast: nothing -> rowcast_" in told
    assert "chatgenius: nothing -> chatgenius_" in told
    assert await value(empty_database, "select to_regclass('chatgenius.messages') is not null")
    assert "chatgenius: already at chatgenius_" in await asyncio.to_thread(run, *command)
