"""The model embedded in edgelm, as a data package. How it was made: ``models/README.md``."""

from pathlib import Path

DEFAULT_MODEL = "stories-6m-int8"


def default_bundle_path() -> Path:
    """The folder of the embedded default bundle."""
    return Path(__file__).parent / DEFAULT_MODEL
