"""The report of a run: numbers as JSON, the same numbers as Markdown for people, and loss curves as a picture."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch

from edgelm_export.source.checkpoint import quiet_torch
from edgelm_train.run.folder import end_run, saving, write_json
from edgelm_train.run.loop import Outcome

_CURVES_FILE = "curves.svg"
_LOSS_LABEL = "loss (nats per token)"
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
ReportKind = TypeVar("ReportKind", "TrainingReport", "TuningReport")
Points = Sequence[Mapping[str, Any]]
"""Points of the loss curves, as in `edgelm_train.run.loop.Outcome.log`."""


@dataclass(frozen=True)
class Finished(Generic[ReportKind]):
    """The end of a call: with a report, or without one where a signal stopped a run that can be resumed."""

    report: ReportKind | None
    outcome: Outcome

    @classmethod
    def with_report(
        cls, report: ReportKind, outcome: Outcome, logs: Mapping[str, Points], tokens_per_step: int, out: Path
    ) -> "Finished[ReportKind]":
        """Write report.md, report.json and curves.svg into `out`, and remove its checkpoints.

        The model must be saved already. `logs` and `tokens_per_step` are as for `draw_curves`.
        """
        with saving(out):
            draw_curves(logs, tokens_per_step, out / _CURVES_FILE, label=report.curve_label)
            report.write(out)
        end_run(out)
        return cls(report, outcome)


@dataclass(frozen=True)
class TrainingReport:
    """Results of ``edgelm pretrain``; losses are nats per token, of the model in float32 without dropout."""

    facts: Mapping[str, object]
    """Facts about data, model and run, by their names in the report."""
    held_out: Mapping[int, float]
    """Loss on the held-out text, by the length of its windows in tokens."""
    training: float
    """Loss on as much training text, in windows of the first of those lengths."""
    samples: Sequence[str]
    log: Points
    curve_label: ClassVar[str] = _LOSS_LABEL

    @property
    def gap(self) -> float:
        """Held-out loss minus training loss; a large gap is overfitting."""
        return next(iter(self.held_out.values())) - self.training

    def write(self, folder: Path) -> None:
        """Write report.md and report.json into `folder`."""
        losses = {f"held-out text, windows of {window}": loss for window, loss in self.held_out.items()}
        losses[f"training text, windows of {next(iter(self.held_out))}"] = self.training
        gap = ["", f"Overfitting gap: {self.gap:.4f} nats per token."]
        lines = [*_loss_table("measured", losses), *gap, *_curves_and_facts(self.facts)]
        for number, sample in enumerate(self.samples):
            lines += ["", f"## Sample {number}", "", *(f"> {line}" for line in sample.splitlines())]
        _write(folder, lines, {**asdict(self), "gap": self.gap})


@dataclass(frozen=True)
class TuningReport:
    """Results of ``edgelm finetune`` and ``edgelm distill``; losses as in `TrainingReport`."""

    losses: Mapping[str, float]
    """The `metric` of each measured model on the same held-out data, by the model's name in the report."""
    facts: Mapping[str, object]
    notes: Sequence[str]
    log: Points
    next_steps: Sequence[str] = ()
    """Shell commands that use the result."""
    metric: Literal["loss", "Spearman"] = "loss"

    @property
    def curve_label(self) -> str:
        """What the curves show."""
        return _LOSS_LABEL if self.metric == "loss" else "loss; held out: 1 - Spearman"

    def write(self, folder: Path) -> None:
        """Write report.md and report.json into `folder`."""
        if self.metric == "loss":
            lines = _loss_table("held-out data", self.losses)
        else:
            lines = ["# Training report", "", f"| held-out data | {self.metric} |", "|---|---|"]
            lines += [f"| {name} | {value:.4f} |" for name, value in self.losses.items()]
        lines += _curves_and_facts(self.facts)
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        if self.next_steps:
            lines += ["", "## How to use the result", "", "```sh", *self.next_steps, "```"]
        _write(folder, lines, asdict(self))


def draw_samples(model: Any, tokenizer: Any, seeds: Sequence[int], new_tokens: int) -> list[str]:
    """One text for each seed, continued from <|endoftext|> alone at temperature 0.8 and top_p 0.95."""
    start = torch.tensor([[model.config.bos_token_id]], device=model.device)
    samples = []
    model.eval()
    with quiet_torch(), torch.random.fork_rng():
        for seed in seeds:
            torch.manual_seed(seed)
            ids = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                top_k=0,
                max_new_tokens=new_tokens,
                pad_token_id=model.config.eos_token_id,
            )
            samples.append(tokenizer.decode(ids[0].tolist(), skip_special_tokens=True).strip())
    return samples


def draw_curves(logs: Mapping[str, Points], tokens_per_step: int, path: Path, label: str = _LOSS_LABEL) -> None:
    """Write an SVG of training losses (thin lines) and held-out losses (dots) over tokens.

    `logs` has the points of each run by its name, and each run has a colour. `tokens_per_step` counts the tokens of an
    optimizer step.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    with pyplot.rc_context({"svg.hashsalt": "edgelm", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
        colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(logs)}
        for name, log in logs.items():
            steps, smooth = _averaged([(point["step"], point["loss"]) for point in log if "loss" in point])
            axes.plot([step * tokens_per_step / 1e6 for step in steps], smooth, colours[name], lw=0.8, alpha=0.6)
            measured = [point for point in log if "eval_loss" in point]
            millions = [point["step"] * tokens_per_step / 1e6 for point in measured]
            losses = [point["eval_loss"] for point in measured]
            axes.plot(millions, losses, color=colours[name], marker="o", ms=3, lw=1.2)
        # A single run needs no name. Several runs have a colour each, and the two kinds of lines are grey.
        grey = next(iter(colours.values())) if len(logs) == 1 else "#8c959f"
        runs = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in colours.items()]
        kinds = [
            Line2D([], [], color=grey, lw=0.8, alpha=0.6, label="training"),
            Line2D([], [], color=grey, marker="o", ms=3, lw=1.2, label="held out"),
        ]
        axes.set(xlabel="million tokens", ylabel=label)
        axes.grid(alpha=0.3)
        handles = [*runs, *kinds] if len(logs) > 1 else kinds
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
        pyplot.close(figure)
    path.write_text(drawn.getvalue().replace("<defs>", f"{_STYLE}\n <defs>", 1), encoding="utf-8")


def _averaged(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses of at most 200 points, each the mean of neighbouring points."""
    width = -(-len(points) // _SMOOTHED_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)] if width else []
    return [sum(s for s, _ in g) / len(g) for g in groups], [sum(x for _, x in g) / len(g) for g in groups]


def _write(folder: Path, markdown: Sequence[str], content: Mapping[str, object]) -> None:
    (folder / "report.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    write_json(folder / "report.json", content)  # the last file, because it says that the run is finished


def _loss_table(measured: str, losses: Mapping[str, float]) -> list[str]:
    lines = ["# Training report", "", f"| {measured} | loss (nats per token) | perplexity |", "|---|---|---|"]
    # In torch, unlike in math, the exponential of a large loss is infinite.
    return lines + [f"| {name} | {loss:.4f} | {torch.tensor(loss).exp():.2f} |" for name, loss in losses.items()]


def _curves_and_facts(facts: Mapping[str, object]) -> list[str]:
    lines = ["", f"![loss curves]({_CURVES_FILE})", "", "| fact | |", "|---|---|"]
    return lines + [f"| {name} | {_shown(value)} |" for name, value in facts.items()]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
