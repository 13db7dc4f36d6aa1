"""``edgelm compare``: two bundles side by side, and how far they agree with each other."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from edgelm.bundle.certificate import Certificate, Quality
from edgelm.bundle.folder import Bundle
from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.progress import percent, progress
from edgelm.cli.shared import json_option, print_json, print_table, print_wrapped, storage_formats, threads_option
from edgelm.cli.streams import print_line
from edgelm.errors import BundleError, DeviceError

if TYPE_CHECKING:
    from edgelm.ids import IdArray, Logits

UNKNOWN = "-"
MAX_NATS = 700
"""Of a token on average; e^710 is larger than any float."""
QUALITY_LABELS = {
    "tokens": "tokens",
    "source_perplexity": "source's perplexity",
    "bundle_perplexity": "bundle's perplexity",
    "perplexity_ratio": "perplexity ratio",
    "mean_kl_divergence": "KL, nats per token",
    "top1_agreement": "same most likely token",
    "max_abs_logit_difference": "largest logit difference",
    "greedy_tokens_equal": "equal greedy tokens",
    "greedy_tokens_compared": "compared greedy tokens",
    "greedy_first_divergence": "first difference after",
}
"""Names of the fields of `Quality` in the table."""


@dataclass(frozen=True)
class Row:
    """One fact of both bundles."""

    name: str
    """Its name in JSON."""
    label: str
    """Its name in the table."""
    values: tuple[object, object]

    @property
    def cells(self) -> tuple[str, str, str]:
        """The row of the table."""
        first, second = (self._shown(value) for value in self.values)
        return self.label, first, second

    def _shown(self, value: object) -> str:
        if value is None:
            return UNKNOWN
        if isinstance(value, bool):
            return "yes" if value else "no"
        if self.name.endswith("_bytes") and isinstance(value, int):
            return f"{value / 1e6:.1f} MB"
        if isinstance(value, float) and self.name.startswith("top1_agreement"):
            return f"{value:.2%}"
        if isinstance(value, float):
            if self.name.endswith("_per_second"):
                return f"{value:,.1f} tokens/s"
            return f"{value:.2%}" if self.name.endswith("_error") else f"{value:.6g}"
        return f"{value:,}" if isinstance(value, int) else str(value)


@click.command(name="compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@threads_option
@json_option("Print one JSON object instead of a table.")
def command(first: str, second: str, threads: int | None, as_json: bool) -> None:
    """Compare the bundles in the folders A and B.

    The table shows sizes, recipes and quality as the two certificates state them. How far A and B agree with each
    other is measured here, on the reference tokens of A. Both bundles must have the same tokenizer.
    """
    a, b = Bundle.read(first), Bundle.read(second)
    rows = _rows(a, b)
    agreement = _agreement(a, b, threads)
    if as_json:
        sides = [{row.name: row.values[side] for row in rows} for side in (0, 1)]
        print_json({"a": sides[0], "b": sides[1], "agreement": agreement})
        return
    print_table([("", "A", "B"), *(row.cells for row in rows)])
    print_line("")
    print_wrapped(f"agreement of A and B on {agreement['tokens']:,} reference tokens of A:")
    print_table(
        [
            ("same most likely token", f"{agreement['top1_agreement']:.2%}"),
            ("KL(A || B)", f"{agreement['mean_kl_divergence']:.6f} nats per token"),
            ("perplexity of A and B", f"{agreement['perplexity_a']:.4f} and {agreement['perplexity_b']:.4f}"),
            ("largest logit difference", f"{agreement['max_abs_logit_difference']:.3g}"),
        ]
    )


def _rows(a: Bundle, b: Bundle) -> list[Row]:
    """All facts of both bundles; their names in JSON carry the units."""

    def row(name: str, label: str, fact: Callable[[Bundle], object]) -> Row:
        return Row(name, label, (fact(a), fact(b)))

    def largest_error(bundle: Bundle) -> float | None:
        return max((matrix.relative_error for matrix in bundle.manifest.recipe.matrices), default=None)

    def certified(name: str, label: str, fact: Callable[[Certificate], object]) -> Row:
        return row(name, label, lambda x: None if x.manifest.certificate is None else fact(x.manifest.certificate))

    rows = [
        row("path", "folder", lambda x: str(x.path)),
        row("source", "source", lambda x: x.manifest.source.name),
        row("precision", "precision", lambda x: x.manifest.recipe.name),
        row("bits", "storage", storage_formats),
        row("calibration_tokens", "calibration tokens", lambda x: x.manifest.recipe.calibration_tokens),
        row("size_bytes", "on disk", lambda x: x.size_bytes),
        row("largest_relative_error", "largest matrix error", largest_error),
        certified("weights_bytes", "weights", lambda c: c.weights_bytes),
        certified("peak_rss_bytes", "peak memory", lambda c: c.footprint.peak_rss_bytes),
        certified("prefill_tokens_per_second", "reads, when exported", lambda c: c.footprint.prefill_tokens_per_second),
        certified("decode_tokens_per_second", "writes, when exported", lambda c: c.footprint.decode_tokens_per_second),
        certified("measured_on_cpu", "measured by", lambda c: c.footprint.cpu),
        certified("gate_passed", "gate passed", lambda c: c.passed),
    ]
    measured = [{q.text: q for q in x.manifest.certificate.texts} if x.manifest.certificate else {} for x in (a, b)]
    for number, text in enumerate(dict.fromkeys([*measured[0], *measured[1]])):
        suffix = f" ({text})" if number else ""
        pair = measured[0].get(text), measured[1].get(text)
        rows.append(_quality_row(f"text{suffix}", "measured on", pair, "text"))
        for field, label in QUALITY_LABELS.items():
            rows.append(_quality_row(f"{field}{suffix}", f"  {label}", pair, field))
    return rows


def _quality_row(name: str, label: str, pair: tuple[Quality | None, Quality | None], field: str) -> Row:
    first, second = (None if quality is None else getattr(quality, field) for quality in pair)
    return Row(name, label, (first, second))


def _agreement(a: Bundle, b: Bundle, threads: int | None) -> dict[str, float]:
    """Run both bundles on the reference tokens of `a`; `b` is judged as if `a` were its source."""
    with ends_at_once():
        from edgelm.bundle.reference import read_reference, rows_of
        from edgelm.decoding.logprobs import BROKEN_LOGITS
        from edgelm.engine.graph import Graph
        from edgelm.scoring.comparison import compare_texts

    sizes = [bundle.manifest.architecture for bundle in (a, b)]
    if sizes[0].vocab_size != sizes[1].vocab_size or _tokenizer_hash(a) != _tokenizer_hash(b):
        raise BundleError(
            f"{str(a.path)!r} and {str(b.path)!r} have different tokenizers, so their tokens cannot be compared; "
            "see each with `edgelm info`"
        )
    facts, data = read_reference(a)
    context = min(size.context_length for size in sizes)
    windows = (row[at : at + context] for row in rows_of(facts, data.ids) for at in range(0, len(row), context))
    texts = [window for window in windows if len(window) >= 2]
    with ends_at_once():
        first, second = (Graph.open(bundle, device="cpu", threads=threads).session() for bundle in (a, b))

    def logits(ids: "IdArray") -> "Logits":
        first.reset()
        return first.score(ids)

    with progress("compared") as show:
        total = compare_texts(logits, second, texts, percent(show))
    nats = total.source_nats / total.tokens, total.bundle_nats / total.tokens, total.kl_nats / total.tokens
    if not all(abs(value) < MAX_NATS for value in nats):  # NaN is not
        raise DeviceError(BROKEN_LOGITS)
    return {
        "tokens": total.tokens,
        "top1_agreement": total.same_top1 / total.tokens,
        "mean_kl_divergence": nats[2],
        "perplexity_a": math.exp(nats[0]),
        "perplexity_b": math.exp(nats[1]),
        "max_abs_logit_difference": total.max_abs_logit_difference,
    }


def _tokenizer_hash(bundle: Bundle) -> str:
    return bundle.manifest.files["tokenizer.json"].sha256
