"""``edgelm compare``: two bundles side by side, and how far they agree with each other."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from edgelm.bundle.certificate import Certificate
from edgelm.bundle.folder import Bundle
from edgelm.cli.options import print_json
from edgelm.errors import BundleError

if TYPE_CHECKING:
    from edgelm.bundle.reference import Ids
    from edgelm.ids import Logits

Row = tuple[str, object, object]
NOT_KNOWN = "-"


@click.command(name="compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--threads", type=int, metavar="N", help="CPU threads; all allowed CPUs when not given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(first: str, second: str, threads: int | None, as_json: bool) -> None:
    """Show the bundles in the folders A and B side by side, and measure how far they agree.

    Sizes, recipe, and what each lost against its source are those of their certificates. Their agreement with each
    other is measured here, on A's reference tokens; it takes two bundles of one vocabulary.
    """
    one, other = Bundle.read(first), Bundle.read(second)
    rows = _rows(one, other)
    agreement = _agreement(one, other, threads)
    if as_json:
        sides = [{name: pair[side] for name, *pair in rows} for side in (0, 1)]
        print_json({"a": sides[0], "b": sides[1], "agreement": agreement})
        return
    shown = [(name, _show(name, a), _show(name, b)) for name, a, b in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(2)]
    for name, a, b in shown:
        click.echo(f"{name:<{widths[0]}}  {a:<{widths[1]}}  {b}")
    click.echo()
    click.echo(f"agreement with each other, on {agreement['tokens']:,} reference tokens of A:")
    click.echo(f"same most likely token    {agreement['top1_agreement']:.2%}")
    click.echo(f"KL(A || B)                {agreement['mean_kl_divergence']:.6f} nats a token")
    click.echo(f"perplexity                {agreement['perplexity_a']:.4f} and {agreement['perplexity_b']:.4f}")
    click.echo(f"largest logit difference  {agreement['max_abs_logit_difference']:.3g}")


def _rows(one: Bundle, other: Bundle) -> list[Row]:
    """The facts of both bundles, named with their units."""
    pair = (one, other)

    def row(name: str, fact: Callable[[Bundle], object]) -> Row:
        return name, fact(pair[0]), fact(pair[1])

    rows = [
        row("path", lambda b: str(b.path)),
        row("source", lambda b: b.manifest.source.name),
        row("precision", lambda b: b.manifest.recipe.name),
        row("bits", lambda b: ", ".join(sorted({f"{m.bits}-bit {m.format}" for m in b.manifest.recipe.matrices}))),
        row("calibration_tokens", lambda b: b.manifest.recipe.calibration_tokens),
        row("size_bytes", lambda b: b.size_bytes),
        row(
            "largest_relative_error",
            lambda b: max((m.relative_error for m in b.manifest.recipe.matrices), default=None),
        ),
    ]

    def certified(name: str, fact: Callable[[Certificate], object]) -> Row:
        return row(name, lambda b: None if b.manifest.certificate is None else fact(b.manifest.certificate))

    rows += [
        certified("weights_bytes", lambda c: c.weights_bytes),
        certified("peak_rss_bytes", lambda c: c.footprint.peak_rss_bytes),
        certified("prefill_tokens_per_second", lambda c: c.footprint.prefill_tokens_per_second),
        certified("decode_tokens_per_second", lambda c: c.footprint.decode_tokens_per_second),
        certified("measured_on_cpu", lambda c: c.footprint.cpu),
        certified("gate_passed", lambda c: c.passed),
    ]
    texts = list(dict.fromkeys(q.text for b in pair if b.manifest.certificate for q in b.manifest.certificate.texts))
    for text in texts:
        suffix = "" if text == texts[0] else f" ({text})"
        rows.append((f"text{suffix}", text if _has(one, text) else None, text if _has(other, text) else None))
        for name in (
            "tokens",
            "source_perplexity",
            "bundle_perplexity",
            "perplexity_ratio",
            "mean_kl_divergence",
            "top1_agreement",
            "max_abs_logit_difference",
            "greedy_tokens_equal",
            "greedy_tokens_compared",
            "greedy_first_divergence",
        ):
            rows.append((name + suffix, _quality(one, text, name), _quality(other, text, name)))
    return rows


def _has(bundle: Bundle, text: str) -> bool:
    certificate = bundle.manifest.certificate
    return certificate is not None and any(quality.text == text for quality in certificate.texts)


def _quality(bundle: Bundle, text: str, name: str) -> object:
    certificate = bundle.manifest.certificate
    found = [quality for quality in certificate.texts if quality.text == text] if certificate else []
    return getattr(found[0], name) if found else None


def _agreement(one: Bundle, other: Bundle, threads: int | None) -> dict[str, float]:
    """Run both on the reference tokens of the first; the second is judged as if the first were its source."""
    import math

    from edgelm.bundle.reference import read_reference, rows_of
    from edgelm.engine.graph import Graph
    from edgelm.scoring.comparison import compare_texts

    sizes = [bundle.manifest.architecture for bundle in (one, other)]
    if sizes[0].vocab_size != sizes[1].vocab_size or _tokenizer_hash(one) != _tokenizer_hash(other):
        raise BundleError(
            f"{str(one.path)!r} and {str(other.path)!r} have different tokenizers, so their tokens cannot be compared; "
            "see each with `edgelm info`"
        )
    facts, data = read_reference(one)
    context = min(size.context_length for size in sizes)
    texts = [part for row in rows_of(facts, data.ids) for part in _windows(row, context)]
    first, second = (Graph.open(bundle, device="cpu", threads=threads).session() for bundle in (one, other))

    def logits(ids: "Ids") -> "Logits":
        first.reset()
        return first.score(ids)

    found = compare_texts(logits, second, texts)
    return {
        "tokens": found.tokens,
        "top1_agreement": found.same_top1 / found.tokens,
        "mean_kl_divergence": found.kl_nats / found.tokens,
        "perplexity_a": math.exp(found.source_nats / found.tokens),
        "perplexity_b": math.exp(found.bundle_nats / found.tokens),
        "max_abs_logit_difference": found.max_abs_logit_difference,
    }


def _windows(row: "Ids", context: int) -> "list[Ids]":
    parts = [row[start : start + context] for start in range(0, len(row), context)]
    return [part for part in parts if len(part) >= 2]


def _tokenizer_hash(bundle: Bundle) -> str:
    return bundle.manifest.files["tokenizer.json"].sha256


def _show(name: str, value: object) -> str:
    if value is None:
        return NOT_KNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 1e6:.1f} MB"
    if isinstance(value, float):
        return f"{value:.1f}" if name.endswith("_per_second") else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
