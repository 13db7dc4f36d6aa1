"""Loss curves as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHED_POINTS = 200


def draw_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], tokens_a_step: int, path: Path) -> None:
    """Write an SVG of training losses (thin) and held-out losses (dots) over tokens, a colour for each named log.

    Args:
        logs: points as `edgelm_train.run.loop.Outcome.log` has them.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "edgelm", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for number, (name, log) in enumerate(logs.items()):
            color = f"C{number}"
            label = f"{name}: " if len(logs) > 1 else ""
            losses = [(point["step"], point["loss"]) for point in log if "loss" in point]
            steps, smooth = _averaged(losses)
            axes.plot(
                [s * tokens_a_step / 1e6 for s in steps], smooth, color, lw=0.8, alpha=0.6, label=f"{label}training"
            )
            held_out = [
                (point["step"] * tokens_a_step / 1e6, point["eval_loss"]) for point in log if "eval_loss" in point
            ]
            axes.plot(*zip(*held_out, strict=True), f"{color}o-", ms=3, lw=1.2, label=f"{label}held out")
        axes.set(xlabel="million tokens", ylabel="loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _averaged(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """At most 200 points, each the mean of neighbours."""
    width = -(-len(points) // _SMOOTHED_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)] if width else []
    return [sum(s for s, _ in g) / len(g) for g in groups], [sum(x for _, x in g) / len(g) for g in groups]
