"""Small SVG charts, written by hand: a plotting library would be the largest dependency of the repository."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, ROW_HEIGHT, GROUP_GAP = 760, 18, 26
NAME_WIDTH, VALUE_WIDTH, TOP = 190, 90, 46
OWN_COLOUR, PEER_COLOUR, SPREAD_COLOUR = "#1f6feb", "#9aa4b1", "#24292f"


def bar_chart(
    title: str,
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    own: str,
    unit: str,
) -> str:
    """Horizontal bars of medians, with a line from the least to the most.

    Args:
        groups: by the group's title: by the bar's name: the values of the rounds.
        own: what the names of highlighted bars begin with.

    Returns:
        The SVG file's text.
    """
    room = WIDTH - NAME_WIDTH - VALUE_WIDTH
    parts: list[str] = []
    y = TOP
    for group, bars in groups.items():
        # Every group has its own scale: within it engines are compared.
        scale = room / max(max(values) for values in bars.values())
        parts.append(f'<text x="0" y="{y}" font-weight="bold">{escape(group)}</text>')
        y += 8
        for name, values in bars.items():
            ordered = sorted(values)
            middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
            colour = OWN_COLOUR if name.startswith(own) else PEER_COLOUR
            centre = y + ROW_HEIGHT / 2
            parts += [
                f'<text x="{NAME_WIDTH - 8}" y="{centre + 4:.0f}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{NAME_WIDTH}" y="{y + 2}" width="{middle * scale:.1f}" height="{ROW_HEIGHT - 4}" '
                f'fill="{colour}"/>',
                f'<line x1="{NAME_WIDTH + ordered[0] * scale:.1f}" x2="{NAME_WIDTH + ordered[-1] * scale:.1f}" '
                f'y1="{centre:.1f}" y2="{centre:.1f}" stroke="{SPREAD_COLOUR}"/>',
                f'<text x="{NAME_WIDTH + ordered[-1] * scale + 6:.1f}" y="{centre + 4:.0f}">{_number(middle)}</text>',
            ]
            y += ROW_HEIGHT
        y += GROUP_GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
            'font-family="sans-serif" font-size="12" fill="#24292f">',
            f"<title>{escape(title)}</title>",
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="0" y="16" font-size="15">{escape(title)} ({escape(unit)})</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"
