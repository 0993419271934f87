"""Runs `python -m MODULE` by forking a process that has imported Rowcast; the import takes longer than most commands.

The server that forks has no thread, no event loop and no connection, like the supervisor. A forked process behaves
like a fresh interpreter with the arguments, environment, directory and files of the request.
"""

import asyncio
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import daemon

ROOT = Path(__file__).parents[2]
IMPORTED_LATE = ("sqlalchemy.ext.asyncio", "sqlalchemy.dialects.postgresql.asyncpg")  # when the DDL is applied
MAX_REQUEST = 100_000  # bytes

Request = dict[str, Any]


class Process:
    """A forked process. Its `returncode` is None while it runs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = asyncio.get_running_loop().create_future()

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal that ended the process."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Wait until the process ends; return the exit code."""
        code: int = await asyncio.shield(self._ended)
        return code

    def send_signal(self, number: int) -> None:
        if not self._ended.done():
            os.kill(self.pid, number)

    def set_returncode(self, code: int) -> None:
        self._ended.set_result(code)


@dataclass
class Forker:
    """The client of the server that forks. The server exits when `channel` is closed."""

    server: asyncio.subprocess.Process
    channel: socket.socket
    _shared: ClassVar["asyncio.Task[Forker] | None"] = None

    def __post_init__(self) -> None:
        self._starting: deque[asyncio.Future[Process]] = deque()
        self._running: dict[int, Process] = {}
        asyncio.get_running_loop().add_reader(self.channel, self._on_message)

    @classmethod
    async def shared(cls, environment: Mapping[str, str]) -> "Forker":
        """The Forker that all tests of this process share; started by the first call."""
        if cls._shared is None:
            cls._shared = asyncio.create_task(cls.start(environment))
        return await cls._shared

    @classmethod
    async def close_shared(cls) -> None:
        """Close the shared Forker, if there is one."""
        if cls._shared is not None:
            await (await cls._shared).close()
            cls._shared = None

    @classmethod
    async def start(cls, environment: Mapping[str, str]) -> "Forker":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            server = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
            )
        return cls(server, ours)

    async def run(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str],
        directory: Path | str,
        files: Sequence[int],
    ) -> Process:
        """Start `python -m MODULE ARGUMENTS`; `files` are its stdin, stdout and stderr."""
        request = {
            "module": module,
            "arguments": arguments,
            "environment": dict(environment),
            "directory": str(directory),
        }
        started: asyncio.Future[Process] = asyncio.get_running_loop().create_future()
        self._starting.append(started)
        socket.send_fds(self.channel, [json.dumps(request).encode()], files)
        return await started

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.channel)
        self.channel.close()
        await self.server.wait()

    def _on_message(self) -> None:
        message = json.loads(self.channel.recv(MAX_REQUEST))
        if "code" in message:
            self._running.pop(message["pid"]).set_returncode(message["code"])
            return
        process = self._running[message["pid"]] = Process(message["pid"])
        started = self._starting.popleft()
        if started.cancelled():
            process.send_signal(signal.SIGKILL)
        else:
            started.set_result(process)


def serve(channel: socket.socket) -> Request | None:
    """Fork for each request, and report the start and end of each process. Returns the request in a new process."""
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    inputs: list[Any] = [channel, wakeup_read]
    signal.set_wakeup_fd(wakeup_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if wakeup_read in ready:
            os.read(wakeup_read, 1000)
            for pid, code in iter(reap, None):
                channel.send(json.dumps({"pid": pid, "code": code}).encode())
        if channel in ready:
            text, files, _, _ = socket.recv_fds(channel, MAX_REQUEST, 3)
            if not text:
                return None
            request: Request = json.loads(text)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, file in enumerate(files):
                    os.dup2(file, number)
                channel.detach()
                os.closerange(3, 256)
                return request
            for file in files:
                os.close(file)
            channel.send(json.dumps({"pid": pid}).encode())


def reap() -> tuple[int, int] | None:
    """The pid and exit code of a child that has ended; None if none has."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def run_module(request: Request) -> None:
    """Run the module of the request, in place of this process, as `python -m` would."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors = "backslashreplace" if name == "stderr" else None
        file = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115 stays open
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    if "PYTHONFAULTHANDLER" in os.environ:
        faulthandler.enable()
    sys.argv = [request["module"], *request["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for _name in (*IMPORTED_LATE, *(module.name for module in pkgutil.walk_packages(daemon.__path__, "daemon."))):
        if _name != "daemon.__main__":
            importlib.import_module(_name)
    gc.freeze()  # or a collection in a forked process would touch, and so copy, every page
    if _request := serve(socket.socket(fileno=int(sys.argv[1]))):
        run_module(_request)
