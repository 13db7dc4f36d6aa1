"""The real GPT-2 in every recipe, beside published figures of it.

    python -m benchmarks.real_gpt2                       # gpt2, 124 M parameters
    python -m benchmarks.real_gpt2 --model gpt2-medium   # 355 M

Needs the network: the checkpoint and two data sets are downloaded once from the Hugging Face hub (HF_ENDPOINT names
another one). Bundles are kept in --work and used again. On two cores a recipe of gpt2 takes some minutes to export and
about half an hour to measure; --wikitext-tokens and --lambada-passages shorten that. Prints a Markdown table, and one
JSON object as its last line. Progress goes to stderr.

The published figures and their sources are in gpt2_published.json.
"""

import argparse
import io
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from benchmarks.machine import machine_facts
from benchmarks.published import PUBLISHED, Answers, ask, read_published
from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import FixedPrecision
from edgelm.loading import load

WIKITEXT2 = ("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext-2-raw/wiki.test.raw")
"""Data set, file and member of the raw test text. Its lines equal those of Salesforce/wikitext."""
LAMBADA = ("EleutherAI/lambada_openai", "data/lambada_test_en.jsonl")
"""Data set and file of OpenAI's version of the test set, lambada_openai in lm-evaluation-harness: JSON lines."""
MAX_WIKITEXT_BYTES = 64 * 2**20


def fetch(repo: str, name: str) -> bytes:
    """Content of a file of a data set on the hub, through the hub's cache.

    Raises:
        SystemExit: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset")).read_bytes()
    except Exception as error:  # huggingface_hub raises its own errors, those of its HTTP client, and OSError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SystemExit(f"cannot fetch {name!r} of the data set {repo!r}: {reason}") from None


def wikitext2_test() -> str:
    """The test text for the stride method: the data set's rows joined by blank lines."""
    repo, name, member = WIKITEXT2
    with zipfile.ZipFile(io.BytesIO(fetch(repo, name))) as archive:
        if archive.getinfo(member).file_size > MAX_WIKITEXT_BYTES:
            raise SystemExit(
                f"{member!r} of {name!r} is larger than {MAX_WIKITEXT_BYTES:,} bytes, so it is not WikiText-2"
            )
        text = archive.read(member).decode("utf-8")
    # Rows of the data set keep their line ends, and blank lines are empty rows.
    rows = [line if line.strip() else "" for line in io.StringIO(text)]
    return "\n\n".join(rows)


def lambada_test() -> list[str]:
    """The passages of the test set, including the last word."""
    lines = fetch(*LAMBADA).decode("utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line.strip()]


def made_bundle(source: str, recipe: FixedPrecision, work: Path) -> Bundle:
    """The bundle of a recipe, exported unless `work` has it already."""
    folder = work / f"{source.replace('/', '--')}-{recipe}"
    if not folder.is_dir():
        from edgelm_export.pipeline import export

        export(source, folder, recipe, accept_quality_loss=True, report=lambda stage: _say(f"  {stage}"))
    return Bundle.read(folder)


def markdown(results: dict[str, dict[str, Any]], figures: dict[str, Any]) -> str:
    """A Markdown table: the published figures first, then a row for each recipe."""
    rows = [
        "| | MB | perplexity ratio, own text | greedy texts equal | largest error of a log-probability | "
        "WikiText-2 perplexity | LAMBADA accuracy | LAMBADA perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for published in figures["wikitext2"]:
        rows.append(f"| {published['what']} | | | | | {published['perplexity']:.2f} | | |")
    for published in figures["lambada"]:
        accuracy = f"{published['accuracy']:.2%}"
        rows.append(f"| {published['what']} | | | | | | {accuracy} | {published['perplexity']:.2f} |")
    for recipe, r in results.items():
        greedy = f"{r['greedy_equal']} of {r['greedy_cases']}"
        rows.append(
            f"| edgelm {recipe} | {r['size_bytes'] / 1e6:.1f} | {r['perplexity_ratio']:.4f} | {greedy} | "
            f"{r['log_probability_error']:.2g} | {r['wikitext2_perplexity']:.2f} | {r['lambada_accuracy']:.2%} | "
            f"{r['lambada_perplexity']:.2f} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parsed(arguments)
    figures = read_published(options.figures, options.model.rpartition("/")[2])
    _say("fetching WikiText-2 and LAMBADA")
    text, passages = wikitext2_test(), lambada_test()[: options.lambada_passages]
    results: dict[str, dict[str, Any]] = {}
    for recipe in options.recipes:
        _say(f"{options.model} as {recipe}")
        bundle = made_bundle(options.model, recipe, options.work)
        began = time.perf_counter()
        answers: Answers = ask(
            load(bundle.path, device="cpu", threads=options.threads),
            figures,
            text,
            passages,
            options.wikitext_tokens,
            lambda stage: _say(f"  {stage}"),
        )
        certificate = bundle.manifest.certificate
        results[recipe] = {
            "size_bytes": bundle.size_bytes,
            "digest": bundle.manifest.digest,
            "revision": bundle.manifest.source.revision,
            "perplexity_ratio": certificate.drawn.perplexity_ratio if certificate else float("nan"),
            "measuring_seconds": time.perf_counter() - began,
            **asdict(answers),
        }
    print(markdown(results, figures))
    print()
    print(json.dumps({"model": options.model, "machine": machine_facts(), "published": figures, "recipes": results}))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    recipes = get_args(FixedPrecision)
    parser = argparse.ArgumentParser(description="Compare the real GPT-2 in every recipe with published figures.")
    parser.add_argument("--model", default="gpt2", metavar="HUB_ID", help="gpt2 or gpt2-medium; default %(default)s")
    parser.add_argument(
        "--recipes", type=lambda value: value.split(","), default=list(recipes), metavar="A,B", help=", ".join(recipes)
    )
    work = Path(tempfile.gettempdir()) / "edgelm-real-gpt2"
    parser.add_argument("--work", type=Path, default=work, metavar="DIR", help="keeps the bundles; %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all allowed CPUs")
    parser.add_argument("--wikitext-tokens", type=int, metavar="N", help="default: all, 287,644 for GPT-2")
    parser.add_argument("--lambada-passages", type=int, metavar="N", help="default: all, 5,153")
    parser.add_argument("--figures", type=Path, default=PUBLISHED, metavar="FILE", help="published figures")
    options = parser.parse_args(arguments)
    unknown = [recipe for recipe in options.recipes if recipe not in recipes]
    if unknown:
        parser.error(f"there is no recipe {unknown[0]!r}; choose among {', '.join(recipes)}")
    options.recipes = [cast(FixedPrecision, recipe) for recipe in options.recipes]
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
