"""``edgelm run --choices`` and the like: output, messages, exit status."""

import json
from pathlib import Path

from tests.conftest import RunCommand

RUN = ["run", "--threads", "1", "--seed", "1", "--no-echo", "Lily felt"]


def test_each_kind(edgelm_command: RunCommand, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}), encoding="utf-8")
    (tmp_path / "grammar.lark").write_text('start: " yes" | " no"', encoding="utf-8")
    done = edgelm_command(*RUN, "--choices", " happy", "--choices", " sad")
    assert (done.status, done.stderr) == (0, "") and done.stdout in (" happy\n", " sad\n")
    done = edgelm_command(*RUN, "--regex", " [0-9]{3}")
    assert done.status == 0 and int(done.stdout) < 1000
    done = edgelm_command(*RUN, "--json-schema", "schema.json")
    assert done.status == 0 and json.loads(done.stdout)["n"] in range(10)
    done = edgelm_command(*RUN, "--grammar", "grammar.lark", "--json")
    assert done.status == 0 and json.loads(done.stdout)["choices"][0]["text"] in (" yes", " no")


def test_a_cut_text_has_a_status_of_its_own(edgelm_command: RunCommand) -> None:
    for more in ([], ["--json"]):
        done = edgelm_command(*RUN, "--regex", " [a-z ]{200}", "-n", "3", *more)
        assert done.status == 3 and done.stdout
        assert done.stderr.splitlines() == [
            "edgelm: the text was cut off (length) before it was what it must be: allow more tokens with -n"
        ]


def test_mistakes(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("[", encoding="utf-8")
    (tmp_path / "latin.json").write_bytes(b'{"title": "\xe9"}')
    for arguments, words in (
        (["--regex", "a", "--choices", "a"], "--choices and --regex contradict each other"),
        (["--regex", "(?=a)"], "look-around"),
        (["--regex", "(" * 20_000], "at most 16,384 characters"),
        (["--json-schema", "schema.json"], "is not valid JSON (line 1"),
        (["--json-schema", "latin.json"], "is not UTF-8"),
        (["--grammar", "nowhere.lark"], "cannot read 'nowhere.lark'"),
        (["--choices", ""], "none of them empty"),
        (["--choices", "a", "--stop", "b"], "stop_strings and constraint contradict each other"),
    ):
        done = edgelm_command(*RUN, *arguments)
        assert done.status == 2, done
        assert words in done.one_line()
