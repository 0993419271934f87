"""The parts of the bench do what they say; how fast anything is, no test asks."""

import asyncio
import json
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from bench import __main__ as bench_main
from bench import data
from bench.charts import scale_of
from bench.experiments import FORMS, Bench, bursts, floor, in_turn
from bench.judge import Samples, Sense, Spread, Target
from bench.lines import LINES, Line, chosen
from bench.load import Load, load, split
from bench.peers import Relay, Rowcast
from bench.results import Found, asked, publish
from bench.rig import HERE, Broken, Server, clean_environment, cpu, process, resident
from bench.writers import evenly, write
from daemon.gateway.connection import encode
from daemon.postgres.connect import Connection
from tests.support import postgres as support

ANSWER = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
IN_C = pytest.mark.parametrize("in_c", [True, False], ids=["C", "Python"])
HELLO, FIRST, SECOND = '{"op":"hello"}', '{"op":"subscribe","id":1}', '{"op":"subscribe","id":2}'

Attend = Callable[[ServerConnection], Awaitable[None]]


def row(stamp: int) -> bytes:
    """What a message looks like in the frame of any peer."""
    return b'{"id":"x","content":"@%d and some more words"}' % stamp


@asynccontextmanager
async def clients_of(attend: Attend, count: int, *said: str, in_c: bool, **options: Any) -> AsyncIterator[Load]:
    """Load clients of a server that treats each of its connections so."""
    async with serve(attend, "127.0.0.1", 0, compression=None, **options) as server:
        port = server.sockets[0].getsockname()[1]
        async with load(port, [said] * count, in_c=in_c) as clients:
            yield clients


@IN_C
async def test_the_load_client_counts_every_row_and_frame_that_it_is_sent(in_c: bool) -> None:
    frames = [row(n) * size for n, size in enumerate([1, 2, 3, 700])] + [b'{"op":"head"}', b"x" * 70_000]

    async def attend(connection: ServerConnection) -> None:
        for frame in frames:
            await connection.send(frame.decode())
        await connection.wait_closed()

    async with clients_of(attend, 7, in_c=in_c) as clients:
        await clients.open(2)
        await clients.until(706)
        assert 2 == (await clients.mark()).clients
        await clients.open()
        mark = await clients.received(7 * 706)
        while mark.frames < 7 * len(frames):
            mark = await clients.mark()
    assert (7, 7 * 706, 7 * len(frames)) == (mark.clients, mark.rows, mark.frames)
    assert mark.bytes > 7 * sum(map(len, frames))


@IN_C
async def test_rows_are_counted_however_their_bytes_are_cut(in_c: bool) -> None:
    stream = b"".join(encode(row(1_000_000 + n) + b"@") for n in range(40))

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER + stream[:5])
        place, size = 5, 0
        while place < len(stream):
            size = size % 23 + 1
            writer.write(stream[place : place + size])
            await writer.drain()
            await asyncio.sleep(0)
            place += size
        await reader.read()
        writer.close()

    async with await asyncio.start_server(attend, "127.0.0.1", 0) as server:
        async with load(server.sockets[0].getsockname()[1], [()], in_c=in_c) as clients:
            await clients.open()
            await clients.until(40)
            mark = await clients.received(40)
        assert (40, 40) == (mark.rows, mark.sampled)
        assert mark.p50 > 4000, "the stamps lie at the beginning of 1970"


@IN_C
async def test_a_client_says_its_first_frame_and_the_others_when_that_is_answered(in_c: bool) -> None:
    heard: list[str] = []

    async def attend(connection: ServerConnection) -> None:
        heard.append(str(await connection.recv()))
        await connection.send('{"op":"head"}')
        await connection.ping()
        await connection.send('{"op":"welcome"}')
        for _ in range(2):
            heard.append(str(await connection.recv()))
            await connection.send('{"op":"subscribed"}')
        await connection.wait_closed()

    async with clients_of(attend, 1, HELLO, FIRST, SECOND, in_c=in_c) as clients:
        await clients.open()
    assert [HELLO, FIRST, SECOND] == heard


@IN_C
async def test_the_load_client_answers_the_pings_of_the_server(in_c: bool) -> None:
    async def attend(connection: ServerConnection) -> None:
        await (await connection.ping(b"are you there"))
        await connection.send(row(1).decode())
        await connection.wait_closed()

    async with clients_of(attend, 1, in_c=in_c) as clients:
        await clients.open()
        assert 1 == (await clients.received(1)).rows


async def tell_an_error(connection: ServerConnection) -> None:
    await connection.recv()
    await connection.send('{"op":"error","code":"no_such_topic"}')
    await connection.wait_closed()


async def close_at_once(connection: ServerConnection) -> None:
    await connection.close(4401, "token")


async def hang_up(connection: ServerConnection) -> None:
    connection.transport.abort()


