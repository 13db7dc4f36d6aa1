"""``edgelm info``: what a bundle is, where it came from, what it lost."""

from dataclasses import asdict

import click

from edgelm.bundle.certificate import Quality
from edgelm.bundle.folder import Bundle, default_bundle_path
from edgelm.cli.options import bundle_argument, model_option, one_bundle, print_json
from edgelm.reuse.prefix import Prefix, baked_prefix, shortened


@click.command(name="info")
@bundle_argument
@model_option
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest as one JSON object.")
def command(bundle: str | None, model: str | None, as_json: bool) -> None:
    """Show what a bundle is and what it lost."""
    folder = one_bundle(bundle, model)
    opened = Bundle.read(default_bundle_path() if folder is None else folder)
    if as_json:
        print_json({"path": str(opened.path), "size_bytes": opened.size_bytes, **asdict(opened.manifest)})
        return
    for name, value in _facts(opened):
        click.echo(f"{name:<14}{value}")


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    sizes, source, recipe, certificate = (
        manifest.architecture,
        manifest.source,
        manifest.recipe,
        manifest.certificate,
    )
    bits = sorted({f"{matrix.bits}-bit {matrix.format}" for matrix in recipe.matrices})
    prefix = baked_prefix(bundle)
    with_adapter = f" with the adapter {source.adapter}" if source.adapter else ""
    of_all = f" of {source.vocab_size:,}" if source.vocab_size and source.vocab_size > sizes.vocab_size else ""
    facts = [
        ("bundle", str(bundle.path)),
        ("source", f"{source.name}{with_adapter}, {source.architecture}, {source.parameters:,} parameters"),
        ("revision", source.revision or "not known"),
        ("license", source.license or "not known"),
        (
            "sizes",
            f"{sizes.num_layers} layers, {sizes.num_heads} heads, {sizes.hidden_size} wide, "
            f"vocabulary {sizes.vocab_size:,}{of_all}, context {sizes.context_length:,}",
        ),
        ("precision", f"{recipe.name}: {', '.join(bits)}"),
        ("runs on", f"{', '.join(manifest.graph.devices)}; ONNX Runtime {manifest.graph.minimum_onnxruntime} or newer"),
        ("on disk", f"{bundle.size_bytes / 1e6:.1f} MB in {len(manifest.files) + 1} files"),
        *([] if prefix is None else [("prefix", _prefix_fact(prefix))]),
        ("made by", manifest.created_by),
        ("digest", manifest.digest),
    ]
    if certificate is None:
        return [*facts, ("certificate", "none")]
    c, made_on = certificate, certificate.footprint
    facts += [
        ("weights", f"{c.weights_bytes / 1e6:.1f} MB of {c.source_weights_bytes / 1e6:.1f} MB as 32-bit floats"),
        (
            "speed",
            f"{made_on.decode_tokens_per_second:.0f} tokens/s after a prompt of {made_on.prompt_tokens} at "
            f"{made_on.prefill_tokens_per_second:.0f}; peak {made_on.peak_rss_bytes / 1e6:.0f} MB",
        ),
        ("", f"({made_on.cpu}, {made_on.system}, {made_on.threads} threads, ONNX Runtime {made_on.onnxruntime})"),
    ]
    for quality in c.texts:
        facts += _quality_facts(quality)
    return [
        *facts,
        ("gate", f"{c.gate}: {'passed' if c.passed else 'MISSED'}"),
        ("reference", f"{c.reference.tokens:,} tokens: `edgelm verify` measures them again, anywhere"),
    ]


def _prefix_fact(prefix: Prefix) -> str:
    what = "learned" if prefix.text is None else f"the text {shortened(prefix.text)}"
    return f"{prefix.tokens} tokens before every prompt, {what}; what was measured, was without it"


def _quality_facts(quality: Quality) -> list[tuple[str, str]]:
    q = quality
    first = "never" if q.greedy_first_divergence is None else f"after {q.greedy_first_divergence} tokens"
    return [
        ("measured on", f"{q.tokens:,} tokens, {q.text}"),
        (
            "  perplexity",
            f"{q.source_perplexity:.4f} before, {q.bundle_perplexity:.4f} now (x {q.perplexity_ratio:.4f})",
        ),
        ("  KL", f"{q.mean_kl_divergence:.6f} nats a token"),
        ("  top-1", f"{q.top1_agreement:.2%} of tokens the same"),
        (
            "  greedy",
            f"{q.greedy_tokens_equal} of {q.greedy_tokens_compared} tokens before the first difference of each text; "
            f"first divergence {first}",
        ),
    ]
