"""What tuning and distilling report: losses by name as JSON, and the same for people as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelm_train.run.loop import Outcome
from edgelm_train.run.report import CURVES_FILE, perplexity, shown, write_report


@dataclass(frozen=True)
class TuningReport:
    """How a run went; losses are nats a token on held-out data, the model in float32 without dropout."""

    losses: Mapping[str, float]
    """On the same held-out data, by what was measured."""
    facts: Mapping[str, object]
    """Of data, model and run, by a name for people."""
    notes: Sequence[str]
    log: Sequence[Mapping[str, Any]]

    def write(self, folder: Path) -> None:
        """Put report.json and report.md into `folder`."""
        write_report(folder, asdict(self), self.markdown())

    def markdown(self) -> str:
        """The report for people."""
        lines = ["# Training report", "", "| held-out data | loss (nats a token) | perplexity |", "|---|---|---|"]
        lines += [f"| {name} | {loss:.4f} | {perplexity(loss):.2f} |" for name, loss in self.losses.items()]
        lines += ["", f"![loss curves]({CURVES_FILE})", "", "| fact | |", "|---|---|"]
        lines += [f"| {name} | {shown(value)} |" for name, value in self.facts.items()]
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class Tuned:
    """How a call ended: with a report, or on a signal, to be resumed."""

    report: TuningReport | None
    outcome: Outcome
