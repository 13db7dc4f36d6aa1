"""The whole way from a checkpoint to a published bundle."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgelm import __version__
from edgelm.bundle.certificate import Certificate
from edgelm.bundle.folder import Bundle
from edgelm.bundle.latent_facts import LATENT_FEATURE
from edgelm.bundle.manifest import (
    FORMAT_VERSION,
    PREFIX_FEATURE,
    TASK_FEATURE,
    TASK_FILE,
    VALUE_DIVISORS_FILE,
    CacheType,
    FixedPrecision,
    GraphFacts,
    Manifest,
    Matrix,
    Recipe,
)
from edgelm.bundle.whole_folder import move_into_place
from edgelm.engine.machine import default_threads
from edgelm.errors import ExportError
from edgelm.reuse.kv_file import KvDtype
from edgelm_export.certify.certificate import MAX_ROW_TOKENS, EvaluationText, certify, read_eval_text
from edgelm_export.certify.chats import chat_difference
from edgelm_export.certify.latent import certify_latent, write_latent
from edgelm_export.certify.optimum_graph import OptimumGraph
from edgelm_export.fit import CALIBRATION_TOKENS, store_as, store_within
from edgelm_export.graph.decoder import write_graph
from edgelm_export.model.decoder import DecoderWeights
from edgelm_export.publish.card import model_card
from edgelm_export.publish.draft import add_draft, check_draft, plan_draft
from edgelm_export.publish.folder import folder_bytes, seal, workshop
from edgelm_export.publish.prefix import plan_prefix
from edgelm_export.publish.task import check_task, plan_task
from edgelm_export.quantize.budget import Budget, check_budget
from edgelm_export.quantize.calibrate import StoredDecoder
from edgelm_export.source.adapter import merge_adapter
from edgelm_export.source.chat_template import write_chat_template
from edgelm_export.source.checkpoint import Checkpoint, load_checkpoint
from edgelm_export.source.context import shorten_context
from edgelm_export.source.drawn_text import TextDrawer
from edgelm_export.source.fingerprint import body_sha256
from edgelm_export.source.generation_settings import bundle_settings, stop_ids
from edgelm_export.source.prune import FEATURE, prune_vocabulary

EVALUATION_TOKENS = 10_000
EVALUATION_SEED = 0


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    bundle: Bundle
    certificate: Certificate
    notes: tuple[str, ...]
    """Remarks for the person who exports: a setting that was left out, for example."""


def export(
    source: str,
    output: Path,
    precision: FixedPrecision | Budget,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    tokenizer: str | None = None,
    generation_config: Path | None = None,
    vocabulary: Path | None = None,
    context: int | None = None,
    prefix: Path | None = None,
    prefix_dtype: KvDtype | None = None,
    task: Path | None = None,
    draft_model: Path | None = None,
    two_stage_head: bool = False,
    int8_cache: bool = False,
    accept_quality_loss: bool = False,
    eval_texts: Sequence[Path] = (),
    report: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Turn the checkpoint `source` into a bundle in the folder `output`.

    The bundle is built beside `output` and measured with the runtime against optimum's graph. It is renamed into its
    place only when it is whole and has passed its gate, so nobody sees half a bundle there.

    Args:
        source: a folder in Hugging Face layout, or a hub id.
        output: a folder that does not exist yet, or is empty.
        precision: the name of a recipe, or a budget, for which a recipe is made.
        revision: branch, tag or commit of a hub id.
        adapter: a LoRA adapter to merge into the source first: a folder that peft wrote, or a hub id.
        tokenizer: a folder or a hub id whose tokenizer takes the place of the source's.
        generation_config: file of generation settings that override the source's.
        vocabulary: file of UTF-8 text. Only the tokens of this text are kept, and the tokens that spell all other text.
        context: the longest text, in tokens; None for the source's own context.
        prefix: file to put before every prompt of the bundle: UTF-8 text, or a prefix that was learned. Its task
            becomes the bundle's, unless `task` is given.
        prefix_dtype: type of the prefix's keys and values; None for the cache's own type, which is exact.
        task: file that says what the bundle is for (docs/tasks.md).
        draft_model: bundle of a much smaller model with the same vocabulary, which guesses tokens in the new bundle.
        two_stage_head: whether a coarse head of 4 bits finds the likeliest tokens, whose logits are then computed from
            the 8-bit table (docs/precision.md); not with a budget.
        int8_cache: whether keys and values are kept in 8 bits, which takes a quarter of the memory; neither with floats
            nor with a latent part or a learned prefix (docs/precision.md).
        accept_quality_loss: whether to publish a bundle that missed its gate.
        eval_texts: files of UTF-8 text to measure on, beside the text drawn from the source.
        report: called with the name of each stage as it begins.

    Raises:
        ExportError: two arguments exclude each other, the output is taken or not writable, the source or the task
            cannot be used, or the gate was missed.
    """
    if two_stage_head and isinstance(precision, Budget):
        raise ExportError("two_stage_head goes with the name of a recipe, not with a budget; give one of them")
    if int8_cache and precision in ("fp32", "fp16"):
        raise ExportError(
            f"an int8 cache loses more than {precision} promises: leave it out, or choose a quantized precision"
        )
    if prefix_dtype is not None and prefix is None:
        raise ExportError("prefix_dtype is given without a prefix; give both, or neither")
    planned_task = None if task is None else plan_task(task)
    small = None if draft_model is None else plan_draft(draft_model)
    torch.set_num_threads(default_threads())  # torch itself ignores a container's quota
    output = Path(output).absolute()
    with workshop(output) as (draft, scratch):
        report(f"loading {source}")
        checkpoint = load_checkpoint(source, revision, tokenizer=tokenizer, generation_config=generation_config)
        if adapter is not None:
            report(f"merging the adapter {adapter}")
            checkpoint = merge_adapter(checkpoint, adapter)
        if vocabulary is not None:
            report(f"keeping the tokens that {vocabulary} needs")
            checkpoint = prune_vocabulary(checkpoint, vocabulary)
        if context is not None:
            checkpoint = shorten_context(checkpoint, context)
        checkpoint = _with_equal_chats(checkpoint)
        if small is not None:
            check_draft(small, checkpoint.tokenizer)
        cache_type: CacheType = "int8" if int8_cache else "float32"
        if int8_cache and checkpoint.latent is not None:
            raise ExportError("an int8 cache does not go with a latent part, whose keys and values are floats")
        planned = None if prefix is None else plan_prefix(prefix, prefix_dtype, checkpoint, cache_type)
        if planned_task is None and planned is not None:
            planned_task = planned.task
        settings, notes = bundle_settings(checkpoint.generation_settings, checkpoint.architecture.vocab_size)
        if planned_task is not None:
            check_task(planned_task.task, checkpoint.tokenizer, checkpoint.chat_template, settings)
        bos, row_tokens = settings.get("bos_token_id"), min(checkpoint.architecture.context_length, MAX_ROW_TOKENS)
        bos_token_id = bos if isinstance(bos, int) else None
        files = [read_eval_text(path, checkpoint.tokenizer, bos_token_id, row_tokens) for path in eval_texts]
        report("exporting the reference graph with optimum")
        reference = OptimumGraph(checkpoint.model, scratch)
        report(f"drawing {EVALUATION_TOKENS:,} tokens from the source to measure on")
        drawer = TextDrawer(checkpoint.model, scratch / "source")
        texts = drawer.draw(EVALUATION_TOKENS, EVALUATION_SEED)
        _write_papers(checkpoint, settings, draft)
        if planned_task is not None:
            (draft / TASK_FILE).write_bytes(planned_task.content)
        budget, limit = None, None
        if isinstance(precision, Budget):
            budget, limit = precision, precision.max_perplexity_ratio
            prefix_bytes = 0 if planned is None else planned.size_bytes
            stored, given_up = store_within(
                checkpoint,
                precision,
                drawer,
                draft / "tokenizer.json",
                prefix_bytes,
                report,
                int8_cache=int8_cache,
            )
            notes += (given_up,)
        else:
            stored = store_as(
                checkpoint, precision, drawer, report, two_stage_head=two_stage_head, int8_cache=int8_cache
            )
        report("writing the graph")
        graph, matrices = write_graph(stored, draft)
        _check_account(checkpoint, stored.source, matrices)
        _write_value_divisors(stored.source, draft)
        uncertified = _uncertified(checkpoint, stored, graph, matrices)
        if checkpoint.latent is not None:
            end = _end_token(checkpoint)
            latent = write_latent(checkpoint.latent, stored.source, stored.recipe.name, (end, end), draft)
            features = (*uncertified.required_features, LATENT_FEATURE)
            uncertified = replace(uncertified, latent=latent, required_features=features)
        uncertified = replace(uncertified, required_features=(*uncertified.required_features, *graph.features))
        if planned_task is not None:
            uncertified = replace(uncertified, required_features=(*uncertified.required_features, TASK_FEATURE))
        manifest = seal(draft, uncertified)
        drawn = EvaluationText(f"drawn from the source at temperature 1, seed {EVALUATION_SEED}", texts)
        measured = certify(Bundle.read(draft), limit, reference.logits, [drawn, *files], report)
        if not (measured.passed or accept_quality_loss):
            lost = measured.drawn
            raise ExportError(
                f"the {stored.recipe.name} bundle missed its gate ({measured.gate}): perplexity ratio "
                f"{lost.perplexity_ratio:.4f}, max |logit difference| {lost.max_abs_logit_difference:.2g}; "
                "nothing was written; choose a finer precision or add --accept-quality-loss"
            )
        manifest, added = replace(manifest, certificate=measured), None
        if checkpoint.latent is not None:
            report("measuring the latent part against the source")
            manifest = seal(draft, manifest)
            of_latent = certify_latent(Bundle.read(draft), checkpoint.model, checkpoint.latent)
            if not (of_latent.passed or accept_quality_loss):
                raise ExportError(
                    f"the latent part of the {stored.recipe.name} bundle missed its gate ({of_latent.gate}): ratio "
                    f"{of_latent.perplexity_ratio:.4f}, shift {of_latent.posterior_shift:.2g}; nothing was written; "
                    "choose a finer precision or add --accept-quality-loss"
                )
            assert manifest.latent is not None
            manifest = replace(manifest, latent=replace(manifest.latent, reference=of_latent))
        if planned is not None:
            report(f"adding the prefix {prefix}")
            manifest = seal(draft, manifest)
            added = planned.write(draft, scratch)
            manifest = replace(manifest, required_features=(*manifest.required_features, PREFIX_FEATURE))
        if small is not None:
            manifest = add_draft(small, draft, manifest)
        if budget is not None:
            check_budget(budget, folder_bytes(draft), measured.footprint.peak_rss_bytes)
        job = None if planned_task is None else planned_task.task
        card = model_card(manifest, measured, output.name, stored.source.model_type, checkpoint.card, added, job)
        (draft / "README.md").write_text(card, encoding="utf-8", newline="\n")
        seal(draft, manifest)
        move_into_place(draft, output)
    return Exported(Bundle.read(output), measured, checkpoint.notes + notes)


