"""Loss curves as a picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHED_POINTS = 200
_COLOURS = ("#2f81f7", "#e3722b", "#2da44e", "#d64545", "#a371f7", "#9a7b4f")
"""Colours that are readable on light and on dark pages."""

_STYLE = """<style>
text { fill: #24292f; }
[style*="stroke: #000000"] { stroke: #57606a !important; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  [style*="stroke: #000000"] { stroke: #9198a1 !important; }
}
</style>"""
"""Text and axes take the colours of the page. The background is transparent."""


def draw_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], tokens_per_step: int, path: Path) -> None:
    """Write an SVG of training losses (thin lines) and held-out losses (dots) over tokens.

    Args:
        logs: points as in `edgelm_train.run.loop.Outcome.log`, by the name of the run; each run has a colour.
        tokens_per_step: tokens of an optimizer step.
        path: the file to write.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    with pyplot.rc_context({"svg.hashsalt": "edgelm", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
        colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(logs)}
        for name, log in logs.items():
            losses = [(point["step"], point["loss"]) for point in log if "loss" in point]
            steps, smooth = _averaged(losses)
            axes.plot([s * tokens_per_step / 1e6 for s in steps], smooth, colours[name], lw=0.8, alpha=0.6)
            held_out = [
                (point["step"] * tokens_per_step / 1e6, point["eval_loss"]) for point in log if "eval_loss" in point
            ]
            axes.plot(*zip(*held_out, strict=True), color=colours[name], marker="o", ms=3, lw=1.2)
        # A single run needs no name. Several runs have a colour each, and the two kinds of lines are grey.
        grey = next(iter(colours.values())) if len(logs) == 1 else "#8c959f"
        runs = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in colours.items()]
        kinds = [
            Line2D([], [], color=grey, lw=0.8, alpha=0.6, label="training"),
            Line2D([], [], color=grey, marker="o", ms=3, lw=1.2, label="held out"),
        ]
        axes.set(xlabel="million tokens", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        figure.legend(
            handles=[*(runs if len(logs) > 1 else []), *kinds], loc="outside lower center", ncols=2, frameon=False
        )
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
        pyplot.close(figure)
    path.write_text(drawn.getvalue().replace("<defs>", f"{_STYLE}\n <defs>", 1), encoding="utf-8")


def _averaged(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses of at most 200 points, each the mean of neighbouring points."""
    width = -(-len(points) // _SMOOTHED_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)] if width else []
    return [sum(s for s, _ in g) / len(g) for g in groups], [sum(x for _, x in g) / len(g) for g in groups]
