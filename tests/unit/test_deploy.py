"""The alerts, the dashboard, the runbook and the image match the code. What cannot be run here is read."""

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from daemon.cli.root import cli
from daemon.metrics import METRICS, REGISTRY
from daemon.settings import VARIABLES
from tests.support.programs import complaints

ROOT = Path(__file__).parents[2]
RULES = ROOT / "monitoring" / "rules.yml"
DASHBOARD = ROOT / "monitoring" / "dashboard.json"
RUNBOOK = ROOT / "docs" / "runbook.md"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
OF_PROMETHEUS = {"job", "instance", "exported_job", "worker"}  # labels that Prometheus or a worker adds
OF_PROCESSES = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_max_fds"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    assert ["rowcast"] == [group["name"] for group in groups]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def expressions() -> Iterator[str]:
    """Every expression of the rules and of the dashboard."""
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


def unknown_metrics(text: str) -> list[str]:
    """The metrics in a text that the daemon does not have."""
    names = re.findall(r"\b(?:rowcast|process)_[a-z_]+\b", text)
    series = {f"{name}{end}" for name in METRICS for end in ("", "_bucket", "_count", "_sum")}
    return [name for name in names if name not in series | OF_PROCESSES and name != "rowcast_capture"]


def test_each_metric_of_the_alerts_the_dashboard_and_the_runbook_exists() -> None:
    assert [] == [
        name for text in (*expressions(), RUNBOOK.read_text(encoding="utf-8")) for name in unknown_metrics(text)
    ]
    assert ["rowcast_nothing", "process_nothing"] == unknown_metrics("rowcast_nothing rowcast_ready process_nothing")


def test_each_label_of_the_alerts_and_the_dashboard_exists() -> None:
    known = {label for family in REGISTRY.collect() for sample in family.samples for label in sample.labels}
    known |= {"le", "reason", "code", "table", "work", "job", "query", "kind", "state"} | OF_PROMETHEUS
    selected = r"(?:by|without) \(([^)]*)\)|\{([^}]*)\}"
    for text in expressions():
        for names, matchers in re.findall(selected, text):
            found = {name.strip() for name in names.split(",")} if names else set(re.findall(r"(\w+)[=!]", matchers))
            assert found <= known, text
        assert text.count("(") == text.count(")"), text


def test_each_rule_has_the_form_that_prometheus_takes() -> None:
    for rule in rules():
        assert {"alert", "expr", "labels", "annotations"} <= rule.keys() <= {*rule, "for"}
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert ["summary"] == list(rule["annotations"])
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def recorded(expressions: Iterable[str]) -> str:
    """Rules that record these expressions, with values for the variables of Grafana."""
    filled = [text.replace("$__rate_interval", "5m").replace("$job", "rowcast") for text in expressions]
    found = [{"record": f"recorded:{number}", "expr": text} for number, text in enumerate(filled)]
    return str(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": found}]}))


def test_promtool_accepts_the_alerts_and_each_expression_of_the_dashboard(tmp_path: Path) -> None:
    assert "" == complaints("promtool", "check", "rules", RULES)
    file = tmp_path / "rules.yml"
    file.write_text(recorded(expressions()))
    assert "" == complaints("promtool", "check", "rules", file)
    file.write_text(recorded(["rate(rowcast_errors_total)"]))
    assert "expected type range vector" in complaints("promtool", "check", "rules", file)


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    assert "" == complaints("hadolint", "--no-color", ROOT / "Dockerfile")
    (tmp_path / "Dockerfile").write_text("FROM python\n")
    assert "DL3006" in complaints("hadolint", "--no-color", tmp_path / "Dockerfile")


def test_each_alert_has_an_entry_in_the_runbook_and_the_other_way_round() -> None:
    headings = re.findall(r"^## (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert [rule["alert"] for rule in rules()] == headings
    assert len(headings) == len(set(headings))


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["description"]
        assert panel["title"]
    assert len(panels()) == len({panel["id"] for panel in panels()})


def copied() -> set[str]:
    """The files and folders of the repository that the image is made from."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_the_image_is_made_from_files_that_exist_and_from_all_that_the_wheel_contains() -> None:
    assert set() == {name for name in copied() if not (ROOT / name).exists()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml"}
    assert needed <= copied()
    passed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied() == {line.removeprefix("!") for line in passed if line.startswith("!")}
    [extras] = re.findall(r"'\.\[(.*)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()


def test_the_lock_file_becomes_constraints_without_hashes_and_extras() -> None:
    [expression] = re.findall(r"^RUN sed -nE '(.+)' requirements\.lock", DOCKERFILE, re.MULTILINE)
    done = subprocess.run(
        ["sed", "-nE", expression, ROOT / "requirements.lock"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    locked = re.findall(r"^[A-Za-z0-9]\S*==", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(locked) == len(lines)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)


def commands() -> Iterator[list[str]]:
    """The words after `daemon` of each command of the image and of the compose file."""
    [healthcheck] = re.findall(r"CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    program, *words = json.loads(healthcheck)
    assert 'ENTRYPOINT ["daemon"]' in DOCKERFILE
    assert "daemon" == program
    yield words
    yield from (service["command"] for service in COMPOSE["services"].values() if "command" in service)


def test_the_commands_of_the_image_and_the_compose_file_are_those_of_the_command_line() -> None:
    options = {name for parameter in cli.params for name in parameter.opts}
    for words in commands():
        assert words[0] in options | set(cli.commands), shlex.join(words)


@pytest.mark.parametrize("service", ["apply-ddl", "rowcast"])
def test_the_compose_file_sets_only_variables_that_exist(service: str) -> None:
    given = COMPOSE["services"][service]["environment"]
    assert given.keys() <= set(VARIABLES.values())
    assert {"POSTGRES_HOST", "POSTGRES_PASSWORD", "ROWCAST_SECRET"} <= given.keys()
    assert "postgres" == given["POSTGRES_HOST"]
    assert all("set it in .env" in given[name] for name in ("POSTGRES_PASSWORD", "ROWCAST_SECRET"))
    of_image = re.findall(r"^(?:ENV|   ) +(ROWCAST_\w+)=", DOCKERFILE, re.MULTILINE)
    assert ["ROWCAST_LISTEN"] == of_image


def test_the_services_start_in_order_and_the_daemon_is_confined() -> None:
    services = COMPOSE["services"]
    assert {"apply-ddl": {"condition": "service_completed_successfully"}} == services["rowcast"]["depends_on"]
    assert {"postgres": {"condition": "service_healthy"}} == services["apply-ddl"]["depends_on"]
    assert services["rowcast"]["image"] == services["apply-ddl"]["image"]
    assert services["rowcast"]["read_only"]
    assert ["ALL"] == services["rowcast"]["cap_drop"]
    assert re.search(r"^USER 10001", DOCKERFILE, re.MULTILINE)
