"""Several processes behind one listening socket, which share nothing but the log; and the parent that minds them.

The parent listens, forks, and then waits: for what its workers say, for their end, for its own signals. It has no
event loop, no thread and no connection, so that a fork of it is sound at any time, and the pages of memory with the
program in them are shared by all.

All workers accept from the same socket. With SO_REUSEPORT each would have a socket and a queue of its own, and who
waits in that of a worker that hangs would wait in vain. So that each gets its share, one that has more connections
than another leaves the next to it for a moment.
"""

import asyncio
import ctypes
import gc
import math
import mmap
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NoReturn

import click

from daemon import logs, metrics, systemd
from daemon.app import serve
from daemon.core.errors import fault_in
from daemon.gateway.server import bind
from daemon.settings import Settings

log = logs.get_logger()

BEATS: Final = 5  # signs of life that a worker owes in the time after which it counts as hung
INITIAL_DELAY: Final = (
    0.5  # seconds, at most, from a worker's end until another takes its place; twice that the next time
)
MAX_DELAY: Final = 30.0  # seconds; a worker that lived longer than this begins anew with the first pause

_STOPS: Final = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG: Final = 1


class Shares:
    """How many connections each worker has, in memory that all of them see. Each writes its own number only."""

    _ABSENT: Final = 2**64 - 1

    def __init__(self, workers: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 8 * workers)).cast("Q")
        for number in range(workers):
            self.leave(number)

    def leave(self, number: int) -> None:
        """This worker accepts nothing: let nobody wait for it."""
        self._counts[number] = self._ABSENT

    def should_accept(self, number: int, connections: int) -> bool:
        """Is the next connection for this worker, which has so many?"""
        self._counts[number] = connections
        return connections <= min(self._counts)


@dataclass(frozen=True)
class Parent:
    """The `systemd.Manager` of a worker: what a service tells systemd, a worker tells its parent."""

    link: socket.socket
    sockets: Sequence[socket.socket]
    beat_every: float

    def notify(self, state: str) -> bool:
        """Tell it. False if it cannot be told just now."""
        try:
            self.link.send(state.encode())
        except OSError:
            return False
        return True

    def watchdog_interval(self) -> float:
        """Seconds between two signs of life."""
        return self.beat_every

    def listen_fds(self) -> list[socket.socket]:
        """The sockets that all workers accept from."""
        return list(self.sockets)


@dataclass(eq=False)
class Worker:
    """One process, as its parent sees it."""

    number: int
    pid: int
    link: socket.socket
    began: float
    ready: bool = False
    status: str = "starting"
    fault: str = ""
    missed: int = 0  # beats of the parent since it last said anything


