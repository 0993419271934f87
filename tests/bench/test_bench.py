"""The parts of the bench count, judge and write correctly. No test measures speed."""

import asyncio
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench_main
from bench import data, floods, nodes, peers
from bench.charts import axis_ticks
from bench.costs import Costs
from bench.experiments import FORMS, Bench, bursts, filtered_events, in_turn, insert, snapshots
from bench.judge import Samples, Sense, Spread, Target
from bench.lines import LINES, Line, select
from bench.load import split
from bench.peers import NODE, STARLETTE, Relay, Rowcast, relays
from bench.results import Result, publish, target_text
from bench.rig import HERE, MeasurementError, Server, clean_environment, cpu, process, resident
from bench.writers import evenly, write
from daemon.postgres.connect import Connection
from tests.support import postgres as support
from tests.support.nats import find_nats_server
from tests.support.node import installed


def test_the_guide_to_security_names_the_line_of_each_flood_and_leaves_figures_to_the_results() -> None:
    guide = (HERE.parent / "docs/security.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| \*(floods-[a-z-]+)\* \|$", guide, re.MULTILINE)
    assert [line.name for line in LINES if line.name.startswith("floods-")] == rows


@pytest.mark.parametrize("together", [1, 3], ids=["single rows", "three rows"])
@pytest.mark.parametrize("by_pgbench", [True, False], ids=["pgbench", "asyncpg"])
async def test_every_client_receives_what_the_writers_insert(database: str, by_pgbench: bool, together: int) -> None:
    await data.fill(database, 3, 2, [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)])
    async with Rowcast().serving(database) as service, service.clients([[0, 1], [0, 1]]) as clients:
        await clients.open()
        written = await write(
            database, clients=2, seconds=1, channels=2, authors=3, rate=50, rows=together, by_pgbench=by_pgbench
        )
        steps: list[int] = []

        async def after_each(rows: int) -> None:
            steps.append((await clients.received(2 * (written.rows + rows))).rows)

        more = await evenly(database, rate=100, seconds=0.1, channels=2, after_each=after_each)
        assert [2 * (written.rows + n) for n in range(1, 11)] == steps
        assert 10 == more.rows
        mark = await clients.received(2 * (written.rows + more.rows))
    assert written.rows > 0
    assert 0 == written.rows % together
    assert mark.rows == mark.sampled
    assert 0 < mark.p50 <= mark.p99 <= mark.worst


@pytest.mark.parametrize("relay", [Relay(), NODE, STARLETTE], ids=lambda relay: relay.name)
async def test_a_relay_passes_on_every_row_to_every_client(database: str, sql: Connection, relay: Relay) -> None:
    if relay is NODE:
        installed(HERE, "ws", HERE / "relay.mjs")
    assert relay in relays(), peers.left_out()
    await data.fill(database, 1, 2, [(0, 0), (1, 0)])
    await sql.execute("select rowcast.unwatch('chatgenius.messages')")
    await sql.execute((HERE / "relay.sql").read_text())
    async with relay.serving(database) as service, service.clients([[0, 1]] * 3) as clients:
        await clients.open(1)
        for channel in (0, 1):
            await sql.execute(data.INSERT, data.channel(channel), data.user(0), 5)
        await clients.until(10)
        await clients.open()
        await sql.execute(data.INSERT, data.channel(1), data.user(0), 5)
        mark = await clients.received(10 + 15)
        assert 0 == await sql.fetchval("select count(*) from rowcast.events where topic like 'channel:%'")
    assert mark.sampled == mark.rows
    assert mark.p50 < 60, "the timestamp is that of the row"


async def test_the_relay_in_node_sends_only_what_a_client_subscribes_to(database: str, sql: Connection) -> None:
    installed(HERE, "ws", HERE / "relay.mjs")
    await data.fill(database, 1, 3, [(0, 0), (1, 0), (2, 0)])
    await sql.execute((HERE / "relay.sql").read_text())
    async with NODE.serving(database) as service, service.clients([[0], [1, 2], [2]]) as clients:
        await clients.open()
        for channel, rows in enumerate((1, 10, 100)):
            await sql.execute(data.INSERT, data.channel(channel), data.user(0), rows)
        await clients.received(1 + 10 + 2 * 100)


