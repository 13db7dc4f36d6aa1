"""What a terminal and a reader of JSON get: nothing that steers the terminal, no NaN, no endless reading."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgelm.bundle import small_files
from edgelm.bundle.small_files import SmallFileError, read_small_file
from edgelm.cli import cli
from edgelm.cli.shared import json_line, print_table, read_text_file
from edgelm.cli.streams import escaped
from edgelm.decoding.logprobs import BROKEN_LOGITS
from edgelm.engine.session import Session
from edgelm.errors import DeviceError, EdgelmError, PromptError
from edgelm.scoring.token_scores import BROKEN_STATES
from tests.conftest import TINY_BUNDLE, edit_manifest

EVIL = "\x1b[2J\x9b31m\u202eevil\u2066\x07\r"


def run(*args: str, **kwargs: Any) -> Any:
    return CliRunner().invoke(cli, list(args), **kwargs)


def test_escaped_shows_what_would_steer_a_terminal() -> None:
    assert escaped(EVIL) == r"\x1b[2J\x9b31m\u202eevil\u2066\x07\r"
    assert escaped("Grüße, 今天 🎉 naïve — “x”") == "Grüße, 今天 🎉 naïve — “x”"
    assert escaped("\udcff") == r"\udcff"


def test_tables_and_json_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([(f"name{EVIL}", f"value{EVIL}")])
    assert not set(capsys.readouterr().out) & set("\x1b\x9b\u202e\u2066\x07\r")
    line = json_line({"text": EVIL + "\udcff"})
    assert not set(line) & set("\x1b\x9b\u202e\u2066\x07\r\udcff")
    assert json.loads(line) == {"text": EVIL + "\udcff"}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_info_of_a_bundle_with_controls(tiny_copy: Path, options: list[str]) -> None:
    edit_manifest(tiny_copy, lambda m: m["source"].update(name=EVIL, license=EVIL, revision=EVIL))
    edit_manifest(tiny_copy, lambda m: m.update(created_by=EVIL))
    for command in (["info", str(tiny_copy)], ["compare", str(tiny_copy), str(TINY_BUNDLE)]):
        result = run(*command, *options)
        assert result.exit_code == 0, result.output
        assert not set(result.output) & set("\x1b\x9b\u202e\u2066\x07\r")
        assert "evil" in result.output


def test_errors_with_file_names_are_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from edgelm.cli import _fail

    with pytest.raises(SystemExit):
        _fail(f"cannot read {EVIL}", 1)
    assert capfd.readouterr().err == "edgelm: cannot read \\x1b[2J\\x9b31m\\u202eevil\\u2066\\x07\n"


def test_json_has_no_nan() -> None:
    assert json_line({"a": [float("nan"), (float("inf"), 1.5)]}) == '{"a": [null, [null, 1.5]]}'


@pytest.mark.parametrize(
    "command, broken",
    [
        (["score", "a", "b"], BROKEN_LOGITS),
        (["choose", "a", "-o", "b", "-o", "c"], BROKEN_LOGITS),
        (["perplexity", "abc"], BROKEN_LOGITS),
        (["embed", "abc"], BROKEN_STATES),
        (["run", "abc", "-n", "1", "--logprobs", "1", "--json"], BROKEN_LOGITS),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_an_error(command: list[str], broken: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose results are broken prints none of them."""

    def spoil(name: str) -> None:
        original = getattr(Session, name)

        def spoiled(self: Session, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            parts = result if isinstance(result, tuple) else (result,)
            filled = tuple(np.full_like(part, value) for part in parts)
            return filled if isinstance(result, tuple) else filled[0]

        monkeypatch.setattr(Session, name, spoiled)

    for name in ("step", "score", "step_hidden"):
        spoil(name)
    as_json = [] if "--json" in command else ["--json"]
    for options in ([], as_json):
        result = run(*command, *options, "-m", str(TINY_BUNDLE))
        assert isinstance(result.exception, DeviceError) and str(result.exception) == broken
        assert result.stdout == ""


def test_a_perplexity_beyond_floats_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Session.score

    def certain(self: Session, ids: Any) -> Any:
        logits = original(self, ids)
        logits[:] = 0
        logits[:, 0] = 1e30
        return logits

    monkeypatch.setattr(Session, "score", certain)
    result = run("perplexity", "abcdef", "-m", str(TINY_BUNDLE))
    assert isinstance(result.exception, DeviceError)


# Small files


def test_small_files_are_regular_and_small(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_small_file(tmp_path / "a", 3) == b"abc"
    with pytest.raises(SmallFileError, match="has 3 bytes, more than 2"):
        read_small_file(tmp_path / "a", 2)
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(3 * 2**30)
    with pytest.raises(SmallFileError, match="has 3,221,225,472 bytes"):
        read_small_file(tmp_path / "sparse", 2**20)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes of POSIX")
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises((SmallFileError, IsADirectoryError), match=f"is {words}|directory"):
            read_small_file(path, 10)
        with pytest.raises(PromptError, match="cannot read"):
            read_text_file(path, PromptError)
        result = run("run", "abc", "-m", str(TINY_BUNDLE), "--state", str(path))
        assert isinstance(result.exception, EdgelmError | SystemExit) and result.exit_code == 1
        assert "\n" not in str(result.exception)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_large_files_of_a_bundle_are_refused(name: str, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelm.bundle.folder import file_fact

    with (tiny_copy / name).open("ab") as stream:
        stream.truncate(70 * 2**20)
    fact = file_fact(tiny_copy / name)
    edit_manifest(
        tiny_copy, lambda m: m["files"].update({name: {"size_bytes": fact.size_bytes, "sha256": fact.sha256}})
    )
    result = run("run", "abc", "-m", str(tiny_copy))
    assert isinstance(result.exception, EdgelmError) and "bytes, more than" in str(result.exception)


# Numbers on the command line


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "1e400"],
        ["--temperature", "nan"],
        ["--temperature", "9" * 400],
        ["--seed", "9" * 5000],
        ["--max-new-tokens", "9" * 30],
        ["--logit-bias", "9" * 5000 + "=1"],
        ["--logit-bias", "11=inf"],
        ["--exponential-decay-length-penalty", "inf", "1.1"],
        ["--exponential-decay-length-penalty", "nan", "1.1"],
        ["--exponential-decay-length-penalty", "2.5", "1.1"],
        ["--threads", "9" * 30],
        ["--threads", "9" * 5000],
        ["--max-time", "-inf"],
    ],
    ids=range(13),
)
def test_numbers_beyond_all_limits(flags: list[str]) -> None:
    result = run("run", "abc", "-m", str(TINY_BUNDLE), *flags)
    assert result.exit_code != 0
    assert isinstance(result.exception, (EdgelmError, SystemExit)), result.exception


def test_caps_exist() -> None:
    assert small_files.MAX_TEXT_BYTES == 2**28
