"""What many tests share: the tiny committed bundle, a fake session, and the command line."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest

from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE
from edgelm.bundle.folder import file_fact
from edgelm.bundle.manifest import TASK_FEATURE, TASK_FILE, digest_of
from edgelm.engine.call import OTHER_DRAFTS, DraftCost

pytest_plugins = ["tests.build_side"]

hypothesis.settings.register_profile("edgelm", deadline=None)  # on a busy machine any example may take seconds
hypothesis.settings.load_profile("edgelm")

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER and hasattr(os, "sched_setaffinity"):  # a CPU for each process: threads that wait for each other spin
    CPUS = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CPUS[int(WORKER.removeprefix("gw")) % len(CPUS)]})

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
TINY_BUNDLE = DATA / "tiny-gpt2"


@dataclass
class FakeSession:
    """A session without a graph. The logits after token t are `rows[t]`; `fed` lists the tokens so far."""

    rows: npt.NDArray[np.float32]  # (V, V)
    context_length: int = 1000
    batch_invariant: bool = False
    fed: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.fed)

    @property
    def draft_cost(self) -> DraftCost:
        return OTHER_DRAFTS

    @property
    def vocab_size(self) -> int:
        return len(self.rows)

    def step(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        assert len(ids) >= 1
        assert self.position + len(ids) <= self.context_length
        self.fed += [int(i) for i in ids]
        return np.array(self.rows[self.fed[-1]], np.float32)

    def step_all(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.stack([self.step([int(token)]) for token in ids])

    def step_hidden(
        self, ids: Sequence[int] | npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        logits = self.step(ids)
        return logits, self.hidden[list(ids)]

    @property
    def hidden(self) -> npt.NDArray[np.float32]:
        """The hidden state after each token, float32 (V, D): random with a fixed seed, different for each token."""
        return np.random.default_rng(0).normal(size=(len(self.rows), 8)).astype(np.float32)

    def batch(self, rows: int, capacity: int) -> "FakeBatch":
        assert len(self.fed) <= capacity <= self.context_length
        return FakeBatch(self, [list(self.fed) for _ in range(rows)], capacity)

    def reset(self) -> None:
        self.fed.clear()

    def rewind(self, count: int) -> None:
        assert 0 <= count <= len(self.fed)
        del self.fed[len(self.fed) - count :]


@dataclass
class FakeBatch:
    """A batch of rows that continue the text of a fake session."""

    session: FakeSession
    fed: list[list[int]]
    capacity: int

    def step(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self.step_hidden(ids)[0]

    def step_hidden(
        self, ids: Sequence[int] | npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        for row, token in zip(self.fed, ids, strict=True):
            row.append(int(token))
            assert len(row) <= self.capacity
        last = [row[-1] for row in self.fed]
        return np.array(self.session.rows[last], np.float32), self.session.hidden[last]

    def reorder(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self.fed = [list(self.fed[row]) for row in rows]


def counting_rows(vocab: int) -> npt.NDArray[np.float32]:
    """Logits under which the likeliest token after t is t + 1, modulo `vocab`."""
    return np.roll(np.eye(vocab, dtype=np.float32) * 10, 1, axis=1)


def flat_rows(vocab: int) -> npt.NDArray[np.float32]:
    """The logits of `counting_rows`, flattened until every token is likely enough to be drawn."""
    return counting_rows(vocab) * np.float32(0.1)


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    """A copy of the tiny bundle, which a test may damage."""
    return Path(shutil.copytree(TINY_BUNDLE, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Results of transformers for the weights of the tiny bundle."""
    content: dict[str, Any] = json.loads((DATA / "tiny-gpt2-golden.json").read_text(encoding="utf-8"))
    return content


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object], *, reseal: bool = True) -> None:
    """Change ``bundle.json``, and correct its digest as an attacker would."""
    path = bundle / "bundle.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    if reseal:
        content["digest"] = digest_of(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Write a file of a bundle, and fix its hash and size up."""
    (bundle / name).write_bytes(content)
    fact = file_fact(bundle / name)
    edit_manifest(bundle, lambda m: m["files"].update({name: {"size_bytes": fact.size_bytes, "sha256": fact.sha256}}))


# Short, because the context of the tiny bundle is 64 tokens.
CHAT_TEMPLATE = """{% for m in messages -%}
{% if m.content == 'refuse' %}{{ raise_exception('not that') }}{% endif -%}
{{ m.role[0] }}:{{ m.content }}{{ eos_token }}
{%- endfor %}a:"""


def make_chat_bundle(folder: Path) -> Path:
    """The tiny bundle with a chat template, in a new folder inside `folder`."""
    bundle = Path(shutil.copytree(TINY_BUNDLE, folder / "tiny"))
    content = {"templates": {"default": CHAT_TEMPLATE}, "special_tokens": {"eos_token": "<|endoftext|>"}}
    replace_file(bundle, CHAT_TEMPLATE_FILE, json.dumps(content).encode())
    return bundle


def make_latent_bundle(folder: Path) -> Path:
    """The tiny bundle with a latent part of random maps, in a new folder inside `folder`."""
    bundle, latent = Path(shutil.copytree(TINY_BUNDLE, folder / "tiny")), DATA / "tiny-latent"
    for name in ("latent.bin", "latent_reference.bin"):
        replace_file(bundle, name, (latent / name).read_bytes())
    entry = json.loads((latent / "latent.json").read_text(encoding="utf-8"))
    edit_manifest(bundle, lambda m: m.update(latent=entry, required_features=["latent"]))
    return bundle


def give_task(bundle: Path, task: dict[str, Any]) -> Path:
    """Put a task into a bundle, as an export with ``--task`` does; returns the bundle's folder."""
    replace_file(bundle, TASK_FILE, json.dumps(task).encode())
    edit_manifest(bundle, lambda m: m["required_features"].append(TASK_FEATURE))
    return bundle


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str

    def one_line(self) -> str:
        """The only line on stderr. Fails if there is a second line or a traceback, or if stdout is not empty."""
        assert self.stdout == ""
        assert "Traceback" not in self.stderr
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("edgelm: ")
        return lines[0]


RunCommand = Callable[..., CommandResult]


@pytest.fixture
def edgelm_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunCommand:
    """Runs ``edgelm ARGS`` in an empty folder.

    In this process, which has loaded everything: a new one takes half a second to. With variables of its own `env`, or
    without a stdin, it gets a new process.
    """
    from edgelm.cli import main

    def run(*args: str, stdin: bytes | None = b"", env: dict[str, str] | None = None) -> CommandResult:
        if env is not None or stdin is None:
            environment = {k: v for k, v in os.environ.items() if k not in ("EDGELM_MODEL", "COLUMNS")} | (env or {})
            command = [sys.executable, "-m", "edgelm", *args]
            done = subprocess.run(command, input=stdin, capture_output=True, cwd=tmp_path, env=environment, timeout=300)
            return CommandResult(done.returncode, done.stdout.decode(), done.stderr.decode())
        capfd.readouterr()
        with standard_input(stdin), monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.chdir(tmp_path)
            patch.setattr("sys.argv", ["edgelm", *args])
            patch.delenv("EDGELM_MODEL", raising=False)
            patch.delenv("COLUMNS", raising=False)
            main()
        shown = capfd.readouterr()
        status = ended.value.code
        assert status is None or isinstance(status, int)
        return CommandResult(status or 0, shown.out, shown.err)

    return run


@contextmanager
def standard_input(content: bytes) -> Iterator[None]:
    """Let this process read `content` from its standard input, in Python and below it."""
    own_stream, own_descriptor = sys.stdin, os.dup(0)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        os.dup2(file.fileno(), 0)
        try:
            with open(0, encoding="utf-8", closefd=False) as stream:
                sys.stdin = stream
                yield
        finally:
            sys.stdin = own_stream
            os.dup2(own_descriptor, 0)
            os.close(own_descriptor)
