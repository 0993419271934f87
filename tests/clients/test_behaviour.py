"""Both clients pass the cases of clients/behaviour."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rowcast_client.client import Channel, Collection
from rowcast_client.engine import Change, ConnectionStopped, Engine, Frame, TopicEnded

from tests.clients.drivers import client_page
from tests.support.daemon import Daemon
from tests.support.node import node

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "clients/behaviour").glob("*.json"))
CASES = [case for file in FILES for case in json.loads(file.read_text(encoding="utf-8"))]


class Recorded(Collection):
    """A collection that remembers the numbers of its changes."""

    def __init__(self) -> None:
        super().__init__("rows", None, lambda _: None)
        self.got: list[Any] = []

    def receive(self, changes: list[Change]) -> None:
        self.got += [change.get("seq", change.get("reason")) for change in changes]
        super().receive(changes)


class Case:
    """The engine of the Python client, and what it has asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.now = 1_000_000_000  # milliseconds
        self.out: list[Any] = []
        self.events: list[Any] = []
        self.collections: dict[str, Recorded] = {}
        self.channels: dict[str, Channel] = {}
        self.signals: dict[str, list[Any]] = {}
        self.engine = Engine(self, **options, now=lambda: self.now / 1000, random=lambda: 0.5)

    def open(self, *, fresh: bool) -> None:
        self.out.append({"open": {"fresh": fresh}})

    def renew(self) -> None:
        self.out.append("renew")

    def send(self, frame: Frame) -> None:
        self.out.append(frame)

    def close(self) -> None:
        self.out.append("close")

    def emit(self, name: str, value: Any) -> None:
        self.events.append([name, value.code if isinstance(value, (TopicEnded, ConnectionStopped)) else value])

    def run(self, step: dict[str, Any]) -> None:
        [(name, value)] = step.items()
        match name:
            case "follow":
                self.collections[value[0]] = Recorded()
                self.engine.follow(value[0], self.collections[value[0]], *value[1:])
            case "channel":
                self.channel(*value)
            case "signal":
                self.channels[value[0]].signal(*value[1:])
            case "show":
                self.channels[value[0]].show(value[1])
            case "unfollow":
                self.engine.unfollow(value, self.collections[value])
            case "opened":
                self.engine.dialing()
                self.engine.opened("t")
            case "renew":
                self.engine.renew(value)
            case "in":
                self.engine.receive(value)
            case "closed":
                self.engine.closed(*value)
            case "advance":
                self.advance(round(value * 1000))
            case "sleep":
                self.now += value * 1000
                self.engine.tick()
            case "out":
                assert value == taken(self.out)
            case "events":
                assert value == [event for event in taken(self.events) if event[0] not in {"status", "welcome"}]
            case "is":
                for what, wanted in value.items():
                    self.check(what, wanted)
            case _:
                getattr(self.engine, name)()

    def channel(self, topic: str, shown: dict[str, Any] | None = None) -> None:
        channel = self.channels[topic] = Channel(self, topic, shown)
        self.signals[topic] = []
        channel.on("signal", self.signals[topic].append)
        self.engine.follow(topic, channel)

    def send_signal(self, topic: str, name: str, data: object) -> bool:
        return self.engine.signal(topic, name, data)

    def present(self, topic: str, channel: Channel) -> None:
        self.engine.present(topic, channel)

    def unfollow(self, topic: str, channel: Channel) -> None:
        self.engine.unfollow(topic, channel)

    def advance(self, milliseconds: int) -> None:
        end = self.now + milliseconds
        while (deadline := self.engine.deadline) is not None and round(deadline * 1000) <= end:
            self.now = max(self.now, round(deadline * 1000))
            self.engine.tick()
        self.now = end

    def check(self, what: str, wanted: Any) -> None:
        if what == "position":
            assert wanted == str(self.engine.position)
        elif what in {"status", "stale"}:
            assert wanted == getattr(self.engine, what)
        elif what == "signals":
            assert wanted == {topic: taken(self.signals[topic]) for topic in wanted}
        elif what == "presence":
            assert wanted == {topic: self.channels[topic].presence for topic in wanted}
        else:
            found = {topic: getattr(self.collections[topic], what) for topic in wanted}
            assert wanted == {topic: taken(v) if what == "got" else v for topic, v in listed(found).items()}


def taken(items: list[Any]) -> list[Any]:
    found = items[:]
    items.clear()
    return found


def listed(found: dict[str, Any]) -> dict[str, Any]:
    return {topic: list(value) if isinstance(value, tuple) else value for topic, value in found.items()}


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"].replace(" ", "_")) for case in CASES])
async def test_the_python_client_behaves_as_the_case_says(case: dict[str, Any]) -> None:
    run = Case({name: value for name, value in case.items() if name not in {"name", "steps"}})
    for step in case["steps"]:
        run.run(step)


def test_the_javascript_client_behaves_as_the_cases_say() -> None:
    command = node(ROOT / "tests/clients/behaviour.mjs", *FILES)
    done = subprocess.run(command, capture_output=True, text=True)
    assert 0 == done.returncode, done.stdout
    assert re.search(rf"^\S+ pass {len(CASES)}$", done.stdout, re.MULTILINE)


IN_A_PAGE = """async (cases) => {
  const [client, { runCase }] = await Promise.all([import("/rowcast.js"), import("/cases.js")]);
  const sorted = (_, value) => value && typeof value === "object" && !Array.isArray(value)
    ? Object.fromEntries(Object.entries(value).sort()) : value;
  const equal = (found, wanted) => {
    const [one, other] = [found, wanted].map((value) => JSON.stringify(value, sorted));
    if (one !== other) throw new Error(`${one} is not ${other}`);
  };
  return cases.flatMap((one) => {
    try {
      runCase(client, one, equal);
      return [];
    } catch (error) {
      return [error.message];
    }
  });
}"""


async def test_the_javascript_client_behaves_as_the_cases_say_in_a_browser(daemon: Daemon) -> None:
    async with client_page(f"{daemon.http}/healthz") as page:
        assert [] == await page.evaluate(IN_A_PAGE, CASES)
        broken = {"name": "broken", "steps": [{"out": ["nothing"]}]}
        assert 1 == len(await page.evaluate(IN_A_PAGE, [broken]))
