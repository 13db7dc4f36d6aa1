"""The pure parts of the peer benchmark: ratios, tables, agreement, plots, and the sections of the page."""

from xml.etree import ElementTree

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not part of a distribution")

from benchmarks.engines import single_prompt
from benchmarks.peers.check import agreement
from benchmarks.peers.page import with_section
from benchmarks.peers.plot import bar_chart
from benchmarks.peers.tables import CALL, DECODE, Row, best_peer, memory_table, ratio, speed_table
from benchmarks.report import Measured
from benchmarks.rounds import Case

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


def test_bar_chart_is_xml_with_every_name() -> None:
    svg = bar_chart("Speed & size", {"a < b": {"edgelm": [1.0, 3.0], "peer": [2.0]}}, own="edgelm", unit="tokens/s")
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert {"Speed & size (tokens/s)", "a < b", "edgelm", "peer"} <= set(texts)


PAGE = "before\n<!-- begin: peers -->\n<!-- end: peers -->\nafter\n"


def test_a_section_is_added_to_the_region_then_replaced() -> None:
    once = with_section(PAGE, "124m", "first \\1 text")
    assert "before" in once and once.index("first") < once.index("<!-- end: peers -->")
    both = with_section(once, "355m", "other")
    again = with_section(both, "124m", "second text")
    assert "first" not in again and again.count("second text") == 1 and "other" in again
    assert again.index("second") < again.index("other") < again.index("after")


def test_a_page_without_a_region_is_refused() -> None:
    with pytest.raises(ValueError, match="no line"):
        with_section("a page", "124m", "text")