@IN_C
@pytest.mark.parametrize(
    ("attend", "why"),
    [(tell_an_error, "no_such_topic"), (close_at_once, "closed with 4401: token"), (hang_up, "lost its connection")],
)
async def test_a_client_that_is_not_served_breaks_the_measurement(attend: Attend, why: str, in_c: bool) -> None:
    async with clients_of(attend, 1, HELLO, in_c=in_c) as clients:
        with pytest.raises(Broken, match=why):
            await clients.open()
            await clients.until(1)


@IN_C
async def test_a_handshake_that_is_refused_breaks_the_measurement(in_c: bool) -> None:
    def full(connection: ServerConnection, _request: Request) -> Response:
        return connection.respond(503, "full\n")

    async with clients_of(close_at_once, 1, in_c=in_c, process_request=full) as clients:
        with pytest.raises(Broken, match=r"refused: HTTP/1\.1 503"):
            await clients.open()


async def test_more_rows_than_were_written_break_the_measurement() -> None:
    async def attend(connection: ServerConnection) -> None:
        await connection.send((row(1) * 2).decode())
        await connection.wait_closed()

    async with clients_of(attend, 1, in_c=True) as clients:
        await clients.open()
        await clients.until(2)
        with pytest.raises(Broken, match="1 rows should have come in, and 2 did"):
            await clients.received(1)


async def test_the_c_loop_sends_what_the_load_client_counts() -> None:
    assert await floor(5, 300, 3, 0, 20) > 0  # it raises if one row more or less comes in


@pytest.mark.parametrize("by_pgbench", [True, False], ids=["pgbench", "asyncpg"])
async def test_what_writers_write_comes_through_a_daemon_to_every_client(database: str, by_pgbench: bool) -> None:
    await data.fill(database, 3, 2, [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)])
    async with Rowcast().serving(database) as service, service.clients([[0, 1], [0, 1]]) as clients:
        await clients.open()
        written = await write(database, clients=2, seconds=1, channels=2, authors=3, rate=50, by_pgbench=by_pgbench)
        more = await evenly(database, rate=100, seconds=0.1, channels=2)
        assert 10 == more.rows
        mark = await clients.received(2 * (written.rows + more.rows))
    assert written.rows > 0
    assert mark.rows == mark.sampled
    assert 0 < mark.p50 <= mark.p99 <= mark.worst


async def test_the_relay_passes_on_every_row(database: str, sql: Connection) -> None:
    await data.fill(database, 1, 1, [(0, 0)])
    await sql.execute("select rowcast.unwatch('chatgenius.messages')")
    await sql.execute((HERE / "relay.sql").read_text())
    async with Relay().serving(database) as service, service.clients([()] * 3) as clients:
        await clients.open()
        await sql.execute(data.INSERT, data.channel(0), data.user(0), 5)
        assert 15 == (await clients.received(15)).rows
        assert 0 == await sql.fetchval("select count(*) from rowcast.events where topic like 'channel:%'")


async def test_a_process_that_ends_before_it_is_ready_says_why() -> None:
    command = ["/bin/sh", "-c", "echo no such thing >&2; exit 3"]
    with pytest.raises(Broken, match="ended with 3: no such thing"):
        async with process(command, clean_environment(), asyncio.Event().wait):
            pass


async def test_what_a_process_uses_is_counted_with_its_children() -> None:
    command = ["/bin/sh", "-c", "sh -c 'while :; do :; done' & wait"]
    async with process(command, clean_environment(), partial(asyncio.sleep, 0)) as pid:
        while cpu(pid) < 0.1:
            await asyncio.sleep(0.01)
        assert resident(pid) > 0


async def test_a_line_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: support.Server
) -> None:
    async def fails(_bench: Bench) -> Samples:
        raise Broken("there is no such thing")

    async def finds(bench: Bench) -> Samples:
        bench.note(found := Samples(), 0, "Rowcast", us=300)
        return found

    @asynccontextmanager
    async def ready() -> AsyncIterator[Server]:
        yield Server(postgres.embedded)

    monkeypatch.setattr(bench_main, "postgres", ready)
    targets = [Target("Rowcast", "us", "<=", 350)]
    lines = [Line(name, "", one, lambda _: targets) for name, one in (("writers", fails), ("handshake", finds))]
    first, second = await bench_main.run(lines, FORMS["tiny"], {"machine": "any"})
    assert ("failed", "Broken: there is no such thing") == (first.verdict, first.failure)
    assert "met" == second.verdict
    publish(tmp_path, [first, second])
    assert "| writers | " in (tmp_path / "RESULTS.md").read_text()


