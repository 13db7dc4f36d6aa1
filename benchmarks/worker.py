"""The process of one engine: it loads its model once, then answers requests, in JSON lines both ways.

    python -m benchmarks.worker MODULE:LOADER MODEL_FOLDER THREADS

`benchmarks.rounds` starts it. Between requests it blocks on its pipe, so that the engine whose turn it is has the
machine to itself. It runs in the engine's environment, so it imports the standard library alone, besides the loader.
"""

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks.machine import anonymous_bytes
from edgelm.engine.memory import peak_rss_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker", description="Serve one engine; benchmarks.rounds starts this."
    )
    parser.add_argument("loader", metavar="MODULE:LOADER")
    parser.add_argument("folder", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("threads", type=int, metavar="THREADS")
    options = parser.parse_args()
    # Replies get a descriptor of their own, because libraries print to stdout.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**facts: object) -> None:
        replies.write(json.dumps(facts) + "\n")
        replies.flush()

    module, _, function = options.loader.partition(":")
    loaded = getattr(import_module(module), function)(options.folder, options.threads)
    reply(
        import_seconds=loaded.import_seconds,
        load_seconds=loaded.load_seconds,
        loaded_peak_bytes=peak_rss_bytes(),
        loaded_anonymous_bytes=anonymous_bytes(),
    )
    last_cpu = time.process_time()
    for line in sys.stdin:
        idle_cpu = time.process_time() - last_cpu
        request = json.loads(line)
        started_cpu = time.process_time()
        prompts, new_tokens, num_beams = request["prompts"], request["new_tokens"], request["num_beams"]
        if num_beams == 1:
            timing = loaded.generate(prompts, new_tokens)
        else:
            assert loaded.beam_search is not None, f"{options.loader} is not driven with beams"
            timing = loaded.beam_search(prompts, new_tokens, num_beams)
        last_cpu = time.process_time()
        reply(
            prefill_seconds=timing.prefill_seconds,
            decode_seconds=timing.decode_seconds,
            token_ids=[int(token_id) for token_id in timing.token_ids],
            cpu_seconds=last_cpu - started_cpu,
            idle_cpu_seconds=idle_cpu,
            peak_bytes=peak_rss_bytes(),
            anonymous_bytes=anonymous_bytes(),
        )


if __name__ == "__main__":
    main()
