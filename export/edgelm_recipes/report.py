"""The report of a recipe: scores, learning curve, budget, speed and commands, as Markdown and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelm_recipes.data import DataFacts
from edgelm_recipes.measure import Scores
from edgelm_recipes.recipe import Recipe
from edgelm_recipes.speed import Speed
from edgelm_train.run.folder import write_json


@dataclass(frozen=True)
class Report:
    """What a recipe made, in numbers."""

    recipe: Recipe
    facts: DataFacts
    scores: Mapping[str, Scores]
    """Of "baseline", "float" and "quantized"."""
    precision: str
    """Of the quantized bundle."""
    perplexity_ratio: float | None
    """Of the quantized bundle on text that its source drew, where the bundle missed its gate; None where it passed."""
    speed: Speed
    tuning: Mapping[str, Any]
    """The content of ``report.json`` of ``edgelm finetune``."""
    machine: str
    base: str
    method: str
    augment: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The main scores, on one line."""
        metric = self.recipe.metric
        baseline, exact, quantized = (self.scores[name].value(metric) for name in ("baseline", "float", "quantized"))
        count = self.scores["quantized"].measured[0].count
        return (
            f"{metric} {quantized:.4g} ({self.precision}), {exact:.4g} (fp32), {baseline:.4g} "
            f"({self.recipe.baseline.name}), on {count:,} examples"
        )

    def write(self, folder: Path) -> None:
        """Write report.md and report.json into `folder`."""
        (folder / "report.md").write_text(self._markdown(), encoding="utf-8")
        write_json(folder / "report.json", self._json())

    def _json(self) -> dict[str, object]:
        return {
            "recipe": self.recipe.name,
            "metric": self.recipe.metric,
            "baseline": self.recipe.baseline.name,
            "base": self.base,
            "method": self.method,
            "precision": self.precision,
            "perplexity_ratio_beyond_gate": self.perplexity_ratio,
            "augment": list(self.augment),
            "data": {**asdict(self.recipe.source), **asdict(self.facts)},
            "scores": {name: scores.as_json() for name, scores in self.scores.items()},
            "speed": asdict(self.speed),
            "machine": self.machine,
            "budget": self.budget,
            "learning_curve": self.curve,
            "commands": list(self.commands),
        }

    @property
    def budget(self) -> dict[str, object]:
        """What training took."""
        facts = self.tuning["facts"]
        names = ("parameters learned", "tokens", "steps", "best step, whose weights these are", "ended", "seconds")
        return {name: facts[name] for name in (*names, "peak learning rate", "precision") if name in facts}

    @property
    def curve(self) -> list[dict[str, float]]:
        """Held-out losses during training, by steps: nats per token, or 1 - Spearman where vectors are learned."""
        points = [point for point in self.tuning["log"] if "eval_loss" in point]
        return [{"step": point["step"], "held_out_loss": point["eval_loss"]} for point in points]

    def _markdown(self) -> str:
        source, speed = self.recipe.source, self.speed
        lines = [f"# {self.recipe.name}: {self.recipe.does}", "", *self._score_table(), ""]
        added = []
        if self.augment:
            added.append(f"{self.facts.augmented:,} changed copies (`--augment {' '.join(self.augment)}`)")
        if self.facts.back_translated:
            added.append(f"{self.facts.back_translated:,} that were translated back")
        within = f", {' and '.join(added)} among them" if added else ""
        lines += [
            f"- Data: {source.name}, {source.url}; licence: {source.licence}.",
            f"- {self.facts.train:,} rows to train on{within}; {self.facts.held_out:,} "
            "held out of the training part to choose the weights by. The development part was not trained on.",
            f"- Base: {self.base}, tuned by the method {self.method}.",
        ]
        if self.perplexity_ratio is not None:
            lines.append(
                f"- The {self.precision} bundle **missed its gate**: on text that its source drew, its perplexity is "
                f"x {self.perplexity_ratio:.4f}. The scores above say what that means for this task."
            )
        if self.facts.form is not None:
            lines.append(f"- Chats are written in this form: {self.facts.form}.")
        lines += [f"- {note[0].upper()}{note[1:]}." for note in self.facts.notes]
        for name, scores in self.scores.items():
            if scores.unanswered:
                count, total = len(scores.unanswered), scores.measured[0].count
                lines.append(f"- {name}: {count:,} of {total:,} inputs have no answer ({scores.unanswered[0]}).")
        lines += ["", "## Speed and memory", ""]
        rate = "" if speed.tokens_per_second is None else f", {speed.tokens_per_second:.1f} tokens/s"
        lines.append(
            f"The {self.precision} bundle takes {speed.median_seconds * 1e3:.1f} ms for an input{rate}, and "
            f"{speed.peak_rss_bytes / 1e6:.0f} MB of memory at most: medians of {speed.inputs} inputs of the "
            f"development part on {speed.threads} threads, {self.machine}."
        )
        measured = "1 - Spearman" if self.tuning.get("metric") == "Spearman" else "loss (nats per token)"
        lines += ["", "## Training", "", "| budget | |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in {**self.budget, "machine": self.machine}.items()]
        lines += ["", "![loss curves](tuned/curves.svg)", "", f"| step | held-out {measured} |", "|--:|--:|"]
        lines += [f"| {point['step']:,} | {point['held_out_loss']:.4f} |" for point in self.curve]
        lines += ["", "## Commands", "", "```sh", *self.commands, "```"]
        return "\n".join(lines) + "\n"

    def _score_table(self) -> list[str]:
        metrics = [one.metric for one in self.scores["quantized"].measured]
        measured = self.scores["quantized"].measured[0]
        rows = {f"baseline: {self.recipe.baseline.name}": self.scores["baseline"]}
        rows |= {"fp32": self.scores["float"], self.precision: self.scores["quantized"]}
        table = [f"| {measured.data}, {measured.count:,} examples | {' | '.join(metrics)} |"]
        table.append(f"|---|{'--:|' * len(metrics)}")
        for name, scores in rows.items():
            table.append(f"| {name} | {' | '.join(f'{scores.value(metric):.4g}' for metric in metrics)} |")
        ratios = (_ratio(self.scores["quantized"].value(name), self.scores["float"].value(name)) for name in metrics)
        return [*table, f"| {self.precision} / fp32 | {' | '.join(ratios)} |"]


def _ratio(value: float, exact: float) -> str:
    return f"{value / exact:.4f}" if exact else ""


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
