"""The guides match the code: their tables row for row, the names and paths they cite, and their links."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TypeVar, get_args

import click
import pytest
from click.exceptions import Exit, NoArgsIsHelpError

import daemon
from daemon.cli.root import cli
from daemon.contracts.schema import frames
from daemon.core import wire
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.close_codes import CLOSE_CODES
from daemon.core.errors import ClientFault, OperatorFault, RowcastError
from daemon.core.frames import EXACTLY
from daemon.core.presence import Key, Person
from daemon.logs import EVENTS
from daemon.metrics import METRICS, REGISTRY, exposition
from daemon.packs import bundled_jobs
from daemon.settings import Address, Settings

ROOT = Path(__file__).parents[2]
OPERATE = ROOT / "docs" / "operate.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
SOURCES = sorted((ROOT / "daemon").rglob("*.py"))
GUIDES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
OF_TODAY = [guide for guide in GUIDES if guide.name != "CHANGELOG.md" and guide.parent.name != "decisions"]

LEVELS = ("debug", "info", "warn", "error")
METHODS = {"warning": "warn", "exception": "error", "critical": "error"} | {level: level for level in LEVELS}


def row(*cells: str) -> str:
    """One row of a Markdown table."""
    clean = [" ".join(cell.split()).replace("|", "\\|").replace("<", "\\<") for cell in cells]
    return "".join(f"| {cell} " if cell else "| " for cell in clean) + "|"


def settings() -> Iterator[str]:
    """A row for each setting."""
    for field in Settings.model_fields.values():
        match field.default:
            case None | ():
                default = ""
            case bool() as flag:
                default = f"`{str(flag).lower()}`"
            case float() as seconds:
                default = f"`{seconds:g}`"
            case timedelta() as kept:
                default = f"`{kept.days}d`"
            case tuple() as names:
                default = f"`{','.join(names)}`"
            case int() | str() | Address() as value:
                default = f"`{value}`"
            case _:  # computed from the environment, so it differs in the test
                default = "`~/.local/state/rowcast`"
        yield row(f"`{field.validation_alias}`", default, field.description or "")


def log_events() -> Iterator[str]:
    """A row for each event."""
    for name, event in EVENTS.items():
        yield row(f"`{name}`", event.level, event.meaning)


def metrics() -> Iterator[str]:
    """A row for each metric."""
    for name, meaning in METRICS.items():
        yield row(f"`{name}`", meaning)


def jobs() -> Iterator[str]:
    """A row for each job, in the order of the day."""
    for job in sorted(bundled_jobs().values(), key=lambda job: job.at):
        yield row(f"`{job.name}`", job.schedule, job.meaning)


Fault = TypeVar("Fault", bound=RowcastError)


def faults(kind: type[Fault]) -> Iterator[type[Fault]]:
    """Every subclass of this fault in the program."""
    for module in pkgutil.walk_packages(daemon.__path__, "daemon."):
        importlib.import_module(module.name)
    for fault in kind.__subclasses__():
        if fault.__module__.startswith("daemon."):
            yield fault
        yield from faults(fault)


def exit_codes() -> Iterator[str]:
    """A row for each fault that can end the process, by exit code."""
    for fault in sorted(
        set(faults(OperatorFault)), key=lambda fault: (fault.exit_code, fault.__name__, fault.__module__)
    ):
        yield row(str(fault.exit_code), f"`{fault.__name__}`", fault.__doc__ or "")


def error_codes() -> Iterator[str]:
    """A row for each fault that clients receive."""
    for fault in faults(ClientFault):
        yield row(f"`{fault.code}`", str(fault.retry).lower(), str(fault.close or ""), fault.__doc__ or "")


def close_codes() -> Iterator[str]:
    """A row for each close code."""
    for closing in CLOSE_CODES.values():
        yield row(str(closing.code), f"`{closing.name}`", closing.meaning, closing.come_back)


def members(names: Sequence[str]) -> str:
    """The names of members in one cell."""
    return ", ".join(f"`{name}`" for name in names)


def client_frames() -> Iterator[str]:
    """A row for each frame of a client, without reserved members."""
    for frame in get_args(wire.ClientFrame):
        [op] = get_args(frame.model_fields["op"].annotation)
        names = [name for name, field in frame.model_fields.items() if field.annotation is not type(None)]
        yield row(f"`{op}`", members([name for name in names if name not in {"id", "op"}]))


def server_frames() -> Iterator[str]:
    """A row for each frame of the server."""
    for node in ast.walk(ast.parse(inspect.getsource(wire))):
        match node:
            case ast.Call(func=ast.Name(id="_payload"), args=[ast.Constant(value=str() as op)], keywords=keywords):
                yield row(f"`{op}`", members([word.arg for word in keywords if word.arg]))
    change = Change(Seq(1), "1", "", "app", "rows", Topic("t"), Kind.DELETE, "{}", None)
    for payload in (
        wire.snapshot(change.topic, change.table, [], omitted=1, more=False),
        wire.changes(change.topic, Position("e", Seq(0)), [change]),
    ):
        frame = json.loads(payload)
        yield row(f"`{frame.pop('op')}`", members(list(frame)))
    key, person = Key("u", "d"), Person("{}", datetime.now(UTC), datetime.now(UTC))
    state = json.loads(wire.presence_state(change.topic, {key: person}))
    changes = wire.presence_changes(change.topic, joined={key: person}, left=[key], updated={key: person})
    for frame in (json.loads(wire.signal(change.topic, "n", "null", "u")), state | json.loads(changes)):
        yield row(f"`{frame.pop('op')}`", members(list(frame)))


def rows_in_guide(guide: Path, heading: str, columns: int | None) -> list[str]:
    """The rows of the table under this heading, or only their first `columns`."""
    _, _, after = guide.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    section, _, _ = after.partition("\n## ")
    table = [line for line in section.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"[|-]+", table[1]), f"{guide.name} has no table under {heading!r}"
    return [first_columns(line, columns) for line in table[2:]] if columns else table[2:]


def first_columns(line: str, columns: int) -> str:
    """The first columns of a row. The row must have more, none of them empty."""
    _, *cells, _ = re.split(r"(?<!\\)\|", line)
    assert len(cells) > columns, line
    assert all(cell.strip() for cell in cells[columns:]), line
    return "".join(f"|{cell}" for cell in cells[:columns]) + "|"


@pytest.mark.parametrize(
    ("guide", "heading", "columns", "rows"),
    [
        (OPERATE, "Settings", None, settings),
        (OPERATE, "Log events", None, log_events),
        (OPERATE, "Jobs", None, jobs),
        (OPERATE, "Metrics", None, metrics),
        (OPERATE, "Exit codes", None, exit_codes),
        (PROTOCOL, "From the client", 2, client_frames),
        (PROTOCOL, "From the server", 2, server_frames),
        (PROTOCOL, "Error codes", 4, error_codes),
        (PROTOCOL, "Close codes", None, close_codes),
    ],
)
def test_each_table_of_a_guide_matches_the_code(
    guide: Path, heading: str, columns: int | None, rows: Callable[[], Iterator[str]]
) -> None:
    expected = list(dict.fromkeys(rows()))
    table = "\n".join(expected)
    found = rows_in_guide(guide, heading, columns)
    assert expected == found, f"The table under {heading!r} in {guide.name} should be:\n{table}"


def frames_shown() -> Iterator[tuple[str, str]]:
    """Every frame in the examples of the protocol guide: `>` or `<`, and the text with its lines joined."""
    text = PROTOCOL.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for shown in () if language else re.split(r"\n(?=[<>] )", block.strip()):
            yield shown[0], "".join(line.strip() for line in shown[1:].splitlines())


def test_each_frame_that_the_server_builds_has_a_type_with_its_members() -> None:
    built = {line.split("`")[1]: {"op", *line.split("`")[3::2]} for line in server_frames()}
    typed = {name.partition(".")[2]: set(frame.__annotations__) for name, frame in frames("server").items()}
    assert typed == built, "daemon/core/frames.py and daemon/core/wire.py differ"


def test_the_frames_in_the_guide_are_valid_frames_of_the_protocol() -> None:
    shown = list(frames_shown())
    assert {"<", ">"} == {direction for direction, _ in shown}
    for direction, text in shown:
        if direction == ">":
            wire.parse(text.encode())
        else:
            EXACTLY.validate_json(text)


def test_no_two_settings_share_a_variable() -> None:
    variables = [field.validation_alias for field in Settings.model_fields.values()]
    assert len(variables) == len(set(variables))


def test_the_metrics_page_shows_every_metric_and_no_label_that_clients_could_choose() -> None:
    page = b"".join(exposition()).decode()
    shown = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE rowcast_")}
    assert METRICS.keys() == shown
    labels = {label for family in REGISTRY.collect() for sample in family.samples for label in sample.labels}
    expected = {
        "kind",
        "pack",
        "table",
        "outcome",
        "result",
        "source",
        "reason",
        "code",
        "state",
        "work",
        "job",
        "query",
        "index",
        "version",
        "le",
    }
    assert labels <= expected


def log_calls(source: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call of a logger, and its level."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=method)) if method in METHODS:
                yield node, METHODS[method]
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="get_logger")), attr=method)) if (
                method in METHODS
            ):
                yield node, METHODS[method]


def unlisted(sources: Sequence[Path]) -> Iterator[str]:
    """Every log call that the table of events does not allow, with file and line."""
    for source in sources:
        for call, level in log_calls(source):
            place = f"{source.name}:{call.lineno}"
            match call.args:
                case [ast.Constant(value=str() as name)] if name in EVENTS:
                    highest = EVENTS[name].level
                    if LEVELS.index(level) > LEVELS.index(highest):
                        yield f"{place}: {name} is {level}, and the table says {highest}"
                case _:
                    yield f"{place}: not the name of an event in EVENTS: {ast.unparse(call)}"


def test_only_events_of_the_table_are_logged_and_none_above_its_level() -> None:
    assert "" == "\n".join(unlisted(SOURCES))


def test_a_log_call_that_the_table_does_not_allow_is_found(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        "log.info('serving', a=1)\nlog.info('no_such_event')\nlog.error('serving')\nlog.info(name)\n"
        "get_logger().exception('no_such_event')\nlog.debug('listener_lost')\nmath.log(2)\n"
    )
    assert [2, 3, 4, 5] == [int(problem.split(":")[1]) for problem in unlisted([source])]


@cache
def defined_names() -> frozenset[str]:
    """What the Python and SQL files define: `name`, `module.name`, `Class.member`, `schema.name`."""
    names: set[str] = set()
    for source in (*SOURCES, *(ROOT / "tests").rglob("*.py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            for name in bound_names(node):
                names |= {name, f"{source.stem}.{name}"}
            if isinstance(node, ast.ClassDef):
                members = {name for member in node.body for name in bound_names(member)} | attributes(node)
                names |= {f"{node.name}.{name}" for name in members}
    for source in (*(ROOT / "ddl").rglob("*.sql"), *(ROOT / "triggers").glob("*.sql")):
        text = source.read_text(encoding="utf-8")
        for name in re.findall(r"^create (?:or replace )?function ([\w.]+)", text, re.MULTILINE):
            names |= {name, name.partition(".")[2]}
    return frozenset(names)


def bound_names(statement: ast.stmt) -> list[str]:
    """The names that a definition or an assignment binds."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def attributes(definition: ast.ClassDef) -> set[str]:
    """The attributes that the methods of a class assign to `self`."""
    return {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def unknown_citations(text: str) -> Iterator[str]:
    """The paths, functions, classes and tests between backticks that do not exist.

    A function is cited with parentheses. A path is relative to the repository or to daemon/; one with a placeholder
    such as `<pack>` is not checked.
    """
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for cited in dict.fromkeys(re.findall(r"`([^`\n]+)`", prose)):
        if re.fullmatch(r"[\w./-]+/|[\w./-]+/[\w.-]+\.sql|\w[\w./-]*\.(py|md|toml|js)", cited):
            exists = any((folder / cited).exists() for folder in (ROOT, ROOT / "daemon"))
        elif re.fullmatch(r"[\w.]+\(\)|[A-Z]\w*[a-z]\w*(\.\w+)?|test_\w+", cited):
            exists = cited.removesuffix("()") in defined_names()
        else:
            continue
        if not exists:
            yield cited


@pytest.mark.parametrize("guide", ["CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md"])
def test_each_path_and_name_that_a_guide_cites_exists(guide: str) -> None:
    assert [] == list(unknown_citations((ROOT / guide).read_text(encoding="utf-8")))


def test_a_citation_of_something_that_does_not_exist_is_found() -> None:
    known = [
        "core/hub.py",
        "Hub.publish()",
        "wire.parse()",
        "Limits.frames",
        "rowcast.watch()",
        "ddl/<pack>/",
        "UPDATE",
    ]
    unknown = ["core/bus.py", "Hub.shout()", "parse_all()", "Limits.sizes", "test_what_no_test_is_called", "Doorbell"]
    assert unknown == list(unknown_citations(" ".join(f"`{name}`" for name in known + unknown)))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.relative_to(ROOT).as_posix())
