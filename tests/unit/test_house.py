"""Rules of the code base that no other tool checks."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

READERS_OF_THE_ENVIRONMENT = {
    "daemon/settings/load.py": "it loads the settings",
    "daemon/settings/database_url.py": "the driver also reads PGHOST and PGSSLMODE",
    "daemon/settings/model.py": "child processes get the same environment",
    "daemon/settings/values.py": "the default data directory depends on it",
    "daemon/systemd.py": "the variables of systemd are not settings",
}
SKIPS = {
    "tests/acceptance/test_rolling_upgrade.py": "a copy without its history has no older version; the skip says so",
    "tests/embedded/test_server.py": "the wheel with Postgres does not exist for every platform",
    "tests/support/axe.py": "axe-core cannot be installed everywhere; the skip names the package",
    "tests/support/browser.py": "a browser cannot be installed everywhere; the skip names the package",
    "tests/support/guide.py": "curl cannot be installed everywhere; the skip names the package",
    "tests/support/nats.py": "a NATS server cannot be installed everywhere; the skip names the package",
    "tests/support/machine.py": "only root can make a machine of namespaces; the skip says what is needed",
    "tests/support/node.py": "Node cannot be installed everywhere; the skip names the package",
    "tests/support/pooler.py": "a pooler cannot be installed everywhere; the skip names the package",
    "tests/support/programs.py": "promtool and hadolint cannot be installed everywhere; the skip says how",
    "tests/support/small_disk.py": "not every account may mount a file system; the skip says so",
    "tests/support/sshd.py": "an SSH server cannot be installed everywhere; the skip names the package",
}
EVENT_LOOPS = {
    "daemon/cli/options.py": "it runs each command through the SSH tunnel",
    "daemon/supervisor.py": "each worker opens a tunnel of its own",
}
NOT_ABOUT_ONE_MODULE = {
    "tests/unit/model/test_delivery.py": "about the whole path from a row to a client",
    "tests/unit/model/test_gateways.py": "about the same path, through gateways",
    "tests/unit/test_deploy.py": "about the alerts, the dashboard and the image",
    "tests/unit/test_docs.py": "about the guides",
    "tests/unit/test_glossary.py": "about the names in the whole code base",
    "tests/unit/test_house.py": "about the whole code base",
    "tests/unit/test_requirements.py": "about the specifications of the packs",
    "tests/unit/test_secret_scan.py": "about the scanner in .ci",
    "tests/unit/test_workflow.py": "about what CI runs",
}
MIN_WORDS = 4
PACKS = sorted(path.stem for path in (ROOT / "daemon/packs").glob("*.py") if path.stem != "__init__")
MAX_LINES = 60  # of a function in daemon/

# Split, so that this file does not contain what it looks for.
FORBIDDEN = {
    "a path of one machine": "(?<![a-z.])/(work|root|home/[a-z]+)" + "/",
    "the host of a package registry": "|".join(
        [
            r"pypi\." + "org",
            "python" + "hosted",
            r"npmjs\." + "(org|com)",
            r"crates\." + "io",
            r"proxy\.golang\." + "org",
        ]
    ),
    "a promise": r"\b(TO" + r"DO|FIX" + r"ME)\b",
}
MAY_NAME_A_HOME = {"tests/unit/test_settings.py"}  # as an expected value


def files(*patterns: str) -> Iterator[tuple[str, Path]]:
    """Every file of the repository that matches and is not ignored by git: its name, and its path."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.name == ".git" or any(fnmatch(path.name, pattern) for pattern in ignored):
                continue
            if path.is_dir():
                folders.append(path)
            elif any(fnmatch(path.name, pattern) for pattern in patterns):
                yield path.relative_to(ROOT).as_posix(), path


Rule = Callable[[ast.AST], Iterator[ast.AST]]


def violations(rule: Rule, folder: str) -> dict[str, list[str]]:
    """The places in a folder that break a rule, by file."""
    places: dict[str, list[str]] = {}
    for name, path in files("*.py"):
        if name.startswith(f"{folder}/"):
            for node in rule(ast.parse(path.read_text(encoding="utf-8"))):
                places.setdefault(name, []).append(f"{name}:{getattr(node, 'lineno', 0)}")
    return places


