"""The result of a run as a Markdown table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Measured:
    """The numbers of one engine. Sequences have one entry for each round."""

    prefill_tokens_per_second: Sequence[float]
    decode_tokens_per_second: Sequence[float]
    call_tokens_per_second: Sequence[float]
    """New tokens divided by the time of the whole call, prefill included."""
    import_seconds: float
    load_seconds: float
    """Time of loading the model, without the imports."""
    loaded_peak_bytes: int
    """Peak of the process's resident memory up to the end of loading."""
    loaded_anonymous_bytes: int
    """Memory of the process that no file backs, after loading."""
    peak_bytes: int
    """Peak of the process's resident memory up to the end of the run."""
    anonymous_bytes: int
    """Memory of the process that no file backs, at the end of the run."""
    idle_cpu_seconds: float
    """Maximum CPU time that the process used between two requests."""


def paired_ratio(measured: Measured, baseline: Measured) -> float:
    """Decode speed divided by the baseline's of the same round, median over the rounds."""
    pairs = zip(measured.decode_tokens_per_second, baseline.decode_tokens_per_second, strict=True)
    return median(own / other for own, other in pairs)


def markdown(results: Mapping[str, Measured], baseline: str) -> str:
    """A Markdown table with a row for each engine."""
    rows = [
        f"| engine | prefill tokens/s | decode tokens/s (min-max) | decode x {baseline} | load s | peak MB "
        f"| peak x {baseline} |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    base = results[baseline]
    for name, own in results.items():
        decode = own.decode_tokens_per_second
        cells = [
            name,
            f"{median(own.prefill_tokens_per_second):.0f}",
            f"{median(decode):.1f} ({min(decode):.1f}-{max(decode):.1f})",
            f"{paired_ratio(own, base):.2f}",
            f"{own.import_seconds + own.load_seconds:.2f}",
            f"{own.peak_bytes / 1e6:.0f}",
            f"{own.peak_bytes / base.peak_bytes:.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def as_json(results: Mapping[str, Measured], baseline: str) -> dict[str, object]:
    """All numbers, with units in the keys."""
    base = results[baseline]
    return {
        name: {
            "prefill_tokens_per_second": spread(own.prefill_tokens_per_second),
            "decode_tokens_per_second": spread(own.decode_tokens_per_second),
            "decode_ratio_to_baseline": round(paired_ratio(own, base), 3),
            "import_seconds": round(own.import_seconds, 3),
            "load_seconds": round(own.load_seconds, 3),
            "loaded_peak_bytes": own.loaded_peak_bytes,
            "loaded_anonymous_bytes": own.loaded_anonymous_bytes,
            "peak_bytes": own.peak_bytes,
            "anonymous_bytes": own.anonymous_bytes,
            "peak_ratio_to_baseline": round(own.peak_bytes / base.peak_bytes, 3),
            "max_idle_cpu_seconds": round(own.idle_cpu_seconds, 4),
        }
        for name, own in results.items()
    }


def spread(rates: Sequence[float]) -> dict[str, float | list[float]]:
    """Median, minimum and maximum over the rounds, and the value of every round."""
    rounds = [round(rate, 2) for rate in rates]
    return {"median": round(median(rates), 2), "min": min(rounds), "max": max(rounds), "rounds": rounds}
