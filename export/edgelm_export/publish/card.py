"""The bundle's README.md: a model card in the hub's form."""

import json

from edgelm.bundle.certificate import Certificate, Quality
from edgelm.bundle.manifest import Manifest
from edgelm.bundle.task import ChatTask, ChooseTask, Task, fields_of
from edgelm.errors import shortened
from edgelm.reuse.prefix import Prefix

_BAR_CHARACTERS = 32
_SOURCE_CARD = "\n## The source's own card\n\n"
_PRECISION_TEXT = {
    "fp32": "32-bit floats, exact",
    "fp16": "16-bit floats",
    "int8": "8-bit weights and activations in blocks, token table and head too",
    "w8a8": "8-bit weights and activations, one scale per token and per column; 8-bit token table and head",
    "int4": "4-bit weights in blocks; 8-bit token table and head",
    "int4-small": "4-bit weights in blocks, token table and head too",
    "mixed": "4- and 8-bit weights, chosen matrix by matrix",
}


def model_card(
    manifest: Manifest,
    certificate: Certificate,
    folder_name: str,
    model_type: str,
    source_card: str,
    prefix: Prefix | None = None,
    task: Task | None = None,
) -> str:
    """The text of the card.

    Args:
        folder_name: name of the bundle's folder, for the commands.
        model_type: name of the family, for the tags.
        source_card: text of the source's own card, which is quoted at the end; empty where there is none.
        prefix: the bundle's prefix, if any.
        task: the bundle's task, if any.
    """
    source, recipe, c, made_on = manifest.source, manifest.recipe, certificate, certificate.footprint
    # JSON strings are YAML strings: quoted, so that a name cannot end the front matter.
    meta = ["library_name: edgelm", "pipeline_tag: text-generation", f"tags: [edgelm, onnx, {model_type}]"]
    if source.license:
        meta.append(f"license: {json.dumps(source.license)}")
    if source.revision:  # it came from the hub
        meta += [f"base_model: {json.dumps(source.name)}", "base_model_relation: quantized"]
    memory = f"{made_on.peak_rss_bytes / 1e6:.0f} MB"
    exact = manifest.graph.exact_logits
    head = "" if exact is None else f", with a head of two stages ({exact} logits exact)"
    cache = ", with keys and values in 8 bits" if manifest.graph.kv_dtype == "int8" else ""
    quoted = f"{_SOURCE_CARD}{source_card}\n" if source_card else ""
    return f"""---
{chr(10).join(meta)}
---

# {source.name}, {recipe.name}

An edgelm bundle of **{source.name}** ({source.architecture}, {source.parameters:,} parameters){_changes(manifest)}:
{_PRECISION_TEXT[recipe.name]}{head}{cache}. It runs without torch:

```sh
{_command(folder_name, task)}
```
{_about_task(task)}{_about_prefix(prefix)}{_about_latent(manifest)}{_about_draft(manifest)}
## What it lost

Measured against {source.name} in float32, with the runtime of edgelm:

{_table(c)}

{_chart(c)}

Gate, on the first text: {c.gate}: **{"passed" if c.passed else "missed"}**.
Every matrix with its bits and its error is listed in `bundle.json`. `edgelm verify {folder_name}` measures
{c.reference.tokens:,} tokens again, on your machine and without torch, and fails if the weights were altered.

With {made_on.prompt_tokens} tokens of prompt and {made_on.new_tokens} new tokens a process took {memory} of memory.
`edgelm bench {folder_name}` measures the speed on your machine.
{quoted}"""


def quoted_card(card: str) -> str:
    """The source's own card in a text of `model_card`; empty where it has none."""
    return card.partition(_SOURCE_CARD)[2].removesuffix("\n")


def _table(certificate: Certificate) -> str:
    """A table with a column for each text."""
    texts = certificate.texts
    rows: list[tuple[str, list[str]]] = [
        ("", [_cell(q.text) for q in texts]),
        ("---", ["--:"] * len(texts)),
        ("tokens", [f"{q.tokens:,}" for q in texts]),
        ("perplexity of the source", [f"{q.source_perplexity:.4f}" for q in texts]),
        ("perplexity of this bundle", [f"{q.bundle_perplexity:.4f} (× {q.perplexity_ratio:.4f})" for q in texts]),
        ("mean KL divergence, nats", [f"{q.mean_kl_divergence:.6f}" for q in texts]),
        ("same most likely token", [f"{q.top1_agreement:.2%}" for q in texts]),
        ("same greedy text", [_same_greedy(q) for q in texts]),
        ("largest difference of a logit", [f"{q.max_abs_logit_difference:.2g}" for q in texts]),
    ]
    return "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)