def reads_of_the_environment(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" | "getenvb"):
                yield node
            case ast.ImportFrom(module="os", names=names):
                if any(alias.name.startswith(("environ", "getenv")) for alias in names):
                    yield node


def fixed_sleeps(tree: ast.AST) -> Iterator[ast.AST]:
    """Sleeps of a fixed time, except those in a loop that checks a condition."""
    polling = {
        inner
        for loop in ast.walk(tree)
        if isinstance(loop, ast.While) and not isinstance(loop.test, ast.Constant)
        for inner in ast.walk(loop)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="sleep") | ast.Name(id="sleep"),
                args=[ast.Constant(value=float() | int() as time)],
            ) if time > 0 and node not in polling:
                yield node


def event_loops(tree: ast.AST) -> Iterator[ast.AST]:
    """Places that start an event loop: work that begins elsewhere would have no SSH tunnel."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="asyncio"), attr="run" | "Runner" | "new_event_loop"):
                yield node


def growing_powers(tree: ast.AST) -> Iterator[ast.AST]:
    """Powers of a variable exponent, such as the bound of a delay: after hours of attempts they overflow."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.BinOp(op=ast.Pow() | ast.LShift(), right=right)
                | ast.AugAssign(op=ast.Pow() | ast.LShift(), value=right)
            ) if not isinstance(right, ast.Constant):
                yield node
            case ast.Call(func=ast.Name(id="pow") | ast.Attribute(attr="pow" | "ldexp" | "exp" | "exp2")):
                yield node
            case ast.AugAssign(op=ast.Mult(), value=ast.Constant()):  # delay *= 2
                yield node


def skips(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="skip" | "skipif" | "xfail" | "importorskip"):
                yield node
            case ast.ImportFrom(module="pytest" | "unittest", names=names):
                if any(alias.name in {"skip", "skipIf", "xfail", "importorskip", "SkipTest"} for alias in names):
                    yield node


def short_test_names(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if name.startswith("test_") and len(name.split("_")) <= MIN_WORDS:
                    yield node


def statements_of_a_pool(tree: ast.AST) -> Iterator[ast.AST]:
    """Uses of a pool without `acquired`: cancelled while the database hangs, they wait forever for the connection."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(
                attr="acquire" | "execute" | "executemany" | "fetch" | "fetchrow" | "fetchval",
                value=ast.Name(id="pool") | ast.Attribute(attr="pool" | "_pool"),
            ):
                yield node


def imports_from_tests(tree: ast.AST) -> Iterator[ast.AST]:
    """What two test modules share is in `tests/support`, or in a module of their folder without tests."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                modules = [f"{module}.{alias.name}" for alias in names]
            case _:
                continue
        parts = [part for name in modules if name.startswith("tests.") for part in name.split(".")]
        if any(part.startswith("test_") or part == "conftest" for part in parts):
            yield node


def long_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(lineno=first, end_lineno=int() as last)
                | ast.AsyncFunctionDef(lineno=first, end_lineno=int() as last)
            ):
                if last - first + 1 > MAX_LINES:
                    yield node


@pytest.mark.parametrize(
    ("rule", "folder", "exceptions"),
    [
        (reads_of_the_environment, "daemon", READERS_OF_THE_ENVIRONMENT),
        (event_loops, "daemon", EVENT_LOOPS),
        (fixed_sleeps, "tests", {}),
        (growing_powers, "daemon", {"daemon/postgres/backoff.py": "the one capped backoff"}),
        (skips, "tests", SKIPS),
        (imports_from_tests, "tests", {}),
        (long_functions, "daemon", {}),
        (statements_of_a_pool, "daemon", {"daemon/postgres/connect.py": "it defines `acquired`"}),
        (short_test_names, "tests", {}),
    ],
)
def test_a_rule_is_broken_only_where_a_reason_is_listed(rule: Rule, folder: str, exceptions: dict[str, str]) -> None:
    found = violations(rule, folder)
    places = [place for name, lines in found.items() if name not in exceptions for place in lines]
    assert "" == "\n".join(places)


def test_each_unit_test_has_the_name_of_the_module_that_it_tests() -> None:
    modules = {path.stem if path.stem != "__init__" else path.parent.name for path in (ROOT / "daemon").rglob("*.py")}
    strays = [
        name
        for name, path in files("test_*.py")
        if name.startswith("tests/unit/")
        and name not in NOT_ABOUT_ONE_MODULE
        and not any(f"{path.stem}_".startswith(f"test_{module}_") for module in modules)
    ]
    assert [] == strays