def test_a_relay_that_cannot_run_here_is_left_out_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "node_versions", str)
    monkeypatch.setattr(peers, "starlette_versions", str)
    monkeypatch.delenv("PG_EVENTSERV", raising=False)
    assert ["NOTIFY relay"] == [peer.name for peer in relays()]
    assert [
        "pg_eventserv: name its program in PG_EVENTSERV",
        "Node relay: install Node and run npm install in bench/",
        "Starlette relay: run make install",
    ] == peers.left_out()
    monkeypatch.setenv("PG_EVENTSERV", "/nowhere")
    with pytest.raises(MeasurementError, match="PG_EVENTSERV names /nowhere, which is no file"):
        relays()


async def test_a_process_that_ends_before_it_is_ready_is_reported_with_its_output() -> None:
    command = ["/bin/sh", "-c", "echo no such thing >&2; exit 3"]
    with pytest.raises(MeasurementError, match="ended with 3: no such thing"):
        async with process(command, clean_environment(), asyncio.Event().wait):
            pass


async def test_resource_use_includes_child_processes() -> None:
    command = ["/bin/sh", "-c", "sh -c 'while kill -0 $PPID; do :; done' & wait"]  # the child ends with its parent
    async with process(command, clean_environment(), partial(asyncio.sleep, 0)) as pid:
        while cpu(pid) < 0.1:
            await asyncio.sleep(0.01)
        assert resident(pid) > 0


async def test_a_line_that_fails_is_reported_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: support.Server
) -> None:
    async def fails(_bench: Bench) -> Samples:
        raise MeasurementError("there is no such thing")

    async def finds(bench: Bench) -> Samples:
        bench.note(found := Samples(), 0, "Rowcast", us=300)
        return found

    @asynccontextmanager
    async def ready() -> AsyncIterator[Server]:
        yield Server(postgres.embedded)

    monkeypatch.setattr(bench_main, "postgres", ready)
    targets = [Target("Rowcast", "us", "<=", 350)]
    lines = [Line(name, "", one, lambda _: targets) for name, one in (("writers", fails), ("handshake", finds))]
    kept: list[Result] = []
    first, second = await bench_main.run(lines, FORMS["tiny"], {"machine": "any"}, kept.append)
    assert [first, second] == kept
    assert ("failed", "MeasurementError: there is no such thing") == (first.verdict, first.failure)
    assert "met" == second.verdict
    publish(tmp_path, [first, second])
    assert "| writers | " in (tmp_path / "RESULTS.md").read_text()


@pytest.fixture(scope="module")
def server(postgres: support.Server) -> Server:
    """Its templates are made once."""
    return Server(postgres.embedded)


async def test_experiments_run_from_the_database_to_their_figures(server: Server) -> None:
    log: list[str] = []
    bench = Bench(server, replace(FORMS["tiny"], fan_out=4, idle_clients=8), log.append)
    found = await bursts(bench)
    [deliveries] = found.rounds("Rowcast", "deliveries")
    assert deliveries > 0
    assert "round 1/1  Rowcast: deliveries" in log[0]
    found = await filtered_events(bench)
    assert all(found.rounds(peer, "us")[0] > 0 for peer in ("no filters", "1 filter", "100 filters"))
    found = await snapshots(bench)
    for peer in ("1 client", "4 clients", "8 clients"):
        assert found.rounds(peer, "rows")[0] > 0
        assert 1 <= found.rounds(peer, "reads")[0] <= 8


async def test_the_cost_of_a_row_is_measured_by_process_and_in_bytes(server: Server) -> None:
    async with Bench(server, FORMS["tiny"], lambda _line: None).serving(Rowcast()) as (dsn, service):
        costs = Costs(server, dsn, service)
        await costs.begin()
        await insert(dsn, 5000)
        found = await costs.per_row(5000)
    assert {"postgres_us", "writer_us", "leader_us", "wal_us", "daemon_us", "wal", "disk"} == found.keys()
    assert found["wal"] > 100
    assert found["disk"] >= 0
    assert 0 < found["writer_us"] <= found["postgres_us"]
    assert found["writer_us"] + found["leader_us"] + found["wal_us"] <= found["postgres_us"] + 5  # µs, read in turn


@pytest.mark.parametrize("kind", ["ping", "handshake"])
async def test_a_flood_is_measured_in_turn_with_its_control(server: Server, kind: str) -> None:
    [flood] = [flood for flood in floods.FLOODS if flood.kind == kind]
    found = await floods.measure(flood, Bench(server, replace(FORMS["tiny"], seconds=0.5), lambda _line: None))
    for peer in (flood.name, flood.control):
        assert 0 < found.rounds(peer, "p50")[0] <= found.rounds(peer, "p99")[0]
        assert 0 < found.rounds(peer, "health")[0] < floods.HEALTH_TIMEOUT
    assert found.rounds(flood.name, "units")[0] > 0
    assert 0 == found.rounds(flood.control, "throttled")[0]


