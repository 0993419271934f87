"""Bar charts as SVG, with a background that follows the reader's light or dark mode."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from bench.judge import Spread

WIDTH, LEFT, RIGHT, TOP, BAR, GAP, BOTTOM = 760, 222, 40, 84, 26, 18, 52

STYLE = """
  .ground { fill: #ffffff; }
  text { font: 13px system-ui, sans-serif; fill: #24292f; }
  .title { font-weight: 600; font-size: 14px; }
  .small { font-size: 11px; fill: #57606a; }
  .grid { stroke: #8c959f; stroke-opacity: .35; }
  .own { fill: #2f81d7; } .other { fill: #8c959f; }
  .round { fill: #24292f; fill-opacity: .75; }
  .target { stroke: #c4432b; stroke-width: 1.5; stroke-dasharray: 5 4; }
  text.aim { fill: #c4432b; font-size: 11px; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; }
    text { fill: #e6edf3; } .small { fill: #9198a1; } .round { fill: #e6edf3; }
    .target { stroke: #ff8a73; } text.aim { fill: #ff8a73; }
  }"""


@dataclass(frozen=True)
class Bar:
    """One peer: the median as a bar, the rounds as dots on it."""

    name: str
    rounds: Sequence[float]
    own: bool  # is it the one that the target judges?


def bars(
    title: str,
    about: str,
    axis: str,
    shown: Sequence[Bar],
    show: Callable[[float], str],
    aim: tuple[float, str] | None = None,
) -> str:
    """A chart of horizontal bars. `show` formats a median; `aim` is the target's value and label."""
    height = TOP + len(shown) * (BAR + GAP) + BOTTOM
    ticks = axis_ticks(max([value for bar in shown for value in bar.rounds] + ([aim[0]] if aim else [])))

    def place(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value / ticks[-1], 1)

    bottom = height - BOTTOM + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{STYLE}\n</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<text class="title" x="12" y="24">{escape(title)}</text>',
        f'<text class="small" x="12" y="44">{escape(about)}</text>',
    ]
    for tick in ticks:
        x = place(tick)
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:,.10g}</text>')
    parts.append(
        f'<text class="small" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 36}" text-anchor="middle">'
        f"{escape(axis)}</text>"
    )
    for number, bar in enumerate(shown):
        y = TOP + number * (BAR + GAP)
        middle, spread = y + BAR / 2, Spread.of(bar.rounds)
        width = round(max(1.0, place(spread.median) - LEFT), 1)
        kind = "own" if bar.own else "other"
        parts.append(f'<text x="{LEFT - 10}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{width}" height="{BAR}" rx="2"/>')
        parts += [f'<circle class="round" cx="{place(value)}" cy="{middle}" r="3"/>' for value in bar.rounds]
        parts.append(f'<text class="small" x="{LEFT + 4}" y="{y + BAR + 12}">{escape(show(spread.median))}</text>')
    if aim is not None:
        x = place(aim[0])
        near_the_edge = x > WIDTH * 0.75
        anchor, aside = ("end", -4) if near_the_edge else ("start", 4)
        parts.append(f'<line class="target" x1="{x}" y1="{TOP - 14}" x2="{x}" y2="{bottom}"/>')
        parts.append(
            f'<text class="aim" x="{x + aside}" y="{TOP - 18}" text-anchor="{anchor}">{escape(aim[1])}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def axis_ticks(maximum: float) -> list[float]:
    """Round numbers from 0 to `maximum` or slightly above."""
    if maximum <= 0:
        return [0.0, 1.0]
    rough = maximum / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(step * number, 12) for number in range(math.ceil(maximum / step - 1e-9) + 1)]
