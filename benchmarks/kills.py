"""Kills processes that write: whatever bears its final name afterwards must be whole, and the next run must work.

    python -m benchmarks.kills export [--count N] [--seed S]
    python -m benchmarks.kills states [--count N] [--seed S]

`export` kills `edgelm_export.pipeline.export` of a tiny checkpoint. `states` kills `Model.save_state`,
`edgelm run --state` and `edgelm bake` in turn. Every second kill comes after a random time, the others before a random
one of the process's operations on files beside the result. Needs a POSIX system; `export` needs the build side.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgelm.bundle.folder import Bundle, default_bundle_path
from edgelm.reuse.prefix import read_prefix
from edgelm.reuse.state import read_state

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
TEXT_TOKENS = 400
"""Length of the texts that an export draws here; otherwise it draws 10,000 tokens and more."""
PROMPTS = [("Once upon a time there was a dog. " * 50)[:length] for length in (300, 900, 1500)]
"""Each continues the one before it, so that `--state` replaces its file."""
LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Subject:
    """Something that writes a file or a folder called `place`."""

    name: str
    place: Path
    write: Callable[[], object]
    check: Callable[[], object]
    """Raises an exception if what stands in its place is not whole."""
    clear: Callable[[], object] = lambda: None
    """Makes room for the next run, which may find an earlier result."""


@dataclass
class Counts:
    """What came of the kills."""

    kills: int = 0
    finished: int = 0
    """Processes that had finished before their kill, each a next run that worked."""
    whole: int = 0
    absent: int = 0
    faults: list[str] = field(default_factory=list)


def start(subject: Subject, kill_at_event: int | None = None, events: Path | None = None) -> int:
    """Begin to write in a child process, which may kill itself at an operation on files, or count these operations."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with Path(os.devnull).open("r+b") as nowhere:
            for stream in (0, 1, 2):
                os.dup2(nowhere.fileno(), stream)
        seen, beside = 0, os.fspath(subject.place.parent)

        def audit(event: str, args: tuple[object, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS and args and isinstance(args[0], str | os.PathLike):
                if os.fspath(args[0]).startswith(beside):
                    seen += 1
                if seen == kill_at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        subject.write()
        status = 0
        if events is not None:
            events.write_text(str(seen), encoding="ascii")
    finally:
        os._exit(status)


def whole_run(subject: Subject, folder: Path) -> tuple[float, int]:
    """Write once without a kill; returns the seconds and the number of operations on files."""
    events, started = folder / "events", time.monotonic()
    status = os.waitpid(start(subject, events=events), 0)[1]
    if status:
        raise SystemExit(f"{subject.name} fails without a kill: status {status}")
    seconds = time.monotonic() - started
    subject.check()
    subject.clear()
    return seconds, int(events.read_text(encoding="ascii"))


def ended(child: int, seconds: float) -> int | None:
    """The wait status of a child that ends within `seconds`, else None."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def kill_often(subjects: list[Subject], count: int, seed: int, folder: Path) -> Counts:
    """Kill the subjects in turn, `count` times in all, and check after every kill what stands in its place."""
    chance, counts = random.Random(seed), Counts()
    measured = {subject.name: whole_run(subject, folder) for subject in subjects}
    for number in range(count):
        subject = subjects[number % len(subjects)]
        seconds, events = measured[subject.name]
        if chance.random() < 0.5:
            child = start(subject)
            status = ended(child, chance.uniform(0, seconds))
            if status is None:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
        else:
            child = start(subject, chance.randint(1, events))
            status = ended(child, LIMIT_SECONDS)
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                counts.faults.append(f"{subject.name}: takes more than {LIMIT_SECONDS:.0f} s after earlier kills")
                continue
        if os.WIFSIGNALED(status):
            counts.kills += 1
        elif status == 0:
            counts.finished += 1
        else:
            counts.faults.append(f"{subject.name}: exit status {os.waitstatus_to_exitcode(status)} after earlier kills")
        if not subject.place.exists():
            counts.absent += 1
            continue
        try:
            subject.check()
            counts.whole += 1
        except Exception as error:
            counts.faults.append(f"{subject.name}: {error}")
        subject.clear()
    for subject in subjects:
        whole_run(subject, folder)
    return counts


def export_subject(folder: Path) -> Subject:
    """An export of a tiny checkpoint into `folder`."""
    from benchmarks.make_gpt2 import Shape, make_checkpoint
    from edgelm_export import fit, pipeline

    pipeline.EVALUATION_TOKENS = fit.CALIBRATION_TOKENS = TEXT_TOKENS
    checkpoint = folder / "checkpoint"
    made = os.fork()  # this process must not run torch, because its threads would not reach a fork
    if made == 0:
        make_checkpoint(checkpoint, Shape(layers=2, width=32, heads=4, vocabulary=300, context=64))
        os._exit(0)
    if os.waitpid(made, 0)[1]:
        raise SystemExit("cannot make the checkpoint")
    place = folder / "out" / "bundle"
    place.parent.mkdir()

    def write() -> None:
        pipeline.export(str(checkpoint), place, "int8", accept_quality_loss=True)

    def clear() -> None:
        place.rename(folder / f"old-{time.monotonic_ns()}")

    return Subject("export", place, write, lambda: Bundle.read(place).verify(), clear)


def state_subjects(folder: Path) -> list[Subject]:
    """Three ways to write keys and values of the embedded model into `folder`. `bake` makes a new file, as does
    `--state`, which then replaces it twice; `save_state` replaces the file of the run before.
    """
    import edgelm
    from edgelm.cli import main
    from edgelm.engine.device import import_onnxruntime

    import_onnxruntime()  # once, because a process takes longer to import than to write
    bundle = Bundle.read(default_bundle_path())
    places = {name: folder / name / "file" for name in ("save_state", "state", "bake")}
    for place in places.values():
        place.parent.mkdir()
    text = folder / "text"
    text.write_text(PROMPTS[-1], encoding="utf-8")

    def save() -> None:
        with edgelm.load(device="cpu", threads=1) as model:
            for prompt in (*PROMPTS, *PROMPTS):
                model.save_state(places["save_state"], prompt)

    def command(*words: str) -> None:
        sys.argv = ["edgelm", *words]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

    def keep() -> None:
        places["state"].unlink(missing_ok=True)
        for prompt in PROMPTS:
            command("run", "-n", "1", "--threads", "1", "--state", str(places["state"]), prompt)

    def bake() -> None:
        command("bake", str(text), "-o", str(places["bake"]), "--threads", "1")

    def check_state(name: str) -> None:
        read_state(places[name], bundle.manifest)

    return [
        Subject("save_state", places["save_state"], save, lambda: check_state("save_state")),
        Subject("run --state", places["state"], keep, lambda: check_state("state")),
        Subject("bake", places["bake"], bake, lambda: read_prefix(places["bake"], bundle), places["bake"].unlink),
    ]


def left_over(subjects: list[Subject]) -> Iterator[Path]:
    """What killed processes left beside the results."""
    for subject in subjects:
        yield from (path for path in subject.place.parent.iterdir() if path != subject.place)


def run(what: str, count: int, seed: int) -> tuple[Counts, int]:
    """Kill `count` processes; returns what came of it, and how many files and folders they left beside the results."""
    with tempfile.TemporaryDirectory(prefix="edgelm-kills-") as name:
        folder = Path(name)
        subjects = [export_subject(folder)] if what == "export" else state_subjects(folder)
        counts = kill_often(subjects, count, seed, folder)
        return counts, len(list(left_over(subjects)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes that write, and check what stands afterwards.")
    parser.add_argument("what", choices=("export", "states"), help="what writes")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="processes; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments; default %(default)s")
    options = parser.parse_args()
    counts, left = run(options.what, options.count, options.seed)
    print(f"{options.what}: {counts.kills} killed, {counts.finished} finished before; under the final name", end=" ")
    print(f"{counts.whole} whole, {counts.absent} absent, {len(counts.faults)} faults; {left} temporary left beside")
    for fault in counts.faults:
        print(f"  {fault}")
    sys.exit(1 if counts.faults else 0)


if __name__ == "__main__":
    main()
