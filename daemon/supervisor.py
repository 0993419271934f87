"""The parent of several worker processes, which share one listening socket and nothing else but the log.

The parent listens, forks, and then waits for messages from its workers, for their end, and for its own signals. It
has no event loop, no threads and no connections, so it can fork at any time, and the workers share its memory pages.

All workers accept from the same socket. With SO_REUSEPORT each would have its own queue, and connections in the queue
of a hung worker would wait in vain. To balance the load, a worker with more connections than another leaves the next
connection to it for a moment.
"""

import asyncio
import ctypes
import faulthandler
import gc
import math
import mmap
import os
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NoReturn

import click

from daemon import logs, metrics, systemd
from daemon.app.serve import Serving, has_terminal, running, serve
from daemon.core.errors import OperatorFault, fault_in
from daemon.gateway.server import bind
from daemon.postgres.backoff import backoff_delay
from daemon.settings import Settings, refreshed

log = logs.get_logger()

BEATS: Final = 5  # messages that a worker sends in the time after which it counts as hung
INITIAL_DELAY: Final = 0.5  # seconds: the upper bound of the restart delay; it doubles with each quick end in a row
MAX_DELAY: Final = 30.0  # seconds: its maximum; a worker that ends within this time of its start ended quickly

_STOPS: Final = (signal.SIGTERM, signal.SIGINT)
_HANDLED: Final = (*_STOPS, signal.SIGHUP)
_PR_SET_PDEATHSIG: Final = 1


class ConnectionCounts:
    """How many connections each worker has, in shared memory. Each worker writes its own count only."""

    _ABSENT: Final = 2**64 - 1

    def __init__(self, workers: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 8 * workers)).cast("Q")
        for number in range(workers):
            self.remove(number)

    def remove(self, number: int) -> None:
        """Take a worker that accepts nothing out of the balance, so the others do not leave connections to it."""
        self._counts[number] = self._ABSENT

    def should_accept(self, number: int, connections: int) -> bool:
        """Record the connections of this worker; True if no other worker has fewer."""
        self._counts[number] = connections
        return connections <= min(self._counts)


@dataclass(frozen=True)
class ParentLink:
    """The `systemd.Manager` of a worker: it sends to its parent what a service sends to systemd."""

    link: socket.socket
    sockets: Sequence[socket.socket]
    beat_every: float

    def notify(self, state: str) -> bool:
        """Send a state to the parent. Returns False if the parent does not take it."""
        try:
            self.link.send(state.encode())
        except OSError:
            return False
        return True

    def watchdog_interval(self) -> float:
        """Seconds between two messages to the parent."""
        return self.beat_every

    def listen_fds(self) -> list[socket.socket]:
        """The listening sockets that all workers share."""
        return list(self.sockets)


@dataclass(eq=False)
class Worker:
    """One worker process, as seen by the parent."""

    number: int
    pid: int
    link: socket.socket
    started: float
    ready: bool = False
    status: str = "starting"
    fault: str = ""
    missed: int = 0  # beats of the parent since the worker's last message
    reload_began: int = 0  # by systemd.monotonic_usec


