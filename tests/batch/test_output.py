"""The output of a run: torn lines, other runs, full disks, and folders that cannot be written."""

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.batch.answers import Answer
from edgelm.batch.output import LineSet, OutputError, RunRecord, opened_output, read_written
from edgelm.bundle.strict_json import StrictJsonError

RECORD = RunRecord(
    input_sha256="a", bundle="b", prefix="", task="", kind="generate", context=64, device="cpu", order="input",
    options={"top_k": "3"}, seed=2**64 - 1, started="2026-01-01T00:00:00", edgelm="0.1.0",
)  # fmt: skip

ROWS = st.lists(st.tuples(st.text(max_size=5), st.sampled_from(["eos", "length", None])), max_size=6)


def answer(number: int, text: str = "", reason: str | None = "eos") -> Answer:
    facts = {"line": number} | ({"error": text} if reason is None else {"text": text, "finish_reason": reason})
    return Answer(number, json.dumps(facts))


@given(ROWS, st.data())
def test_a_file_torn_anywhere_has_its_whole_lines(rows: list[tuple[str, str | None]], data: st.DataObject) -> None:
    """In the order of the input, and in any other."""
    ordered = data.draw(st.booleans())
    numbers = list(range(1, len(rows) + 1))
    if not ordered:
        numbers = data.draw(st.permutations(numbers))
    lines = [f"{answer(number, *row).line}\n".encode() for number, row in zip(numbers, rows, strict=True)]
    content = b"".join(lines)
    torn = content[: data.draw(st.integers(0, len(content)))]
    whole = torn.count(b"\n")
    written = read_written(io.BytesIO(torn), ordered=ordered)
    assert written.size_bytes == len(b"".join(lines[:whole]))
    assert {number for number in numbers if number in written.lines} == set(numbers[:whole])
    assert len(written.lines) == whole
    assert written.failed == sum(reason is None for _, reason in rows[:whole])
    assert written.cut == sum(reason == "length" for _, reason in rows[:whole])


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\n", "its line 1 is no answer"),
        (b"{}\n", "its line 1 is no answer"),
        (b'{"line": true}\n', "is no answer"),
        (b'{"line": 0}\n', "is no answer"),
        (b'{"line": 1}\n{"line": 1}\n', "its line 2 is no answer"),
        (b'{"line": 1}\n\0\0\0\n', "its line 2 is no answer"),
        (b"[" * 100_000 + b"\n", "is no answer"),
        (b'{"line": 2}\n', "its line 1 is out of order"),
    ],
)
def test_a_file_of_something_else_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(StrictJsonError, match=words):
        read_written(io.BytesIO(content), ordered=True)


@given(st.lists(st.integers(1, 30)))
def test_a_set_of_lines_is_a_set(numbers: list[int]) -> None:
    lines = LineSet()
    for number in numbers:
        if number not in lines:
            lines.add(number)
    assert {number for number in range(-1, 32) if number in lines} == set(numbers) and len(lines) == len(set(numbers))
    assert "a" not in lines


def test_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with opened_output(path, RECORD) as output:
        output.write(answer(1, "é\n"))
        output.write(answer(2))
    first = path.read_bytes()
    path.write_bytes(first + b'{"line": 3, "text": "to')
    later = replace(RECORD, started="2027-01-01T00:00:00", seed=None)
    with opened_output(path, later) as output:
        assert (output.found, output.record) == (2, RECORD)  # with the seed and the start of the first run
        output.write(answer(3))
    assert path.read_bytes() == first + answer(3).line.encode() + b"\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run"]


def test_a_seed_is_drawn_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    seeds = set()
    for _ in range(2):
        with opened_output(path, replace(RECORD, seed=None)) as output:
            seeds.add(output.record.seed)
    assert len(seeds) == 1 and None not in seeds


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"input_sha256": "c"}, "another input"),
        ({"bundle": "c"}, "another bundle"),
        ({"kind": "score"}, "another --as"),
        ({"order": "finished"}, "another order"),
        ({"options": {}}, "another value of top_k"),
        ({"options": {"top_k": "3", "min_p": "0.1"}}, "another value of min_p"),
        ({"seed": 1}, "another seed"),
        ({"edgelm": "0.2.0"}, "another version"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    path = tmp_path / "out.jsonl"
    with opened_output(path, RECORD) as output:
        output.write(answer(1))
    before = path.read_bytes()
    with pytest.raises(OutputError, match=words), opened_output(path, replace(RECORD, **changed)):  # type: ignore[arg-type]
        pass
    assert path.read_bytes() == before
    path.write_bytes(b"")  # without answers there is nothing that another run could spoil
    with opened_output(path, replace(RECORD, **changed)) as output:  # type: ignore[arg-type]
        assert output.found == 0


def test_a_file_that_no_run_made_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(OutputError, match="give another output file"), opened_output(path, RECORD):
        pass
    assert path.read_text() == "precious\n"
    (tmp_path / "out.jsonl.run").write_text("{")
    with pytest.raises(OutputError, match="is not valid JSON"), opened_output(path, RECORD):
        pass


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        opened_output(path, RECORD),
        pytest.raises(OutputError, match="another run writes"),
        opened_output(path, RECORD),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of a file's size to set")
def test_a_full_disk_leaves_whole_answers(tmp_path: Path) -> None:
    """A limit of the file's size stands for it: the write that crosses the limit is cut, and the next one fails."""
    import resource

    path = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    line = len(answer(1).line) + 1
    with opened_output(path, RECORD) as output:
        output.write(answer(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (line + 10, limits[1]))
        try:
            with pytest.raises(OutputError, match="File too large; give the same command again"):
                output.write(answer(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == answer(1).line.encode() + b"\n"
    with opened_output(path, RECORD) as output:
        assert output.found == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot write"), opened_output(tmp_path / "out.jsonl", RECORD):
            pass
    finally:
        tmp_path.chmod(0o700)
