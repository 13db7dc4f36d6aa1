"""Bar charts as SVG, written by hand because a plotting library would be the largest dependency of the benchmarks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

WIDTH, NAME_WIDTH, VALUE_WIDTH, RIGHT = 760, 190, 60, 8
BAR_STEP, BAR_HEIGHT, GROUP_STEP, AXIS_HEIGHT, TOP = 20, 14, 18, 40, 78
STYLE = """\
svg { color-scheme: light dark; }
text { fill: #24292f; }
.own { fill: #1f6feb; }
.peer { fill: #8c959f; }
.whisker { stroke: #24292f; stroke-width: 1.5; }
.grid { stroke: #8c959f; stroke-opacity: 0.35; }
.note { fill: #57606a; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .own { fill: #4493f8; }
  .peer { fill: #768390; }
  .whisker { stroke: #e6edf3; }
  .note { fill: #9198a1; }
}"""
"""The background stays transparent. Text, bars and whiskers have colours for light and for dark pages."""


@dataclass(frozen=True)
class Bar:
    """One engine in a panel: the median, and the minimum and maximum that the whisker shows."""

    name: str
    bits: int
    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, name: str, bits: int, values: Sequence[float]) -> "Bar":
        """The bar of the values of all rounds."""
        return cls(name, bits, median(values), min(values), max(values))


def bar_chart(title: str, panels: Mapping[str, Sequence[Bar]], *, own: str, unit: str) -> str:
    """Horizontal bars of medians, grouped by bits. All panels share one scale.

    Args:
        title: title of the chart.
        panels: bars by the panel's title.
        own: beginning of the names whose bars are highlighted.
        unit: unit of the values, and which direction is better.

    Returns:
        Text of the SVG file.
    """
    room = WIDTH - NAME_WIDTH - VALUE_WIDTH - RIGHT
    ticks = axis_ticks(max(bar.maximum for bars in panels.values() for bar in bars))
    scale = room / ticks[-1]
    body: list[str] = []
    y = TOP
    for panel, bars in panels.items():
        body.append(f'<text x="0" y="{y}" font-weight="bold">{escape(panel)}</text>')
        first = y = y + 8
        groups = {bits: [bar for bar in bars if bar.bits == bits] for bits in dict.fromkeys(bar.bits for bar in bars)}
        inner: list[str] = []
        for bits, group in groups.items():
            inner.append(f'<text class="note" x="{NAME_WIDTH - 8}" y="{y + 13}" text-anchor="end">{bits} bits</text>')
            y += GROUP_STEP
            for bar in group:
                inner += _drawn(bar, y, scale, bar.name.startswith(own))
                y += BAR_STEP
        body += [*_axis(ticks, scale, first, y), *inner]
        y += AXIS_HEIGHT
    whiskers = any(bar.minimum < bar.maximum for bars in panels.values() for bar in bars)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
            'font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE}\n</style>",
            f'<text x="0" y="16" font-size="15">{escape(title)} ({escape(unit)})</text>',
            *_legend(own, whiskers),
            *body,
            "</svg>",
            "",
        ]
    )


def axis_ticks(maximum: float) -> list[float]:
    """Four to eight round values from 0 to at least `maximum`."""
    magnitude = 10 ** math.floor(math.log10(maximum))
    step = next(s * magnitude for s in (0.2, 0.25, 0.5, 1.0, 2.0) if maximum / (s * magnitude) <= 7)
    return [step * i for i in range(math.ceil(maximum / step) + 1)]


def _drawn(bar: Bar, y: float, scale: float, is_own: bool) -> Iterator[str]:
    """Name, bar, whisker and value. The values of all bars stand in a column of their own."""
    centre = y + BAR_STEP / 2
    yield f'<text x="{NAME_WIDTH - 8}" y="{centre + 4:.0f}" text-anchor="end">{escape(bar.name)}</text>'
    yield (
        f'<rect class="{"own" if is_own else "peer"}" x="{NAME_WIDTH}" y="{centre - BAR_HEIGHT / 2:.0f}" '
        f'width="{bar.median * scale:.1f}" height="{BAR_HEIGHT}"/>'
    )
    if bar.minimum < bar.maximum:
        yield _whisker(NAME_WIDTH + bar.minimum * scale, NAME_WIDTH + bar.maximum * scale, centre)
    yield f'<text x="{WIDTH - RIGHT}" y="{centre + 4:.0f}" text-anchor="end">{_number(bar.median)}</text>'


def _whisker(left: float, right: float, y: float) -> str:
    path = f"M{left:.1f} {y - 4:.0f}v8M{left:.1f} {y:.0f}H{right:.1f}M{right:.1f} {y - 4:.0f}v8"
    return f'<path class="whisker" fill="none" d="{path}"/>'


def _axis(ticks: Sequence[float], scale: float, top: float, bottom: float) -> Iterator[str]:
    for tick in ticks:
        x = NAME_WIDTH + tick * scale
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.0f}" y2="{bottom + 4:.0f}"/>'
        yield f'<text class="note" x="{x:.1f}" y="{bottom + 17:.0f}" text-anchor="middle">{_number(tick)}</text>'


def _legend(own: str, whiskers: bool) -> Iterator[str]:
    """What colours, whiskers and values mean, in a row under the title."""
    yield '<rect class="own" x="0" y="32" width="20" height="12"/>'
    yield f'<text x="26" y="43">{escape(own)}</text>'
    yield '<rect class="peer" x="90" y="32" width="20" height="12"/>'
    yield '<text x="116" y="43">other engines</text>'
    if whiskers:
        yield _whisker(220, 250, 38)
        yield '<text x="258" y="43">minimum to maximum of the rounds; bar and value: median</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2f}"
