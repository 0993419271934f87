"""The load client of clients.c in Python, for machines without a compiler: same arguments, same commands.

Several processes of it are needed to keep up with a daemon, and on a small machine the daemon lacks their CPU.
"""

import asyncio
import json
import re
import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import NoReturn, cast

from bench.rig import raise_open_files

ROW = re.compile(rb'"content":"@(\d{1,19})\D')
PARTIAL = 40  # bytes at the end of a read that may contain the beginning of a row
SAMPLED = 16  # clients whose latencies are recorded
AT_ONCE = 64  # clients that connect at the same time


class Bench:
    """All clients of this process, and what they have received."""

    def __init__(self, request: bytes, openings: list[list[str]]) -> None:
        self.request, self.openings = request, openings
        self.begun = self.opened = self.to_open = 0
        self.is_holding = False  # do clients keep back what follows their first frame?
        self.holding: list[Client] = []
        self.rows = self.frames = self.bytes = self.goal = self.at = 0
        self.latencies: list[float] = []

    def answer(self, **members: object) -> None:
        """Write an answer to stdout."""
        print(json.dumps(members), flush=True)

    def begin(self, port: int) -> None:
        """Connect further clients, at most AT_ONCE at a time."""
        loop = asyncio.get_running_loop()
        while self.begun < self.to_open and self.begun - self.opened < AT_ONCE:
            client = Client(self, self.begun, port)
            client.connecting = loop.create_task(client.connect())
            self.begun += 1

    def client_opened(self, port: int) -> None:
        """Called when a client is open; connects the next one."""
        self.opened += 1
        if self.opened == self.to_open:
            self.answer(opened=self.opened, at=time.monotonic_ns())
        self.begin(port)

    def ask(self) -> None:
        """Send what all clients have kept back."""
        for client in self.holding:
            client.send_rest()
        self.holding.clear()

    def check_goal(self) -> None:
        """Answer `until` if its number of rows has been reached."""
        if self.goal and self.rows >= self.goal:
            self.goal = 0
            self.answer(rows=self.rows, at=self.at)

    def mark(self) -> None:
        """Answer `mark` with everything received so far."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        ordered = sorted(self.latencies) or [0.0]
        p50, p90, p99, worst = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.9, 0.99, 1.0))
        self.answer(
            clients=self.opened,
            rows=self.rows,
            frames=self.frames,
            bytes=self.bytes,
            at=self.at,
            cpu=used.ru_utime + used.ru_stime,
            sampled=len(self.latencies),
            p50=p50,
            p90=p90,
            p99=p99,
            worst=worst,
        )


class Client(asyncio.Protocol):
    """One websocket client."""

    def __init__(self, bench: Bench, number: int, port: int) -> None:
        self.connecting: asyncio.Task[None] | None = None
        self._bench, self._number, self._port = bench, number, port
        self._unsent = deque(bench.openings[number])
        self._unanswered = 0
        self._greeted = self._open = False
        self._buffer = bytearray()
        self._carry = b""

    async def connect(self) -> None:
        """Connect from one of several addresses, since the ports of one would not suffice."""
        source = (f"127.0.0.{2 + self._number % 16}", 0)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: self, "127.0.0.1", self._port, local_addr=source
            )
        except OSError as error:
            self._fail(f"cannot connect: {error}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._bench.request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"lost its connection: {exc}")

    def data_received(self, data: bytes) -> None:
        bench = self._bench
        self._buffer += data
        if not self._greeted:
            head, end, rest = bytes(self._buffer).partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._fail(f"was refused: {head.splitlines()[0].decode()}")
            self._greeted, self._buffer, data = True, bytearray(rest), rest
            self._send(1)
            if not self._unanswered:
                self._mark_open()
        bench.bytes += len(data)
        bench.at = time.monotonic_ns()
        self._count(data)
        self._take_frames()
        bench.check_goal()

    def _count(self, data: bytes) -> None:
        text = self._carry + data
        wall, end = time.time(), max(0, len(text) - PARTIAL)
        for row in ROW.finditer(text):
            self._bench.rows += 1
            end = max(end, row.end())
            if self._number < SAMPLED:
                self._bench.latencies.append(max(0.0, wall - int(row[1]) / 1e6))
        self._carry = text[end:]

    def _take_frames(self) -> None:
        buffer, place = self._buffer, 0
        while len(buffer) >= place + 2:
            opcode, form = buffer[place] & 15, buffer[place + 1]
            extra = {126: 2, 127: 8}.get(form, 0)
            if len(buffer) < place + 2 + extra:
                break
            size = int.from_bytes(buffer[place + 2 : place + 2 + extra], "big") if extra else form
            begin = place + 2 + extra
            if len(buffer) < begin + size:
                break
            self._frame(opcode, bytes(buffer[begin : begin + min(size, 125)]))
            place = begin + size
        del buffer[:place]

    def _frame(self, opcode: int, beginning: bytes) -> None:
        match opcode:
            case 1:
                self._bench.frames += 1
                if beginning.startswith(b'{"op":"error"'):
                    self._fail(f"got an error: {beginning.decode(errors='replace')}")
                if not self._open and beginning.startswith((b'{"op":"welcome"', b'{"op":"subscribed"')):
                    self._answered()
            case 8:
                self._fail(f"was closed with {int.from_bytes(beginning[:2], 'big')}: {beginning[2:].decode()}")
            case 9:
                self._transport.write(frame(10, beginning))

    def _answered(self) -> None:
        self._unanswered -= 1
        if self._unanswered:
            return
        if self._bench.is_holding:
            self._bench.holding.append(self)
        else:
            self.send_rest()
        if not self._unanswered:
            self._mark_open()

    def send_rest(self) -> None:
        """Send all frames that were not sent yet."""
        self._send(len(self._unsent))

    def _send(self, count: int) -> None:
        for _ in range(min(count, len(self._unsent))):
            self._transport.write(frame(1, self._unsent.popleft().encode()))
            self._unanswered += 1

    def _mark_open(self) -> None:
        self._open = True
        self._bench.client_opened(self._port)

    def _fail(self, what: str) -> NoReturn:
        print(f"client {self._number} {what}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def frame(opcode: int, payload: bytes) -> bytes:
    """A masked frame; the masking key is 0, which RFC 6455 allows."""
    size = len(payload)
    head = (
        bytes([0x80 | opcode, 0x80 | size]) if size < 126 else bytes([0x80 | opcode, 0x80 | 126, *divmod(size, 256)])
    )
    return head + bytes(4) + payload


class Commands(asyncio.Protocol):
    """Reads commands from stdin and runs them."""

    def __init__(self, bench: Bench, port: int) -> None:
        self._bench, self._port, self._waiting = bench, port, b""

    def data_received(self, data: bytes) -> None:
        *lines, self._waiting = (self._waiting + data).split(b"\n")
        for line in lines:
            self._run(line.decode().split())

    def eof_received(self) -> None:
        asyncio.get_running_loop().stop()

    def _run(self, words: list[str]) -> None:
        bench = self._bench
        match words:
            case ["open" | "connect" as word, number]:
                bench.to_open, bench.is_holding = bench.opened + int(number), word == "connect"
                bench.begin(self._port)
            case ["ask"]:
                bench.ask()
            case ["pause"]:
                bench.answer(paused=False)  # its processes are needed to keep up with a daemon
            case ["until" | "gather", number]:
                bench.goal = max(1, int(number))
                bench.check_goal()
            case ["mark"]:
                bench.mark()
            case ["forget"]:
                bench.latencies.clear()


def main() -> None:
    """Run until stdin ends."""
    port, path, protocol, openings = sys.argv[1:]
    raise_open_files()
    header = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol != "-" else ""
    request = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{header}\r\n"
    )
    frames = [line.split("\t") if line else [] for line in Path(openings).read_text().splitlines()]
    bench = Bench(request.encode(), frames)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(loop.connect_read_pipe(lambda: Commands(bench, int(port)), sys.stdin))
    loop.run_forever()


if __name__ == "__main__":
    main()