def _same_greedy(quality: Quality) -> str:
    at = quality.greedy_first_divergence
    equal = f"{quality.greedy_tokens_equal} of {quality.greedy_tokens_compared} tokens"
    return equal if at is None else f"{equal}, the first text differs after {at}"


def _chart(certificate: Certificate) -> str:
    """Bars in a code block, which is readable as plain text and on the hub."""
    first, c = certificate.drawn, certificate
    larger = max(c.weights_bytes, c.source_weights_bytes)
    higher = max(first.source_perplexity, first.bundle_perplexity)
    lines = [
        _bar("size        source", c.source_weights_bytes / larger, f"{c.source_weights_bytes / 1e6:.1f} MB"),
        _bar("            bundle", c.weights_bytes / larger, f"{c.weights_bytes / 1e6:.1f} MB"),
        _bar("perplexity  source", first.source_perplexity / higher, f"{first.source_perplexity:.2f}"),
        _bar("            bundle", first.bundle_perplexity / higher, f"{first.bundle_perplexity:.2f}"),
        _bar("same top token    ", first.top1_agreement, f"{first.top1_agreement:.1%}"),
    ]
    return "\n".join(["```text", *lines, "```"])


def _bar(label: str, share: float, value: str) -> str:
    """A bar of eighths of a character."""
    eighths = round(share * 8 * _BAR_CHARACTERS)
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return f"{label}  {bar:<{_BAR_CHARACTERS}}  {value}"


def _cell(text: str) -> str:
    """`text` without line ends and bars, which would end its cell of the table."""
    return " ".join(text.replace("|", "\\|").split())


def _command(folder_name: str, task: Task | None) -> str:
    """How to run the bundle."""
    if task is None:
        return f'edgelm run -m {folder_name} "Once upon a time"'
    if isinstance(task, ChatTask):
        return f"edgelm chat -m {folder_name}"
    fields = fields_of(task)
    if len(fields) == 1:
        return f'edgelm run -m {folder_name} "..."'
    return " ".join([f"edgelm run -m {folder_name}", *(f'--field {name}="..."' for name in fields)])


def _about_task(task: Task | None) -> str:
    """A paragraph about the bundle's task, and what it scored."""
    if task is None:
        return ""
    fields = ", ".join(f"`{name}`" for name in fields_of(task))
    what = f" {_cell(task.description)}" if task.description else ""
    lines = [f"\n**What it does** ({task.kind}, from {fields}).{what}"]
    if isinstance(task, ChooseTask):
        lines.append(f"Its labels: {_cell(', '.join(task.choices))}.")
    if task.measured:
        lines += ["", "| metric | this bundle | source | data | examples |", "|---|--:|--:|---|--:|"]
    for m in task.measured or ():
        source = "" if m.float_value is None else f"{m.float_value:.4g}"
        lines.append(f"| {_cell(m.metric)} | {m.value:.4g} | {source} | {_cell(m.data)} | {m.count:,} |")
    return "\n".join(lines) + "\n"


def _about_prefix(prefix: Prefix | None) -> str:
    """A paragraph about the bundle's prefix."""
    if prefix is None:
        return ""
    origin = "learned by prefix-tuning" if prefix.text is None else f"of the text {shortened(_cell(prefix.text))}"
    return f"""
{prefix.tokens} tokens stand before every prompt, {origin}. The bundle contains their keys and values, so nothing needs
to compute them. The figures below were measured without them.
"""


def _about_latent(manifest: Manifest) -> str:
    """A paragraph about the bundle's latent part."""
    latent = manifest.latent
    if latent is None or latent.reference is None:
        return ""
    r = latent.reference
    return f"""
The bundle has a latent space of {latent.size} dimensions: `edgelm latent encode` turns a text into a vector, and
`edgelm latent decode` a vector into a text. On {r.texts} texts drawn behind vectors of their own, the perplexity of the
source is {r.source_perplexity:.4f} and that of this bundle × {r.perplexity_ratio:.4f}; the means of its posteriors
are {r.posterior_shift:.4f} standard deviations away. Gate: {r.gate}: **{"passed" if r.passed else "missed"}**.
"""


def _about_draft(manifest: Manifest) -> str:
    """A paragraph about the small model that guesses tokens."""
    if manifest.draft is None:
        return ""
    return f"""
A small model, {_cell(manifest.draft.source_name)} ({manifest.draft.recipe.name}), guesses tokens, and this one checks
several guesses in one call. The text is that of this model alone.
"""


def _changes(manifest: Manifest) -> str:
    """What was done to the source before its weights were stored."""
    source, kept = manifest.source, manifest.architecture.vocab_size
    text = f"\nwith the adapter **{source.adapter}** merged into it" if source.adapter else ""
    if source.vocab_size and source.vocab_size > kept:
        text += f",\nits vocabulary cut to the {kept:,} of {source.vocab_size:,} tokens that a domain needs"
    return text