async def test_an_experiment_runs_from_the_database_to_its_figures(postgres: support.Server) -> None:
    said: list[str] = []
    found = await bursts(Bench(Server(postgres.embedded), FORMS["tiny"], said.append))
    [deliveries] = found.rounds("Rowcast", "deliveries")
    assert deliveries > 0
    assert "round 1/1  Rowcast: deliveries" in said[0]


@pytest.mark.parametrize(
    ("sense", "bound", "met"),
    [(">=", 0.5, True), (">=", 0.51, False), (">", 0.5, False), ("<=", 0.5, True), ("<=", 0.49, False)],
)
def test_a_ratio_is_that_of_the_same_round_and_its_median_is_judged(sense: Sense, bound: float, met: bool) -> None:
    samples = Samples({"own": {"tps": [10, 40, 5]}, "peer": {"tps": [20, 10, 50]}})
    target = Target("own", "tps", sense, bound, "peer")
    assert Spread(0.5, 0.1, 4) == target.measured(samples)
    assert met is target.met(samples)


@pytest.mark.parametrize(("cost", "met"), [(119, True), (81, True), (121, False), (79, False)])
def test_flat_means_that_neither_more_nor_less_is_found(cost: float, met: bool) -> None:
    samples = Samples({"few": {"us": [100]}, "many": {"us": [cost]}})
    assert met is Target("many", "us", "+-", 0.2, "few").met(samples)


def test_a_figure_without_a_peer_stands_for_itself() -> None:
    samples = Samples({"own": {"rows": [90_000, 100_000, 300_000]}})
    assert Target("own", "rows", ">=", 100_000).met(samples)
    with pytest.raises(ValueError, match="nothing to take the median of"):
        Spread.of([])


def test_every_other_round_takes_the_peers_in_the_opposite_order() -> None:
    assert [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")] == list(in_turn(3, ["a", "b"]))


def test_lines_are_chosen_by_their_names_or_by_how_they_begin() -> None:
    assert LINES == tuple(chosen([]))
    assert ["writers", "latency-50", "latency-1000"] == [line.name for line in chosen(["writers", "latency"])]
    with pytest.raises(ValueError, match="there is no line speed; there are writers, "):
        chosen(["speed"])


def test_clients_are_shared_out_evenly_among_processes() -> None:
    assert [3, 3, 2, 2] == split(10, 4)
    assert [1, 1] == split(2, 4)


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (0, [0, 1]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (4100, [0, 1000, 2000, 3000, 4000, 5000]),
        (0.3, [0, 0.1, 0.2, 0.3]),
    ],
)
def test_the_axis_of_a_chart_has_round_numbers(most: float, ticks: list[float]) -> None:
    assert ticks == scale_of(most)


SETUP = {"command": "`make bench`", "machine": "a small one"}
FIGURES: dict[str, Any] = {"Rowcast": {"tps": [800, 700, 750]}, "no trigger": {"tps": [1000, 1000, 1000]}}


def found(name: str, setup: dict[str, str] = SETUP) -> Found:
    [line] = chosen([name])
    return Found(name, setup, tuple(line.targets(FORMS["short"])), Samples(FIGURES))


def test_results_and_charts_are_written_from_the_figures(tmp_path: Path) -> None:
    publish(tmp_path, [found("writers")])
    report = (tmp_path / "RESULTS.md").read_text()
    assert "| transactions per second: ≥ 0.7 x no trigger | 0.75 (0.70 to 0.80) x | met |" in report
    assert "- machine: a small one" in report
    assert "| Rowcast | 750 (700 to 800) |" in report
    assert "(charts/writers.svg)" in report
    drawing = ET.fromstring((tmp_path / "charts" / "writers.svg").read_text())
    words = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"writers", "Rowcast", "no trigger", "750", "1,000", "transactions per second", "≥ 0.7 x no trigger"} <= {
        *words
    }
    bars = {
        bar.get("class"): float(bar.get("width", "0")) for bar in drawing.iter("{http://www.w3.org/2000/svg}rect")
    }
    assert bars["own"] == pytest.approx(0.75 * bars["other"], abs=0.2)


def test_a_run_of_some_lines_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    publish(tmp_path, [found("writers"), Found("replay", SETUP, failure="no rows")])
    publish(tmp_path, [Found("writers", {"machine": "another"}, failure="out of disk")])
    report = (tmp_path / "RESULTS.md").read_text()
    assert "out of disk | failed |" in report
    assert "no rows | failed |" in report
    assert "Of replay:\n\n- command: `make bench`\n- machine: a small one\n" in report
    assert "Of writers:\n\n- machine: another\n" in report
    assert {"writers", "replay"} == json.loads((tmp_path / "results.json").read_text()).keys()
    assert [] == list((tmp_path / "charts").iterdir())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_line_says_in_words_what_it_asks(form: Any) -> None:
    for line in LINES:
        assert line.what
        for target in line.targets(form):
            assert asked(target)
