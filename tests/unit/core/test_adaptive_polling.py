"""When the leader sleeps, and that no interleaving loses a wake-up, even without the help of a timer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from daemon.core.adaptive_polling import BUSY_RATE, MAX_POLL_DELAY, AdaptivePoller, State

POLL = 1.0


def awake() -> AdaptivePoller:
    leader = AdaptivePoller(0.0, max_sleep=POLL)
    assert (State.AWAKE, False) == (leader.state, leader.wants_sleep_lock)
    return leader


def asleep() -> AdaptivePoller:
    leader = awake()
    leader.record_poll(60.0, 0, 0.0005, held=False)
    assert (State.FALLING_ASLEEP, True) == (leader.state, leader.wants_sleep_lock)
    leader.record_poll(60.1, 0, 0.0005, held=True)
    assert (State.ASLEEP, True) == (leader.state, leader.wants_sleep_lock)
    return leader


def steadily(leader: AdaptivePoller, rate: float, since: float) -> set[State]:
    """The poller's states while it finds `rate` transactions a second, one by one, after the first second."""
    states = set()
    for number in range(int(3 * rate)):
        leader.record_poll(since + number / rate, 1, 0.0005, held=leader.wants_sleep_lock)
        if number > rate:
            states.add(leader.state)
    return states


def test_an_idle_leader_sleeps_until_it_is_notified_or_the_maximum_delay_has_passed() -> None:
    assert POLL == asleep().delay


def test_a_leader_that_loses_the_lock_is_no_longer_asleep() -> None:
    leader = asleep()
    leader.record_poll(61.0, 0, 0.0, held=False)
    assert State.FALLING_ASLEEP == leader.state
    assert leader.delay < POLL


@pytest.mark.parametrize(
    ("rate", "was_asleep", "was_awake"),
    [(20, "asleep", "asleep"), (200, "asleep", "awake"), (2000, "awake", "awake")],
)
def test_the_leader_relies_on_notifications_at_low_rates_and_polls_at_high_rates(
    rate: float, was_asleep: str, was_awake: str
) -> None:
    assert {State(was_asleep)} == steadily(asleep(), rate, 61.0)
    assert {State(was_awake)} == steadily(awake(), rate, 0.0)


def test_many_transactions_in_one_poll_wake_the_leader_and_a_single_large_one_does_not() -> None:
    states = []
    leader = asleep()
    for now, found in ((61.0, 1), (62.0, 100)):
        leader.record_poll(now, found, 0.5, held=True)
        states.append(leader.state)
    assert [State.ASLEEP, State.AWAKE] == states


def test_an_awake_leader_waits_half_as_long_as_its_last_poll_took_within_bounds() -> None:
    leader = awake()
    shortest = 0.25 / (2 * BUSY_RATE)
    for took, delay in ((0.0, shortest), (shortest, shortest), (0.004, 0.002), (2.0, MAX_POLL_DELAY)):
        leader.record_poll(0.001, 100, took, held=False)
        assert delay == leader.delay


def test_an_awake_leader_polls_less_often_when_less_is_written() -> None:
    delays = []
    for rate in (1000, 300, 150):
        leader = awake()
        steadily(leader, rate, 0.0)
        assert State.AWAKE == leader.state
        delays.append(leader.delay)
    assert sorted(delays) == delays
    assert delays[-1] > 3 * delays[0]


def test_a_leader_that_is_falling_asleep_gives_up_the_lock_when_writers_return() -> None:
    leader = awake()
    leader.record_poll(60.0, 0, 0.0005, held=False)
    assert leader.wants_sleep_lock
    leader.record_poll(60.1, 100, 0.0005, held=False)
    assert not leader.wants_sleep_lock


# Every interleaving of two writers, notifications, the lock and the leader. A step is one atomic action of one party.


@dataclass(frozen=True)
class World:
    """A writer is None before it writes, then (notifies, is visible, holds the lock, notification is due)."""

    writers: tuple[tuple[bool, bool, bool, bool] | None, ...] = (None, None)
    numbered: frozenset[int] = frozenset()
    wakeup: bool = False
    step: str = "clear"
    seen: frozenset[int] = frozenset()  # by the poll in progress
    state: State = State.AWAKE
    lock: str = "free"  # in Postgres: free, requested, held
    held: bool = False  # as far as the leader knows
    losses: int = 1  # connections that may still break

    def visible(self) -> frozenset[int]:
        return frozenset(n for n, writer in enumerate(self.writers) if writer is not None and writer[1])