class Supervisor:
    """Starts the workers, restarts those that end or hang, and stops them all when it stops.

    Until all workers have been ready once, a worker that exits with an error code stops everything.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: Sequence[socket.socket],
        read_settings: Callable[[], Settings] | None = None,
        serving: Serving = running,
    ) -> None:
        self._settings, self._sockets, self._read_settings = settings, sockets, read_settings
        self._serving = serving
        self._connections = ConnectionCounts(settings.workers)
        self._running: dict[int, Worker] = {}
        self._due = dict.fromkeys(range(settings.workers), 0.0)  # start time by number
        self._quick_ends: Counter[int] = Counter()  # by number, in a row
        self._beat_every = min(settings.worker_silence / BEATS, systemd.watchdog_interval() or math.inf)
        self._max_missed = math.ceil(settings.worker_silence / self._beat_every)
        self._selector = selectors.DefaultSelector()
        self._ready = self._stopping = False
        self._reload_asked = 0  # by systemd.monotonic_usec
        self._reloading: set[Worker] = set()  # those that have not reloaded since then
        self._has_terminal = has_terminal()  # a terminal that has been closed could not be seen any more
        self._code = 0

    def run(self) -> int:
        """Supervise until SIGTERM, SIGINT or a fault at the start; returns the highest exit code of a worker."""
        faulthandler.enable(file=2)  # SIGABRT: stderr then says where the process hung
        gc.collect()
        gc.freeze()  # a collection writes to the objects it visits, and a page that is written to is not shared
        next_beat = time.monotonic() + self._beat_every
        with self._signals():
            while self._running or not self._stopping:
                now = time.monotonic()
                for number in [number for number, due in self._due.items() if due <= now]:
                    self._start(number)
                next_due = min([next_beat, *self._due.values()])
                for key, _ in self._selector.select(max(0.0, next_due - time.monotonic())):
                    key.data()
                # By now all messages have been read that arrived while this process slept or was stopped.
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._beat_every
                    self._beat()
        return self._code

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals that arrive: they wake the selector."""
        receiver, sender = socket.socketpair()
        receiver.setblocking(False)
        sender.setblocking(False)
        with receiver, sender, self._selector:
            self._selector.register(receiver, selectors.EVENT_READ, partial(self._on_signal, receiver))
            signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            for number in _HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) sets it for SIGHUP
                    signal.signal(number, lambda *_: None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)  # SIGHUP was held until here
            try:
                yield
            finally:
                signal.set_wakeup_fd(-1)

    def _on_signal(self, receiver: socket.socket) -> None:
        arrived = set(receiver.recv(64))
        if signal.SIGHUP in arrived and not self._has_terminal:
            arrived.discard(signal.SIGHUP)
            self._reload()
        if arrived:
            self._stop()

    def _reload(self) -> None:
        """Let each worker reload, since it has keys of its own. systemd learns when the last one has."""
        if self._ready:  # else systemd would take the end of the reload for that of the start
            self._reload_asked, self._reloading = systemd.monotonic_usec(), set(self._running.values())
            systemd.notify(systemd.reloading_message())
            if not self._reloading:
                systemd.notify("READY=1")
        for worker in self._running.values():
            os.kill(worker.pid, signal.SIGHUP)

    def _end_reload(self, worker: Worker) -> None:
        if worker in self._reloading:
            self._reloading.discard(worker)
            if not self._reloading:
                systemd.notify("READY=1")

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._due.clear()
        systemd.notify(systemd.stopping_message(self._settings.drain_seconds))
        for listening in self._sockets:
            listening.close()
        for worker in self._running.values():
            os.kill(worker.pid, signal.SIGTERM)

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)  # they stay pending until the worker handles them
        try:
            pid = os.fork()
            if pid == 0:
                self._run_worker(number, theirs, parent)
        except OSError as error:  # no memory, or too many processes, at the moment
            ours.close()
            self._schedule_restart(number, 0.0, os.strerror(error.errno or 0))
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        del self._due[number]
        self._running[number] = worker = Worker(number, pid, ours, time.monotonic())
        self._selector.register(ours, selectors.EVENT_READ, partial(self._read_messages, worker))
        log.info("worker_started", worker=number, pid=pid)

    def _read_messages(self, worker: Worker) -> None:
        try:
            while message := worker.link.recv(4096):
                self._handle_message(worker, message.decode())
        except BlockingIOError:
            return
        self._reap(worker)

    def _handle_message(self, worker: Worker, message: str) -> None:
        worker.missed = 0
        for line in message.splitlines():
            match line.split("=", 1):
                case ["STATUS", status]:
                    worker.status = status
                case ["FAULT", fault]:
                    worker.fault = fault
                case ["MONOTONIC_USEC", began]:
                    worker.reload_began = int(began)
                case ["READY", _]:
                    worker.ready = True
                    if worker.reload_began >= self._reload_asked:
                        self._end_reload(worker)
        if not self._ready and [True] * self._settings.workers == [each.ready for each in self._running.values()]:
            self._ready = True
            systemd.notify("READY=1")

    def _reap(self, worker: Worker) -> None:
        self._selector.unregister(worker.link)
        worker.link.close()
        del self._running[worker.number]
        self._connections.remove(worker.number)
        _, status = os.waitpid(worker.pid, 0)
        self._end_reload(worker)
        code = os.waitstatus_to_exitcode(status)
        if self._stopping:
            self._code = max(self._code, _exit_code(code))
        elif code > 0 and not self._ready:
            if worker.fault:
                click.echo(f"daemon: {worker.fault}", err=True)
            self._code = code
            self._stop()
        else:
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            lifetime = time.monotonic() - worker.started
            self._schedule_restart(worker.number, lifetime, worker.fault or how or "", pid=worker.pid)

    def _schedule_restart(self, number: int, lifetime: float, reason: str, **more: object) -> None:
        """Restart this worker after a delay that grows with each quick end in a row."""
        self._quick_ends[number] = 0 if lifetime > MAX_DELAY else self._quick_ends[number] + 1
        delay = backoff_delay(self._quick_ends[number], initial=INITIAL_DELAY, maximum=MAX_DELAY)
        self._due[number] = time.monotonic() + delay
        log.warning("worker_ended", worker=number, **more, reason=reason, pause=round(delay, 3))

    def _beat(self) -> None:
        """Kill hung workers, and feed the watchdog of systemd, unless a worker survives even SIGKILL."""
        logs.flush()
        for worker in self._running.values():
            worker.missed += 1
            if worker.missed == self._max_missed + 1:
                log.error("worker_hung", worker=worker.number, pid=worker.pid)
                os.kill(worker.pid, signal.SIGABRT)  # stderr then says where it hung
            elif worker.missed > self._max_missed:
                os.kill(worker.pid, signal.SIGKILL)
        if all(worker.missed <= self._max_missed + 2 for worker in self._running.values()):
            states = dict.fromkeys(self._due, "to be started again")
            states |= {worker.number: worker.status for worker in self._running.values() if worker.status != "ready"}
            status = "; ".join(f"worker {number}: {state}" for number, state in sorted(states.items()))
            systemd.notify(systemd.watchdog_message(status or "ready", self._beat_every, starting=not self._ready))

    def _run_worker(self, number: int, link: socket.socket, parent: int) -> NoReturn:
        """Run the forked process until it exits."""
        code = 70
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # the parent ended before prctl took effect
                os._exit(code)
            os.setsid()  # Ctrl-C reaches only the parent, which stops its workers
            signal.set_wakeup_fd(-1)
            for handled in _HANDLED:
                if signal.getsignal(handled) is not signal.SIG_IGN:
                    signal.signal(handled, signal.SIG_DFL)
            self._selector.close()
            for worker in self._running.values():
                worker.link.close()
            logs.configure(self._settings.log_format, self._settings.log_level, worker=number)
            metrics.name_worker(number)
            asyncio.run(self._serve(number, ParentLink(link, self._sockets, self._beat_every)))
            code = 0
        except Exception as error:
            fault = fault_in(error)
            if fault is None:
                log.exception("internal_error")
            else:
                code = fault.exit_code
                link.send(f"FAULT={fault}".encode())
        finally:
            logs.flush(logs.EXIT_TIMEOUT)
            os._exit(code)  # the rest of this program is for the parent

    def _current_settings(self) -> Settings:
        """The settings; for a worker that takes the place of another one, with what has been reloaded meanwhile."""
        if not self._ready or self._read_settings is None:
            return self._settings
        try:
            return refreshed(self._settings, self._read_settings())
        except OperatorFault as fault:
            log.warning("reload_failed", reason=" ".join(str(fault).split()))
            return self._settings

    async def _serve(self, number: int, parent: ParentLink) -> None:
        settings = _settings_of_worker(number, self._current_settings())
        read = self._read_settings
        try:
            await serve(
                settings,
                manager=parent,
                should_accept=partial(self._connections.should_accept, number),
                read_settings=read and (lambda: _settings_of_worker(number, read())),
                serving=self._serving,
            )
        finally:  # a worker that is exiting needs no signal, and a closing event loop cannot handle one
            signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)


def _settings_of_worker(number: int, settings: Settings) -> Settings:
    """The settings, with this worker's own port for metrics."""
    first = settings.metrics_listen
    if first is None or not first.port:
        return settings
    return settings.model_copy(update={"metrics_listen": replace(first, port=first.port + number)})


def _exit_code(code: int) -> int:
    """The exit code that a shell would report: 128 plus the number of a signal."""
    return 128 - code if code < 0 else code


def supervise(
    settings: Settings, read_settings: Callable[[], Settings] | None = None, serving: Serving = running
) -> int:
    """Serve with several processes until SIGTERM or SIGINT; returns the exit code. Raises ListenFailed.

    `read_settings` and `serving` are passed to `serve`.
    """
    sockets = systemd.listen_fds() or asyncio.run(bind(settings.listen.host, settings.listen.port))
    return Supervisor(settings, sockets, read_settings, serving).run()
