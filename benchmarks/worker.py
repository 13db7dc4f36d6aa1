"""One engine in a process of its own: loads its model once, then answers requests. JSON lines both ways.

    python -m benchmarks.worker MODULE:LOADER MODEL_FOLDER THREADS

Between requests it blocks on its pipe, so that the one engine whose turn it is has the machine to itself. It runs in
whatever environment the engine needs: besides the loader it imports the standard library alone.
"""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks.machine import anonymous_bytes
from edgelm.engine.memory import peak_rss_bytes


def main() -> None:
    loader, folder, threads = sys.argv[1:]
    # Libraries print to stdout as they like; the replies get a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**facts: object) -> None:
        replies.write(json.dumps(facts) + "\n")
        replies.flush()

    module, _, function = loader.partition(":")
    loaded = getattr(import_module(module), function)(Path(folder), int(threads))
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
        before_cpu = time.process_time()
        prompts, new_tokens, num_beams = request["prompts"], request["new_tokens"], request["num_beams"]
        if num_beams == 1:
            timing = loaded.generate(prompts, new_tokens)
        else:
            assert loaded.beam_search is not None, f"{loader} is not driven with beams"
            timing = loaded.beam_search(prompts, new_tokens, num_beams)
        last_cpu = time.process_time()
        reply(
            prefill_seconds=timing.prefill_seconds,
            decode_seconds=timing.decode_seconds,
            token_ids=[int(token_id) for token_id in timing.token_ids],
            cpu_seconds=last_cpu - before_cpu,
            idle_cpu_seconds=idle_cpu,
            peak_bytes=peak_rss_bytes(),
            anonymous_bytes=anonymous_bytes(),
        )


if __name__ == "__main__":
    main()
