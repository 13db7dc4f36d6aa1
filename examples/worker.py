"""A queue of jobs and processes that work on it, as Celery or RQ have them, with the standard library alone.

A job is a prompt and a seed; the same seed gives the same text whichever worker takes it. Each process loads the model
itself, after it has started: nothing is shared but the pages of the weights' file, and a crash takes one job along.

    python worker.py "Once upon a time" "The little dog"
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import edgelm

PROCESSES = 2
model: edgelm.Model


def begin() -> None:
    """Runs once in each worker."""
    global model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = edgelm.load(os.environ.get("EDGELM_MODEL"), threads=max(1, cores // PROCESSES))


def work(prompt: str, seed: int) -> str:
    """One job: bounded in tokens and in time."""
    completion = model.generate(prompt, max_new_tokens=30, seed=seed, do_sample=True, max_time=30.0)
    return prompt + completion.text


def main(prompts: list[str]) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, spawn, initializer=begin) as workers:
        for text in workers.map(work, prompts, range(len(prompts))):
            print(text, end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["Once upon a time", "The little dog", "One day, Lily"])
