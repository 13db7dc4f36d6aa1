"""A queue of jobs and processes that work on it, as in Celery or RQ, with the standard library alone.

A job is a prompt and a seed. The text does not depend on which worker takes the job. Each process loads the model
itself after it has started. The processes share only the pages of the weights' file.

    python worker.py "Once upon a time" "The little dog"
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import edgelm

PROCESSES = 2
model: edgelm.Model


def load_model() -> None:
    """Runs once in each process."""
    global model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = edgelm.load(os.environ.get("EDGELM_MODEL"), threads=max(1, cores // PROCESSES))


def run_job(prompt: str, seed: int) -> str:
    """One job: bounded in tokens and in time."""
    completion = model.generate(prompt, max_new_tokens=30, seed=seed, do_sample=True, max_time=30.0)
    return prompt + completion.text


def main(prompts: list[str]) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, spawn, initializer=load_model) as workers:
        for text in workers.map(run_job, prompts, range(len(prompts))):
            print(text, end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["Once upon a time", "The little dog", "One day, Lily"])