def homes_of(pack: str) -> tuple[str, str]:
    """The module and the folder of daemon/ in which the name of a pack may stand."""
    return f"daemon/packs/{pack}.py", f"daemon/extensions/{pack}/"


@pytest.mark.parametrize("pack", PACKS)
def test_only_a_packs_own_files_name_it(pack: str) -> None:
    places = [
        f"{name}:{number}: {line.strip()}"
        for name, path in files("*.py", "*.sql")
        if name.startswith("daemon/") and not name.startswith(homes_of(pack))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(rf"(?<![a-z]){pack}(?![a-z])", line, re.IGNORECASE)
    ]
    assert "" == "\n".join(places), f"only {' and '.join(homes_of(pack))} may name {pack}"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_contains_forbidden_text(what: str) -> None:
    places = [
        f"{name}:{number}: {line.strip()}"
        for name, path in files("*")
        if name not in MAY_NAME_A_HOME
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert "" == "\n".join(places), f"{what} is not allowed"


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of one machine", "see /ro" + "ot/notes.md"),
        ("a path of one machine", "cd '/wo" + "rk/main'"),
        ("the host of a package registry", "--index-url https://py" + "pi.org/simple"),
        ("a promise", "# TO" + "DO: later"),
    ],
)
def test_forbidden_text_is_recognized(what: str, line: str) -> None:
    assert re.search(FORBIDDEN[what], line)


def test_the_lint_of_sql_refuses_dropped_columns_and_columns_that_must_be_filled(tmp_path: Path) -> None:
    file = tmp_path / "0009_columns.up.sql"
    file.write_text("alter table a.b drop column c;\nalter table a.b add column d text not null;\n")
    squawk = Path(sys.executable).with_name("squawk")
    arguments = ("--config", ROOT / ".squawk.toml", "--reporter", "gcc", file)
    done = subprocess.run([squawk, *arguments], capture_output=True, text=True)
    assert (1, True, True) == (
        done.returncode, "ban-drop-column" in done.stdout, "adding-required-field" in done.stdout
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "forbidden", "allowed"),
    [
        (reads_of_the_environment, "os.environ['A']", "os.defpath"),
        (reads_of_the_environment, "os.getenv('A')", "settings.getenv('A')"),
        (reads_of_the_environment, "from os import environ", "from os import path"),
        (event_loops, "asyncio.run(work)", "run(settings, work)"),
        (fixed_sleeps, "asyncio.sleep(0.1)", "asyncio.sleep(0)"),
        (fixed_sleeps, "while True: sleep(1)", "while not happened(): sleep(1)"),
        (growing_powers, "delay = 0.2 * 2**attempt", "2**53"),
        (growing_powers, "delay = 1 << attempt", "delay = backoff_delay(attempt)"),
        (growing_powers, "delay *= 2", "delay += 2"),
        (growing_powers, "delay = math.ldexp(0.2, attempt)", "delay = math.ceil(attempt)"),
        (skips, "pytest.mark.skipif(True)", "pytest.mark.parametrize('a', [1])"),
        (skips, "from unittest import SkipTest", "from unittest import TestCase"),
        (statements_of_a_pool, "await self._pool.fetch('select')", "await connection.fetch('select')"),
        (imports_from_tests, "from tests.gateway.test_http import get", "from tests.gateway.peers import until"),
        (imports_from_tests, "from tests.gateway import test_http", "from tests.gateway import peers"),
        (imports_from_tests, "from tests.conftest import ignore", "from tests.support.postgres import ignore"),
        (imports_from_tests, "import tests.gateway.test_http as http", "import tests.gateway.peers as peers"),
        (short_test_names, "def test_it(): ...", "def test_it_has_four_words(): ..."),
        (short_test_names, "async def test_one_two_three(): ...", "async def one(): ..."),
        (long_functions, "def f():" + "\n    g()" * MAX_LINES, "def f():" + "\n    g()" * (MAX_LINES - 1)),
    ],
)
def test_each_rule_finds_what_it_forbids(rule: Rule, forbidden: str, allowed: str) -> None:
    assert list(rule(ast.parse(forbidden)))
    assert [] == list(rule(ast.parse(allowed)))
