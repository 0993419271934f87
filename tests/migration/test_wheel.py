"""The wheel, installed in an environment without this checkout."""

import asyncio
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.folders import value
from tests.support.packages import ROOT, build_sdist, build_wheel, new_environment, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `daemon` command of an environment with the wheel and its dependencies."""
    return new_environment(tmp_path_factory.mktemp("empty"), wheel) / "daemon"


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


def test_the_wheel_and_the_source_archive_are_the_same_bytes_wherever_and_whenever_they_are_built(
    wheel: Path, tmp_path: Path
) -> None:
    """So whoever has the source can tell whether a package was made from it."""
    sources = build_sdist(ROOT, tmp_path)
    built: list[tuple[bytes, bytes]] = []
    for folder, mode, when in (("a", 0o755, 1_000_000_000), ("b/deeper", 0o700, 1_700_000_000)):
        with tarfile.open(sources) as archive:
            archive.extractall(tmp_path / folder, filter="data")
        [source] = (tmp_path / folder).iterdir()
        (source / "PKG-INFO").unlink()  # which the build adds
        for path in source.rglob("*"):
            os.utime(path, (when, when))
        source.chmod(mode)
        built.append((build_wheel(source, tmp_path / folder).read_bytes(), build_sdist(source, source).read_bytes()))
    assert built[0] == built[1] == (wheel.read_bytes(), sources.read_bytes())


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
