"""Figures by round, their median and spread, and whether a target is met."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple, Self

Sense = Literal[">=", "<=", ">", "+-"]


class Spread(NamedTuple):
    """The median, minimum and maximum of the rounds."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Raises ValueError if there are no values."""
        values = list(values)
        if not values:
            raise ValueError("there is nothing to take the median of")
        return cls(median(values), min(values), max(values))


class Samples:
    """Figures by peer and name, one for each round, in the order of measurement."""

    def __init__(self, values: Mapping[str, Mapping[str, Iterable[float]]] | None = None) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}
        for peer, figures in (values or {}).items():
            for figure, rounds in figures.items():
                self.values.setdefault(peer, {})[figure] = list(rounds)

    def add(self, peer: str, **figures: float) -> None:
        """Record the figures of one round for this peer."""
        for figure, value in figures.items():
            self.values.setdefault(peer, defaultdict(list))[figure].append(value)

    def rounds(self, peer: str, figure: str) -> list[float]:
        """Raises KeyError if it was not measured."""
        return self.values[peer][figure]


@dataclass(frozen=True)
class Target:
    """The bound that one figure of one peer must meet.

    With `against`, the figure is divided by that of another peer in the same round; without, its absolute value
    counts. The sense "+-" requires a ratio that differs from 1 by no more than `bound`.
    """

    peer: str
    figure: str
    sense: Sense
    bound: float
    against: str | None = None

    def measured(self, samples: Samples) -> Spread:
        """The ratio, or the figure itself. Raises KeyError if it was not measured."""
        own = samples.rounds(self.peer, self.figure)
        if self.against is None:
            return Spread.of(own)
        other = samples.rounds(self.against, self.figure)
        return Spread.of(mine / theirs if theirs else math.inf for mine, theirs in zip(own, other, strict=True))

    def met(self, samples: Samples) -> bool:
        """Is the median within the bound?"""
        value = self.measured(samples).median
        match self.sense:
            case ">=":
                return value >= self.bound
            case ">":
                return value > self.bound
            case "<=":
                return value <= self.bound
            case "+-":
                return abs(value - 1) <= self.bound