class Supervisor:
    """Starts the workers, starts anew those that end or hang, and ends with all of them.

    Until all have been ready once, one that ends by a fault or an error of its own ends everything.
    """

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket]) -> None:
        self._settings, self._sockets = settings, sockets
        self._shares = Shares(settings.workers)
        self._living: dict[int, Worker] = {}
        self._due = dict.fromkeys(range(settings.workers), 0.0)  # those that are to start, and when
        self._ends: Counter[int] = Counter()  # in a row, each soon after the start
        self._beat_every = min(settings.worker_silence / BEATS, systemd.watchdog_interval() or math.inf)
        self._max_missed = math.ceil(settings.worker_silence / self._beat_every)
        self._selector = selectors.DefaultSelector()
        self._ready = self._stopping = False
        self._code = 0

    def run(self) -> int:
        """Supervise until SIGTERM, SIGINT or a fault at the start; returns the worst exit code of a worker."""
        gc.collect()
        gc.freeze()  # the collector writes to what it looks at, and a page that is written to is no longer shared
        next_beat = time.monotonic() + self._beat_every
        with self._signals():
            while self._living or not self._stopping:
                now = time.monotonic()
                for number in [number for number, due in self._due.items() if due <= now]:
                    self._start(number)
                next_due = min([next_beat, *self._due.values()])
                for key, _ in self._selector.select(max(0.0, next_due - time.monotonic())):
                    key.data()
                # All that was said while this process slept or was stopped has been heard by now.
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._beat_every
                    self._beat()
        return self._code

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """A signal to stop wakes the selector."""
        waking, waker = socket.socketpair()
        waking.setblocking(False)
        waker.setblocking(False)
        with waking, waker, self._selector:
            self._selector.register(waking, selectors.EVENT_READ, partial(self._woken, waking))
            signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
            for number in _STOPS:
                signal.signal(number, lambda *_: None)
            try:
                yield
            finally:
                signal.set_wakeup_fd(-1)

    def _woken(self, waking: socket.socket) -> None:
        waking.recv(64)
        self._stop()

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._due.clear()
        systemd.notify("STOPPING=1")
        for listening in self._sockets:
            listening.close()
        for worker in self._living.values():
            os.kill(worker.pid, signal.SIGTERM)

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # they wait until the worker can mind them
        try:
            pid = os.fork()
            if pid == 0:
                self._live(number, theirs, parent)
        except OSError as error:  # there is no room for another process just now
            ours.close()
            self._again(number, 0.0, os.strerror(error.errno or 0))
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        del self._due[number]
        self._living[number] = worker = Worker(number, pid, ours, time.monotonic())
        self._selector.register(ours, selectors.EVENT_READ, partial(self._hear, worker))
        log.info("worker_started", worker=number, pid=pid)

    def _hear(self, worker: Worker) -> None:
        try:
            while said := worker.link.recv(4096):
                self._note(worker, said.decode())
        except BlockingIOError:
            return
        self._ended(worker)

    def _note(self, worker: Worker, said: str) -> None:
        worker.missed = 0
        for line in said.splitlines():
            match line.split("=", 1):
                case ["STATUS", status]:
                    worker.status = status
                case ["FAULT", fault]:
                    worker.fault = fault
                case ["READY", _]:
                    worker.ready = True
        if not self._ready and [True] * self._settings.workers == [each.ready for each in self._living.values()]:
            self._ready = True
            systemd.notify("READY=1")

    def _ended(self, worker: Worker) -> None:
        self._selector.unregister(worker.link)
        worker.link.close()
        del self._living[worker.number]
        self._shares.leave(worker.number)
        _, status = os.waitpid(worker.pid, 0)
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
            self._again(worker.number, time.monotonic() - worker.began, worker.fault or how or "", pid=worker.pid)

    def _again(self, number: int, lived: float, reason: str, **more: object) -> None:
        """Start this worker anew, after a pause that grows with each end that follows the last one soon."""
        self._ends[number] = 0 if lived > MAX_DELAY else self._ends[number] + 1
        pause = random.uniform(0, min(MAX_DELAY, INITIAL_DELAY * 2 ** min(self._ends[number], 10)))  # noqa: S311
        self._due[number] = time.monotonic() + pause
        log.warning("worker_ended", worker=number, **more, reason=reason, pause=round(pause, 3))

    def _beat(self) -> None:
        """Kill who hangs, and tell systemd that all live. One that not even SIGKILL ends is for systemd to see."""
        for worker in self._living.values():
            worker.missed += 1
            if worker.missed > self._max_missed:
                os.kill(worker.pid, signal.SIGKILL)
            if worker.missed == self._max_missed + 1:
                log.error("worker_hung", worker=worker.number, pid=worker.pid)
        if all(worker.missed <= self._max_missed + 1 for worker in self._living.values()):
            states = dict.fromkeys(self._due, "to be started again")
            states |= {worker.number: worker.status for worker in self._living.values() if worker.status != "ready"}
            said = "; ".join(f"worker {number}: {state}" for number, state in sorted(states.items()))
            systemd.notify(systemd.alive(said or "ready", self._beat_every, starts=not self._ready))

    def _live(self, number: int, link: socket.socket, parent: int) -> NoReturn:
        """What the new process does from the fork to its end."""
        code = 70
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it ended before it could take us along
                os._exit(code)
            os.setsid()  # Ctrl-C is for the parent, who asks us to stop
            signal.set_wakeup_fd(-1)
            for stop in _STOPS:
                signal.signal(stop, signal.SIG_DFL)
            self._selector.close()
            for worker in self._living.values():
                worker.link.close()
            logs.configure(self._settings.log_format, self._settings.log_level, worker=number)
            metrics.name_worker(number)
            asyncio.run(self._serve(number, Parent(link, self._sockets, self._beat_every)))
            code = 0
        except Exception as error:
            fault = fault_in(error)
            if fault is None:
                log.exception("internal_error")
            else:
                code = fault.exit_code
                link.send(f"FAULT={fault}".encode())
        finally:
            os._exit(code)  # the rest of this program is the parent's

    async def _serve(self, number: int, parent: Parent) -> None:
        settings = _settings_of(number, self._settings)
        try:
            await serve(settings, manager=parent, should_accept=partial(self._shares.should_accept, number))
        finally:  # who ends anyway need not be asked to, and a loop that is being closed minds no signal
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def _settings_of(number: int, settings: Settings) -> Settings:
    """The same, with the port for metrics that is this worker's."""
    first = settings.metrics_listen
    if first is None or not first.port:
        return settings
    return settings.model_copy(update={"metrics_listen": replace(first, port=first.port + number)})


def _exit_code(code: int) -> int:
    """An exit code as a shell has it: a signal counts from 128 on."""
    return 128 - code if code < 0 else code


def supervise(settings: Settings) -> int:
    """Serve with several processes until SIGTERM or SIGINT; returns the exit code. Raises ListenFailed."""
    sockets = systemd.listen_fds() or asyncio.run(bind(settings.listen.host, settings.listen.port))
    return Supervisor(settings, sockets).run()
