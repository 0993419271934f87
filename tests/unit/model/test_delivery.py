"""Random histories of a database, daemons and clients, checked for the invariants of delivery, I1 to I7.

`--hypothesis-profile=search` tries more histories, from a new random seed each time.
"""

import pytest

from tests.unit.model.client import Violation
from tests.unit.model.designs import DESIGN, MUTANTS, SEEN_IGNORED, Design
from tests.unit.model.histories import Histories, search
from tests.unit.model.world import TOPICS

SEARCHES = 10


def test_no_history_of_the_real_design_violates_an_invariant() -> None:
    search(DESIGN, 250)


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_of_the_design_violates_the_invariant_that_it_endangers(name: str) -> None:
    mutant, invariants = MUTANTS[name]
    violated = set[str]()
    for number in range(SEARCHES):  # most mutants violate several, and any of them may be found first
        with pytest.raises(Violation) as caught:
            search(mutant, 1000, number)
        violated.add(caught.value.invariant)
        if violated & invariants:
            break
    assert violated & invariants


def lose_changes_seen_in_a_replay(design: Design) -> None:
    """A connection breaks during a replay; a crash undoes what the replay had sent beyond the client's position."""
    history = type("Histories", (Histories,), {"design": design})()
    try:
        history.begin(subscriptions=[(0, TOPICS[0]), (0, TOPICS[1])])
        history.restart(number=0)
        history.crash_after_delivery(row=1, other=1, topic=TOPICS[0], flush=False, lost=0, number=0)
        history.crash(lost=1, elected=False)
        history.come_back(user=0, number=0, limit=0, reading=False)
        history.restart(number=0)
    finally:
        history.teardown()


def test_a_crash_that_undoes_changes_seen_beyond_the_position_causes_a_reset() -> None:
    lose_changes_seen_in_a_replay(DESIGN)
    with pytest.raises(Violation, match="again"):
        lose_changes_seen_in_a_replay(SEEN_IGNORED)
