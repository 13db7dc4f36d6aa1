"""edgelm beside its peers, from the same weights, in interleaved runs.

    python -m benchmarks.peers --trained CHECKPOINT

Builds an environment per peer from PyPI, which takes long the first time because llama.cpp is compiled. Makes every
peer's model by that peer's own means, checks on a trained checkpoint that every engine's text agrees with that of
transformers, and measures. Prints Markdown tables, and one JSON object as its last line. Progress goes to stderr. An
engine that cannot be built or fails the check is left out by name, with the reason. `--write` puts tables and charts
into `docs/performance.md`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.engines import ENVIRONMENT, ROOM_TOKENS
from benchmarks.machine import machine_facts
from benchmarks.make_gpt2 import Shape
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.charts import PAGE, chart_names, write_charts
from benchmarks.peers.environments import DEFAULT_CACHE, EnvironmentFailed, python_of
from benchmarks.peers.measure import Measurement, Ready, agreements, measure
from benchmarks.peers.models import ConversionFailed, model_of
from benchmarks.peers.page import with_section
from benchmarks.peers.tables import CALL, DECODE, PREFILL, as_json, memory_table, speed_table
from benchmarks.prepare import DEFAULT_WORK, Source, given_source, random_source
from benchmarks.rounds import ROOT, Case

SHAPES = {"124m": Shape(), "355m": Shape(layers=24, width=1024, heads=16)}
CONTEXTS = (16, 128, 512, 896)
BATCHES = (1, 4, 8)
BATCH_PROMPT_TOKENS = 128


def _parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Measure edgelm beside its peers.")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["124m"],
        metavar="MODEL",
        help=f"{' or '.join(SHAPES)}, which get random weights, or checkpoint folders; default 124m",
    )
    parser.add_argument("--trained", type=Path, metavar="DIR", help="trained checkpoint to check the engines with")
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="default: all")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[2, 1], metavar="N", help="one run for each; default 2 1"
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        default=CONTEXTS,
        metavar="N",
        help=f"prompt lengths in tokens, if they fit the model; default {' '.join(map(str, CONTEXTS))}",
    )
    parser.add_argument(
        "--batches",
        nargs="*",
        type=int,
        default=BATCHES,
        metavar="N",
        help=f"batch sizes, with prompts of {BATCH_PROMPT_TOKENS} tokens; default {' '.join(map(str, BATCHES))}",
    )
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="after the warm-up; default %(default)s")
    parser.add_argument(
        "--starts", type=int, default=3, metavar="N", help="starts, to time the first token; default %(default)s"
    )
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, metavar="DIR", help="keeps the models; %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="keeps environments; %(default)s"
    )
    parser.add_argument("--write", action="store_true", help=f"put the result into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.rounds < 1 or options.new_tokens < 2 or min(options.contexts) < 1:
        parser.error("--rounds and --contexts must be at least 1, and --new-tokens at least 2")
    for model in [*options.models, *([options.trained] if options.trained else [])]:
        if model not in SHAPES and not (Path(model) / "model.safetensors").is_file():
            parser.error(f"{model} is not {' or '.join(SHAPES)}, nor a folder with a model.safetensors")
    return options


def _source(work: Path, model: str | Path, engines: Sequence[str]) -> Source:
    """The checkpoint of a name or folder, after making the models that no peer's converter makes."""
    names = [PEERS[name].model for name in engines if PEERS[name].converter is None]
    command = [sys.executable, "-m", "benchmarks.prepare", "--work", str(work), "--only", *names, "checkpoint"]
    if model in SHAPES:
        shape = SHAPES[str(model)]
        source = random_source(work, shape)
        command += [f"--{name}={getattr(shape, name)}" for name in Shape.__slots__]
    else:
        source = given_source(work, Path(model).absolute())
        command += ["--checkpoint", str(source.checkpoint)]
    if subprocess.run(command, env=ENVIRONMENT, cwd=ROOT).returncode:
        raise SystemExit("the models could not be made; the reason stands above")
    return source


def _ready(names: Sequence[str], source: Source, cache: Path, skipped: dict[str, str]) -> list[Ready]:
    """The engines that can be started. Engines that cannot are added to `skipped`, with the reason."""
    ready = []
    for name in names:
        if name not in skipped:
            peer = PEERS[name]
            try:
                python = Path(sys.executable) if peer.environment is None else python_of(peer.environment, cache)
                ready.append(Ready(name, peer, python, model_of(peer, source, cache)))
            except (EnvironmentFailed, ConversionFailed) as failure:
                skipped[name] = str(failure)
                print(f"skipping {name}: {failure}", file=sys.stderr)
    return ready


