"""`make autobahn`: the Autobahn test suite on a gateway, and the tables of docs/websocket-conformance.md.

The suite is the reference for websockets, and needs Python 2.7, so it cannot be among our dependencies. It expects a
server that sends back what it gets, so the gateway has a handler that does that. Everything else is as it ships.
"""

import asyncio
import json
import re
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from daemon.core.close_codes import Close
from daemon.core.ports import Socket
from daemon.core.wire import SUBPROTOCOL
from daemon.gateway.fan_out import fan_out
from daemon.gateway.framing import encode
from daemon.gateway.http import Site
from daemon.gateway.server import Gateway, Limits

GUIDE = Path(__file__).parents[2] / "docs/websocket-conformance.md"
SHIPPED = Limits(deflate_bytes=1, user_rate=10**9)  # the rate of a user only delays
RAISED = Limits(deflate_bytes=1, message_bytes=2**25, fragments=2**20, frames=2**20, user_rate=10**9)
LARGE = ("9", "12", "13")  # groups with messages of up to 16 MiB

# Each group: its name in the suite, and tests of ours for the same, which run with every change.
VIOLATION = "test_a_violation_closes_with_its_code_and_disturbs_no_other_client"
FRAGMENTS = "test_fragments_are_joined_and_a_ping_between_them_is_answered"
GROUPS = {
    "1": ("framing", "test_a_frame_may_arrive_byte_by_byte"),
    "2": ("pings and pongs", "test_any_frame_counts_as_an_answer_to_a_ping"),
    "3": ("reserved bits", VIOLATION),
    "4": ("opcodes", VIOLATION),
    "5": ("fragmentation", FRAGMENTS),
    "6": ("UTF-8", VIOLATION),
    "7": ("closing", "test_a_message_sent_along_with_a_close_frame_is_answered_before_the_close"),
    "9": ("limits", "test_a_message_of_the_maximum_size_is_accepted"),
    "10": ("many fragments", FRAGMENTS),
    "12": ("compression", "test_a_client_that_offers_compression_sends_and_gets_compressed_messages"),
    "13": ("its parameters", "test_an_offer_that_cannot_be_met_is_declined_and_the_client_still_served"),
}
# What is not "OK" in the suite's words, by its verdict and our close code, in the words of the guide.
EXPLAINED = {
    ("FAILED", 1003): "binary",
    ("FAILED", 1009): "too large",
    ("NON-STRICT", 1007): "late",
    ("UNIMPLEMENTED", None): "small window",
    ("INFORMATIONAL", 1002): "informational",
    ("INFORMATIONAL", 1009): "informational",
}


class Echo:
    """The handler of a client: what arrives is sent back, as frames for many clients are."""

    def __init__(self, client: Socket) -> None:
        self._socket, self.outlet = client, client.outlet
        client.authenticated("autobahn")

    def message_received(self, text: bytes) -> None:
        fan_out((self,), encode(text))

    def deliver(self, frames: bytes) -> None:
        """What does not go straight to the kernel, such as compressed frames."""
        self._socket.write(frames)

    def tick(self, now: float) -> None:
        """Nothing is due."""

    def connection_lost(self, close: Close | None) -> None:
        """Nothing is kept."""


class Case(NamedTuple):
    """What the suite says of one case."""

    group: str
    number: str
    verdict: str
    code: int | None

    @property
    def outcome(self) -> str:
        """`ok`, or why not; empty if nobody knows."""
        if self.verdict == "OK":
            return "ok"
        return EXPLAINED.get((self.verdict, self.code), EXPLAINED.get((self.verdict, None), ""))


async def run(wstest: str, limits: Limits, groups: Sequence[str]) -> list[Case]:
    """Run the cases of these groups on a gateway with these limits."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"ws://127.0.0.1:{listening.getsockname()[1]}/v1"
        spec = {
            "outdir": folder,
            "servers": [{"agent": "rowcast", "url": url, "protocols": [SUBPROTOCOL]}],
            "cases": [f"{group}.*" for group in groups],
            "exclude-cases": [],
            "exclude-agent-cases": {},
        }
        Path(folder, "spec").write_text(json.dumps(spec))
        async with Gateway(Echo, Site({}), limits=limits) as gateway:
            await gateway.start(sockets=[listening])
            suite = await asyncio.create_subprocess_exec(wstest, "-m", "fuzzingclient", "-s", f"{folder}/spec")
            assert 0 == await suite.wait()
        found: dict[str, dict[str, Any]] = json.loads(Path(folder, "index.json").read_text())["rowcast"]
    return [
        Case(number.partition(".")[0], number, case["behavior"], case["remoteCloseCode"])
        for number, case in found.items()
    ]


def table(cases: Sequence[Case]) -> Iterator[str]:
    """A row for each group."""
    yield "| Group | Cases | OK | Otherwise | A test of ours |"
    yield "|---|---|---|---|---|"
    for group, (name, test) in GROUPS.items():
        found = Counter(case.outcome for case in cases if case.group == group)
        if found:
            otherwise = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()) if outcome != "ok")
            yield f"| {group}: {name} | {found.total()} | {found['ok']} | {otherwise} | `{test}` |"
    everything = Counter(case.outcome for case in cases)
    yield f"| all | {everything.total()} | {everything['ok']} | {everything.total() - everything['ok']} | |"


async def main(wstest: str) -> None:
    """Run everything, and write the guide's tables. Ends with 1 if an outcome is not explained there."""
    text = GUIDE.read_text(encoding="utf-8")
    for name, limits, groups in (("shipped", SHIPPED, list(GROUPS)), ("raised", RAISED, LARGE)):
        cases = await run(wstest, limits, groups)
        if unknown := [case for case in cases if not case.outcome]:
            raise SystemExit(f"not explained: {unknown}")
        rows = "\n".join(table(cases))
        text = re.sub(rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1{rows}\n\2", text)
    GUIDE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
