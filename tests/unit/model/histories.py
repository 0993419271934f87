"""What happens in a history, and the search for one that violates an invariant."""

from typing import ClassVar

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from daemon.core.change import Topic
from tests.unit.model.designs import DESIGN, Design
from tests.unit.model.postgres import Transaction
from tests.unit.model.world import TOPICS, USERS, Node, World

ROWS = (1, 2, 3)
MAX_OPEN = 3

rows, topics, users = st.sampled_from(ROWS), st.sampled_from(TOPICS), st.sampled_from(range(len(USERS)))
daemons, few, yes_or_no = st.sampled_from((0, 1)), st.integers(0, 4), st.booleans()


class Histories(RuleBasedStateMachine):
    """The events of a history. Most rules do several steps, which random single steps would rarely combine."""

    design: ClassVar[Design] = DESIGN
    gateways: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.design, gateways=self.gateways)
        self.open: list[Transaction] = []

    @initialize(subscriptions=st.lists(st.tuples(users, topics), min_size=2, max_size=6, unique=True))
    def begin(self, subscriptions: list[tuple[int, Topic]]) -> None:
        world = self.world
        for user, topic in subscriptions:
            world.subscribe(world.clients[user], topic)
            tx = world.postgres.begin()
            world.postgres.grant(tx, USERS[user], topic)
            world.postgres.commit(tx)
        world.number()
        world.wake_all()
        for number, client in enumerate(world.clients):
            world.connect(client, self.node(number % 2))
            world.receive(client)

    def node(self, number: int) -> Node:
        """Where clients connect that choose this number."""
        return self.world.daemons[number]

    def _commit(self, tx: Transaction, *, flush: bool = True) -> None:
        if tx in self.open:
            self.open.remove(tx)
        self.world.postgres.commit(tx, flush=flush)

    # What applications write.

    @rule(row=rows, topic=topics, flush=st.sampled_from((True, True, True, False)))
    def write(self, row: int, topic: Topic, flush: bool) -> None:
        tx = self.world.postgres.begin()
        self.world.postgres.write(tx, row, topic)
        self._commit(tx, flush=flush)

    @rule(row=rows, topic=topics, restored=yes_or_no)
    def delete(self, row: int, topic: Topic, restored: bool) -> None:
        """Write a row, delete it, and maybe restore it."""
        postgres = self.world.postgres
        for step in ("write", "delete", "write")[: 2 + restored]:
            tx = postgres.begin()
            if step == "write":
                postgres.write(tx, row, topic)
            else:
                postgres.delete(tx, row)
            self._commit(tx)

    @rule(first=rows, second=rows, topic=topics, other=topics, early=yes_or_no, numbered=yes_or_no, swapped=yes_or_no)
    def overtake(
        self, first: int, second: int, topic: Topic, other: Topic, early: bool, numbered: bool, swapped: bool
    ) -> None:
        """A slow transaction begins, a quick one writes and commits, and the slow one commits after it."""
        postgres = self.world.postgres
        slow, quick = postgres.begin(early=early), postgres.begin()
        if not swapped:
            postgres.write(slow, first, topic)
        postgres.write(quick, second, other)
        self._commit(quick)
        if numbered:
            self.world.number()
        postgres.write(slow, second if swapped else first, topic)
        self._commit(slow)

    @precondition(lambda self: len(self.open) < MAX_OPEN)
    @rule(row=rows, topic=topics, early=yes_or_no)
    def open_transaction(self, row: int, topic: Topic, early: bool) -> None:
        tx = self.world.postgres.begin(early=early)
        self.world.postgres.write(tx, row, topic)
        self.open.append(tx)

    @precondition(lambda self: self.open)
    @rule(which=few, row=rows, topic=topics, what=st.sampled_from(("write", "delete", "savepoint", "prepare")))
    def go_on_in_transaction(self, which: int, row: int, topic: Topic, what: str) -> None:
        tx, postgres = self.open[which % len(self.open)], self.world.postgres
        if tx in postgres.state.prepared:
            return
        match what:
            case "write":
                postgres.write(tx, row, topic)
            case "delete":
                postgres.delete(tx, row)
            case "savepoint":
                postgres.savepoint_rollback(tx, row)
            case "prepare":
                postgres.prepare(tx)

    @precondition(lambda self: self.open)
    @rule(which=few, how=st.sampled_from(("commit", "commit", "later", "rollback")))
    def end_transaction(self, which: int, how: str) -> None:
        tx = self.open.pop(which % len(self.open))
        if how == "rollback":
            self.world.postgres.rollback(tx)
        else:
            self._commit(tx, flush=how == "commit")

    @rule(table=st.sampled_from(("rows", "rows", "members")))
    def truncate(self, table: str) -> None:
        self.world.postgres.truncate(table)

    # Rights.

    @rule(user=users, topic=topics)
    def grant(self, user: int, topic: Topic) -> None:
        tx = self.world.postgres.begin()
        self.world.postgres.grant(tx, USERS[user], topic)
        self._commit(tx)

    @rule(user=users, topic=topics, all_topics=st.sampled_from((False, False, True)), row=rows, delivered=yes_or_no)
    def revoke(self, user: int, topic: Topic, all_topics: bool, row: int, delivered: bool) -> None:
        """End a right, then write a row that its user must not receive."""
        postgres = self.world.postgres
        tx = postgres.begin()
        postgres.revoke(tx, USERS[user], None if all_topics else topic)
        self._commit(tx)
        tx = postgres.begin()
        postgres.write(tx, row, topic)
        self._commit(tx)
        if delivered:
            self.flow()

    @rule(user=users, topic=topics, row=rows, number=daemons)
    def join_late(self, user: int, topic: Topic, row: int, number: int) -> None:
        """Grant a right to a client that already has a position, after a row was written."""
        client, postgres = self.world.clients[user], self.world.postgres
        self.revoke(user, topic, all_topics=False, row=row, delivered=True)
        self.world.connect(client, self.node(number))
        self.world.receive(client)
        self.write(row, topic, flush=True)
        self.world.number()
        tx = postgres.begin()
        postgres.grant(tx, USERS[user], topic)
        self._commit(tx)
        self.flow()
        self.subscribe(user, topic)
        self.world.receive(client)

    @rule(user=users, topic=topics, row=rows, number=daemons)
    def revoke_during_lookup(self, user: int, topic: Topic, row: int, number: int) -> None:
        """End a right during its lookup: the end reaches the hub before the result of the lookup."""
        client, daemon = self.world.clients[user], self.node(number)
        daemon.link.held = True
        self.world.connect(client, daemon)
        if daemon.link.waiting:
            daemon.link.let_through(0)
        self.revoke(user, topic, all_topics=False, row=row, delivered=False)
        self.world.number()
        daemon.wake()
        for _ in range(4):
            if len(daemon.link.waiting) > 1:
                daemon.link.let_through(-1)
        daemon.link.held = False
        while daemon.link.waiting:
            daemon.link.let_through(0)

    # Delivery.

    @rule()
    def number(self) -> None:
        self.world.number()

    @rule(number=daemons)
    def wake(self, number: int) -> None:
        self.world.daemons[number].wake()

    @rule()
    def flow(self) -> None:
        """Deliver everything that is committed to every connected client."""
        self.world.number()
        self.world.wake_all()
        for gateway in self.world.gateways:
            gateway.wake()
        for client in self.world.clients:
            self.world.receive(client)

    @rule(user=users, limit=few)
    def receive(self, user: int, limit: int) -> None:
        self.world.receive(self.world.clients[user], limit)

    @rule()
    def pass_time(self) -> None:
        self.world.pass_time()

    @rule(number=daemons)
    def beat(self, number: int) -> None:
        self.world.daemons[number].tick()

    @rule(number=daemons)
    def hold(self, number: int) -> None:
        """Hold up this daemon's queries from now on."""
        self.world.daemons[number].link.held = True

    @precondition(lambda self: any(daemon.link.held for daemon in self.world.daemons))
    @rule(number=daemons, all_queries=yes_or_no, order=few)
    def let_through(self, number: int, all_queries: bool, order: int) -> None:
        self.world.daemons[number].link.let_go(order, all_queries=all_queries)

    # Clients come and go.

    @rule(user=users, number=daemons, limit=few, reading=yes_or_no)
    def come_back(self, user: int, number: int, limit: int, reading: bool) -> None:
        """A client reads a little, loses its connection, and resumes at one of the daemons."""
        client = self.world.clients[user]
        self.world.receive(client, limit)
        self.world.connect(client, self.node(number))
        if reading:
            self.world.receive(client)

    @rule(user=users, number=daemons, row=rows, topic=topics, delivered=yes_or_no)
    def stay_away(self, user: int, number: int, row: int, topic: Topic, delivered: bool) -> None:
        """A client is offline while a row is written."""
        client = self.world.clients[user]
        self.world.receive(client)
        client.cut()
        self.write(row, topic, flush=True)
        self.world.number()
        if delivered:
            self.node(number).wake()
        self.world.connect(client, self.node(number))
        self.world.receive(client)

    @rule(user=users, topic=topics)
    def subscribe(self, user: int, topic: Topic) -> None:
        self.world.subscribe(self.world.clients[user], topic)

    @rule(user=users, topic=topics)
    def unsubscribe(self, user: int, topic: Topic) -> None:
        client = self.world.clients[user]
        if client.connection is not None and topic in client.wanted and topic in client.topics:
            client.wanted.remove(topic)
            client.unsubscribe(topic)

    # Faults, elections and retention.

    @rule(next_segment=yes_or_no)
    def elect(self, next_segment: bool) -> None:
        self.world.elect(next_segment=next_segment)

    @rule()
    def drop_segments(self) -> None:
        self.world.drop_segments()

    @rule(number=daemons)
    def restart(self, number: int) -> None:
        self.world.restart(number)

    @rule(lost=few, elected=yes_or_no)
    def crash(self, lost: int, elected: bool) -> None:
        self.open.clear()
        self.world.crash(lost)
        self._recover(elected=elected)

    @rule(row=rows, other=rows, topic=topics, flush=yes_or_no, lost=few, number=daemons)
    def crash_after_delivery(self, row: int, other: int, topic: Topic, flush: bool, lost: int, number: int) -> None:
        """A crash loses changes that were delivered, and their numbers are free for other changes."""
        self.write(row, topic, flush=flush)
        self.flow()
        self.crash(lost, elected=True)
        self.write(other, topic, flush=True)
        self.world.number()
        self.node(number).wake()

    @rule(lost=few, elected=yes_or_no)
    def fail_over(self, lost: int, elected: bool) -> None:
        self.open.clear()
        self.world.fail_over(lost)
        self._recover(elected=elected)

    def _recover(self, *, elected: bool) -> None:
        self.open = list(self.world.postgres.open)
        if elected:
            self.world.elect()

    def teardown(self) -> None:
        try:
            self.world.rest()
        finally:
            self.world.close()


def search(design: Design, examples: int, number: int = 0, machine: type[Histories] = Histories) -> None:
    """Run random histories and raise the first Violation. `number` is the seed of the search."""
    histories = type("Histories", (machine,), {"design": design})
    thorough = settings.get_current_profile_name() == "search"
    profile = settings.get_profile("search") if thorough else settings(max_examples=examples, stateful_step_count=25)
    run_state_machine_as_test(
        histories if thorough else seed(number)(histories),
        settings=settings(
            profile,
            derandomize=False,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink] if thorough else [Phase.generate],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            verbosity=Verbosity.normal if thorough else Verbosity.quiet,
        ),
    )
