"""What an application installs: the npm package and the wheel, with the examples of their READMEs."""

import asyncio
import itertools
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, get, token
from tests.support.node import node, npm, typescript
from tests.support.packages import ROOT, build_wheel, pack, run

CLIENTS = ROOT / "clients"


def example(language: str, folder: str, url: str) -> str:
    """The first code block of a README in this language, with another URL."""
    text = (CLIENTS / folder / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    code, count = re.subn(r"ws://127\.0\.0\.1:8787/v1", url, found[1])
    assert 1 == count
    return code


async def until_printed(
    line: str, command: Sequence[str | Path], chat: Chat, directory: Path, **environment: str
) -> None:
    """Run the example and insert users until it prints this line."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env={"PATH": os.environ["PATH"], "TOKEN": token(chat.ada), **environment},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    printed = asyncio.create_task(process.stdout.readuntil(line.encode()))
    try:
        for number in itertools.count():
            await chat.sql.execute(
                "insert into chatgenius.users (auth0_id, email, username) values ($1, $2, 'grace')",
                f"grace {number}",
                f"grace{number}@example.com",
            )
            await asyncio.wait([printed], timeout=0.2)
            if printed.done():
                break
        await printed
    finally:
        process.kill()
        await process.communicate()


async def test_the_npm_package_is_installed_and_its_example_runs(chat: Chat, daemon: Daemon, tmp_path: Path) -> None:
    archive = pack(CLIENTS / "javascript", tmp_path)
    with tarfile.open(archive) as opened:
        names = {Path(name).name for name in opened.getnames()}
    assert {"LICENSE", "README.md", "package.json", "rowcast.d.ts", "rowcast.js"} == names
    (tmp_path / "package.json").write_text("{}")
    run(npm(), "install", "--omit=dev", archive, directory=tmp_path)
    script = tmp_path / "example.mjs"
    script.write_text(example("js", "javascript", daemon.url))
    await until_printed("insert grace\n", node(script), chat, tmp_path)


async def test_the_wheel_is_built_and_its_example_runs(chat: Chat, daemon: Daemon, tmp_path: Path) -> None:
    wheel = build_wheel(CLIENTS / "python", tmp_path)
    files = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("rowcast_client/")}
    assert {"__init__.py", "client.py", "engine.py", "py.typed"} == files
    script = tmp_path / "example.py"
    script.write_text(example("python", "python", daemon.url))
    await until_printed("insert grace\n", [sys.executable, script], chat, tmp_path, PYTHONPATH=str(wheel))


async def test_the_daemon_serves_the_javascript_client_to_pages(daemon: Daemon) -> None:
    client = (CLIENTS / "javascript/rowcast.js").read_text(encoding="utf-8")
    assert (200, client) == await get(f"{daemon.http}/rowcast.js")
    assert [] == re.findall(r"^import |\bfrom \"", re.sub(r"^ *\*.*$", "", client, flags=re.MULTILINE), re.MULTILINE)


def test_the_types_accept_what_is_right_and_refuse_what_is_wrong(tmp_path: Path) -> None:
    options = "--noEmit --strict --allowJs --checkJs --target es2022 --module nodenext --lib es2022,dom,dom.iterable"
    compiler = typescript(CLIENTS / "javascript")
    files = (CLIENTS / "javascript/rowcast.js", ROOT / "tests/clients/types.ts")
    assert "" == run(*compiler, *options.split(), *files, directory=tmp_path)


def test_both_packages_have_the_same_version() -> None:
    package = json.loads((CLIENTS / "javascript/package.json").read_text(encoding="utf-8"))
    assert f'version = "{package["version"]}"\n' in (CLIENTS / "python/pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["javascript", "python"])
def test_each_package_contains_the_license_of_the_project(folder: str) -> None:
    assert (ROOT / "LICENSE").read_text(encoding="utf-8") == (CLIENTS / folder / "LICENSE").read_text(
        encoding="utf-8"
    )
