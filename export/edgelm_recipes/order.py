"""What ``edgelm recipe`` is asked for, and what can be refused before torch is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import FixedPrecision
from edgelm.errors import BundleError, TrainingError
from edgelm_recipes.augment import Augmentation
from edgelm_recipes.back_translation import BackTranslation
from edgelm_recipes.data import HELD_OUT
from edgelm_recipes.recipe import Recipe
from edgelm_train.models.base import find_base
from edgelm_train.options import FinetuneOptions, Method
from edgelm_train.run.folder import check_name, read_record, refuse_changes
from edgelm_train.run.lock import is_empty

DATA = "data"
"""The part of an output folder with the examples."""


@dataclass(frozen=True)
class Order:
    """What ``edgelm recipe`` was asked for. None stands for the recipe's own value."""

    recipe: Recipe
    data: Path
    out: Path
    base: str
    method: Method = "full"
    precision: FixedPrecision = "int8"
    rows: int | None = None
    """Train on so many examples only."""
    limit: int | None = None
    """Measure on so many examples only."""
    augment: tuple[Augmentation, ...] = ()
    back_translation: BackTranslation | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)
    """Fields of FinetuneOptions in place of the recipe's."""
    bundles: tuple[Path, ...] = ()
    """Bundles of the base that are at hand: one in fp32, one quantized, or both."""
    threads: int = 2
    """CPU threads on which bundles are measured."""
    command: str = ""
    """The command, for the report."""

    @property
    def options(self) -> FinetuneOptions:
        """How the base is tuned."""
        given = {**self.recipe.tuning, "method": self.method, **self.tuning}
        return FinetuneOptions(**given, held_out=self.out / DATA / HELD_OUT)

    def recorded(self) -> dict[str, object]:
        """What must be equal where the same folder is given again."""
        asked = {"recipe": self.recipe.name, "data": str(self.data), "base": self.base, "method": self.method}
        more = {name.replace("_", "-"): value for name, value in self.tuning.items() if name != "device"}
        back = self.back_translation
        added = {
            "augment": " ".join(self.augment) or None,
            "back-translate": None if back is None else f"{back.bundle} {back.texts}",
        }
        return {**asked, "rows": self.rows, **added, **more}

    def check(self) -> None:
        """Refuse, in seconds, what would fail after hours.

        Raises:
            TrainingError: the output folder is taken, an option is out of its range, the data cannot be read, or
                nothing can be translated back.
            ExportError: there is no such base.
            BundleError: as `given_bundles`, or the bundle that translates back cannot be read.
        """
        self.check_out()
        context = find_base(self.base, None).context_length
        if context is not None:
            self.options.room_in(context)
        self.given_bundles()
        if not (self.out / DATA).is_dir():
            self.recipe.read(self.data)
            if self.back_translation is not None:
                self.back_translation.check(self.recipe)

    def check_out(self) -> None:
        """Raise TrainingError unless the output folder is new, empty, or one of the same recipe with equal options.

        Before the first step is done, nothing hangs on the options.
        """
        out = self.out
        check_name(out)
        if out.exists() and not out.is_dir():
            raise TrainingError(f"{out} is a file; give a new folder as --out")
        started = read_record(out)
        if started is not None:
            if (out / DATA).is_dir():
                refuse_changes(started, self.recorded(), out)
        elif out.exists() and not is_empty(out):
            raise TrainingError(f"{out} is not empty; give a new folder as --out")

    def given_bundles(self) -> dict[str, Path]:
        """The bundles of the base that were given, by "fp32" and "quantized".

        Raises:
            BundleError: one cannot be read or takes no prefix, or two are of one kind.
        """
        given: dict[str, Path] = {}
        for path in self.bundles:
            manifest = Bundle.read(path).manifest
            if manifest.graph.kv_dtype == "int8":
                raise BundleError(f"{str(path)!r} has an int8 cache, which takes no learned prefix; give one without")
            kind = "fp32" if manifest.recipe.name == "fp32" else "quantized"
            if kind in given:
                raise BundleError(f"{str(given[kind])!r} and {str(path)!r} are both {kind}; give one of each kind")
            given[kind] = path
        return given
