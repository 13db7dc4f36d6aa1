"""The pure functions of the peer benchmark; of every benchmark its help, its README entry, and no private path."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not part of a distribution")

from benchmarks.engines import single_prompt
from benchmarks.peers.charts import PAGE as CHARTED_PAGE
from benchmarks.peers.charts import charts, write_charts
from benchmarks.peers.check import agreement
from benchmarks.peers.page import sections, with_section
from benchmarks.peers.plot import Bar, axis_ticks, bar_chart
from benchmarks.peers.tables import CALL, DECODE, PREFILL, Row, best_peer, memory_table, ratio, speed_table
from benchmarks.report import Measured
from benchmarks.rounds import Case
from tests.conftest import ROOT

CASE = Case(prompt_tokens=16, new_tokens=8)


def row(bits: int, *decode: float) -> Row:
    measured = Measured(
        prefill_tokens_per_second=decode,
        decode_tokens_per_second=decode,
        call_tokens_per_second=decode,
        import_seconds=0.5,
        load_seconds=1.0,
        loaded_peak_bytes=10_000_000,
        loaded_anonymous_bytes=4_000_000,
        peak_bytes=20_000_000,
        anonymous_bytes=5_000_000,
        idle_cpu_seconds=0,
    )
    return Row(bits, {CASE: measured}, (2.0, 1.5, 3.0))


ROWS = {
    "edgelm int8": row(8, 30, 20, 10),
    "slow int8": row(8, 10, 10, 10),
    "fast int8": row(8, 15, 10, 20),
    "fast int4": row(4, 90, 90, 90),
}


REAL = {"edgelm int8": row(8, 30, 20, 10), "llama.cpp Q4_0": row(4, 15, 10, 20)}


def test_ratio_pairs_rounds() -> None:
    assert ratio([30, 20, 10], [15, 10, 20]) == 2


def test_best_peer_is_of_the_same_bits_and_not_edgelm() -> None:
    assert best_peer(ROWS, 8, CASE, DECODE) == "fast int8"
    assert best_peer(ROWS, 32, CASE, DECODE) is None


def test_speed_table_says_medians_spreads_and_the_best_peer() -> None:
    lines = speed_table(ROWS, [CASE], DECODE).splitlines()
    assert lines[2] == "| edgelm int8 | 20 (10-30) |"
    assert lines[3] == "| *edgelm int8 / best peer* | *2.00 x fast int8* |"
    assert len(lines) == 7


def test_a_batch_is_a_column_of_its_own() -> None:
    batch = Case(prompt_tokens=16, new_tokens=8, batch=4)
    assert speed_table({"one": Row(8, {batch: row(8, 2).loading}, ())}, [batch], CALL).splitlines()[0] == (
        "| whole calls, tokens/s | 4 x 16 |"
    )


def test_memory_table_has_every_engine() -> None:
    assert memory_table(ROWS).splitlines()[2] == "| edgelm int8 | 20 | 5 | 4 | 0.50 | 1.00 | 2.00 |"


def test_agreement_counts_up_to_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4], [1, 9, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]]) == 5 / 8
    assert agreement([[7, 7]], [[1, 2]]) == 0


def test_prompts_are_the_same_in_a_turn_and_share_no_beginning_between_turns_or_lengths() -> None:
    assert CASE.prompts(1000, 1) == CASE.prompts(1000, 1)
    starts = [case.prompts(1000, turn)[0][:4] for case in (CASE, Case(32, 8)) for turn in (1, 2)]
    assert len(set(map(tuple, starts))) == 4
    batch = Case(16, 8, batch=4).prompts(1000, 1)
    assert len({tuple(prompt) for prompt in batch}) == 4


def test_engines_of_one_sequence_refuse_a_batch() -> None:
    assert single_prompt([[1, 2]]) == [1, 2]
    with pytest.raises(ValueError, match="batch of 2"):
        single_prompt([[1], [2]])


def test_bar_chart_is_xml_with_every_name_an_axis_and_a_legend() -> None:
    bars = [Bar.of("edgelm int8", 8, [1.0, 3.0]), Bar("peer", 4, 2.0, 2.0, 2.0)]
    svg = bar_chart("Speed & size", {"a < b": bars}, own="edgelm", unit="tokens/s")
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert {"Speed & size (tokens/s)", "a < b", "edgelm int8", "peer", "8 bits", "4 bits", "0", "3"} <= set(texts)
    assert "minimum to maximum of the rounds; bar and value: median" in texts
    assert "prefers-color-scheme: dark" in svg and "white" not in svg


def test_axes_end_at_a_round_value_above_the_maximum() -> None:
    assert axis_ticks(350) == [0, 50, 100, 150, 200, 250, 300, 350]
    assert axis_ticks(1308) == [0, 200, 400, 600, 800, 1000, 1200, 1400]
    for maximum in (1, 3, 9.9, 64, 5617, 22865):
        assert axis_ticks(maximum)[-1] >= maximum > axis_ticks(maximum)[-2] and 4 <= len(axis_ticks(maximum)) <= 9


def test_the_charts_of_the_page_show_its_tables(tmp_path: Path) -> None:
    page = tmp_path / CHARTED_PAGE.name
    page.write_text(CHARTED_PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    drawn = {path.name: path.read_text(encoding="utf-8") for path in write_charts(page)}
    folder = CHARTED_PAGE.parent / "performance"
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_a_section_gives_its_three_charts() -> None:
    section = "\n\n".join(["### tiny, 1 thread", *(speed_table(REAL, [CASE], rate) for rate in (DECODE, PREFILL))])
    drawn = charts(f"{section}\n\n{memory_table(REAL)}\n")
    assert list(drawn) == ["decode", "prefill", "memory"]
    texts = [element.text for element in ElementTree.fromstring(drawn["decode"]).iter() if element.text]
    assert {"tiny, 1 thread: decode (tokens per second, higher is better)", "edgelm int8", "20"} <= set(texts)
    assert not any("best peer" in text for text in texts)


PAGE = "before\n<!-- begin: peers -->\n<!-- end: peers -->\nafter\n"


def test_a_section_is_added_to_the_region_then_replaced() -> None:
    once = with_section(PAGE, "124m", "first \\1 text")
    assert "before" in once and once.index("first") < once.index("<!-- end: peers -->")
    both = with_section(once, "355m", "other")
    again = with_section(both, "124m", "second text")
    assert "first" not in again and again.count("second text") == 1 and "other" in again
    assert sections(again) == {"124m": "second text", "355m": "other"}
    assert again.index("second") < again.index("other") < again.index("after")


def test_a_page_without_a_region_is_refused() -> None:
    with pytest.raises(ValueError, match="no line"):
        with_section("a page", "124m", "text")


COMMANDS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for path in (ROOT / "benchmarks").rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
"""Every module that is a command."""

HELP = """
import contextlib, io, json, runpy, sys
texts = {}
for name in json.loads(sys.argv[1]):
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as done:
            assert not done.code, (name, done.code)
    assert "torch" not in sys.modules, f"{name} --help imports torch"
    texts[name] = output.getvalue()
print(json.dumps(texts))
"""


def test_every_command_answers_help_without_torch() -> None:
    pytest.importorskip("onnx", reason="some benchmarks write ONNX graphs, which needs the build side")
    command = [sys.executable, "-c", HELP, json.dumps(COMMANDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, text in json.loads(done.stdout).items():
        assert text.startswith("usage: ") and len(text.splitlines()) > 4, name


def test_the_readme_lists_every_command() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"{name}`" not in text and f"{name} " not in text] == []


@pytest.mark.parametrize("name", ["benchmarks", "docs/performance.md", "docs/quality.md", "models"])
def test_no_private_path(name: str) -> None:
    place = ROOT / name
    paths = [place] if place.is_file() else [path for path in place.rglob("*") if path.suffix in (".py", ".md")]
    assert [path for path in paths if "shared/" in path.read_text(encoding="utf-8")] == []
