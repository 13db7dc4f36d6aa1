"""What it costs to compute several tokens in one call, by how a bundle's weights are stored."""

from dataclasses import dataclass

from edgelm.bundle.manifest import Recipe


@dataclass(frozen=True, slots=True)
class DraftCost:
    """The cost of a draft beside the step it is part of, in steps of one token.

    A constant, never what a machine's clock says: the same request makes the same drafts everywhere.
    """

    call: float
    token: float

    def of(self, drafted: int) -> float:
        """Of so many tokens."""
        return self.call + self.token * drafted

    def affordable(self, credit: float) -> int:
        """How many tokens can be drafted for `credit`."""
        return max(0, int((credit - self.call) / self.token + 1e-9))


FOUR_BITS = DraftCost(0.4, 0.4)
"""One token alone has a kernel of its own, much faster than that of several; measured: docs/embedding.md."""
OTHERS = DraftCost(0.2, 0.25)
"""Measured at 8 bits; floats, whose weights take longer to read, cost less."""


def draft_cost(recipe: Recipe) -> DraftCost:
    """Of a bundle with matrices like these."""
    return FOUR_BITS if any(matrix.bits == 4 for matrix in recipe.matrices) else OTHERS