def _report(
    title: str,
    command: str,
    measurement: Measurement,
    together: Measurement | None,
    skipped: Mapping[str, str],
    facts: dict[str, object],
    images: Mapping[str, str],
) -> str:
    """The Markdown section of a run."""
    rows = measurement.rows
    cases = list(next(iter(rows.values())).cases)
    parts = [f"### {title}", f"`{command}`, {facts['date']}; {facts['note']}"]
    for rate in (DECODE, PREFILL):
        parts.append(speed_table(rows, cases, rate))
    parts.append(memory_table(rows))
    failures = {**skipped, **measurement.failures}
    if together is not None:
        batches = list(next(iter(together.rows.values())).cases)
        parts.append(
            "Batches, each engine in a new process: new tokens divided by the time of the whole call, prompts included."
        )
        parts.append(speed_table(together.rows, batches, CALL))
        failures |= together.failures
    parts += [f"Left out: {name}: {reason}" for name, reason in failures.items()]
    parts += [f"![{title}: {kind}]({path})" for kind, path in images.items()]
    return "\n\n".join(parts)


def main() -> None:
    options = _parsed_options()
    skipped: dict[str, str] = {}
    shares: dict[str, float] = {}
    if options.trained:
        names = [*options.engines, *(name for name, peer in PEERS.items() if peer.bits == 32)]
        trained = _source(options.work, options.trained, names)
        engines = _ready(list(dict.fromkeys(names)), trained, options.cache, skipped)
        shares, failures = agreements(engines, trained.checkpoint)
        for name, share in shares.items():
            print(f"{name}: {share:.1%} of the greedy tokens of transformers on {trained.name}", file=sys.stderr)
        skipped |= failures
    else:
        print("no --trained: the engines' texts are not checked, so a broken engine would be measured", file=sys.stderr)
    runs: list[dict[str, object]] = []
    for model in options.models:
        source = _source(options.work, model, options.engines)
        config = json.loads((source.checkpoint / "config.json").read_text(encoding="utf-8"))
        context = config["n_positions" if source.is_gpt2 else "max_position_embeddings"]
        room = min(context, ROOM_TOKENS) - options.new_tokens
        cases = [Case(length, options.new_tokens) for length in options.contexts if length <= room]
        batches = [Case(BATCH_PROMPT_TOKENS, options.new_tokens, rows) for rows in options.batches]
        for threads in options.threads:
            missing = dict(skipped)
            engines = _ready(options.engines, source, options.cache, missing)
            vocabulary, rounds, together = config["vocab_size"], options.rounds, None
            measurement = measure(engines, cases, vocabulary, threads, rounds, options.starts)
            if batches and room >= BATCH_PROMPT_TOKENS:
                together = measure(engines, batches, vocabulary, threads, rounds, 0)
            name = model if model in SHAPES else source.name
            title = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            slug = f"{name}-{threads}threads"
            facts: dict[str, object] = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "note": f"medians of {options.rounds} interleaved rounds (minimum-maximum), {options.new_tokens} new "
                f"tokens; other processes kept {measurement.mean_other_cpus:.2f} CPUs busy",
            }
            command = f"python -m benchmarks.peers {shlex.join(sys.argv[1:])}"
            images = chart_names(slug) if options.write else {}
            text = _report(title, command, measurement, together, missing, facts, images)
            print(f"{text}\n")
            if options.write:
                PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), slug, text), encoding="utf-8")
            runs.append(
                {
                    "model": name,
                    "threads": threads,
                    **facts,
                    "mean_cpus_busy_with_other_processes": round(measurement.mean_other_cpus, 3),
                    "left_out": {**missing, **measurement.failures},
                    "engines": as_json(measurement.rows),
                    "batches": as_json(together.rows) if together else None,
                }
            )
    if options.write:
        list(write_charts(PAGE))
    versions = {
        environment.name: list(environment.requirements)
        for environment in dict.fromkeys(peer.environment for peer in PEERS.values())
        if environment
    }
    print(json.dumps({"machine": machine_facts(), "peers": versions, "agreement": shares, "runs": runs}))


if __name__ == "__main__":
    main()
