"""Measures engines: agreement with transformers, speed, memory, and time to the first token."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.check import MIN_AGREEMENT, NEW_TOKENS, agreement, check_prompts
from benchmarks.peers.tables import Row
from benchmarks.rounds import Case, Worker, WorkerEnded, measured, run_rounds, started_worker

FIRST_TOKEN_PROMPT = Case(prompt_tokens=16, new_tokens=1)


@dataclass(frozen=True)
class Ready:
    """A peer whose environment and model are there."""

    name: str
    peer: Peer
    python: Path
    model: Path

    def started(self, threads: int) -> AbstractContextManager[Worker]:
        """A worker that has loaded the model."""
        return started_worker(self.name, self.peer.loader, self.model, threads, self.python)


def agreements(engines: Sequence[Ready], checkpoint: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Compare the greedy texts of engines with that of transformers.

    Args:
        engines: engines with models of `checkpoint`; one of them is transformers.
        checkpoint: a trained checkpoint.

    Returns:
        The share of equal tokens by engine, and the reason by engine that failed.
    """
    prompts = check_prompts(checkpoint)
    texts: dict[str, list[list[int]]] = {}
    failures: dict[str, str] = {}
    for engine in engines:
        try:
            with engine.started(1) as worker:
                texts[engine.name] = [worker.ask([prompt], NEW_TOKENS)["token_ids"] for prompt in prompts]
        except WorkerEnded as ended:
            failures[engine.name] = str(ended)
    expected = next(texts[engine.name] for engine in engines if engine.peer.bits == 32)
    shares = {name: agreement(own, expected) for name, own in texts.items()}
    for engine in engines:
        minimum = MIN_AGREEMENT[engine.peer.bits]
        share = shares.get(engine.name)
        if share is not None and share < minimum:
            failures[engine.name] = (
                f"only {share:.0%} of its greedy tokens equal those of transformers on a trained checkpoint; "
                f"at least {minimum:.0%} must"
            )
    return shares, failures


@dataclass(frozen=True)
class Measurement:
    """One interleaved run."""

    rows: Mapping[str, Row]
    failures: Mapping[str, str]
    """Reason by engine that could not be measured."""
    mean_other_cpus: float
    """Mean number of CPUs that other processes kept busy meanwhile."""


def measure(
    engines: Sequence[Ready], cases: Sequence[Case], vocabulary: int, threads: int, rounds: int, starts: int
) -> Measurement:
    """Start every engine `starts` times, then keep all engines loaded and ask them in interleaved rounds.

    Args:
        engines: engines to measure.
        cases: requests of a round.
        vocabulary: vocabulary size, to draw prompts from.
        threads: threads of each engine.
        rounds: rounds after the warm-up.
        starts: timed starts of each engine; 0 to skip them.
    """
    failures: dict[str, str] = {}
    first_tokens: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for count in range(starts + 1 if starts else 0):
        for engine in engines:
            if engine.name not in failures:
                try:
                    seconds = _first_token_seconds(engine, vocabulary, threads, count)
                except WorkerEnded as ended:
                    failures[engine.name] = str(ended)
                    continue
                if count:  # the first start reads the files into the page cache
                    first_tokens[engine.name].append(seconds)
    with ExitStack() as stack:
        workers: list[Worker] = []
        for engine in engines:
            if engine.name not in failures:
                print(f"loading {engine.name}", file=sys.stderr)
                workers.append(stack.enter_context(engine.started(threads)))
        other_cpus = run_rounds(workers, cases, vocabulary, rounds)
        rows = {
            engine.name: Row(
                engine.peer.bits, {case: measured(worker, case) for case in cases}, first_tokens[engine.name]
            )
            for engine in engines
            for worker in workers
            if worker.name == engine.name
        }
    return Measurement(rows, failures, sum(other_cpus) / len(other_cpus))


def _first_token_seconds(engine: Ready, vocabulary: int, threads: int, turn: int) -> float:
    started = time.perf_counter()
    with engine.started(threads) as worker:
        worker.ask(FIRST_TOKEN_PROMPT.prompts(vocabulary, turn), FIRST_TOKEN_PROMPT.new_tokens)
        return time.perf_counter() - started
