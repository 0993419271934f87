"""Cases by theme and seed."""

import random
from dataclasses import dataclass
from typing import Final

from tests.postgres.truth.case import Case
from tests.postgres.truth.tables import Tables, lookup
from tests.postgres.truth.values import ALTERED_TYPES
from tests.postgres.truth.writes import MAY_WRITE, OTHER_SETTINGS, SHADOWS, TEXT_SETTINGS, Writes


@dataclass(frozen=True)
class Theme:
    """How likely each kind of oddity is."""

    tables: int = 1
    names: float = 0.0
    types: float = 0.0
    keys: float = 0.0
    shapes: float = 0.0
    triggers: int = 0
    calls: float = 0.0
    settings: int = 0
    roles: float = 0.0
    lookups: float = 0.0
    per_row: float = 0.0
    shadows: float = 0.0
    trees: float = 0.0
    rules: int = 0
    gaps: float = 0.0
    transactions: int = 4
    among: str = "all"
    shape: str = ""  # the one that odd tables have
    moves: float = 0.0  # between partitions
    forgets: float = 0.0


THEMES: Final = {
    "nests": Theme(tables=2, triggers=3, per_row=0.1, transactions=4),
    "forgets": Theme(tables=2, triggers=3, per_row=0.1, forgets=0.7),
    "calls": Theme(tables=2, calls=0.5, transactions=4),
    "values": Theme(types=0.95, settings=3, transactions=5),
    "settings": Theme(types=0.9, keys=0.4, settings=6, transactions=4, among="sensitive"),
    "own": Theme(types=0.9, keys=0.3, settings=2, among="own"),
    "names": Theme(tables=2, names=0.7, triggers=1, settings=1, transactions=3),
    "shapes": Theme(tables=2, shapes=0.8, triggers=1, transactions=5),
    "deferrable": Theme(shapes=1.0, triggers=1, calls=0.2, keys=0.2, shape="deferrable"),
    "moves": Theme(tables=2, shapes=1.0, triggers=2, calls=0.05, per_row=0.1, shape="partitioned", moves=0.6),
    "trees": Theme(tables=2, trees=0.8, rules=2, triggers=1, keys=0.15, transactions=5),
    "gaps": Theme(
        tables=2, shapes=0.6, per_row=0.3, triggers=1, gaps=0.5, transactions=6, types=0.5, among="altered"
    ),
    "keys": Theme(keys=0.8, types=0.3, settings=3, shapes=0.2, transactions=5),
    "roles": Theme(tables=2, roles=0.8, lookups=0.6, triggers=1, settings=2, shadows=0.5),
    "all": Theme(2, 0.3, 0.4, 0.3, 0.3, 2, 0.1, 3, 0.4, 0.3, 0.15, 0.2, 5),
}


def make(theme_name: str, seed: int) -> Case:
    theme = THEMES[theme_name]
    dice = random.Random(f"{theme_name}/{seed}")
    maker = Tables(
        dice,
        names=theme.names,
        types=theme.types,
        keys=theme.keys,
        shapes=theme.shapes,
        among=theme.among,
        shape=theme.shape,
        trees=theme.trees,
    )
    tables = [maker.table(0)]
    for number in range(1, dice.randint(1, theme.tables)):
        tables.append(maker.table(number, parent=tables[0]))
    lookups = theme.lookups if dice.random() < 0.7 else 0
    setup = lookup(dice) if lookups else []
    if dice.random() < theme.shadows:
        setup.append(SHADOWS)
    if theme.among == "altered":
        setup.append(ALTERED_TYPES)
    for table in tables:
        setup += table.setup
    if theme.calls or theme.triggers:
        setup.append(MAY_WRITE)
    watched = tuple(
        maker.watched(t, lookups=lookups, per_row=theme.per_row)
        for t in tables
        if t is tables[0] or dice.random() < 0.8
    )
    writes = Writes(dice, tables, calls=theme.calls, shifts=theme.trees > 0, moves=theme.moves, forgets=theme.forgets)
    nests = writes.functions() if theme.calls else []
    nests += [
        writes.trigger(number)
        for number in range(dice.randint(min(theme.triggers, 1), theme.triggers) if theme.triggers else 0)
    ]
    nests += [writes.rule(number) for number in range(dice.randint(0, theme.rules) if theme.rules else 0)]
    known = TEXT_SETTINGS if theme.among == "sensitive" else TEXT_SETTINGS + OTHER_SETTINGS
    session = dice.sample(known, dice.randint(theme.settings // 2, theme.settings))
    if dice.random() < theme.roles:
        session.append("set role truth_writer")
        for table in tables:
            if dice.random() < 0.4:
                visible = f"{table.room.quoted} <> 'c'" if table.room and dice.random() < 0.5 else "true"
                force = f"; alter table {table.relation} force row level security" if dice.random() < 0.3 else ""
                security = (
                    f"alter table {table.relation} enable row level security{force};"
                    f" create policy seen on {table.relation} to truth_writer using ({visible})"
                )
                (setup if dice.random() < 0.5 else nests).append(security)
    transactions = [writes.first_rows()] if dice.random() < 0.8 else []
    transactions += [
        writes.gap(watched) if theme.gaps and dice.random() < theme.gaps else writes.transaction()
        for _ in range(theme.transactions)
    ]
    return Case(
        f"{theme_name} {seed}",
        tuple(setup),
        watched,
        tuple(nests),
        tuple(session),
        tuple(transactions),
        dice.random() < 0.8,
    )