def _uncertified(
    checkpoint: Checkpoint, stored: StoredDecoder, graph: GraphFacts, matrices: tuple[Matrix, ...]
) -> Manifest:
    """The manifest of a bundle that has not been measured yet, without its files."""
    is_pruned = checkpoint.architecture.vocab_size != checkpoint.source.vocab_size
    return Manifest(
        format_version=FORMAT_VERSION,
        required_features=(FEATURE,) if is_pruned else (),
        created_by=f"edgelm {__version__}",
        architecture=checkpoint.architecture,
        graph=graph,
        recipe=Recipe(stored.recipe.name, CALIBRATION_TOKENS if stored.recipe.is_quantized else None, matrices),
        source=replace(checkpoint.source, body_sha256=body_sha256(checkpoint.model)),
        certificate=None,
    )


def _end_token(checkpoint: Checkpoint) -> int:
    """The token before and behind every text of a latent part: the first at which the checkpoint's texts end."""
    ends = stop_ids(checkpoint.generation_settings, checkpoint.architecture.vocab_size)
    if not ends:
        raise ExportError(
            f"{checkpoint.name!r} has a latent part and no eos_token_id, which its texts begin and end with"
        )
    return ends[0]


def _with_equal_chats(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` without its chat template, and with a note, where the runtime would write chats otherwise."""
    if checkpoint.chat_template is None:
        return checkpoint
    difference = chat_difference(checkpoint.chat_template, checkpoint.tokenizer)
    if difference is None:
        return checkpoint
    note = f"the bundle has no chat template, because edgelm does not use it as transformers does: {difference}"
    return replace(checkpoint, chat_template=None, notes=(*checkpoint.notes, note))


def _check_account(checkpoint: Checkpoint, weights: DecoderWeights, matrices: tuple[Matrix, ...]) -> None:
    """Refuse an account in which a matrix of the source is missing, or stands twice."""
    joined = {linear.name: linear.source_names for linear in weights.products}
    names: dict[int, str] = {}  # only the first name of a tied matrix
    for name, tensor in checkpoint.model.state_dict().items():
        if tensor.ndim == 2:
            names.setdefault(tensor.data_ptr(), name)
    stored = [name for matrix in matrices for name in joined.get(matrix.name, (matrix.name,))]
    if sorted(stored) != sorted(names.values()):
        wrong = sorted(set(names.values()).symmetric_difference(stored)) or stored
        raise ExportError(f"the graph must store the weight matrix {wrong[0]!r} exactly once: please report this")


def _write_value_divisors(weights: DecoderWeights, draft: Path) -> None:
    """Write the factors by which smoothing divided the values, if it did: the values of a learned prefix need them."""
    divisors = [layer.value_divisors for layer in weights.layers if layer.value_divisors is not None]
    if divisors:
        assert len(divisors) == len(weights.layers), "smoothing divides the values of all layers, or of no layer"
        (draft / VALUE_DIVISORS_FILE).write_bytes(np.stack(divisors).astype("<f4").tobytes())


def _write_papers(checkpoint: Checkpoint, settings: dict[str, Any], draft: Path) -> None:
    checkpoint.tokenizer.save(draft)
    if checkpoint.chat_template is not None:
        write_chat_template(checkpoint.chat_template, draft)
    (draft / "config.json").write_text(checkpoint.config_json, encoding="utf-8", newline="\n")
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (draft / "generation_config.json").write_text(text + "\n", encoding="utf-8", newline="\n")
