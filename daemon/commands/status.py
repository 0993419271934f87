"""`daemon status`: how a running daemon is, from its own pages."""

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import ClassVar, Final

import click
from prometheus_client.parser import text_string_to_metric_families

from daemon.core.errors import OperatorFault
from daemon.settings import Address, Settings
from daemon.settings.local import Node, nodes_of

ANSWER_TIMEOUT: Final = 5.0  # seconds
WATCH_DELAY: Final = 2.0  # seconds between two looks

_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing listens there

_IN_JSON: Final = frozenset({"node", "clients", "members", "lag", "age", "queue", "dead letters"})

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


class NotRunning(OperatorFault):
    """No daemon answers at {address} ({reason}): start it, or correct ROWCAST_LISTEN or ROWCAST_METRICS_LISTEN."""

    exit_code: ClassVar[int] = 69

    def __init__(self, address: Address, reason: str) -> None:
        self.address, self.reason = address, reason


class _UnixConnection(HTTPConnection):
    """HTTP over the Unix socket at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_TIMEOUT)
        self.sock.connect(self._path)


def _get(address: Address, path: str, *, has_tls: bool) -> str:
    """The text of a page, whatever its status. Raises NotRunning."""
    if address.is_unix:
        connection: HTTPConnection = _UnixConnection(address.host.removeprefix("unix:"))
    elif has_tls:
        host = _EVERYWHERE.get(address.host, address.host)
        connection = HTTPSConnection(host, address.port, timeout=ANSWER_TIMEOUT, context=_unverified())
    else:
        host = _EVERYWHERE.get(address.host, address.host)
        connection = HTTPConnection(host, address.port, timeout=ANSWER_TIMEOUT)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        if answer.status not in (200, 503):
            raise NotRunning(address, f"{path} answers {answer.status}")
    except (OSError, HTTPException, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise NotRunning(address, reason or type(error).__name__) from None
    finally:
        connection.close()
    return text


def _unverified() -> ssl.SSLContext:
    """TLS with a certificate that is for another name: the address is our own, and nothing secret is sent."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Report:
    """What one process says about itself."""

    def __init__(self, name: str, address: Address, has_tls: bool) -> None:
        """Ask the process of this name, if it has one, at this address. Raises NotRunning."""
        try:
            self.readiness = json.loads(_get(address, "/readyz", has_tls=has_tls))
            self.is_ready = bool(self.readiness["ready"])
            families = list(text_string_to_metric_families(_get(address, "/metrics", has_tls=has_tls)))
        except (ValueError, KeyError, TypeError):
            raise NotRunning(address, "the pages there are not those of a daemon") from None
        self.address, self.name = address, name
        self._samples = {
            (
                sample.name,
                frozenset(sample.labels.items() - {("worker", sample.labels.get("worker", ""))}),
            ): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 if it is not there."""
        return self._samples.get((name, frozenset(labels.items())), 0.0)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric that are not 0, by one of its labels."""
        return {
            dict(labels)[label]: value
            for (found, labels), value in sorted(self._samples.items(), key=lambda item: sorted(item[0][1]))
            if found == name and value and label in dict(labels)
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """What to print: a heading and a text for each line."""
        if self.name:
            yield "node", self.name
        yield "address", str(self.address)
        yield "ready", "yes" if self.is_ready else "no"
        for reason in self.readiness.get("reasons", ()):
            yield "", reason
        for warning in self.readiness.get("warnings", ()):
            yield "warning", warning
        if not self.is_gateway:
            yield "leader", self._leader()
        value = self.value
        yield (
            "clients",
            f"{value('rowcast_clients'):.0f} of {value('rowcast_clients_limit'):.0f}, "
            f"{value('rowcast_unauthenticated'):.0f} unauthenticated, {value('rowcast_clients_behind'):.0f} behind, "
            f"{value('rowcast_subscriptions'):.0f} subscriptions",
        )
        yield from self._of_gateway() if self.is_gateway else self._of_database()

    @property
    def is_gateway(self) -> bool:
        """Whether it is a gateway, which has no database."""
        return bool(self.value("rowcast_gateway"))

    def _of_gateway(self) -> Iterator[tuple[str, str]]:
        value = self.value
        members = (
            f"{value('rowcast_members'):.0f} known; NATS is {'' if value('rowcast_relay_connected') else 'not '}"
        )
        yield "members", f"{members}reached"
        yield (
            "lag",
            f"nothing was missing {value('rowcast_beat_age_seconds'):.1f} s ago; "
            f"position {value('rowcast_log_position'):.0f}",
        )
        yield from self._ages()

    def _of_database(self) -> Iterator[tuple[str, str]]:
        value = self.value
        notify = "received" if value("rowcast_listener_connected") else "lost"
        yield (
            "lag",
            f"{value('rowcast_unnumbered_age_seconds'):.1f} s without numbers; NOTIFY is {notify}, last heartbeat "
            f"{value('rowcast_beat_age_seconds'):.1f} s ago; position {value('rowcast_log_position'):.0f}",
        )
        yield from self._ages()
        yield "queue", f"the queue of NOTIFY is {value('rowcast_queue_usage'):.0%} full"
        dead_letters = self.by_label("rowcast_dead_letters_total", "table")
        tables = ", ".join(f"{table}: {count:.0f}" for table, count in dead_letters.items())
        more = f" ({tables}); see `daemon dead-letters list`" if dead_letters else ""
        yield "dead letters", f"{sum(dead_letters.values()):.0f} since the start{more}"

    def _ages(self) -> Iterator[tuple[str, str]]:
        """How old changes were on average when they were sent, and how long the canary took, if there were any."""
        means = []
        for what, name in (("changes", "rowcast_delivery_seconds"), ("the canary", "rowcast_canary_seconds")):
            if count := self.value(f"{name}_count"):
                means.append(f"{what} {1000 * self.value(f'{name}_sum') / count:.1f} ms")
        if means:
            yield "age", f"{', '.join(means)} when sent, on average since the start"

    def _leader(self) -> str:
        if not self.value("rowcast_leader"):
            return "another daemon or worker, if any"
        [state, *_] = [*self.by_label("rowcast_leader_state", "state"), "unknown"]
        return f"this process, {state.replace('_', ' ')}"

    def as_json(self) -> dict[str, object]:
        """The same as one object."""
        lines = list(self.lines())
        return {
            "address": str(self.address),
            **self.readiness,
            "leader": bool(self.value("rowcast_leader")),
            **{name: text for name, text in lines if name in _IN_JSON},
        }


def places(settings: Settings) -> Sequence[Node]:
    """Where each process answers: at its port for metrics, or else one of them at the port for clients.

    Those of a `daemon up --nodes` that runs here count, unless the settings name an address only. Raises
    DataDirUnusable.
    """
    given, first = settings.model_fields_set, settings.metrics_listen
    may_be_local = "data_dir" in given or not {"listen", "metrics_listen"} & given
    if may_be_local and (nodes := nodes_of(settings.data_dir)):
        return nodes
    if first is None or not first.port:
        return [Node("", settings.listen, settings.tls_certificate is not None)]
    return [Node("", Address(first.host, first.port + number)) for number in range(settings.workers)]


@dataclass(frozen=True)
class NoReport:
    """What is to be said of a node that does not answer, while others do."""

    node: Node
    reason: str
    is_ready: bool = False

    def lines(self) -> Iterator[tuple[str, str]]:
        """What to print, as for a Report."""
        yield "node", self.node.name
        yield "address", str(self.node.address)
        yield "ready", "no"
        yield "", self.reason

    def as_json(self) -> dict[str, object]:
        """The same as one object."""
        found = {"address": str(self.node.address), "node": self.node.name}
        return {**found, "ready": False, "reasons": [self.reason]}


def _look(nodes: Sequence[Node]) -> Sequence[Report | NoReport]:
    """What each node says. Raises NotRunning if none answers."""
    found = list[Report | NoReport]()
    silent = list[NotRunning]()
    for node in nodes:
        try:
            found.append(Report(*node))
        except NotRunning as fault:
            silent.append(fault)
            found.append(NoReport(node, f"it does not answer ({fault.reason})"))
    if len(silent) == len(nodes):
        raise silent[0]
    return found


def _print(reports: Sequence[Report | NoReport], *, as_json: bool) -> None:
    for number, report in enumerate(reports):
        if as_json:
            click.echo(json.dumps(report.as_json()))
            continue
        if number:
            click.echo()
        for name, text in report.lines():
            click.echo(f"{name:13} {text}")


def status(settings: Settings, *, watch: bool, as_json: bool, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Print how the daemon is, again and again with `watch`. Returns whether all its processes are ready.

    Raises NotRunning, but with `watch` only prints it.
    """
    while True:
        try:
            reports = _look(places(settings))
        except NotRunning as fault:
            if not watch:
                raise
            click.clear()
            click.echo(f"daemon: {fault}")
        else:
            if watch and not as_json:
                click.clear()
            _print(reports, as_json=as_json)
            if not watch:
                return all(report.is_ready for report in reports)
        sleep(WATCH_DELAY)
