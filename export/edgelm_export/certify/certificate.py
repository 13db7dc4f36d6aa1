"""The certificate of a finished draft: quality on every text, footprint, and the reference for measuring again."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from edgelm.bundle.certificate import Certificate, Footprint, Quality, Reference
from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import Manifest
from edgelm.bundle.reference import ReferenceData, encode_reference, rounded, rows_of
from edgelm.engine.graph import Graph
from edgelm.engine.session import Session
from edgelm.errors import ExportError
from edgelm.ids import IdArray, Logits
from edgelm.scoring.comparison import compare_texts
from edgelm.scoring.verification import drift, figures, observe, observe_session, source_perplexity
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.certify.judgement import GREEDY_PROMPTS, SourceLogits, count_equal_greedy, judge, quality
from edgelm_export.source.hub import read_text

REFERENCE_NAME = "reference.bin"
REFERENCE_TOKENS = 2_048
"""The reference has at least one row that fills the context, so that every learned position is measured again."""
MAX_ROW_TOKENS = 2_048
"""Longer rows measure nothing new where positions are not learned, and attention in the reference graph takes memory
that grows with their square."""
MAX_REFERENCE_TOKENS = 16_384
TOP_COUNT = 8
MAX_EVAL_TEXT_BYTES = 64 * 2**20
BENCH_RUNS = 3


@dataclass(frozen=True)
class EvaluationText:
    """A text to measure on."""

    name: str
    rows: Sequence[IdArray]
    """Token ids of each row, (T,)."""


def read_eval_text(path: Path, tokenizer: Tokenizer, bos_token_id: int | None, row_tokens: int) -> EvaluationText:
    """Read a UTF-8 text file, and cut it into rows.

    Args:
        bos_token_id: the token that stands before the text; None for no such token.
        row_tokens: length of a row, in tokens.

    Raises:
        ExportError: the file cannot be read, is no UTF-8 text, is too large, or has fewer than two tokens.
    """
    text = read_text(path, "--eval-text", MAX_EVAL_TEXT_BYTES)
    bos = [] if bos_token_id is None else [bos_token_id]
    ids = np.array(bos + list(tokenizer.encode(text, add_special_tokens=False)), np.int64)  # (T,)
    rows = [row for row in np.split(ids, range(row_tokens, len(ids), row_tokens)) if len(row) >= 2]
    if not rows:
        raise ExportError(f"the --eval-text {str(path)!r} has fewer than two tokens, so there is nothing to measure")
    return EvaluationText(path.name, rows)


def certify(
    draft: Bundle,
    limit: float | None,
    source: SourceLogits,
    texts: Sequence[EvaluationText],
    report: Callable[[str], None] = lambda stage: None,
) -> Certificate:
    """Measure a sealed draft, and write its reference file. The draft must be sealed again afterwards.

    Args:
        draft: the bundle to measure.
        limit: maximum of the perplexity ratio; None for the recipe's own gate.
        source: computes the source's logits.
        texts: the first text was drawn from the source, and the gate judges the bundle on it.
        report: called with the name of each stage as it begins.
    """
    report("measuring speed and memory in a process of its own")
    footprint = measure_footprint(draft.path)
    session = Graph.open(draft, device="cpu").session()
    measured: list[Quality] = []
    for text in texts:
        report(f"measuring the bundle against the reference on the text {text.name}")
        greedy = count_equal_greedy(source, session, text.rows[:GREEDY_PROMPTS])
        measured.append(quality(text.name, compare_texts(source, session, text.rows), greedy))
    report("writing the reference for measuring again")
    facts, data = make_reference(source, session, texts[0].rows)
    (draft.path / REFERENCE_NAME).write_bytes(encode_reference(data))
    gate, passed = judge(draft.manifest.recipe.name, measured[0], limit)
    graph = draft.manifest.graph
    return Certificate(
        texts=tuple(measured),
        gate=gate,
        passed=passed,
        weights_bytes=sum(draft.manifest.files[name].size_bytes for name in (graph.file, graph.weights_file)),
        source_weights_bytes=4 * draft.manifest.source.parameters,
        footprint=footprint,
        reference=facts,
    )


def longest_row(manifest: Manifest) -> int:
    """How many tokens are measured in one row at most: the context, or fewer where positions are not learned."""
    context = manifest.architecture.context_length
    return context if manifest.graph.position_ids is not None else min(context, MAX_ROW_TOKENS)


def measure_footprint(bundle: Path) -> Footprint:
    """Measure speed and peak memory of the runtime in a process of its own, because this process has loaded torch.

    Raises:
        ExportError: the bundle does not run in that process.
    """
    # -P: without it Python would import modules from the current folder, which may be anybody's.
    command = [sys.executable, *f"-P -m edgelm bench --device cpu --runs {BENCH_RUNS} --json".split(), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise ExportError(f"the finished bundle does not run: {done.stderr.strip() or done.returncode}")
    result = json.loads(done.stdout)
    return Footprint(**{field.name: result[field.name] for field in fields(Footprint)})


def make_reference(source: SourceLogits, session: Session, rows: Sequence[IdArray]) -> tuple[Reference, ReferenceData]:
    """The facts and the content of the reference file, for a source and the bundle of `session` on this machine."""
    vocab, context = session.vocab_size, longest_row(session.bundle.manifest)
    ids = np.concatenate(rows)[: min(max(REFERENCE_TOKENS, context), MAX_REFERENCE_TOKENS)]  # (T,)
    if len(ids) % context == 1:  # a row of one token predicts nothing
        ids = ids[:-1]
    row_tokens, top_count = min(context, len(ids)), min(TOP_COUNT, vocab)
    draft = Reference(REFERENCE_NAME, len(ids), row_tokens, top_count, 1, 1, 0, 0, 0, 0)
    top_ids = np.empty((len(ids), top_count), np.int64)  # (T, K)
    rows_left = rows_of(draft, top_ids)  # views (t, K)

    def score(row: IdArray) -> list[Logits]:
        logits = source(row)
        next(rows_left)[:] = _top(logits, top_count)  # `observe` reads these rows after this call
        return [logits]

    of_source = observe(draft, ids, top_ids, score, vocab)
    top, following = rounded(of_source.top), rounded(of_source.next)
    unmeasured = ReferenceData(ids, top_ids, top, top, following, following, of_source.mean)
    of_bundle = observe_session(draft, unmeasured, session)
    # Rounded as the file rounds, so that the stated figures are those of the file.
    data = replace(
        unmeasured,
        bundle_top=rounded(of_bundle.top),
        bundle_next=rounded(of_bundle.next),
        bundle_mean=of_bundle.mean.astype(np.float32).astype(np.float64),
    )
    stated = figures(draft, data, of_bundle)
    noise = drift(data, observe_session(draft, data, session, one_by_one=True))
    facts = replace(
        draft,
        source_perplexity=source_perplexity(draft, data),
        perplexity_ratio=stated.perplexity_ratio,
        mean_kl_divergence=stated.mean_kl_divergence,
        top1_agreement=stated.top1_agreement,
        value_noise=noise.values,
        mean_noise=noise.means,
    )
    return facts, data


def _top(logits: Logits, count: int) -> IdArray:
    """The ids (T, count) of the largest of `logits` (T, V), the largest first; of equal logits the lower id first."""
    starts = np.arange(0, logits.shape[1], max(1, min(256, logits.shape[1] // count)))
    # At least `count` logits of a row reach the smallest of the `count` largest maxima of blocks; few others do.
    maxima = np.maximum.reduceat(logits, starts, axis=1)  # (T, blocks)
    thresholds = np.partition(maxima, -count, axis=1)[:, -count]  # (T,)
    top = np.empty((len(logits), count), np.int64)
    for row, threshold, chosen in zip(logits, thresholds, top, strict=True):
        candidates = np.flatnonzero(row >= threshold)
        chosen[:] = candidates[np.argsort(-row[candidates], kind="stable")[:count]]
    return top