async def test_experiments_with_gateways_run_over_a_real_nats_server(server: Server) -> None:
    find_nats_server()
    form = replace(FORMS["tiny"], fan_out=2, seconds=1)
    bench = Bench(server, form, lambda _line: None)
    found = await nodes.latency(bench)
    assert found.rounds(nodes.GATEWAY, "p50_50")[0] > 0
    assert 1 == len(found.rounds(nodes.GATEWAY, "added_1000"))
    found = await nodes.unfollowed(bench)
    assert {nodes.UNFOLLOWED, nodes.FOLLOWED, nodes.MEMBER} == found.values.keys()
    found = await nodes.contents(bench)
    whole, apart = (
        found.rounds(nodes.contents_name(content, 10_000), "unfollowed_bytes")[0] for content in nodes.CONTENTS
    )
    assert apart < whole / 2
    found = await nodes.gateways(bench)
    assert all(found.rounds(nodes.gateways_name(count), "deliveries")[0] > 0 for count in (1, 2))


async def test_what_a_gateway_receives_and_asks_is_measured_for_each_row(server: Server) -> None:
    find_nats_server()
    bench = Bench(server, replace(FORMS["tiny"], seconds=1), lambda _line: None)
    found = await nodes.batches(bench)
    for rows, _ in nodes.TRANSACTIONS:
        name = nodes.batches_name(rows, with_gateway=True)
        assert 300 < found.rounds(name, "unfollowed_bytes")[0] < 3000  # beats count, too, if there are few rows
        assert rows / 2 < found.rounds(name, "batch")[0]  # a batch may be counted before or after its rows
        assert found.rounds(nodes.batches_name(rows, with_gateway=False), "member_us")[0] > 0
    found = await nodes.replays(bench)
    assert found.rounds(nodes.GATEWAY, "rows")[0] > 0
    found = await nodes.rights(bench)
    assert found.rounds(nodes.MEMBER, "rights")[0] > 0


@pytest.mark.parametrize(
    ("sense", "bound", "met"),
    [(">=", 0.5, True), (">=", 0.51, False), (">", 0.5, False), ("<=", 0.5, True), ("<=", 0.49, False)],
)
def test_ratios_compare_the_same_round_and_the_median_is_judged(sense: Sense, bound: float, met: bool) -> None:
    samples = Samples({"own": {"tps": [10, 40, 5]}, "peer": {"tps": [20, 10, 50]}})
    target = Target("own", "tps", sense, bound, "peer")
    assert Spread(0.5, 0.1, 4) == target.measured(samples)
    assert met is target.met(samples)


def test_a_ratio_to_zero_is_no_error() -> None:
    samples = Samples({"own": {"us": [1]}, "peer": {"us": [0]}})
    assert not Target("own", "us", "<=", 2, "peer").met(samples)


@pytest.mark.parametrize(("cost", "met"), [(119, True), (81, True), (121, False), (79, False)])
def test_a_target_of_no_change_bounds_the_ratio_on_both_sides(cost: float, met: bool) -> None:
    samples = Samples({"few": {"us": [100]}, "many": {"us": [cost]}})
    assert met is Target("many", "us", "+-", 0.2, "few").met(samples)


def test_a_figure_without_a_peer_is_judged_by_its_absolute_value() -> None:
    samples = Samples({"own": {"rows": [90_000, 100_000, 300_000]}})
    assert Target("own", "rows", ">=", 100_000).met(samples)
    with pytest.raises(ValueError, match="nothing to take the median of"):
        Spread.of([])


