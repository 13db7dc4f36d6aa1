"""``edgelm run`` and the other commands on a bundle with a task, as users see them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import Model
from tests.conftest import TINY_BUNDLE, RunCommand, give_task

CHOOSE: dict[str, Any] = {
    "kind": "choose",
    "description": "Where the \x1b[31manimal sat.",
    "template": "The {who} sat on the",
    "choices": {"rug": " mat", "home ☕": " house"},
    "measured": [{"metric": "accuracy", "value": 0.5, "data": "cats, dev", "count": 1872, "float_value": 0.51}],
}
GENERATE: dict[str, Any] = {
    "kind": "generate",
    "template": "{a} and {b}",
    "generation": {"max_new_tokens": 6, "do_sample": False},
}


@pytest.fixture
def chooses(tiny_copy: Path) -> str:
    return str(give_task(tiny_copy, CHOOSE))


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    (tmp_path / "gen.json").write_text(json.dumps(GENERATE), encoding="utf-8")
    return "gen.json"  # commands run in this folder


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu")


def test_a_label_and_its_probability(edgelm_command: RunCommand, chooses: str, model: Model) -> None:
    selection = model.choose("The cat sat on the", [" mat", " house"])
    label = ["rug", "home ☕"][selection.index]
    result = edgelm_command("run", "-m", chooses, "cat")
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout == f"{label} {selection.best.probability:.2f}\n"
    assert edgelm_command("run", "-m", chooses, stdin=b"cat\n").stdout == result.stdout
    assert edgelm_command("run", "-m", chooses, "--field", "who=cat").stdout == result.stdout
    whole = json.loads(edgelm_command("run", "-m", chooses, "cat", "--json").stdout)
    assert whole["label"] == label and whole["digest"] and list(whole["probabilities"]) == ["rug", "home ☕"]
    raw = edgelm_command("run", "-m", chooses, "The cat", "--raw", "-n", "3")
    assert raw.stdout == edgelm_command("run", "-m", str(TINY_BUNDLE), "The cat", "-n", "3").stdout


def test_a_text(edgelm_command: RunCommand, task_file: str, model: Model) -> None:
    tiny = ("run", "-m", str(TINY_BUNDLE), "--task", task_file)
    own = model.generate("The cat and =", max_new_tokens=6, do_sample=False)
    by_field = edgelm_command(*tiny, "--field", "a=The cat", "--field", "b==")
    assert (by_field.status, by_field.stdout, by_field.stderr) == (0, f"{own.text.strip()}\n", "")
    assert edgelm_command(*tiny, '{"a": "The cat", "b": "="}').stdout == by_field.stdout
    whole = json.loads(
        edgelm_command(*tiny, '{"b": "=", "a": "The cat"}', "--json", "-n", "3", "--logprobs", "0").stdout
    )
    assert whole["choices"][0]["token_ids"] == list(own.choices[0].token_ids[:3])
    assert whole["text"] == whole["choices"][0]["text"].strip() and len(whole["choices"][0]["logprobs"]) == 3
    two = edgelm_command(*tiny, '{"a": "x", "b": "y"}', "--do-sample", "--seed", "1", "--num-return-sequences", "2")
    assert two.status == 0 and two.stdout.endswith("\n")


def test_a_line_each(edgelm_command: RunCommand, chooses: str, model: Model) -> None:
    stdin = 'cat\r\n\n{"who": 1}\n<|endoftext|>\n\xff'.encode("latin-1") + b"\ndog"
    result = edgelm_command("run", "-m", chooses, "--lines", stdin=stdin)
    assert result.status == 1
    first, empty, third, special, broken, last = map(json.loads, result.stdout.splitlines())
    selection = model.choose("The cat sat on the", [" mat", " house"])
    assert first == {
        "label": ["rug", "home ☕"][selection.index],
        "probability": pytest.approx(selection.best.probability, abs=1e-6),
    }
    assert "label" in last and "label" in third  # a text, whatever it looks like
    for number, one, words in [(2, empty, "is empty"), (4, special, "special token"), (5, broken, "not UTF-8")]:
        assert one["line"] == number and words in one["error"]
    assert [line.startswith("edgelm: line ") for line in result.stderr.splitlines()] == [True] * 3
    whole = edgelm_command("run", "-m", chooses, "--lines", "--json", stdin=b"cat\n")
    assert whole.status == 0 and sum(json.loads(whole.stdout)["probabilities"].values()) == pytest.approx(1)
    assert edgelm_command("run", "-m", chooses, "--lines", stdin=b"").stdout == ""


def test_a_line_each_of_several_fields(edgelm_command: RunCommand, task_file: str, model: Model) -> None:
    tiny = ("run", "-m", str(TINY_BUNDLE), "--task", task_file, "--lines")
    good = b'{"a": "The cat", "b": "dog"}\n'
    result = edgelm_command(
        *tiny, stdin=good + b"The cat\n" + b'{"a": "The cat"}\n{"a": 1, "b": "' + b"x" * 99 + b'"}\n' + good
    )
    first, text, missing, number, last = map(json.loads, result.stdout.splitlines())
    own = model.generate("The cat and dog", max_new_tokens=6, do_sample=False)
    assert first == last == {"text": own.text.strip(), "finish_reason": "length"} and result.status == 1
    assert "not valid JSON" in text["error"] and "'b' is missing" in missing["error"] and "a text" in number["error"]
    long = edgelm_command(*tiny, "--max-length", "12", stdin=b'{"a": "x", "b": "yyyyyyyyyyyyyyyyyyyyyyyy"}\n' + good)
    refused, answered = map(json.loads, long.stdout.splitlines())
    assert long.status == 1 and "max_length" in refused["error"] and "text" in answered


def test_lines_without_a_task(edgelm_command: RunCommand, chooses: str, model: Model) -> None:
    own = model.generate("The cat", max_new_tokens=4)
    expected = {"text": own.text, "finish_reason": own.choices[0].finish_reason}
    for args in (("-m", str(TINY_BUNDLE)), ("-m", chooses, "--raw")):
        result = edgelm_command("run", *args, "--lines", "-n", "4", stdin=b"The cat\nThe cat")
        assert [json.loads(line) for line in result.stdout.splitlines()] == [expected] * 2 and result.status == 0


def test_a_constrained_line_that_is_cut(edgelm_command: RunCommand, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    task = {**GENERATE, "template": "{a}", "constraint": {"regex": " [a-z]{40}"}, "generation": {}}
    (tmp_path / "cut.json").write_text(json.dumps(task), encoding="utf-8")
    tiny = ("run", "-m", str(TINY_BUNDLE), "--task", "cut.json", "-n", "9")
    result = edgelm_command(*tiny, "--lines", stdin=b"x\ny\n")
    assert result.status == 3 and "cut off" in result.stderr
    assert [json.loads(line)["finish_reason"] for line in result.stdout.splitlines()] == ["length", "length"]
    assert edgelm_command(*tiny, "x").status == 3


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["-n", "5", "cat"], 2, "'max_new_tokens' has no effect, because this task (choose) generates no text"),
        (["--stats", "cat"], 2, "--stats is about generated text"),
        (["--show-probs", "cat"], 2, "--show-probs is for texts that are continued"),
        (["--lines", "--show-probs"], 2, "--lines and --show-probs are given"),
        (["--state", "s", "cat"], 2, "--state keeps a prompt"),
        (["--field", "who", "x"], 2, "--field and a prompt are given"),
        (["--field", "who"], 2, "--field takes NAME=TEXT, got 'who'"),
        (["--field", "=x"], 2, "--field takes NAME=TEXT, got '=x'"),
        (["--field", "who=x", "--field", "who=y"], 2, "--field who is given twice"),
        (["--field", "what=x"], 1, "no field 'what': it has who"),
        (["--field", "who="], 1, "the field 'who' is empty"),
        ([""], 1, "the field 'who' is empty"),
        (["--lines", "cat"], 2, "--lines and a prompt are given"),
        (["--lines", "--field", "who=x"], 2, "--lines and --field are given"),
        (["--lines", "--json", "--logprobs", "2"], 2, "--lines and --logprobs are given"),
        (["--lines", "-n", "3"], 2, "has no effect"),
        (["--raw", "--field", "who=x"], 2, "--raw and --field are given"),
        (["--task", "none.json", "cat"], 2, "cannot read the task 'none.json': No such file"),
    ],
)
def test_bad_input_is_one_line(
    edgelm_command: RunCommand, chooses: str, args: list[str], status: int, message: str
) -> None:
    result = edgelm_command("run", "-m", chooses, *args)
    assert message in result.one_line() and result.status == status


def test_fields_need_a_task(edgelm_command: RunCommand) -> None:
    result = edgelm_command("run", "-m", str(TINY_BUNDLE), "--field", "a=b")
    assert "the bundle has no task" in result.one_line() and result.status == 2


def test_info_shows_the_task(edgelm_command: RunCommand, chooses: str) -> None:
    shown = edgelm_command("info", chooses).stdout
    assert "choose: Where the \\x1b[31manimal sat." in shown and "\x1b" not in shown
    assert "rug, home ☕" in shown and "The {who} sat on the" in shown
    assert "accuracy 0.5 (source 0.51) on 1,872 examples, cats, dev" in shown
    assert json.loads(edgelm_command("info", chooses, "--json").stdout)["task"]["choices"] == CHOOSE["choices"]
    assert "task" not in json.loads(edgelm_command("info", str(TINY_BUNDLE), "--json").stdout)


def test_a_chat_has_the_tasks_form_system_and_defaults(
    edgelm_command: RunCommand, tmp_path: Path, model: Model
) -> None:
    task = {"kind": "chat", "system": "the cat", "plain": "labels", "generation": {"max_new_tokens": 3}}
    (tmp_path / "chat.json").write_text(json.dumps(task), encoding="utf-8")
    tiny = ("chat", "-m", str(TINY_BUNDLE), "--greedy")
    by_task = edgelm_command(*tiny, "--task", "chat.json", stdin=b"hello\n")
    by_hand = edgelm_command(*tiny, "--system", "the cat", "--plain", "labels", "-n", "3", stdin=b"hello\n")
    assert by_task.status == 0 and by_task.stdout == by_hand.stdout and by_task.stdout.strip()
    answer = edgelm_command("run", "-m", str(TINY_BUNDLE), "--greedy", "--task", "chat.json", "hello").stdout
    assert answer.strip() == by_task.stdout.strip()
    (tmp_path / "gen.json").write_text(json.dumps(GENERATE), encoding="utf-8")
    refused = edgelm_command(*tiny, "--task", "gen.json", stdin=b"hello\n")
    assert "the task 'gen.json' is no chat" in refused.one_line()


def test_answers_come_line_by_line_and_a_closed_reader_ends_them(chooses: str) -> None:
    """Each line is answered before the next one is read, so a slow pipe never waits."""
    command = [sys.executable, "-m", "edgelm", "run", "-m", chooses, "--lines"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        for line in (b"cat\n", b"\n", b"dog\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())
        process.stdout.close()
        process.stdin.write(b"cat\ncat\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read().decode().splitlines()[1:] == []  # the empty line alone is told of


def test_a_prefix_that_has_a_task(edgelm_command: RunCommand, task_file: str, tmp_path: Path, model: Model) -> None:
    (tmp_path / "choose.json").write_text(json.dumps(CHOOSE), encoding="utf-8")
    (tmp_path / "examples.txt").write_text("The cat. ", encoding="utf-8")
    tiny = ("-m", str(TINY_BUNDLE))
    baked = edgelm_command("bake", "examples.txt", "-o", "a.prefix", "--task", "choose.json", *tiny)
    assert baked.status == 0, baked.stderr
    label = model.with_prefix(tmp_path / "a.prefix").task("cat")
    line = edgelm_command("run", *tiny, "--prefix", "a.prefix", "--lines", stdin=b"cat\n").stdout
    assert json.loads(line)["label"] == str(label)
    told = edgelm_command("info", *tiny, "--prefix", "a.prefix", "--json").stdout
    assert json.loads(told)["task"]["kind"] == "choose" and json.loads(told)["prefix"]["text"] == "The cat. "
    again = edgelm_command("bake", "a.prefix", "-o", "a.prefix", "--task", task_file, *tiny)
    assert again.status == 0, again.stderr
    assert "generate: no description" in edgelm_command("info", *tiny, "--prefix", "a.prefix").stdout
    for arguments, words in (
        ((), "give --task to put a task into it"),
        (("--task", task_file, "--dtype", "float16"), "drop --dtype"),
        (("--task", "examples.txt"), "the task 'examples.txt' is not valid JSON"),
    ):
        refused = edgelm_command("bake", "a.prefix", "-o", "b.prefix", *arguments, *tiny)
        assert words in refused.one_line() and refused.status == 2
    assert not (tmp_path / "b.prefix").exists()
