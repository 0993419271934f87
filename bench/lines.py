"""The benchmarks ("lines"): the question each asks, and the experiment that answers it."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench import experiments, floods, nodes
from bench.experiments import Bench, Form, scale_name
from bench.judge import Samples, Target

ROWCAST, RELAY = "Rowcast", "NOTIFY relay"


@dataclass(frozen=True)
class Unit:
    """How a figure is shown: its name on the axis, and what to multiply it by."""

    name: str
    factor: float = 1

    def show(self, value: float) -> str:
        """The figure to three significant digits, or all digits before the point, without its unit."""
        value *= self.factor
        digits = 0 if abs(value) >= 100 or value == 0 else 1 if abs(value) >= 10 else 2
        return f"{value:,.{digits}f}"


UNITS = {
    "tps": Unit("transactions per second"),
    "deliveries": Unit("deliveries per second"),
    "at_once": Unit("deliveries per second while clients read"),
    "rows": Unit("rows per second"),
    "rights": Unit("rights per second"),
    "batch": Unit("rows in a batch"),
    "p50": Unit("median latency, ms", 1000),
    "p99": Unit("99th percentile of latency, ms", 1000),
    "p50_50": Unit("median latency at 50 a second, ms", 1000),
    "p99_50": Unit("99th percentile at 50 a second, ms", 1000),
    "p50_1000": Unit("median latency at 1,000 a second, ms", 1000),
    "p99_1000": Unit("99th percentile at 1,000 a second, ms", 1000),
    "us": Unit("CPU, µs"),
    "daemon_us": Unit("CPU of the daemon, µs"),
    "postgres_us": Unit("CPU of Postgres, µs"),
    "writer_us": Unit("CPU of the writers' backends, µs"),
    "leader_us": Unit("CPU of the leader's backend, µs"),
    "wal_us": Unit("CPU of the WAL writer, µs"),
    "wal": Unit("bytes of WAL"),
    "disk": Unit("bytes of the log on disk"),
    "nats_us": Unit("CPU of NATS, µs"),
    "member_us": Unit("CPU of the member, µs"),
    "unfollowed_us": Unit("CPU where nobody follows, µs"),
    "quarter_us": Unit("CPU where a quarter is followed, µs"),
    "unfollowed_bytes": Unit("bytes where nobody follows"),
    "quarter_bytes": Unit("bytes where a quarter is followed"),
    "gateway_us": Unit("CPU of the gateway, µs"),
    "asker_us": Unit("CPU of the asker, µs"),
    "added_50": Unit("added to the median latency at 50 a second, ms", 1000),
    "added_1000": Unit("added to the median latency at 1,000 a second, ms", 1000),
    "bytes": Unit("bytes"),
    "daemon_cpu": Unit("CPU of the daemon, processors"),
    "postgres_cpu": Unit("CPU of Postgres, processors"),
    "load_cpu": Unit("CPU of the load client, processors"),
    "clients": Unit("clients"),
    "reads": Unit("reads of the database"),
    "first": Unit("99th percentile in the first second, ms", 1000),
    "health": Unit("slowest /healthz, ms", 1000),
    "units": Unit("taken by the daemon, a second"),
    **{counter: Unit(f"rowcast_{counter}_total") for counter in floods.COUNTERS},
}
"""What the figures are, in the order in which they are shown."""


@dataclass(frozen=True)
class Line:
    """One question. All its targets must be met; the chart shows the figure of the first."""

    name: str
    what: str
    experiment: Callable[[Bench], Awaitable[Samples]]
    targets: Callable[[Form], Sequence[Target]]
    peers: tuple[str, ...] = ()  # shown in the chart; empty means all


def _targets(*targets: Target) -> Callable[[Form], Sequence[Target]]:
    return lambda _form: targets


def _flat_cost(form: Form) -> Sequence[Target]:
    first, *others = (scale_name(*size) for size in form.scales)
    return [Target(other, "us", "+-", 0.2, first) for other in others]


def _crowd(form: Form) -> Sequence[Target]:
    one, many, all_clients = (experiments.snapshot_name(count) for count in (1, form.fan_out, form.idle_clients))
    return [Target(many, "rows", ">=", 10, one), Target(all_clients, "reads", "<=", 5)]


LINES = (
    Line(
        "writers",
        "throughput of 32 writers with capture, a daemon and a client, compared with no trigger",
        experiments.full_load,
        _targets(Target(ROWCAST, "tps", ">=", 0.62, "no trigger")),
        (ROWCAST, "no trigger"),
    ),
    Line(
        "relay-writers",
        "throughput of 32 writers with capture, compared with a trigger that notifies with the row, and a relay",
        experiments.full_load,
        _targets(Target(ROWCAST, "tps", ">=", 2, RELAY)),
    ),
    Line(
        "latency-50",
        "time from the row to the client at 50 writes a second, compared with the relay",
        experiments.paced,
        _targets(Target(ROWCAST, "p50_50", "<=", 1.5, RELAY)),
    ),
    Line(
        "latency-1000",
        "time from the row to the client at 1,000 writes a second, compared with the relay",
        experiments.paced,
        _targets(Target(ROWCAST, "p50_1000", "<=", 2, RELAY)),
    ),
    Line(
        "saturation",
        "time from the row to the client under full load, compared with the relay under its own full load",
        experiments.full_load,
        _targets(Target(ROWCAST, "p99", "<=", 2, RELAY), Target(ROWCAST, "tps", ">=", 2, RELAY)),
    ),
    Line(
        "half-load",
        "time from the row to the client at half of what the relay admits under full load, compared with the relay",
        experiments.half_load,
        _targets(Target(ROWCAST, "p99", "<=", 1.2, RELAY)),
    ),
    Line(
        "delivery-cpu",
        "server CPU per delivery of single small events, compared with a C loop of send()",
        experiments.single_events,
        _targets(Target(ROWCAST, "us", "<=", 1.4, "C loop")),
    ),
    Line(
        "burst",
        "deliveries (changes x clients) a second from one process, with events in bursts",
        experiments.bursts,
        _targets(Target(ROWCAST, "deliveries", ">=", 1_000_000)),
    ),
    Line(
        "memory",
        "resident memory of the server per idle, subscribed client",
        experiments.idle_clients,
        _targets(Target(ROWCAST, "bytes", "<=", 4 * 1024)),
    ),
    Line(
        "handshake",
        "server CPU per client for handshake, hello and subscribe (relays: what they have of it)",
        experiments.idle_clients,
        _targets(Target(ROWCAST, "us", "<=", 1.6, RELAY)),
    ),
    Line(
        "replay",
        "rows a second replayed from the log to one returning client, right after the daemon has started",
        experiments.replay,
        _targets(Target(ROWCAST, "rows", ">=", 146_000)),
    ),
    Line(
        "snapshot",
        "rows a second in snapshots of one topic: one client, and many that ask at the same time",
        experiments.snapshots,
        _crowd,
    ),
    Line(
        "filters",
        "CPU of the daemon per delivery of single events, with different filters that all events match",
        experiments.filtered_events,
        _targets(Target(experiments.filters_name(100), "us", "<=", 1.5, experiments.filters_name(0))),
    ),
    Line(
        "workers",
        "deliveries a second from two workers compared with one, without the share of the load client",
        experiments.workers,
        _targets(
            Target("2 workers", "deliveries", ">=", 1.6, "1 worker"),
            Target("2 workers", "us", "<=", 1.03, "1 worker"),
        ),
    ),
    Line(
        "scale",
        "CPU of daemon and Postgres per event as topics and clients grow, with one client per topic",
        experiments.scale,
        _flat_cost,
    ),
    Line(
        "gateway-latency",
        "what a gateway adds to the time from the row to the client, at 50 and at 1,000 writes a second",
        nodes.latency,
        _targets(Target(nodes.GATEWAY, "added_50", "<=", 0.001), Target(nodes.GATEWAY, "added_1000", "<=", 0.001)),
    ),
    Line(
        "gateway-cpu",
        "CPU per event of a gateway where nobody follows it, compared with the member that numbers and publishes it",
        nodes.unfollowed,
        _targets(Target(nodes.UNFOLLOWED, "us", "<=", 0.5, nodes.MEMBER)),
    ),
    Line(
        "contents",
        "bytes and CPU per event at gateways, if contents travel with their batches, or by topic",
        nodes.contents,
        _targets(
            *(
                Target(
                    nodes.contents_name("topic", size),
                    "unfollowed_bytes",
                    "<=",
                    0.5,
                    nodes.contents_name("inline", size),
                )
                for size in nodes.SIZES
            )
        ),
    ),
    Line(
        "gateway-batches",
        "CPU and bytes per event at a gateway where nobody follows it, as more events come together",
        nodes.batches,
        _targets(
            Target(
                nodes.batches_name(20, with_gateway=True),
                "unfollowed_us",
                "<=",
                0.5,
                nodes.batches_name(1, with_gateway=True),
            ),
        ),
    ),
    Line(
        "gateway-replay",
        "rows a second that one client of a gateway replays from the database of the member",
        nodes.replays,
        _targets(Target(nodes.GATEWAY, "rows", ">=", 10_000)),
    ),
    Line(
        "gateway-rights",
        "rights a second that one member answers over NATS",
        nodes.rights,
        _targets(Target(nodes.MEMBER, "rights", ">=", 5_000)),
    ),
    Line(
        "gateways",
        "deliveries a second from two gateways compared with one, without the share of the load clients",
        nodes.gateways,
        _targets(
            Target(nodes.gateways_name(2), "deliveries", ">=", 1.3, nodes.gateways_name(1)),
            Target(nodes.gateways_name(2), "us", "<=", 1.1, nodes.gateways_name(1)),
        ),
    ),
    *(
        Line(
            f"floods-{flood.kind.replace('_', '-')}",
            f"time from the row to an established client during a flood: {flood.name}",
            partial(floods.measure, flood),
            _targets(Target(flood.name, "p99", "<=", 1.2, flood.control), Target(flood.name, "health", "<=", 1.0)),
        )
        for flood in floods.FLOODS
    ),
)


def select(names: Sequence[str]) -> list[Line]:
    """The lines with these names. `latency` selects every `latency-*`; no names select all. Raises ValueError."""
    for name in names:
        if not any(_named(line, name) for line in LINES):
            raise ValueError(f"there is no line {name}; there are {', '.join(line.name for line in LINES)}")
    return [line for line in LINES if not names or any(_named(line, name) for name in names)]


def _named(line: Line, name: str) -> bool:
    return line.name == name or line.name.startswith(f"{name}-")
