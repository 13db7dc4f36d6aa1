"""What a small model that drafts gains, and what it loses at worst, against decoding without drafts.

    python -m benchmarks.drafts TARGET DRAFT [--prompts FILE] [--words N] [--count N] [--new-tokens N] [--rounds N]
        [--threads N] [--together N [N ...]]

TARGET and DRAFT are bundles with one vocabulary. Each document of the file, of which a line with <|endoftext|> ends
one, gives its first words as a prompt; without a file, they are stories that no committed model was trained on. Every
prompt is continued with and without drafts in turn, by the same loaded model. In the worst case the small model is sure
of every token, and none is right. `--together 4` continues four prompts side by side in a scheduler, as a server does.
Prints a Markdown table of medians over the rounds.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import edgelm
from benchmarks.data import ROOT
from benchmarks.machine import machine_facts
from edgelm.decoding.request import DecodingRow
from edgelm.generation.results import Stats
from edgelm.generation.text_scheduler import TextScheduler
from edgelm.model import Model

STORIES = ROOT / "benchmarks" / "texts" / "stories.txt"
PROMPT_WORDS = 12
SETTLE_SECONDS = 0.05
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled, temperature 0.8, top-p 0.95": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    "sampled, temperature 1": {"do_sample": True},
}


def prompts(file: Path, count: int, words_of_each: int) -> list[str]:
    """The first `words_of_each` words of `count` documents, spread evenly over the file."""
    documents = [text.split() for text in file.read_text(encoding="utf-8").split("<|endoftext|>") if text.strip()]
    chosen = documents[:: max(1, len(documents) // count)][:count]
    return [" ".join(words[:words_of_each]) for words in chosen]


@contextmanager
def wrong_drafts() -> Iterator[None]:
    """Have small models be sure of tokens that never come true."""

    def wrong(self: DecodingRow, ids: Any, logits: Any) -> int:
        return (int(logits.argmax()) + 1) % len(logits)

    with (
        mock.patch.object(DecodingRow, "guess", wrong),
        mock.patch("edgelm.decoding.draft_model._probability", lambda logits, token: 1.0),
    ):
        yield


def decoded(model: Model, prompt: str, options: dict[str, Any], *, drafts: bool) -> Stats:
    """Continue a prompt; returns the statistics."""
    time.sleep(SETTLE_SECONDS)  # threads of the last call still wait for work
    sessions = model._texts._draft_sessions if drafts else None
    with mock.patch.object(model._texts, "_draft_sessions", sessions):
        return model.generate(prompt, **options).stats


def decoded_by(scheduler: TextScheduler, texts: list[str], options: dict[str, Any]) -> Stats:
    """Continue prompts side by side; returns their statistics as if they were one text."""
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    submissions = [scheduler.submit(text, **options) for text in texts]
    stats = [submission.completion().stats for submission in submissions]
    seconds = time.perf_counter() - began
    new_tokens, drafted, accepted = (
        sum(getattr(one, name) for one in stats) for name in ("new_tokens", "drafted_tokens", "accepted_tokens")
    )
    prefill_seconds = max(one.prefill_seconds for one in stats)  # until the last prompt's first token
    return replace(
        stats[0],
        new_tokens=new_tokens,
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        prefill_seconds=prefill_seconds,
        decode_seconds=seconds - prefill_seconds,
        tokens_per_second=new_tokens / (seconds - prefill_seconds),
    )


Drafting = Callable[[], AbstractContextManager[None]]
"""A context in which small models draft as they do, or wrongly."""


def pairs_alone(
    model: Model, texts: list[str], options: dict[str, Any], rounds: int, drafting: Drafting
) -> tuple[list[Stats], list[Stats]]:
    """Continue each text by `generate`, without drafts and with them, in every round."""
    plain, fast = list[Stats](), list[Stats]()
    for number in range(rounds):
        for place, text in enumerate(texts):
            given = {**options, "seed": number * len(texts) + place}
            model.forget()
            plain.append(decoded(model, text, given, drafts=False))
            model.forget()
            with drafting():
                fast.append(decoded(model, text, given, drafts=True))
    return plain, fast


def pairs_side_by_side(
    model: Model, texts: list[str], options: dict[str, Any], rounds: int, drafting: Drafting
) -> tuple[list[Stats], list[Stats]]:
    """Continue all texts in one scheduler without drafts and in another one with them, in every round."""
    plain, fast = list[Stats](), list[Stats]()
    with (
        model.scheduler(max_rows=len(texts)) as without,
        model.scheduler(max_rows=len(texts), drafts=True) as with_drafts,
    ):
        for number in range(rounds):
            given = {**options, "seed": number}
            plain.append(decoded_by(without, texts, given))
            with drafting():
                fast.append(decoded_by(with_drafts, texts, given))
    return plain, fast


def row(name: str, plain: list[Stats], fast: list[Stats]) -> str:
    """A row of the table: times of the whole call, with its prompt."""
    drafted, accepted = (sum(getattr(stats, f"{kind}_tokens") for stats in fast) for kind in ("drafted", "accepted"))
    tokens = sum(stats.new_tokens for stats in fast)

    def whole(stats: Stats) -> float:
        return stats.new_tokens / (stats.prefill_seconds + stats.decode_seconds)

    ratios = [
        median([measure(after) / measure(before) for before, after in zip(plain, fast, strict=True)])
        for measure in (lambda stats: stats.tokens_per_second, whole)
    ]
    rates = [median([stats.tokens_per_second for stats in of]) for of in (plain, fast)]
    share = f"{accepted / drafted:.0%}" if drafted else "-"
    return (
        f"| {name} | {drafted / tokens:.0%} | {share} | {rates[0]:.0f} | {rates[1]:.0f} | {ratios[0]:.2f} "
        f"| {ratios[1]:.2f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--prompts", type=Path, default=STORIES, help="texts, each ended by <|endoftext|>")
    parser.add_argument("--words", type=int, default=PROMPT_WORDS, help="words of each prompt")
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--together", type=int, nargs="+", default=[], metavar="N", help="prompts side by side")
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    texts = prompts(chosen.prompts, chosen.count, chosen.words)
    common: dict[str, Any] = {"max_new_tokens": chosen.new_tokens, "eos_token_id": ()}
    with edgelm.load(chosen.target, device="cpu", threads=chosen.threads, draft=chosen.draft) as model:
        print("| decoding | drafted | came true | plain tokens/s | with drafts | decoding x | whole call x |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        for name, options in [*WAYS.items(), ("worst case, greedy", WAYS["greedy"])]:
            drafting = wrong_drafts if name.startswith("worst") else nullcontext
            for together in chosen.together:
                beside = prompts(chosen.prompts, together, chosen.words)
                pairs = pairs_side_by_side(model, beside, {**options, **common}, chosen.rounds, drafting)
                print(row(f"{name}, {together} together", *pairs), flush=True)
            if not chosen.together:
                print(row(name, *pairs_alone(model, texts, {**options, **common}, chosen.rounds, drafting)), flush=True)
    print(machine_facts())


if __name__ == "__main__":
    main()
