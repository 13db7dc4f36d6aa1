"""edgelm beside its peers, from the same weights, in interleaved runs.

    python -m benchmarks.peers --trained ../shared/checkpoints/stories-6m

Builds an environment per peer from PyPI (the first time takes long: llama.cpp is compiled), makes every peer's model by
that peer's own means, checks on a trained checkpoint that all say what transformers says, and measures. Prints Markdown
tables and, as its last line, one JSON object. Progress goes to stderr. What cannot be built or is unsound is left out
by name, with the reason. `--write` puts tables and plots into `docs/performance.md`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.engines import ENVIRONMENT
from benchmarks.machine import machine_facts
from benchmarks.make_gpt2 import Shape
from benchmarks.peers.catalogue import OWN, PEERS
from benchmarks.peers.environments import DEFAULT_CACHE, EnvironmentFailed, python_of
from benchmarks.peers.measure import Measurement, Ready, agreements, measure
from benchmarks.peers.models import ConversionFailed, model_of
from benchmarks.peers.page import with_section
from benchmarks.peers.plot import bar_chart
from benchmarks.peers.tables import CALL, DECODE, PREFILL, Rate, as_json, memory_table, speed_table
from benchmarks.prepare import DEFAULT_WORK, Source, given_source, random_source
from benchmarks.rounds import ROOT, Case

SHAPES = {"124m": Shape(), "355m": Shape(layers=24, width=1024, heads=16)}
CONTEXTS = (16, 128, 512, 896)
BATCHES = (1, 4, 8)
BATCH_PROMPT_TOKENS = 128
PAGE = ROOT / "docs" / "performance.md"
PLOTS = "performance"
"""The folder of the plots, beside the page."""


def _parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Measure edgelm beside its peers.")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["124m"],
        metavar="MODEL",
        help=f"of {', '.join(SHAPES)}, which get random weights, or checkpoint folders; default 124m",
    )
    parser.add_argument("--trained", type=Path, metavar="DIR", help="a trained checkpoint to check engines with")
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1], metavar="N", help="a run each; default 2 1")
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        default=CONTEXTS,
        metavar="N",
        help=f"prompt tokens; default {' '.join(map(str, CONTEXTS))}; those that do not fit a model are left out",
    )
    parser.add_argument(
        "--batches",
        nargs="*",
        type=int,
        default=BATCHES,
        metavar="N",
        help=f"prompts of {BATCH_PROMPT_TOKENS} tokens at a time; default {' '.join(map(str, BATCHES))}",
    )
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="after the warm-up; default %(default)s")
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="for the first token; default %(default)s")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, metavar="DIR", help="keeps the models; %(default)s")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="of environments; %(default)s")
    parser.add_argument("--write", action="store_true", help=f"put the result into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.rounds < 1 or options.new_tokens < 2 or min(options.contexts) < 1:
        parser.error("it takes a round, a prompt token and two new tokens at least")
    for model in [*options.models, *([options.trained] if options.trained else [])]:
        if model not in SHAPES and not (Path(model) / "model.safetensors").is_file():
            parser.error(f"{model} is neither {' nor '.join(SHAPES)} nor a folder with a model.safetensors")
    return options


def _source(work: Path, model: str | Path, engines: Sequence[str]) -> Source:
    """The checkpoint of a name or folder, and those models made from it that no peer's converter makes."""
    wanted = [PEERS[name].model for name in engines if PEERS[name].converter is None]
    command = [sys.executable, "-m", "benchmarks.prepare", "--work", str(work), "--only", *wanted, "checkpoint"]
    if model in SHAPES:
        shape = SHAPES[str(model)]
        source = random_source(work, shape)
        command += [f"--{name}={getattr(shape, name)}" for name in Shape.__slots__]
    else:
        source = given_source(work, Path(model).absolute())
        command += ["--checkpoint", str(source.checkpoint)]
    if subprocess.run(command, env=ENVIRONMENT, cwd=ROOT).returncode:
        raise SystemExit("making the models failed; its reason is above")
    return source


def _ready(names: Sequence[str], source: Source, cache: Path, skipped: dict[str, str]) -> list[Ready]:
    """The engines that can be started; the others are added to `skipped`, with the reason."""
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
    plots: Mapping[str, str],
) -> str:
    rows = measurement.rows
    cases = list(next(iter(rows.values())).cases)
    parts = [f"### {title}", f"`{command}`, {facts['date']}; {facts['note']}"]
    for rate in (DECODE, PREFILL):
        parts.append(speed_table(rows, cases, rate))
    parts.append(memory_table(rows))
    failures = {**skipped, **measurement.failures}
    if together is not None:
        batches = list(next(iter(together.rows.values())).cases)
        parts.append("Batches, in processes of their own; new tokens by the time of whole calls, prompts included:")
        parts.append(speed_table(together.rows, batches, CALL))
        failures |= together.failures
    parts += [f"Left out: {name}: {reason}" for name, reason in failures.items()]
    parts += [f"![{name}]({path})" for name, path in plots.items()]
    return "\n\n".join(parts)


def _plots(title: str, measurement: Measurement) -> dict[str, str]:
    """SVG text by the plot's name."""
    rows = measurement.rows
    cases = list(next(iter(rows.values())).cases)

    def speeds(rate: Rate) -> str:
        groups = {
            f"prompt of {case.prompt_tokens} tokens": {name: rate.of(row.cases[case]) for name, row in rows.items()}
            for case in cases
        }
        return bar_chart(f"{title}: {rate.name}", groups, own=OWN, unit="tokens/s, more is better")

    memory = {
        "most resident": {name: [row.peak_bytes / 1e6] for name, row in rows.items()},
        "most not backed by a file": {name: [row.anonymous_bytes / 1e6] for name, row in rows.items()},
    }
    return {
        "decode": speeds(DECODE),
        "prefill": speeds(PREFILL),
        "memory": bar_chart(f"{title}: memory", memory, own=OWN, unit="MB, less is better"),
    }


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
            print(f"{name}: {share:.1%} of transformers' greedy tokens on {trained.name}", file=sys.stderr)
        skipped |= failures
    else:
        print("without --trained no engine's text is checked: a broken one would be measured", file=sys.stderr)
    runs: list[dict[str, object]] = []
    for model in options.models:
        source = _source(options.work, model, options.engines)
        config = json.loads((source.checkpoint / "config.json").read_text(encoding="utf-8"))
        room = config["n_positions"] - options.new_tokens
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
                "note": f"medians of {options.rounds} interleaved rounds (least-most), {options.new_tokens} new "
                f"tokens; other processes kept {measurement.mean_other_cpus:.2f} CPUs busy",
            }
            command = f"python -m benchmarks.peers {shlex.join(sys.argv[1:])}"
            plots = _plots(title, measurement)
            paths = {f"{title}: {plot}": f"{PLOTS}/{slug}-{plot}.svg" for plot in plots}
            text = _report(title, command, measurement, together, missing, facts, paths if options.write else {})
            print(f"{text}\n")
            if options.write:
                for plot, path in zip(plots, paths.values(), strict=True):
                    (PAGE.parent / path).parent.mkdir(exist_ok=True)
                    (PAGE.parent / path).write_text(plots[plot], encoding="utf-8")
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
    versions = {
        environment.name: list(environment.requirements)
        for environment in dict.fromkeys(peer.environment for peer in PEERS.values())
        if environment
    }
    print(json.dumps({"machine": machine_facts(), "peers": versions, "agreement": shares, "runs": runs}))


if __name__ == "__main__":
    main()
