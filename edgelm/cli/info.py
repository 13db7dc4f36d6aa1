"""``edgelm info``: what a bundle is, where it came from, and what its conversion cost; and what a prefix is."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgelm.bundle.certificate import Certificate, Quality
from edgelm.bundle.folder import Bundle
from edgelm.bundle.latent_facts import LatentFacts
from edgelm.bundle.manifest import PREFIX_FILE, DraftFacts, Manifest
from edgelm.bundle.task import ChatTask, ChooseTask, EmbedTask, Measured, Task, fields_of, read_task
from edgelm.cli.shared import bundle_options, json_option, print_json, print_table, storage_formats
from edgelm.errors import shortened

if TYPE_CHECKING:
    from edgelm.reuse.prefix import Prefix

Fact = tuple[str, str]


@click.command(name="info")
@bundle_options
@click.option("--prefix", metavar="FILE", help="Prefix file to show too, with its task in place of the bundle's.")
@json_option("Print the whole manifest as one JSON object.")
def command(place: str, prefix: str | None, as_json: bool) -> None:
    """Show a bundle's source, size and quality certificate."""
    bundle = Bundle.read(place)
    kept = _prefix(bundle, prefix)
    task = read_task(bundle) if kept is None or kept.task is None else kept.task
    if as_json:
        own: dict[str, object] = {} if task is None else {"task": asdict(task)}
        if prefix is not None and kept is not None:
            own["prefix"] = {
                "path": str(kept.path),
                "text": kept.text,
                "tokens": kept.tokens,
                "size_bytes": kept.path.stat().st_size,
                "sha256": kept.sha256,
            }
        print_json({"path": str(bundle.path), "size_bytes": bundle.size_bytes, **asdict(bundle.manifest), **own})
        return
    certificate = bundle.manifest.certificate
    about_prefix = [] if kept is None else [("prefix", _prefix_fact(kept, in_bundle=prefix is None))]
    about_task = [] if task is None else _task_facts(task)
    about_quality = [("certificate", "none")] if certificate is None else _certified(certificate)
    print_table([*_facts(bundle), *about_prefix, *about_task, *about_quality])


def _prefix(bundle: Bundle, path: str | None) -> "Prefix | None":
    """The prefix in the file `path`, or else the bundle's own."""
    if path is None and PREFIX_FILE not in bundle.manifest.files:
        return None
    from edgelm.reuse.prefix import baked_prefix, read_prefix  # imports numpy, which few bundles need

    return baked_prefix(bundle) if path is None else read_prefix(path, bundle)


def _facts(bundle: Bundle) -> list[Fact]:
    manifest = bundle.manifest
    sizes, source, recipe, graph = manifest.architecture, manifest.source, manifest.recipe, manifest.graph
    with_adapter = f" with the adapter {source.adapter}" if source.adapter else ""
    of_all = f" of {source.vocab_size:,}" if source.vocab_size and source.vocab_size > sizes.vocab_size else ""
    return [
        ("bundle", str(bundle.path)),
        ("source", f"{source.name}{with_adapter}, {source.architecture}, {source.parameters:,} parameters"),
        ("revision", source.revision or "not known"),
        ("license", source.license or "not known"),
        (
            "sizes",
            f"{sizes.num_layers} layers, {sizes.num_heads} heads, {sizes.hidden_size} wide, "
            f"vocabulary {sizes.vocab_size:,}{of_all}, context {sizes.context_length:,}",
        ),
        ("precision", f"{recipe.name}: {storage_formats(bundle)}"),
        ("runs on", f"{', '.join(graph.devices)}; ONNX Runtime {graph.minimum_onnxruntime} or newer"),
        ("on disk", f"{bundle.size_bytes / 1e6:.1f} MB in {bundle.file_count} files"),
        *([("latent", _latent_fact(manifest.latent))] if manifest.latent is not None else []),
        *([("drafts", _draft_fact(manifest, manifest.draft))] if manifest.draft is not None else []),
        ("made by", manifest.created_by),
        ("digest", manifest.digest),
    ]


