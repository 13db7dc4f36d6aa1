"""The result of a run as Markdown tables and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.peers.catalogue import OWN
from benchmarks.report import Measured, spread
from benchmarks.rounds import Case


@dataclass(frozen=True)
class Row:
    """The numbers of one engine."""

    bits: int
    cases: Mapping[Case, Measured]
    first_token_seconds: Sequence[float]
    """Time from starting the process to the first new token, for each start."""

    @property
    def peak_bytes(self) -> int:
        return max(measured.peak_bytes for measured in self.cases.values())

    @property
    def anonymous_bytes(self) -> int:
        return max(measured.anonymous_bytes for measured in self.cases.values())

    @property
    def loading(self) -> Measured:
        """The numbers of any case, because the numbers of loading are the same for all cases."""
        return next(iter(self.cases.values()))


@dataclass(frozen=True)
class Rate:
    """A speed that engines are compared by."""

    name: str
    attribute: str

    def of(self, measured: Measured) -> Sequence[float]:
        rates: Sequence[float] = getattr(measured, self.attribute)
        return rates


PREFILL = Rate("prefill", "prefill_tokens_per_second")
DECODE = Rate("decode", "decode_tokens_per_second")
CALL = Rate("whole calls", "call_tokens_per_second")


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of `own` divided by `other` of the same round, which cancels the machine's drift."""
    return median(a / b for a, b in zip(own, other, strict=True))


def best_peer(rows: Mapping[str, Row], bits: int, case: Case, rate: Rate) -> str | None:
    """Name of the peer with these bits and the highest median; None if there is no peer with these bits."""
    peers = {name: row for name, row in rows.items() if row.bits == bits and not name.startswith(OWN)}
    return max(peers, key=lambda name: median(rate.of(peers[name].cases[case])), default=None)


def speed_table(rows: Mapping[str, Row], cases: Sequence[Case], rate: Rate) -> str:
    """A Markdown table of medians, minima and maxima, with a column for each case.

    Each row of edgelm is followed by its ratio to the best peer.
    """
    head = [f"{rate.name}, tokens/s", *(f"{_batch(case)}{case.prompt_tokens}" for case in cases)]
    lines = [_line(head), _line(["---", *["--:"] * len(cases)])]
    for name, row in rows.items():
        lines.append(_line([name, *(_spread(rate.of(row.cases[case])) for case in cases)]))
        if name.startswith(OWN) and any(best_peer(rows, row.bits, case, rate) for case in cases):
            lines.append(_line([f"*{name} / best peer*", *(_against(rows, row, case, rate) for case in cases)]))
    return "\n".join(lines)


def _batch(case: Case) -> str:
    return "" if case.batch == 1 else f"{case.batch} x "


def _against(rows: Mapping[str, Row], row: Row, case: Case, rate: Rate) -> str:
    best = best_peer(rows, row.bits, case, rate)
    if best is None:
        return ""
    return f"*{ratio(rate.of(row.cases[case]), rate.of(rows[best].cases[case])):.2f} x {best}*"


def _spread(rates: Sequence[float]) -> str:
    return f"{median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


def memory_table(rows: Mapping[str, Row]) -> str:
    """A Markdown table of memory and start times, with a row for each engine."""
    head = ["", "peak MB", "anonymous MB", "anonymous MB after load", "import s", "load s", "first token s"]
    lines = [_line(head), _line(["---", *["--:"] * (len(head) - 1)])]
    for name, row in rows.items():
        loading = row.loading
        cells = [
            f"{row.peak_bytes / 1e6:.0f}",
            f"{row.anonymous_bytes / 1e6:.0f}",
            f"{loading.loaded_anonymous_bytes / 1e6:.0f}",
            f"{loading.import_seconds:.2f}",
            f"{loading.load_seconds:.2f}",
            f"{median(row.first_token_seconds):.2f}" if row.first_token_seconds else "",
        ]
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_json(rows: Mapping[str, Row]) -> dict[str, object]:
    """All numbers, with units in the keys."""
    return {
        name: {
            "bits": row.bits,
            "import_seconds": round(row.loading.import_seconds, 3),
            "load_seconds": round(row.loading.load_seconds, 3),
            "first_token_seconds": [round(seconds, 3) for seconds in row.first_token_seconds],
            "loaded_peak_bytes": row.loading.loaded_peak_bytes,
            "loaded_anonymous_bytes": row.loading.loaded_anonymous_bytes,
            "peak_bytes": row.peak_bytes,
            "anonymous_bytes": row.anonymous_bytes,
            "cases": [
                {
                    "prompt_tokens": case.prompt_tokens,
                    "new_tokens": case.new_tokens,
                    "batch": case.batch,
                    **{rate.attribute: spread(rate.of(measured)) for rate in (PREFILL, DECODE, CALL)},
                }
                for case, measured in row.cases.items()
            ],
        }
        for name, row in rows.items()
    }
