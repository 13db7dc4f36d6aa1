"""The report of a run: numbers as JSON, and the same numbers as Markdown for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from edgelm_export.source.checkpoint import quiet_torch
from edgelm_train.run.folder import write_json
from edgelm_train.run.loop import Outcome

CURVES_FILE = "curves.svg"
ReportKind = TypeVar("ReportKind", "TrainingReport", "TuningReport")


@dataclass(frozen=True)
class Finished(Generic[ReportKind]):
    """The end of a call: with a report, or without one where a signal stopped a run that can be resumed."""

    report: ReportKind | None
    outcome: Outcome


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
    log: Sequence[Mapping[str, Any]]
    """Points of the loss curves, as in `edgelm_train.run.loop.Outcome.log`."""

    @property
    def gap(self) -> float:
        """Held-out loss minus training loss; a large gap is overfitting."""
        return next(iter(self.held_out.values())) - self.training

    def write(self, folder: Path) -> None:
        """Write report.md and report.json into `folder`."""
        _write(folder, {**asdict(self), "gap": self.gap}, self.markdown())

    def markdown(self) -> str:
        """The report for people."""
        first = next(iter(self.held_out))
        losses = {f"held-out text, windows of {window}": loss for window, loss in self.held_out.items()}
        losses[f"training text, windows of {first}"] = self.training
        gap = ["", f"Overfitting gap: {self.gap:.4f} nats per token."]
        lines = [*_loss_table("measured", losses), *gap, *_curves_and_facts(self.facts)]
        for number, sample in enumerate(self.samples):
            lines += ["", f"## Sample {number}", "", *(f"> {line}" for line in sample.splitlines())]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class TuningReport:
    """Results of ``edgelm finetune`` and ``edgelm distill``; losses as in `TrainingReport`."""

    losses: Mapping[str, float]
    """Loss on the same held-out data of each model that was measured, by the model's name in the report."""
    facts: Mapping[str, object]
    """Facts about data, model and run, by their names in the report."""
    notes: Sequence[str]
    log: Sequence[Mapping[str, Any]]
    """Points of the loss curves, as in `edgelm_train.run.loop.Outcome.log`."""
    next_steps: Sequence[str] = ()
    """Shell commands that use the result."""

    def write(self, folder: Path) -> None:
        """Write report.md and report.json into `folder`."""
        _write(folder, asdict(self), self.markdown())

    def markdown(self) -> str:
        """The report for people."""
        lines = [*_loss_table("held-out data", self.losses), *_curves_and_facts(self.facts)]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        if self.next_steps:
            lines += ["", "## How to use the result", "", "```sh", *self.next_steps, "```"]
        return "\n".join(lines) + "\n"


def draw_samples(model: Any, tokenizer: Any, seeds: Sequence[int], new_tokens: int) -> list[str]:
    """One text for each seed, after nothing but <|endoftext|>, at temperature 0.8 and top_p 0.95."""
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


def _write(folder: Path, content: Mapping[str, object], markdown: str) -> None:
    """report.json comes last, because it says that the run is finished."""
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    write_json(folder / "report.json", content)


def _loss_table(measured: str, losses: Mapping[str, float]) -> list[str]:
    lines = ["# Training report", "", f"| {measured} | loss (nats per token) | perplexity |", "|---|---|---|"]
    return lines + [f"| {name} | {loss:.4f} | {_perplexity(loss):.2f} |" for name, loss in losses.items()]


def _curves_and_facts(facts: Mapping[str, object]) -> list[str]:
    lines = ["", f"![loss curves]({CURVES_FILE})", "", "| fact | |", "|---|---|"]
    return lines + [f"| {name} | {_shown(value)} |" for name, value in facts.items()]


def _perplexity(loss: float) -> float:
    """The exponential of `loss`; infinite where it is too large for a float32."""
    return float(torch.tensor(loss).exp())


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
