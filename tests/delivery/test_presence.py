"""Presence in the clients of two processes, whose rounds and clock the test controls."""

import asyncio
import json
from typing import Any

import pytest

from daemon.core.change import Topic
from daemon.core.presence import Key, Room
from daemon.delivery.presence import GRACE, Presence
from tests.support.sharing import MemoryPeople, SharedPeople, encode

A, B = Topic("a"), Topic("b")
ADA, BOB = Key("ada", "laptop"), Key("bob", "phone")


class Watcher:
    """A client that is present."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.full = False

    def send_presence(self, frame: bytes) -> bool:
        if not self.full:
            self.frames.append(json.loads(frame))
        return not self.full

    def read(self) -> list[dict[str, Any]]:
        """What it has got since the last time, without the times."""
        frames, self.frames = self.frames, []
        for frame in frames:
            assert ("presence", A) == (frame.pop("op"), frame.pop("topic"))
            lists = [*frame.get("state", {}).values(), frame.get("joined", []), frame.get("updated", [])]
            for entry in (entry for entries in lists for entry in entries):
                del entry["since"]
        return frames


class World:
    """Processes of one database."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.shared = SharedPeople()
        self.stores: list[MemoryPeople] = []
        self.processes = [self.process(name) for name in ("one", "two")]

    def process(self, name: str) -> Presence:
        store = MemoryPeople(self.shared, name)
        self.stores.append(store)

        def announce(topics: Any) -> None:
            for other in self.processes:
                if other is not presence:
                    other.changed_elsewhere(topics)

        presence = Presence(store, encode, announce, lambda: self.now, has_hooks=True)
        return presence

    async def settle(self) -> None:
        """Two rounds of each process: what one has stored, the other has read."""
        for _ in range(2):
            for process in self.processes:
                await process.round()

    def enter(self, process: int, key: Key, data: str = "{}", topic: Topic = A) -> Watcher:
        watcher = Watcher()
        self.processes[process].enter(topic, key, data, watcher)
        return watcher


@pytest.fixture
def world() -> World:
    return World()


async def test_everybody_gets_the_state_and_then_what_changes(world: World) -> None:
    ada = world.enter(0, ADA, '{"n":1}')
    await world.settle()
    assert [{"state": {"ada": [{"device": "laptop", "data": {"n": 1}}]}}] == ada.read()
    bob = world.enter(1, BOB)
    await world.settle()
    [state] = bob.read()
    assert {"ada", "bob"} == state["state"].keys()
    assert [{"joined": [{"user": "bob", "device": "phone", "data": {}}]}] == ada.read()
    world.processes[1].enter(A, BOB, '{"n":2}', bob)
    await world.settle()
    updated = [{"updated": [{"user": "bob", "device": "phone", "data": {"n": 2}}]}]
    assert [updated, updated] == [ada.read(), bob.read()]
    world.processes[1].leave(A, bob)
    await world.settle()
    assert [{"left": [{"user": "bob", "device": "phone"}]}] == ada.read()
    assert [] == bob.read()
    await world.settle()
    assert [] == ada.read()


async def test_a_device_that_comes_back_in_time_never_left_and_one_that_does_not_has(world: World) -> None:
    ada, bob = world.enter(0, ADA), world.enter(1, BOB)
    await world.settle()
    ada.read()
    for _ in range(3):
        world.processes[1].leave(A, bob, disconnected=True)
        world.now += GRACE / 2
        await world.settle()
        bob = world.enter(1, BOB)
        await world.settle()
    world.now += 2 * GRACE
    await world.settle()
    assert [] == ada.read()
    world.processes[1].leave(A, bob, disconnected=True)
    world.now += GRACE + 1
    await world.settle()
    assert [{"left": [{"user": "bob", "device": "phone"}]}] == ada.read()


@pytest.mark.parametrize("is_stored_first", [True, False])
async def test_a_device_that_came_back_to_another_process_leaves_both_at_once(
    world: World, is_stored_first: bool
) -> None:
    ada, near = world.enter(0, ADA), world.enter(1, Key("cyd", "desk"))
    bob = world.enter(1, BOB)
    await world.settle()
    world.processes[1].leave(A, bob, disconnected=True)
    if is_stored_first:
        await world.settle()
    bob = world.enter(0, BOB)
    await world.settle()
    ada.read()
    near.read()
    world.processes[0].leave(A, bob)
    await world.settle()
    left = [{"left": [{"user": "bob", "device": "phone"}]}]
    assert [left, left] == [ada.read(), near.read()]


async def test_a_device_with_two_connections_leaves_with_the_last_of_them(world: World) -> None:
    ada, one, two = world.enter(0, ADA), world.enter(0, BOB), world.enter(1, BOB, '{"n":2}')
    await world.settle()
    assert {"updated": [{"user": "bob", "device": "phone", "data": {"n": 2}}]} == ada.read()[-1]
    world.processes[1].leave(A, two)
    await world.settle()
    assert [{"updated": [{"user": "bob", "device": "phone", "data": {}}]}] == ada.read()
    world.processes[0].leave(A, one)
    await world.settle()
    assert [{"left": [{"user": "bob", "device": "phone"}]}] == ada.read()