def _task_facts(task: Task) -> list[Fact]:
    what = task.description or "no description"
    facts = [("task", f"{task.kind}: {what}"), ("  input", ", ".join(fields_of(task)))]
    if isinstance(task, ChooseTask):
        more = [f"and {len(task.choices) - 12:,} more"] if len(task.choices) > 12 else []
        facts.append(("  labels", ", ".join([*list(task.choices)[:12], *more])))
    if isinstance(task, ChatTask):
        facts.append(("  system", "none" if task.system is None else shortened(task.system)))
    else:
        facts.append(("  template", shortened(task.template)))
    if isinstance(task, EmbedTask) and task.second_template is not None:
        facts.append(("  compared", shortened(task.second_template)))
    return facts + [("  measured", _score(measured)) for measured in task.measured or ()]


def _score(measured: Measured) -> str:
    source = "" if measured.float_value is None else f" (source {measured.float_value:.4g})"
    return f"{measured.metric} {measured.value:.4g}{source} on {measured.count:,} examples, {measured.data}"


def _prefix_fact(prefix: "Prefix", *, in_bundle: bool) -> str:
    origin = "learned" if prefix.text is None else f"the text {shortened(prefix.text)}"
    place = "" if in_bundle else f"{prefix.path}, {prefix.path.stat().st_size / 1e3:,.0f} kB; "
    return f"{place}{prefix.tokens} tokens before every prompt, {origin}; the certificate was measured without it"


def _latent_fact(latent: LatentFacts) -> str:
    fact = f"vectors of {latent.size} numbers, which take {latent.prefix_tokens} tokens of the context"
    if latent.reference is None:
        return f"{fact}; not measured"
    r = latent.reference
    return (
        f"{fact}; texts behind vectors: perplexity source {r.source_perplexity:.4f} (x {r.perplexity_ratio:.4f}), "
        f"posteriors shifted by {r.posterior_shift:.4f} standard deviations; gate: {'passed' if r.passed else 'MISSED'}"
    )


def _draft_fact(manifest: Manifest, draft: DraftFacts) -> str:
    size_bytes = manifest.files[draft.graph.weights_file].size_bytes
    return f"{draft.source_name}, {draft.recipe.name}, {size_bytes / 1e6:.1f} MB, guesses tokens"


def _certified(certificate: Certificate) -> list[Fact]:
    c, f = certificate, certificate.footprint
    return [
        ("weights", f"{c.weights_bytes / 1e6:.1f} MB, {c.source_weights_bytes / 1e6:.1f} MB as 32-bit floats"),
        ("peak memory", f"{f.peak_rss_bytes / 1e6:.0f} MB with a prompt of {f.prompt_tokens} tokens"),
        ("  machine", f"{f.cpu}, {f.system}, {f.threads} threads, ONNX Runtime {f.onnxruntime}"),
        *(fact for quality in c.texts for fact in _quality_facts(quality)),
        ("speed", "`edgelm bench` measures it on this machine"),
        ("gate", f"{c.gate}: {'passed' if c.passed else 'MISSED'}"),
        ("reference", f"{c.reference.tokens:,} tokens; `edgelm verify` measures them again on any machine"),
    ]


def _quality_facts(quality: Quality) -> list[Fact]:
    q = quality
    first = "no text differs" if q.greedy_first_divergence is None else f"after {q.greedy_first_divergence} tokens"
    return [
        ("measured on", f"{q.tokens:,} tokens, {q.text}"),
        (
            "  perplexity",
            f"source {q.source_perplexity:.4f}, bundle {q.bundle_perplexity:.4f} (x {q.perplexity_ratio:.4f})",
        ),
        ("  KL", f"{q.mean_kl_divergence:.6f} nats per token"),
        ("  top-1", f"the likeliest token is the source's in {q.top1_agreement:.2%} of positions"),
        (
            "  greedy",
            f"{q.greedy_tokens_equal} of {q.greedy_tokens_compared} tokens equal the source's before a text first "
            f"differs; earliest difference: {first}",
        ),
    ]
