"""The command: tries many combinations and counts what became of them."""

import collections
import tempfile
from pathlib import Path

import click

from tests.against_transformers.combinations.combination import make, remove
from tests.against_transformers.combinations.sides import differences


@click.command()
@click.option("--count", default=300, show_default=True, help="How many combinations to try.")
@click.option("--seed", default=1, show_default=True, help="Another seed gives other combinations.")
@click.option("--first", default=0, show_default=True, help="Number of the first combination.")
@click.option("--only", type=int, help="Try the combination of this number alone.")
@click.option("--verbose", is_flag=True, help="Show the recipes of all combinations.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the checkpoints and bundles in this new folder.")
def main(count: int, seed: int, first: int, only: int | None, verbose: bool, keep: Path | None) -> None:
    """Compare edgelm with transformers on random checkpoints; the status is 1 where they differ."""
    root = keep or Path(tempfile.mkdtemp(prefix="combinations-"))
    counts: collections.Counter[str] = collections.Counter()
    for number in range(first, first + count) if only is None else [only]:
        folder = root / str(number)
        combination = make(seed, number, folder)
        outcome, faults = differences(combination, folder / "bundle")
        counts["failed" if faults else outcome.partition(":")[0]] += 1
        if faults or verbose:
            click.echo(f"{'FAILED' if faults else outcome} {combination.recipe}")
        for fault in faults:
            click.echo(f"    {fault}")
        if keep is None:
            remove(folder)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("equal", "refused", "failed"))
    click.echo(f"{sum(counts.values())} combinations of seed {seed}: {summary}")
    if keep is None:
        remove(root)
    raise SystemExit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
