"""An explanation as one SVG: the tokens coloured by probability, and the attention averaged over layers and heads."""

from html import escape

import numpy as np
import numpy.typing as npt

from edgelm.pictures.explanation_data import with_whole_prefix
from edgelm.pictures.shares import cells, level_of, percent, shortened, visible
from edgelm.scoring.explanation import ExplainedToken, Explanation

_WIDTH = 760
"""Least width of a picture, in pixels."""
_MARGIN = 20
_TOKEN_CELLS = 18
"""Longer tokens are cut."""
_CELL_WIDTH = 8.4
"""Of a character of the text's size, 14 pixels, in a fixed-width font."""
_LINE = 50
"""Height of a line of tokens, and of their probabilities below them."""
_LEAST_CELL, _MOST_CELL = 4, 24
"""Width and height of a share in the map."""
_NAMED_CELL, _NUMBERED_CELL = 9, 19
"""From these sizes on the map has the tokens' names, and numbers in percent."""
_LEAST_SHARE = 0.004
"""Smaller shares cannot be seen, and are left out."""
_LEAST_NUMBER = 0.095

_STYLE = """
.x{--paper:#fff;--ink:#1b1d1c;--soft:#5c625f;--line:#e2e3de;--look:#b4560f;--l0:#f6f6f3;--l1:#e4f2ee;--l2:#cbe6df;--l3:#a9d5ca;--l4:#82c1b3;--l5:#5fab9c}
@media(prefers-color-scheme:dark){.x{--paper:#1a1d1c;--ink:#e9ebe8;--soft:#a0a7a3;--line:#2b2f2d;--look:#f0a35e;--l0:#222624;--l1:#1d2f2b;--l2:#21413a;--l3:#25554b;--l4:#26635a;--l5:#287064}}
.x text{fill:var(--ink);font:14px ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
.x .h{font:600 14px Inter,system-ui,"Segoe UI",Roboto,Arial,sans-serif}.x .s{fill:var(--soft);font-size:11px}
.x .m{text-anchor:middle}.x .n{font-size:9px;text-anchor:middle}.x .p{fill:var(--paper)}
.x .g{fill:none;stroke:var(--line)}.x .a{fill:var(--look)}
"""


def svg_picture(explanation: Explanation, model: str) -> str:
    """The picture of an explanation by `model`: text of an SVG file, in the colours of the viewer's theme."""
    flow, bottom, most_right = _tokens(explanation.tokens)
    columns = with_whole_prefix(explanation)
    map_, width, height = _map(columns.mean(axis=(0, 1)), explanation, bottom + 46)
    layers, heads = columns.shape[:2]
    width = max(_WIDTH, most_right + _MARGIN, width)
    facts = f"{len(explanation.tokens)} tokens read by {model}"
    words = f"{facts}: the probability of each token, and the attention averaged over {layers} layers of {heads} heads"
    caption = f"Attention of each token to those before it, averaged over {layers} layers of {heads} heads, in percent"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="x" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"><title>{escape(words)}</title><style>{_STYLE}</style>'
        f'<rect class="p" width="100%" height="100%"/>'
        f'<text class="h" x="{_MARGIN}" y="30">{escape(facts)}, with the probability of each</text>{flow}'
        f'<text class="h" x="{_MARGIN}" y="{bottom + 26:.0f}">{escape(caption)}</text>{map_}</svg>\n'
    )


def _tokens(tokens: tuple[ExplainedToken, ...]) -> tuple[str, float, float]:
    """The tokens line by line; also where they end, below and to the right."""
    parts, x, y, most_right = [], float(_MARGIN), 46, 0.0
    for token in tokens:
        name = shortened(visible(token.text), _TOKEN_CELLS)
        chance = "first" if token.logprob is None else percent(float(np.exp(token.logprob)))
        level = 0 if token.logprob is None else level_of(float(np.exp(token.logprob)))
        text_width = cells(name) * _CELL_WIDTH
        width = max(text_width + 10, len(chance) * 6.7 + 2)
        if x + width > _WIDTH - _MARGIN and x > _MARGIN:
            x, y = _MARGIN, y + _LINE
        middle = x + width / 2
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="25" rx="5" style="fill:var(--l{level})"/>'
            f'<text class="m" x="{middle:.1f}" y="{y + 17}" textLength="{text_width:.0f}" '
            f'lengthAdjust="spacingAndGlyphs">{escape(name)}</text>'
            f'<text class="s m" x="{middle:.1f}" y="{y + 38}">{escape(chance)}</text>'
        )
        x += width + 4
        most_right = max(most_right, x)
    return "".join(parts), y + _LINE, most_right


def _map(shares: npt.NDArray[np.float32], explanation: Explanation, top: float) -> tuple[str, float, float]:
    """The shares (T, T), or (T, 1 + T) behind a prefix, as squares; also the width and height of the whole picture."""
    rows, columns = shares.shape
    extra = columns - rows
    names = [shortened(visible(token.text), _TOKEN_CELLS) for token in explanation.tokens]
    room = _TOKEN_CELLS * _CELL_WIDTH * 0.8
    cell = int(min(_MOST_CELL, max(_LEAST_CELL, (_WIDTH - 2 * _MARGIN - room) // columns)))
    is_named = cell >= _NAMED_CELL
    parts, size = [], min(12, cell - 1)
    if extra:
        words = f"first the {explanation.prefix_tokens} tokens of the prefix together"
        parts.append(f'<text class="s" x="{_MARGIN}" y="{top + 8:.0f}">{words}</text>')
        top += 14
    for t, row in enumerate(shares):
        y = top + t * cell
        ink = row[: t + 1 + extra]
        parts.append(f'<path class="g" d="M{_MARGIN} {y + cell:.0f}h{len(ink) * cell}"/><g class="a">')
        for at in np.flatnonzero(ink >= _LEAST_SHARE).tolist():
            opacity = f"{float(ink[at]) ** 0.5:.2f}"
            x = _MARGIN + at * cell
            parts.append(f'<rect x="{x}" y="{y:.0f}" width="{cell - 1}" height="{cell - 1}" opacity="{opacity}"/>')
        parts.append("</g>")
        if cell >= _NUMBERED_CELL:
            baseline = f"{y + cell / 2 + 3:.1f}"
            for at in np.flatnonzero(ink >= _LEAST_NUMBER).tolist():
                middle = f"{_MARGIN + (at + 0.5) * cell:.1f}"
                parts.append(f'<text class="n" x="{middle}" y="{baseline}">{100 * ink[at]:.0f}</text>')
        if is_named:
            x = _MARGIN + len(ink) * cell + 6
            style = f"font-size:{size}px"
            parts.append(f'<text x="{x}" y="{y + cell * 0.72:.1f}" style="{style}">{escape(names[t])}</text>')
    width = 2 * _MARGIN + columns * cell + (room if is_named else 0)
    return "".join(parts), width, top + rows * cell + _MARGIN
