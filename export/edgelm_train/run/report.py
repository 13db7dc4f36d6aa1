"""What a training run reports: numbers as JSON, and the same for people as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgelm_export.source.checkpoint import quiet_torch
from edgelm_train.run.json_file import write_json

CURVES_FILE = "curves.svg"


@dataclass(frozen=True)
class TrainingReport:
    """How a run went; losses are nats a token, the model in float32 without dropout."""

    facts: Mapping[str, object]
    """Of data, model and run, by a name for people."""
    held_out: Mapping[int, float]
    """Loss on the held-out text by window."""
    training: float
    """Loss on as much training text, in the first of those windows."""
    samples: Sequence[str]
    log: Sequence[Mapping[str, Any]]

    @property
    def gap(self) -> float:
        """How much better training text is predicted than held-out text: overfitting, where it is large."""
        return next(iter(self.held_out.values())) - self.training

    def write(self, folder: Path) -> None:
        """Put report.json and report.md into `folder`."""
        write_report(folder, {**asdict(self), "gap": self.gap}, self.markdown())

    def markdown(self) -> str:
        """The report for people."""
        lines = ["# Training report", "", "| measured | loss (nats a token) | perplexity |", "|---|---|---|"]
        for window, loss in self.held_out.items():
            lines.append(f"| held-out text, windows of {window} | {loss:.4f} | {perplexity(loss):.2f} |")
        first = next(iter(self.held_out))
        lines.append(f"| training text, windows of {first} | {self.training:.4f} | {perplexity(self.training):.2f} |")
        lines += ["", f"Overfitting gap: {self.gap:.4f} nats a token.", "", f"![loss curves]({CURVES_FILE})", ""]
        lines += ["| fact | |", "|---|---|"]
        lines += [f"| {name} | {shown(value)} |" for name, value in self.facts.items()]
        for number, sample in enumerate(self.samples):
            lines += ["", f"## Sample {number}", "", *(f"> {line}" for line in sample.splitlines())]
        return "\n".join(lines) + "\n"


def draw_samples(model: Any, tokenizer: Any, seeds: Sequence[int], new_tokens: int) -> list[str]:
    """One text for each seed, from nothing but <|endoftext|>, at temperature 0.8 and top_p 0.95."""
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


def write_report(folder: Path, content: Mapping[str, object], markdown: str) -> None:
    """Put report.md and then report.json, which says that the run is finished, into `folder`."""
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    write_json(folder / "report.json", content)


def perplexity(loss: float) -> float:
    """Its exponential, infinite where that is too large for a float32."""
    return float(torch.tensor(loss).exp())


def shown(value: object) -> str:
    """A fact for people."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