async def test_a_client_that_does_not_read_gets_the_whole_state_once_it_has(world: World) -> None:
    ada = world.enter(0, ADA)
    await world.settle()
    ada.read()
    ada.full = True
    world.enter(0, BOB)
    await world.settle()
    world.enter(0, Key("cyd", "desk"))
    await world.settle()
    ada.full = False
    world.now += 10
    await world.settle()
    [state] = ada.read()
    assert {"ada", "bob", "cyd"} == state["state"].keys()


async def test_people_are_stored_again_when_their_lease_was_lost(world: World) -> None:
    ada, _ = world.enter(0, ADA), world.enter(1, BOB)
    await world.settle()
    ada.read()
    world.shared.processes.clear()
    world.now += 10
    await world.settle()
    await world.settle()
    assert {(A, ADA)} == world.shared.processes["one"].keys()
    assert {(A, BOB)} == world.shared.processes["two"].keys()


async def test_without_a_database_people_of_this_process_are_seen_and_the_rest_follows(world: World) -> None:
    ada = world.enter(0, ADA)
    await world.settle()
    ada.read()
    for store in world.stores:
        store.broken = True
    bob = world.enter(0, BOB)
    far = world.enter(1, Key("cyd", "desk"))
    await world.settle()
    assert ["joined"] == [name for frame in ada.read() for name in frame]
    assert [] == far.read()
    for store in world.stores:
        store.broken = False
    world.now += 10
    await world.settle()
    await world.settle()
    assert [{"ada", "bob", "cyd"}] == [frame["state"].keys() for frame in far.read()]
    assert "cyd" in str(bob.read())


async def test_packs_get_each_user_who_comes_to_a_first_topic_or_leaves_the_last(world: World) -> None:
    one, two = world.enter(0, BOB), world.enter(1, Key("bob", "tablet"), topic=B)
    await world.settle()
    world.processes[0].leave(A, one)
    await world.settle()
    world.processes[1].leave(B, two)
    await world.settle()
    assert [(["bob"], []), ([], ["bob"])] == world.shared.called


async def test_a_hook_that_fails_does_not_disturb_and_is_called_again(world: World) -> None:
    for store in world.stores:
        store.has_broken_hooks = True
    ada = world.enter(0, ADA)
    await world.settle()
    assert [["state"]] == [list(frame) for frame in ada.read()]
    world.stores[0].has_broken_hooks = False
    world.now += 5
    await world.settle()
    assert [(["ada"], [])] == world.shared.called


async def test_no_more_can_be_present_than_the_limit_but_those_who_are_stay(world: World) -> None:
    for number in range(Room().devices):
        world.enter(0, Key(str(number), "d"))
    await world.settle()
    one, watcher = world.processes[0], Watcher()
    assert not one.enter(A, ADA, "{}", watcher)
    assert one.enter(A, Key("7", "d"), "{}", watcher)
    assert one.enter(B, ADA, "{}", watcher)
    one.room = Room(devices=1001)
    assert one.enter(A, ADA, "{}", Watcher())
    assert not one.enter(A, BOB, "{}", Watcher())


async def test_one_user_cannot_fill_a_topic_from_however_many_devices(world: World) -> None:
    for number in range(Room().devices_of_user):
        world.processes[0].leave(A, world.enter(0, Key("ada", str(number))), disconnected=True)
        await world.processes[0].round()
    assert not world.processes[0].enter(A, Key("ada", "another"), "{}", Watcher())
    assert world.processes[0].enter(A, Key("ada", "7"), "{}", Watcher())
    assert world.processes[0].enter(A, BOB, "{}", Watcher())


async def test_news_do_not_wait_for_a_hook_that_hangs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    called = asyncio.Event()

    async def hang() -> bool:
        called.set()
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(world.stores[0], "call_hooks", hang)
    ada = world.enter(0, ADA)
    round_ = asyncio.create_task(world.processes[0].round())
    await called.wait()
    assert [{"state": {"ada": [{"device": "laptop", "data": {}}]}}] == ada.read()
    round_.cancel()


async def test_nothing_is_kept_of_those_who_have_gone(world: World) -> None:
    watchers = [world.enter(0, Key(str(number), "d")) for number in range(10)]
    await world.settle()
    for watcher in watchers:
        world.processes[0].leave(A, watcher)
    await world.settle()
    kept = [value for name, value in vars(world.processes[0]).items() if isinstance(value, dict)]
    assert [{}] * len(kept) == kept
    assert {} == world.shared.processes["one"]
    assert world.processes[0].pause() is None
