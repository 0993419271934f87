"""Metrics: their definitions, and the page that exposes them.

Label values come only from Rowcast itself or from the schema: no users, topics or addresses.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon import __version__
from daemon.core.adaptive_polling import State
from daemon.core.change import Kind
from daemon.core.close_codes import CLOSE_CODES

# Without the extra series that holds the creation time of each counter.
disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY: Final = CollectorRegistry()

_LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

BUILD_INFO: Final = Gauge(
    "rowcast_build_info", "Always 1; the label says which version this daemon is.", ["version"], registry=REGISTRY
)
READY: Final = Gauge("rowcast_ready", "1 while this daemon is ready, as /readyz says, else 0.", registry=REGISTRY)
CLIENTS: Final = Gauge("rowcast_clients", "Connected clients: authenticated connections.", registry=REGISTRY)
CLIENTS_LIMIT: Final = Gauge(
    "rowcast_clients_limit",
    "Maximum number of clients: ROWCAST_MAX_CLIENTS, or fewer if the open files limit does not allow them.",
    registry=REGISTRY,
)
EVENT_STREAMS: Final = Gauge(
    "rowcast_event_streams", "Clients that read an event stream instead of a websocket.", registry=REGISTRY
)
UNAUTHENTICATED: Final = Gauge(
    "rowcast_unauthenticated",
    "Connections that are not authenticated: requests, pages that are being read, websockets before their hello.",
    registry=REGISTRY,
)
CONNECTED: Final = Counter("rowcast_connected_total", "Clients that connected and authenticated.", registry=REGISTRY)
DISCONNECTED: Final = Counter(
    "rowcast_disconnected_total", "Clients whose connection ended after they had authenticated.", registry=REGISTRY
)
REFUSED: Final = Counter(
    "rowcast_refused_total",
    "Connections refused, by reason: full, user, address, crowded, origin, tls, host, request, stopping, files.",
    ["reason"],
    registry=REGISTRY,
)
ABORTED: Final = Counter(
    "rowcast_aborted_total",
    "Connections cut because the peer did not send, answer, read or close in time, by reason.",
    ["reason"],
    registry=REGISTRY,
)
CLOSED: Final = Counter(
    "rowcast_closed_total",
    "Connections of clients that this daemon ended, by close code, such as 1009 (too big) or 4429 (too many frames).",
    ["code"],
    registry=REGISTRY,
)
THROTTLED: Final = Counter(
    "rowcast_throttled_total",
    "Times that the frames of a client had to wait because its user exceeded ROWCAST_USER_RATE or ROWCAST_USER_CPU.",
    registry=REGISTRY,
)
HELD_UP: Final = Counter(
    "rowcast_held_up_total",
    "Times that newcomers had to wait because connections that are not authenticated had used "
    "ROWCAST_UNAUTHENTICATED_CPU.",
    registry=REGISTRY,
)
CLIENTS_BEHIND: Final = Gauge(
    "rowcast_clients_behind",
    "Clients that are too slow for the live stream and are served from the log.",
    registry=REGISTRY,
)
BEHIND: Final = Counter(
    "rowcast_behind_total",
    "Times that a client was too slow for the live stream and was served from the log.",
    registry=REGISTRY,
)
SUBSCRIPTIONS: Final = Gauge(
    "rowcast_subscriptions", "Current subscriptions: followed topics, counted per client.", registry=REGISTRY
)
CHANGES: Final = Counter(
    "rowcast_changes_total",
    "Changes read from the log, by kind; `invalid` are those that their row model refuses.",
    ["kind"],
    registry=REGISTRY,
)
FRAMES: Final = Counter("rowcast_frames_total", "Frames with changes that were built.", registry=REGISTRY)
DELIVERIES: Final = Counter("rowcast_deliveries_total", "Frames with changes written to clients.", registry=REGISTRY)
CAPTURED: Final = Counter(
    "rowcast_captured_total",
    "Captured changes of the packs that were read from the log, by table.",
    ["table"],
    registry=REGISTRY,
)
DEAD_LETTERS: Final = Counter(
    "rowcast_dead_letters_total",
    "Changes that could not be sent and were stored: invalid, unreadable, or in a topic that nobody can follow.",
    ["pack", "table"],
    registry=REGISTRY,
)
SET_ASIDE: Final = Counter(
    "rowcast_set_aside_total",
    "Events that could not be numbered; their topics were reset.",
    ["table"],
    registry=REGISTRY,
)
UNNUMBERED_AGE: Final = Gauge(
    "rowcast_unnumbered_age_seconds",
    "Seconds for which captured events have been waiting for their numbers; 0 if none wait.",
    registry=REGISTRY,
)
LOG_POSITION: Final = Gauge("rowcast_log_position", "Number of the newest log entry delivered.", registry=REGISTRY)
LEADER: Final = Gauge("rowcast_leader", "1 while this daemon is the leader, else 0.", registry=REGISTRY)
LEADER_STATE: Final = Gauge(
    "rowcast_leader_state",
    "1 for the leader's current state: asleep (writers notify), falling_asleep, awake (it polls).",
    ["state"],
    registry=REGISTRY,
)
LOG_LINES_DROPPED: Final = Counter(
    "rowcast_log_lines_dropped_total", "Log lines dropped because nobody reads stderr.", registry=REGISTRY
)
LISTENER_CONNECTED: Final = Gauge(
    "rowcast_listener_connected",
    "1 while the connection that receives NOTIFY is known to work, else 0.",
    registry=REGISTRY,
)
BEAT_AGE: Final = Gauge(
    "rowcast_beat_age_seconds", "Seconds since the last heartbeat came back through Postgres.", registry=REGISTRY
)
CAPTURE_DRIFT: Final = Gauge(
    "rowcast_capture_drift", "Watched tables that are not captured as defined.", registry=REGISTRY
)
READ_SECONDS: Final = Histogram(
    "rowcast_read_seconds",
    "Duration of one read of the log, in seconds.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
QUERY_SECONDS: Final = Histogram(
    "rowcast_query_seconds",
    "Duration of Rowcast's own statements, in seconds, by name: those of its queries.sql files.",
    ["query"],
    buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10),
    registry=REGISTRY,
)
BATCH_CHANGES: Final = Histogram(
    "rowcast_batch_changes",
    "Changes in one read of the log.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000),
    registry=REGISTRY,
)
RESUMES: Final = Counter(
    "rowcast_resumes_total",
    "Clients that resumed from a position and caught up with the head.",
    ["outcome"],
    registry=REGISTRY,
)
RESUME_READS: Final = Counter(
    "rowcast_resume_reads_total",
    "Reads of the log for resuming clients, by source: memory or database.",
    ["source"],
    registry=REGISTRY,
)
SNAPSHOTS: Final = Counter("rowcast_snapshots_total", "Snapshots of topics that clients got.", registry=REGISTRY)
SNAPSHOT_ROWS: Final = Counter(
    "rowcast_snapshot_rows_total",
    "Rows read for snapshots; one that many clients share counts once.",
    registry=REGISTRY,
)
SNAPSHOT_SECONDS: Final = Histogram(
    "rowcast_snapshot_seconds",
    "Duration of one read of a snapshot, in seconds.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)
DELIVERY_SECONDS: Final = Histogram(
    "rowcast_delivery_seconds",
    "Time from a writing statement to its frames in the sockets of this process, in seconds, once per batch.",
    buckets=_LATENCY_BUCKETS,
    registry=REGISTRY,
)
CANARY_SECONDS: Final = Histogram(
    "rowcast_canary_seconds",
    "Time from just before the write of a canary row to its frame in this process, in seconds.",
    buckets=_LATENCY_BUCKETS,
    registry=REGISTRY,
)
RECENT_BYTES: Final = Gauge(
    "rowcast_recent_bytes", "Approximate size of the newest changes cached in memory, in bytes.", registry=REGISTRY
)
RESETS: Final = Counter(
    "rowcast_resets_total",
    "Resets sent because a stream could not be continued, by reason.",
    ["reason"],
    registry=REGISTRY,
)
GATEWAY: Final = Gauge("rowcast_gateway", "1 in a gateway, which has no database, else 0.", registry=REGISTRY)
MEMBERS: Final = Gauge("rowcast_members", "Members that this gateway hears; 0 in a daemon.", registry=REGISTRY)
RELAY_CONNECTED: Final = Gauge("rowcast_relay_connected", "1 while NATS is reached, else 0.", registry=REGISTRY)
RELAY_BATCHES: Final = Counter(
    "rowcast_relay_batches_total",
    "Batches for gateways, by what became of them: sent, dropped because NATS could not take them, unreadable here.",
    ["result"],
    registry=REGISTRY,
)
RELAY_CONTENTS: Final = Counter(
    "rowcast_relay_contents_total",
    "Contents of batches that travel by topic, by what became of them: sent, dropped because NATS could not take "
    "them, too_large to be sent; at a gateway: arrived, asked of a member because they were missing.",
    ["result"],
    registry=REGISTRY,
)
KEY_FETCHES: Final = Counter(
    "rowcast_key_fetches_total",
    "Fetches of the keys at the URL in ROWCAST_JWKS, by outcome: done, failed.",
    ["outcome"],
    registry=REGISTRY,
)
KEY_FETCH_DELAY: Final = Gauge(
    "rowcast_key_fetch_delay_seconds",
    "Seconds for which fetching the keys has been failing; 0 if the last fetch succeeded, or none is needed.",
    registry=REGISTRY,
)
CERTIFICATE_END: Final = Gauge(
    "rowcast_certificate_end_timestamp_seconds",
    "When the certificate in ROWCAST_TLS_CERTIFICATE ends, in seconds since 1970; 0 without one.",
    registry=REGISTRY,
)
ERRORS: Final = Counter("rowcast_errors_total", "Error frames sent to clients, by code.", ["code"], registry=REGISTRY)
SIGNALS: Final = Counter("rowcast_signals_total", "Signals that clients of this daemon sent.", registry=REGISTRY)
SIGNALS_DROPPED: Final = Counter(
    "rowcast_signals_dropped_total",
    "Signals that were dropped, by reason: rate (the sender's), slow (counted for each client that did not read), "
    "full (too many for other processes), unsent (the database did not answer), malformed (not understood).",
    ["reason"],
    registry=REGISTRY,
)
PRESENT: Final = Gauge(
    "rowcast_present", "Who is present in a topic through this daemon, counted per topic.", registry=REGISTRY
)
PURGED: Final = Counter(
    "rowcast_purged_total", "Events and dead letters emptied because their row was deleted.", registry=REGISTRY
)
RETENTION_DELAY: Final = Gauge(
    "rowcast_retention_delay_seconds",
    "Seconds for which a cleanup has been due without progress: purge (content of deleted rows), sweep, floor.",
    ["work"],
    registry=REGISTRY,
)
SEGMENTS_AHEAD: Final = Gauge(
    "rowcast_segments_ahead",
    "Segments of the log that are created but not in use yet.",
    registry=REGISTRY,
)
LOG_FLOOR: Final = Gauge("rowcast_log_floor", "Number up to which the log has been dropped.", registry=REGISTRY)
QUEUE_USAGE: Final = Gauge(
    "rowcast_queue_usage", "Fill level of the NOTIFY queue of Postgres, from 0 to 1.", registry=REGISTRY
)
NOTIFY_WAITERS: Final = Gauge(
    "rowcast_notify_waiters",
    "Transactions that waited for the lock of NOTIFY when a heartbeat was last late; 0 if none was.",
    registry=REGISTRY,
)
JOB_LAST_SUCCESS: Final = Gauge(
    "rowcast_job_last_success_timestamp_seconds",
    "When a job last succeeded, on any daemon, in seconds since 1970; absent until it has.",
    ["job"],
    registry=REGISTRY,
)
JOB_FAILURES: Final = Counter(
    "rowcast_job_failures_total", "Runs of a job that failed on this daemon.", ["job"], registry=REGISTRY
)


class _PostgresCounters(Collector):
    """Counters that Postgres keeps, as they were read last."""

    def __init__(self) -> None:
        self.index_scans: Mapping[tuple[str, str], int] = {}
        self.trigger_executions: Mapping[tuple[str], int] = {}

    def collect(self) -> Iterator[Metric]:
        scans = CounterMetricFamily(
            "rowcast_index_scans",
            "Scans of each index of the packs, as Postgres counts them: every daemon of a database shows the same.",
            labels=["table", "index"],
        )
        executions = CounterMetricFamily(
            "rowcast_trigger_executions",
            "Executions of each table's capture triggers, as Postgres counts them if track_functions is pl or all.",
            labels=["table"],
        )
        for family, values in ((scans, self.index_scans), (executions, self.trigger_executions)):
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


POSTGRES_COUNTERS: Final = _PostgresCounters()
REGISTRY.register(POSTGRES_COUNTERS)

BUILD_INFO.labels(version=__version__).set(1)
# Prometheus cannot see the increase from nothing to 1, so these series start with 0.
for _kind in Kind:
    CHANGES.labels(kind=_kind.value)
for _outcome in ("lossless", "replayed"):
    RESUMES.labels(outcome=_outcome)
for _reason in ("full", "user", "address", "crowded", "origin", "tls", "host", "request", "stopping", "files"):
    REFUSED.labels(reason=_reason)
for _reason in (
    "open_timeout",
    "answer_timeout",
    "silent",
    "too_slow",
    "user_unread",
    "close_timeout",
    "drain_timeout",
):
    ABORTED.labels(reason=_reason)
for _closing in CLOSE_CODES.values():
    CLOSED.labels(code=_closing.code)
for _reason in ("rate", "slow", "full", "unsent", "malformed"):
    SIGNALS_DROPPED.labels(reason=_reason)
for _outcome in ("done", "failed"):
    KEY_FETCHES.labels(outcome=_outcome)
for _source in ("memory", "database"):
    RESUME_READS.labels(source=_source)

METRICS: Final[Mapping[str, str]] = MappingProxyType(
    {
        f"{family.name}_total" if family.type == "counter" else family.name: family.documentation
        for family in REGISTRY.collect()
    }
)
"""The meaning of each metric of Rowcast, by name; the table in docs/operate.md."""


class ProcessMetrics(Collector):
    """process_*, with the names that are usual. Needs only /proc/self, the part of /proc that a sandbox leaves."""

    def __init__(self, proc: str = "/proc") -> None:
        self._own = Path(proc, "self")
        self._page, self._ticks = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
        self._booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def collect(self) -> Iterator[Metric]:
        """Without /proc there are none."""
        with suppress(OSError):
            fields = [float(field) for field in (self._own / "stat").read_bytes().rpartition(b")")[2].split()[1:]]
            memory, resident = fields[19], fields[20] * self._page
            started, cpu = self._booted + fields[18] / self._ticks, (fields[10] + fields[11]) / self._ticks
            files, limit = self._open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            yield GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory size in bytes.", memory)
            yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size in bytes.", resident)
            yield GaugeMetricFamily("process_start_time_seconds", "When the process began, since 1970.", started)
            yield CounterMetricFamily("process_cpu_seconds_total", "User and system CPU time in seconds.", cpu)
            yield GaugeMetricFamily("process_open_fds", "Number of open file descriptors.", files)
            yield GaugeMetricFamily("process_max_fds", "Maximum number of open file descriptors.", limit)

    def _open_files(self) -> int:
        """Linux counts them since 6.2; to list 10,000 takes 10 ms, and one more file."""
        return (self._own / "fd").stat().st_size or sum(1 for _ in (self._own / "fd").iterdir()) - 1


if sys.platform == "linux":
    REGISTRY.register(ProcessMetrics())


_STEP: Final = 64  # samples in a piece: written in a fraction of a millisecond

_worker: dict[str, str] = {}


def name_worker(number: int) -> None:
    """Add the label `worker` to every metric of this process, to tell workers apart."""
    _worker["worker"] = str(number)


class _Only(Collector):
    """A page with one metric."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def exposition() -> Iterator[bytes]:
    """All metrics in the text format of Prometheus, in pieces: others may get their turn in between.

    The figures of one metric are read together, those of another perhaps a little later.
    """
    for family in REGISTRY.collect():
        samples = family.samples
        if _worker:
            samples = [sample._replace(labels=_worker | sample.labels) for sample in samples]
        for first in range(0, max(1, len(samples)), _STEP):
            family.samples = samples[first : first + _STEP]
            text = generate_latest(_Only(family))
            yield text.split(b"\n", 2)[2] if first else text  # what it is and means comes once


_LEADER_STATES: Final = {state: LEADER_STATE.labels(state=state.value) for state in State}


def show_poller_state(state: State | None) -> None:
    """Set `rowcast_leader_state`; None if this daemon is not the leader."""
    for known, gauge in _LEADER_STATES.items():
        gauge.set(known is state)