def test_each_relative_link_of_a_guide_leads_to_a_file(guide: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", guide.read_text(encoding="utf-8"))
    assert [] == [link for link in links if ":" not in link and not (guide.parent / link).exists()]


def headings(guide: Path) -> set[str]:
    """The fragments that lead to the headings of a guide."""
    text = re.sub(r"^```.*?^```", "", guide.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.relative_to(ROOT).as_posix())
def test_each_link_to_a_section_leads_to_its_heading(guide: Path) -> None:
    links = re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", guide.read_text(encoding="utf-8"))
    files = {file: guide.parent / file if file else guide for file, _ in links}
    assert [] == [f"{file}#{part}" for file, part in links if part not in headings(files[file])]


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """The names of all tests, and of their modules."""
    modules = list((ROOT / "tests").rglob("test_*.py"))
    texts = (module.read_text(encoding="utf-8") for module in modules)
    found = (re.findall(r"(?m)^(?:async )?def (test_\w+)", text) for text in texts)
    return {module.stem for module in modules}.union(*found)


@pytest.mark.parametrize("guide", OF_TODAY, ids=lambda guide: guide.relative_to(ROOT).as_posix())
def test_each_test_that_a_guide_names_exists(guide: Path, tests: set[str]) -> None:
    assert set() == set(re.findall(r"\btest_\w+", guide.read_text(encoding="utf-8"))) - tests


def commands_in(text: str) -> Iterator[list[str]]:
    """The words after `daemon` of each such command, in a shell block or between backticks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + re.findall(r"`(daemon [^`]+)`", text):
        lexer = shlex.shlex(re.sub(r"[][]", "", line), posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        words = list(lexer)
        for place, word in enumerate(words):
            if word == "daemon" or word.endswith("/bin/daemon"):
                yield list(takewhile(lambda word: word[0] not in ";|&<>", words[place + 1 :]))
                break


def usage_error(command: click.Command, words: list[str], parent: click.Context | None = None) -> str | None:
    """What is wrong with the words after a command, but for the values of its parameters."""
    try:
        context = command.make_context(command.name, list(words), parent=parent)
        if isinstance(command, click.Group) and (rest := [*context._protected_args, *context.args]):
            _, subcommand, rest = command.resolve_command(context, rest)
            assert subcommand
            return usage_error(subcommand, rest, context)
    except (click.BadParameter, click.BadOptionUsage, NoArgsIsHelpError, Exit):
        return None  # a guide may name a command without its arguments, or a file that does not exist
    except click.UsageError as error:
        return error.format_message()
    return None


def table_of(text: str, head: str) -> list[list[str]]:
    """The cells of each row of the table that begins with this head."""
    _, _, rest = text.partition(f"| {head} |")
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in rest.partition("\n\n")[0].split("\n")[2:]
    ]


def test_each_failure_behind_gateways_is_tried_and_has_a_mutant_that_was_noticed() -> None:
    guide = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    noticed = {number: last for number, *_, last in table_of(guide, "No")}
    faults, model = (
        (ROOT / "tests" / name).read_text(encoding="utf-8") for name in ("faults/mutant.py", "unit/model/designs.py")
    )
    model += (ROOT / "tests" / "unit" / "model" / "test_gateways.py").read_text(encoding="utf-8")
    failures = table_of(guide, "What fails")
    assert failures
    for failure, tried, not_survived in failures:
        mutants = re.findall(r"`([^`]+)`", not_survived)
        rows = re.findall(r"`(\d[^`]*)`", tried)
        known = [f"def {part}()" in faults or f'"{part}"' in model for name in mutants for part in name.split(", ")]
        assert known, failure
        assert all(known), (failure, mutants)
        assert rows or "model" in tried or "test_" in tried, failure
        for number in rows:
            assert any(f"`{mutant}`:" in noticed[number] for mutant in mutants), (failure, number)
    gateways = [number for number, fault, *_ in table_of(guide, "No") if "gateway" in fault or "gateway" in number]
    assert not [number for number in gateways if "not tried" in noticed[number]]


@pytest.mark.parametrize("guide", OF_TODAY, ids=lambda guide: guide.relative_to(ROOT).as_posix())
def test_each_command_of_a_guide_is_one_of_the_command_line(guide: Path) -> None:
    found = {shlex.join(words): usage_error(cli, words) for words in commands_in(guide.read_text(encoding="utf-8"))}
    assert {} == {words: error for words, error in found.items() if error}


def test_a_command_that_does_not_exist_is_found() -> None:
    block = "daemon check  # it runs\nsudo daemon chek; ls\ndaemon tail \\\n  --no-such-option\n"
    errors = [usage_error(cli, words) or "" for words in commands_in(f"`daemon backup` and\n```sh\n{block}```\n")]
    assert [False, True, True, False] == ["No such" in error for error in errors]