def test_every_other_round_reverses_the_order_of_the_peers() -> None:
    assert [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")] == list(in_turn(3, ["a", "b"]))


def test_lines_are_selected_by_name_or_prefix() -> None:
    assert LINES == tuple(select([]))
    assert ["writers", "latency-50", "latency-1000"] == [line.name for line in select(["writers", "latency"])]
    with pytest.raises(ValueError, match="there is no line speed; there are writers, "):
        select(["speed"])


def test_clients_are_distributed_evenly_among_processes() -> None:
    assert [3, 3, 2, 2] == split(10, 4)
    assert [1, 1] == split(2, 4)


@pytest.mark.parametrize(
    ("maximum", "ticks"),
    [
        (0, [0, 1]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (4100, [0, 1000, 2000, 3000, 4000, 5000]),
        (0.3, [0, 0.1, 0.2, 0.3]),
    ],
)
def test_the_axis_of_a_chart_has_round_numbers(maximum: float, ticks: list[float]) -> None:
    assert ticks == axis_ticks(maximum)


SETUP = {"command": "`make bench`", "machine": "a small one"}
FIGURES: dict[str, Any] = {"Rowcast": {"tps": [800, 700, 750]}, "no trigger": {"tps": [1000, 1000, 1000]}}


def a_result(name: str, setup: dict[str, str] = SETUP) -> Result:
    [line] = select([name])
    return Result(name, setup, tuple(line.targets(FORMS["short"])), Samples(FIGURES))


def test_results_and_charts_are_written_from_the_figures(tmp_path: Path) -> None:
    publish(tmp_path, [a_result("writers")])
    report = (tmp_path / "RESULTS.md").read_text()
    assert "| transactions per second: ≥ 0.62 x no trigger | 0.75 (0.70 to 0.80) x | met |" in report
    assert "- machine: a small one" in report
    assert "| Rowcast | 750 (700 to 800) |" in report
    assert "(charts/writers.svg)" in report
    drawing = ET.fromstring((tmp_path / "charts" / "writers.svg").read_text())
    words = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"writers", "Rowcast", "no trigger", "750", "1,000", "transactions per second", "≥ 0.62 x no trigger"} <= {
        *words
    }
    bars = {
        bar.get("class"): float(bar.get("width", "0")) for bar in drawing.iter("{http://www.w3.org/2000/svg}rect")
    }
    assert bars["own"] == pytest.approx(0.75 * bars["other"], abs=0.2)


def test_ratios_to_other_relays_stand_beside_the_target_and_are_not_judged(tmp_path: Path) -> None:
    figures: dict[str, dict[str, list[float]]] = {
        "no trigger": {"tps": [10_000.0]},
        "Rowcast": {"tps": [4000.0], "p99": [0.040], "disk": [800], "leader_us": [25], "wal": [1900]},
        "NOTIFY relay": {"tps": [2000.0], "p99": [0.010]},
        NODE.name: {"tps": [1000.0], "p99": [0.080]},
        STARLETTE.name: {"tps": [8000.0]},
    }
    results = [
        replace(a_result(name), samples=Samples(figures)) for name in ("writers", "relay-writers", "saturation")
    ]
    publish(tmp_path, results)
    report = (tmp_path / "RESULTS.md").read_text()
    beside = "Node relay: 4.00 (4.00 to 4.00) x; Starlette relay: 0.50 (0.50 to 0.50) x"
    assert "| 0.40 (0.40 to 0.40) x | not met |  |" in report, "the writers are not compared with relays"
    assert f"≥ 2 x NOTIFY relay | 2.00 (2.00 to 2.00) x | met | {beside} |" in report
    assert "| 4.00 (4.00 to 4.00) x | not met | Node relay: 0.50 (0.50 to 0.50) x |" in report
    costs = ("transactions per second", "99th percentile of latency, ms", "CPU of the leader's backend, µs")
    assert f"| | {' | '.join(costs)} | bytes of WAL | bytes of the log on disk |" in report
    assert "Node relay" not in (tmp_path / "charts" / "writers.svg").read_text()
    for line in ("relay-writers", "saturation"):
        assert "Node relay" in (tmp_path / "charts" / f"{line}.svg").read_text()


def test_a_run_of_some_lines_keeps_the_results_of_the_others(tmp_path: Path) -> None:
    publish(tmp_path, [a_result("writers"), Result("replay", SETUP, failure="no rows")])
    publish(tmp_path, [Result("writers", {"machine": "another"}, failure="out of disk")])
    report = (tmp_path / "RESULTS.md").read_text()
    assert "out of disk | failed |" in report
    assert "no rows | failed |" in report
    assert "For replay:\n\n- command: `make bench`\n- machine: a small one\n" in report
    assert "For writers:\n\n- machine: another\n" in report
    assert {"writers", "replay"} == json.loads((tmp_path / "results.json").read_text()).keys()
    assert [] == list((tmp_path / "charts").iterdir())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_line_describes_itself_and_its_targets(form: Any) -> None:
    for line in LINES:
        assert line.what
        for target in line.targets(form):
            assert target_text(target)
