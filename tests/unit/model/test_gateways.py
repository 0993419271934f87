"""The same histories with gateways, over a network that loses, repeats, delays and reorders what it carries.

Clients move between members and gateways with one position. Leaders of earlier terms may go on publishing.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from daemon.core.batch import Contents, LogBatch
from daemon.core.change import Topic
from daemon.delivery.feed import Feed
from tests.support.feeds import NoGone, NoLingerRule, WantedSeenOnce
from tests.unit.model.client import Violation
from tests.unit.model.designs import (
    BY_TOPIC,
    DESIGN,
    MUTANTS_OF_GATEWAYS,
    Design,
    KnowsContentsByTheirEnd,
    NoFloor,
)
from tests.unit.model.histories import Histories, daemons, few, rows, search, topics, yes_or_no
from tests.unit.model.nats import Message
from tests.unit.model.world import TOPICS, Node

PLACES = {"members": (0, 1), "gateways": (2, 3), "both": (0, 2)}
FATES = ("told", "told", "late", "late", "lost", "pull")


class HistoriesOfGateways(Histories):
    """With two members and two gateways."""

    gateways = 2

    def __init__(self) -> None:
        super().__init__()
        self.place = "gateways"

    def node(self, number: int) -> Node:
        return self.world.nodes[PLACES[self.place][number]]

    # The network.

    @rule(place=st.sampled_from(tuple(PLACES)))
    def choose_place(self, place: str) -> None:
        """From now on clients come to these nodes."""
        self.place = place

    @rule(number=daemons, fate=st.sampled_from(FATES))
    def choose_fate(self, number: int, fate: str) -> None:
        """What becomes of messages to a gateway from now on."""
        self.world.gateways[number].fate = fate

    @rule(number=daemons, place=few, again=yes_or_no)
    def arrive(self, number: int, place: int, again: bool) -> None:
        self.world.gateways[number].arrive(place, again=again)

    @rule(number=daemons, place=few)
    def lose(self, number: int, place: int) -> None:
        arriving = self.world.gateways[number].arriving
        if arriving:
            del arriving[place % len(arriving)]

    @rule(number=daemons, fate=st.sampled_from(FATES), row=rows, topic=topics, place=few)
    def overtake_messages(self, number: int, fate: str, row: int, topic: Topic, place: int) -> None:
        """Two writes are told in two messages, of which the second may arrive first, or the first not at all."""
        gateway = self.world.gateways[number]
        before, gateway.fate = gateway.fate, "lost" if fate == "lost" else "late"
        self.write(row, TOPICS[0], flush=True)
        self.world.number()
        gateway.fate = fate
        self.write(row, TOPICS[1], flush=True)
        self.world.number()
        gateway.arrive(place)
        gateway.fate = before

    @rule()
    def beat_members(self) -> None:
        self.world.beat()

    @rule(number=daemons, cut_off=yes_or_no)
    def cut_off_member(self, number: int, cut_off: bool) -> None:
        """Nothing that a member publishes reaches anybody."""
        self.world.daemons[number].relay.line.cut_off = cut_off

    # Questions.

    @rule(number=daemons, member=daemons)
    def choose_member(self, number: int, member: int) -> None:
        self.world.gateways[number].asked = member

    @rule(number=daemons)
    def hold_questions(self, number: int) -> None:
        self.world.gateways[number].link.held = True

    @rule(number=daemons, all_queries=yes_or_no, order=few)
    def let_questions_through(self, number: int, all_queries: bool, order: int) -> None:
        self.world.gateways[number].link.let_go(order, all_queries=all_queries)

    @rule(number=daemons, answered=yes_or_no)
    def lose_questions(self, number: int, answered: bool) -> None:
        link = self.world.gateways[number].link
        self.world.run(lambda: link.fail(answered=answered))

    # Faults.

    @rule(unnoticed=yes_or_no)
    def elect_another(self, unnoticed: bool) -> None:
        self.world.elect(unnoticed=unnoticed)

    @rule(number=daemons)
    def restart_gateway(self, number: int) -> None:
        self.world.restart_gateway(number)

    @rule(number=daemons)
    def end_lingering(self, number: int) -> None:
        self.world.gateways[number].end_lingering()


@pytest.mark.parametrize("design", [DESIGN, BY_TOPIC], ids=lambda design: design.name)
def test_no_history_with_gateways_violates_an_invariant(design: Design) -> None:
    search(design, 100, machine=HistoriesOfGateways)


@pytest.mark.parametrize("name", MUTANTS_OF_GATEWAYS)
def test_each_mutant_of_a_gateway_violates_the_invariant_that_it_endangers(name: str) -> None:
    mutant, invariants, number = MUTANTS_OF_GATEWAYS[name]
    with pytest.raises(Violation) as caught:
        search(mutant, 400, number, HistoriesOfGateways)
    assert caught.value.invariant in invariants


# Histories of mutants for which a search would take long.


def begun(design: Design) -> HistoriesOfGateways:
    """Ada and Bob follow a topic at the first gateway, and may read both. What is numbered is told, but late."""
    history: HistoriesOfGateways = type("Histories", (HistoriesOfGateways,), {"design": design})()
    world = history.world
    history.begin(subscriptions=[(0, TOPICS[0]), (1, TOPICS[0])])
    for user in (0, 1):
        history.grant(user, TOPICS[1])
    while world.leading is None:
        world.elect()
    world.connect(world.clients[1], world.gateways[0])
    history.flow()
    world.gateways[0].fate = "late"
    return history


def arrive(history: HistoriesOfGateways, which: Callable[[Message], object]) -> None:
    """Let the late messages arrive that are so."""
    gateway = history.world.gateways[0]
    for message in [message for message in gateway.arriving if which(message)]:
        gateway.arrive(gateway.arriving.index(message))


def write_in_both(history: HistoriesOfGateways) -> None:
    """Write a row in each topic, in one transaction; the message about it arrives, its contents do not."""
    postgres = history.world.postgres
    tx = postgres.begin()
    for row, topic in enumerate(TOPICS, 1):
        postgres.write(tx, row, topic)
    postgres.commit(tx)
    history.number()
    arrive(history, lambda message: not isinstance(message, Contents))


def join_while_contents_are_asked_for(history: HistoriesOfGateways) -> None:
    """A client joins a second topic while the contents of the first are asked for."""
    link = history.world.gateways[0].link
    link.held = True
    write_in_both(history)
    history.subscribe(0, TOPICS[1])
    while len(link.waiting) > 1:
        link.let_through(-1)
    history.let_questions_through(0, all_queries=True, order=0)


def resume_after_a_hole(history: HistoriesOfGateways) -> None:
    """Nobody follows a topic for a moment in which its contents are lost; then a client resumes from before."""
    world = history.world
    for client in world.clients:
        client.cut()
    write_in_both(history)
    world.connect(world.clients[0], world.gateways[0])
    world.receive(world.clients[0])


def resume_after_a_deletion_elsewhere(history: HistoriesOfGateways) -> None:
    """A row moves to a topic that nobody follows and is deleted there; then a client resumes from before."""
    world = history.world
    world.gateways[0].fate = "told"
    world.gateways[0].tick()
    history.flow()
    world.clients[0].cut()
    for topic in TOPICS:
        history.write(1, topic, flush=True)
        history.flow()
    tx = world.postgres.begin()
    world.postgres.delete(tx, 1)
    world.postgres.commit(tx)
    history.flow()
    world.connect(world.clients[0], world.gateways[0])
    world.receive(world.clients[0])


def resume_from_past_retention(history: HistoriesOfGateways) -> None:
    """A right begins after a row was written; once the log says neither, its user resumes from before both."""
    world = history.world
    world.gateways[0].fate = "told"
    world.gateways[0].tick()
    history.flow()
    world.clients[2].cut()
    history.write(1, TOPICS[0], flush=True)
    history.flow()
    history.grant(2, TOPICS[0])
    history.flow()
    history.elect(next_segment=True)
    history.flow()
    world.drop_segments()
    history.subscribe(2, TOPICS[0])
    world.connect(world.clients[2], world.gateways[0])
    world.receive(world.clients[2])


def two_leaders_cut_the_log_differently(history: HistoriesOfGateways) -> None:
    """Two batches of a new leader are one of the old one; contents and manifest of different ones meet."""
    world = history.world
    old = world.leading
    while world.leading in (None, old):
        world.elect(unnoticed=True)
    assert old is not None
    history.flow()
    world.gateways[0].arriving.clear()
    old.link.held = True
    for row in (1, 2):
        history.write(row, TOPICS[0], flush=True)
        history.number()
    last = world.gateways[0].arriving[-2]
    old.wake()
    old.link.held = False
    while old.link.waiting:
        old.link.let_through(0)
    assert isinstance(last, Contents)
    of_old = [
        message
        for message in world.gateways[0].arriving
        if isinstance(message, LogBatch | Contents) and message.after < last.after and message.upto == last.upto
    ]
    assert 2 == len(of_old)
    for next_one in (last, *of_old):
        arrive(history, lambda message: message is next_one)  # noqa: B023 - called at once


KNOWN: dict[str, tuple[Callable[[HistoriesOfGateways], None], Design, str]] = {
    "wanted_seen_once": (join_while_contents_are_asked_for, Design(feed=WantedSeenOnce, by_topic=True), "I7"),
    "no_linger_rule": (resume_after_a_hole, Design(feed=NoLingerRule, by_topic=True), "I7"),
    "no_gone": (resume_after_a_deletion_elsewhere, Design(feed=NoGone), "I4"),
    "no_gone, by topic": (resume_after_a_deletion_elsewhere, Design(feed=NoGone, by_topic=True), "I4"),
    "no_floor": (resume_from_past_retention, Design(feed=NoFloor), "I4"),
    "contents known by their end": (
        two_leaders_cut_the_log_differently,
        Design(feed=KnowsContentsByTheirEnd, by_topic=True),
        "I7",
    ),
}
"""By mutant: the history that it does not survive, and the invariant that it violates."""


def live_through(live: Callable[[HistoriesOfGateways], None], design: Design) -> None:
    """Raises Violation."""
    history = begun(design)
    try:
        live(history)
    finally:
        history.teardown()


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_history_shows_what_a_mutant_of_a_gateway_lacks(name: str) -> None:
    live, mutant, invariant = KNOWN[name]
    live_through(live, replace(mutant, feed=Feed))
    with pytest.raises(Violation) as caught:
        live_through(live, mutant)
    assert invariant == caught.value.invariant
