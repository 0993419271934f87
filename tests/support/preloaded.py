"""Processes of `python -m MODULE` that need not import Rowcast again, which costs more than most of them do.

A server that has imported it forks, as the supervisor does: it has no thread, no event loop and no connection.
What is forked goes on as a fresh interpreter would, with the arguments, environment, directory and files that it is
given, and ends as one does.
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
LOADED_LATE = ("sqlalchemy.ext.asyncio", "sqlalchemy.dialects.postgresql.asyncpg")  # by what applies the DDL
LARGEST = 100_000  # bytes of a request

Request = dict[str, Any]


class Process:
    """A process that was forked. As long as it runs, `returncode` is None."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = asyncio.get_running_loop().create_future()

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the negative number of the signal that ended it."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Wait for its end; the exit code."""
        code: int = await asyncio.shield(self._ended)
        return code

    def send_signal(self, number: int) -> None:
        if not self._ended.done():
            os.kill(self.pid, number)

    def ends(self, code: int) -> None:
        self._ended.set_result(code)


@dataclass
class Forker:
    """This side of the server that forks; it ends when its line is closed."""

    server: asyncio.subprocess.Process
    line: socket.socket
    _shared: ClassVar["Forker | None"] = None

    def __post_init__(self) -> None:
        self._asked: deque[asyncio.Future[Process]] = deque()
        self._running: dict[int, Process] = {}
        asyncio.get_running_loop().add_reader(self.line, self._on_message)

    @classmethod
    async def of_this_process(cls, environment: Mapping[str, str]) -> "Forker":
        """The one that all tests of this process share."""
        if cls._shared is None:
            cls._shared = await cls.start(environment)
        return cls._shared

    @classmethod
    async def close_shared(cls) -> None:
        """End it, if there is one."""
        if cls._shared is not None:
            await cls._shared.close()
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
        """Begin `python -m MODULE ARGUMENTS`; `files` are its input, output and errors."""
        request = {
            "module": module,
            "arguments": arguments,
            "environment": dict(environment),
            "directory": str(directory),
        }
        started: asyncio.Future[Process] = asyncio.get_running_loop().create_future()
        self._asked.append(started)
        socket.send_fds(self.line, [json.dumps(request).encode()], files)
        return await started

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.line)
        self.line.close()
        await self.server.wait()

    def _on_message(self) -> None:
        said = json.loads(self.line.recv(LARGEST))
        if "code" in said:
            self._running.pop(said["pid"]).ends(said["code"])
            return
        process = self._running[said["pid"]] = Process(said["pid"])
        asked = self._asked.popleft()
        if asked.cancelled():
            process.send_signal(signal.SIGKILL)
        else:
            asked.set_result(process)


def serve(line: socket.socket) -> Request | None:
    """Fork for each request, and tell when a process has begun and ended. Returns the request in a new process."""
    ears, mouth = os.pipe()
    os.set_blocking(mouth, False)
    inputs: list[Any] = [line, ears]
    signal.set_wakeup_fd(mouth)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if ears in ready:
            os.read(ears, 1000)
            for pid, code in iter(ended, None):
                line.send(json.dumps({"pid": pid, "code": code}).encode())
        if line in ready:
            text, files, _, _ = socket.recv_fds(line, LARGEST, 3)
            if not text:
                return None
            request: Request = json.loads(text)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, file in enumerate(files):
                    os.dup2(file, number)
                line.detach()
                os.closerange(3, 256)
                return request
            for file in files:
                os.close(file)
            line.send(json.dumps({"pid": pid}).encode())


def ended() -> tuple[int, int] | None:
    """A process that has ended, and how."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def become(request: Request) -> None:
    """Be `python -m` with what the request says."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors = "backslashreplace" if name == "stderr" else None
        file = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115 as long as it lives
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    if "PYTHONFAULTHANDLER" in os.environ:
        faulthandler.enable()
    sys.argv = [request["module"], *request["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for _name in (*LOADED_LATE, *(module.name for module in pkgutil.walk_packages(daemon.__path__, "daemon."))):
        if _name != "daemon.__main__":
            importlib.import_module(_name)
    gc.freeze()  # a collection in a new process need not touch, and so copy, all pages of memory
    if _request := serve(socket.socket(fileno=int(sys.argv[1]))):
        become(_request)
