"""``edgelm score``, ``choose``, ``perplexity`` and ``embed`` as users see them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgelm
from tests.conftest import TINY_BUNDLE, RunCommand

TINY = ("-m", str(TINY_BUNDLE))


@pytest.fixture(scope="module")
def model() -> edgelm.Model:
    return edgelm.load(TINY_BUNDLE, device="cpu")


def test_score(edgelm_command: RunCommand, model: edgelm.Model) -> None:
    expected = model.score("The cat", " sat")
    result = edgelm_command("score", *TINY, "The cat", " sat")
    assert (result.status, result.stdout, result.stderr) == (0, f"{expected.logprob:.6f}\n", "")
    content = json.loads(edgelm_command("score", *TINY, "The cat", " sat", "--json").stdout)
    assert content["prompt"] == "The cat" and content["continuation"] == " sat"
    assert content["logprob"] == pytest.approx(expected.logprob, abs=1e-5)
    assert [token["token_id"] for token in content["tokens"]] == [token.token_id for token in expected.tokens]


def test_score_of_many_lines(edgelm_command: RunCommand, model: edgelm.Model) -> None:
    expected = "".join(f"{model.score('The', end).logprob:.6f}\n" for end in (" cat", " dog ☕"))
    assert edgelm_command("score", *TINY, "The", stdin=" cat\n dog ☕\r\n".encode()).stdout == expected
    assert edgelm_command("score", *TINY, "The", "-", stdin=" cat\n dog ☕".encode()).stdout == expected
    assert edgelm_command("score", *TINY, stdin="The\t cat\nThe\t dog ☕".encode()).stdout == expected


def test_choose(edgelm_command: RunCommand, model: edgelm.Model) -> None:
    options = (" mat", " house", " end")
    flags = [word for option in options for word in ("-o", option)]
    expected = [model.choose(prompt, options) for prompt in ("The cat sat on the", "and then the")]
    assert edgelm_command("choose", *TINY, "The cat sat on the", *flags).stdout == f"{expected[0]}\n"
    stdin = b"The cat sat on the\nand then the\n"
    result = edgelm_command("choose", *TINY, *flags, stdin=stdin)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout == f"{expected[0]}\n{expected[1]}\n"
    lines = edgelm_command("choose", *TINY, *flags, "--json", stdin=stdin).stdout.splitlines()
    for line, selection in zip(lines, expected, strict=True):
        content = json.loads(line)
        assert content["best"] == str(selection) and content["index"] == selection.index
        assert [option["text"] for option in content["options"]] == list(options)
        assert sum(option["probability"] for option in content["options"]) == pytest.approx(1)
    calibrated = edgelm_command(
        "choose", *TINY, *flags, "The", "--json", "--calibrate", "and", "--length-normalization", "token"
    )
    by_hand = model.choose("The", options, calibrate="and", length_normalization="token")
    scores = [option["score"] for option in json.loads(calibrated.stdout)["options"]]
    assert scores == pytest.approx([option.score for option in by_hand.options], abs=1e-5)


def test_perplexity(edgelm_command: RunCommand, model: edgelm.Model, tmp_path: Path) -> None:
    expected = model.perplexity("The cat sat on the mat.")
    line = f"{expected.value:.4f}\n"
    assert edgelm_command("perplexity", *TINY, "The cat sat on the mat.").stdout == line
    two = b"The cat sat on the mat.\nThe cat sat on the mat.\n"
    assert edgelm_command("perplexity", *TINY, stdin=two).stdout == line * 2
    content = json.loads(edgelm_command("perplexity", *TINY, "-", "--json", stdin=two[:24]).stdout)
    assert content == {"perplexity": pytest.approx(expected.value), "tokens": expected.tokens}
    (tmp_path / "story.txt").write_text("The cat sat.\n" * 30, encoding="utf-8")
    whole = model.perplexity("The cat sat.\n" * 30, stride=16)
    result = edgelm_command("perplexity", *TINY, "--file", str(tmp_path / "story.txt"), "--stride", "16")
    assert result.stdout == f"{whole.value:.4f}\n"


def test_embed(edgelm_command: RunCommand, model: edgelm.Model) -> None:
    expected = model.embed("The cat", pooling="last", normalize=True)
    flags = ("--pooling", "last", "--normalize")
    shown = edgelm_command("embed", *TINY, *flags, "The cat").stdout
    np.testing.assert_allclose([float(number) for number in shown.split(" ")], expected, atol=1e-6)
    lines = edgelm_command("embed", *TINY, *flags, "--json", stdin=b"The cat\nThe cat").stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    np.testing.assert_allclose(json.loads(lines[0])["embedding"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "stdin", "status", "message"),
    [
        (["score", "", "x"], b"", 1, "the prompt is empty"),
        (["score", "x", ""], b"", 1, "the continuation is empty"),
        (["score", "x" * 50, "y" * 50], b"", 1, "with a context of 64, scores 65 at most"),
        (["score", "a", "b", "c"], b"", 2, "unexpected extra argument"),
        (["choose", "x", "-o", "a"], b"", 2, "give -o at least twice, got 1"),
        (["choose", "x", "-o", "a", "-o", "a"], b"", 1, "the option 'a' is given twice"),
        (["choose", "x", "-o", "a", "-o", "b", "--length-normalization", "word"], b"", 2, "'word' is not one of"),
        (["perplexity", "x"], b"", 1, "a perplexity needs 2 at least"),
        (["perplexity", "abc", "--stride", "0"], b"", 2, "stride must be a whole number from 2 to 64"),
        (["perplexity", "--stride", "65"], b"abc\n", 2, "edgelm: stride must be a whole number from 2 to 64"),
        (["perplexity", "abc", "--file", "x"], b"", 2, "a text and --file are given"),
        (["perplexity", "--file", "/nowhere"], b"", 1, "cannot read '/nowhere': No such file"),
        (["embed", "x" * 65], b"", 1, "the text has 65 tokens, but this model's context holds 64"),
        (["embed", "x", "--pooling", "max"], b"", 2, "'max' is not one of"),
        (["run", "x", "--logprobs", "1"], b"", 2, "--logprobs needs --json"),
    ],
)
def test_bad_input_is_one_line(
    edgelm_command: RunCommand, args: list[str], stdin: bytes, status: int, message: str
) -> None:
    result = edgelm_command(args[0], *TINY, *args[1:], stdin=stdin)
    assert message in result.one_line()
    assert result.status == status


@pytest.mark.parametrize(
    ("args", "bad", "message"),
    [
        (["perplexity"], b"", ": the text is empty: give some text"),
        (["perplexity"], b"x", ": the text has 1 token, and a perplexity needs 2 at least: give a longer text"),
        (["choose", "-o", "a", "-o", "b"], b"", ": the prompt is empty"),
        (["score"], b"no tab", ": a line must be a prompt, a tab and a continuation, got 0 tabs"),
        (["embed"], b"x" * 65, ": the text has 65 tokens, but this model's context holds 64"),
        (["embed"], b"ab\xff", " is not UTF-8 text (byte 2)"),
    ],
)
def test_a_bad_line_is_reported_and_the_others_are_answered(
    edgelm_command: RunCommand, args: list[str], bad: bytes, message: str
) -> None:
    """Its own answer is an empty line, so that every line has one and a program that waits for it goes on."""
    good = b"The cat\t sat" if args == ["score"] else b"The cat"
    (right,) = edgelm_command(*args, *TINY, stdin=good).stdout.splitlines()
    result = edgelm_command(*args, *TINY, stdin=good + b"\n" + bad + b"\n" + good + b"\n")
    assert result.status == 1 and result.stdout.splitlines() == [right, "", right]
    (reported,) = result.stderr.splitlines()
    assert reported.startswith(f"edgelm: line 2 of standard input{message}")
    shown = edgelm_command(*args, *TINY, "--json", stdin=good + b"\n" + bad + b"\n" + good + b"\n")
    first, wrong, last = map(json.loads, shown.stdout.splitlines())
    assert shown.status == 1 and first == last and "error" not in first
    assert wrong == {"line": 2, "error": reported.removeprefix("edgelm: ")}


def test_an_error_of_every_line_is_said_once(edgelm_command: RunCommand) -> None:
    result = edgelm_command("perplexity", *TINY, "--stride", "1", stdin=b"abc\nabc\n")
    assert result.status == 2 and "stride must be" in result.one_line()


def test_no_lines_are_no_answers(edgelm_command: RunCommand) -> None:
    result = edgelm_command("embed", *TINY, stdin=b"")
    assert (result.status, result.stdout, result.stderr) == (0, "", "")


def test_answers_come_line_by_line() -> None:
    """Each line is answered before the next one is read, so that another program can converse."""
    command = [sys.executable, "-m", "edgelm", "choose", *TINY, "-o", " a", "-o", " b"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for question in (b"The cat\n", b"The dog\n"):
            process.stdin.write(question)
            process.stdin.flush()
            assert process.stdout.readline().rstrip() in (b" a", b" b")
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_a_given_text_never_touches_stdin() -> None:
    read, write = os.pipe()
    try:
        command = [sys.executable, "-m", "edgelm", "perplexity", *TINY, "Hello there"]
        assert subprocess.run(command, stdin=read, capture_output=True, timeout=60).returncode == 0
    finally:
        os.close(read)
        os.close(write)


def test_logprobs_of_a_continuation(edgelm_command: RunCommand) -> None:
    content = json.loads(edgelm_command("run", *TINY, "Hi", "--json", "-n", "3", "--logprobs", "2").stdout)
    (choice,) = content["choices"]
    assert [token["token_id"] for token in choice["logprobs"]] == choice["token_ids"]
    assert all(len(token["top"]) == 2 for token in choice["logprobs"])