@dataclass(frozen=True)
class Rules:
    """The rules that keep wake-ups from being lost."""

    clears_before_polling: bool = True
    notified_of_grants: bool = True
    notified_of_losses: bool = True
    shares_until_visible: bool = True


def steps(world: World, rules: Rules) -> Iterator[World]:
    """Every world that can follow, without the help of a timer."""
    yield from writer_steps(world, rules)
    yield from lock_steps(world, rules)
    yield from leader_steps(world, rules)


def writer_steps(world: World, rules: Rules) -> Iterator[World]:
    for number, writer in enumerate(world.writers):

        def after(*then: bool, number: int = number, **more: bool) -> World:
            changed = (*world.writers[:number], then, *world.writers[number + 1 :])
            return replace(world, writers=changed, **more)  # type: ignore[arg-type]

        if writer is None:
            shares = world.lock == "free"
            yield after(not shares, False, shares, not shares)
            continue
        notifies, visible, shares, due = writer
        if not visible:
            yield after(notifies, True, shares, due)
        if shares and (visible or not rules.shares_until_visible):
            yield after(notifies, visible, False, due)
        if visible and due:
            yield after(notifies, visible, shares, False, wakeup=True)


def lock_steps(world: World, rules: Rules) -> Iterator[World]:
    wanted = world.state is not State.AWAKE
    shared = any(writer is not None and writer[2] for writer in world.writers)
    if world.lock == "free" and wanted and not world.held:
        yield replace(world, lock="requested")
    if world.lock == "requested" and not wanted:
        yield replace(world, lock="free")
    if world.lock == "requested" and not shared:
        yield replace(world, lock="held")
    if world.lock == "held" and not world.held:
        yield replace(world, held=True, wakeup=world.wakeup or rules.notified_of_grants)
    if world.lock == "held" and world.held and not wanted:
        yield replace(world, held=False, lock="free", wakeup=True)
    if world.lock != "free" and world.losses:
        yield replace(world, lock="free", losses=world.losses - 1)
    if world.lock == "free" and world.held and rules.notified_of_losses:
        yield replace(world, held=False, wakeup=True)


def leader_steps(world: World, rules: Rules) -> Iterator[World]:
    match world.step:
        case "clear":
            yield replace(world, wakeup=world.wakeup and not rules.clears_before_polling, step="poll")
        case "poll":
            yield replace(world, seen=world.visible(), step="polled")
        case "polled":
            for rate in (0.0, 1000.0):  # whatever happened before, and however long it took
                leader = AdaptivePoller(0.0, max_sleep=POLL)
                leader.state, leader._rate = world.state, rate
                leader.record_poll(0.0, len(world.seen - world.numbered), 0.0, held=world.held)
                state = leader.state
                step = "clear" if state is State.AWAKE else "wait"
                wakeup = world.wakeup and rules.clears_before_polling
                yield replace(world, numbered=world.numbered | world.seen, state=state, step=step, wakeup=wakeup)
        case "wait" if world.wakeup:
            yield replace(world, step="clear")


def lost_wakeup(rules: Rules) -> World | None:
    """A reachable world in which a visible write has no number and no further step is possible."""
    known, waiting = {World()}, [World()]
    while waiting:
        world = waiting.pop()
        following = set(steps(world, rules))
        if not any(next_ != world for next_ in following) and world.visible() - world.numbered:
            return world
        waiting += following - known
        known |= following
    assert any(world.state is State.ASLEEP and len(world.numbered) == len(world.writers) for world in known)
    assert any(writer and not writer[0] for world in known for writer in world.writers)
    return None


def test_no_interleaving_of_writers_notifications_polls_and_lock_loses_a_wakeup() -> None:
    assert lost_wakeup(Rules()) is None


@pytest.mark.parametrize("rule", Rules.__dataclass_fields__)
def test_without_any_one_of_its_rules_a_wakeup_can_be_lost(rule: str) -> None:
    assert lost_wakeup(replace(Rules(), **{rule: False})) is not None
