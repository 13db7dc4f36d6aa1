"""What the place of a model means: a path, the name of an installed model, or that of one pulled from the hub."""

import os
import re
from pathlib import Path

from edgelm.bundle.cache import HubName, find_pulled

MODEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", re.ASCII)
"""The name of an installed model: that of a Python package."""


def locate(place: str | os.PathLike[str]) -> Path:
    """The absolute path of the bundle that `place` means.

    Whatever stands at the path `place` comes first. Only a text can be a name: one without a slash that of an installed
    model, "owner/name" or "owner/name@revision" that of a pulled one. The network is never asked. Raises BundleError if
    there is no such model, and ValueError if the path has a NUL character.
    """
    path = Path(place).absolute()
    if os.path.lexists(path) or not isinstance(place, str):
        return path
    if MODEL_NAME.fullmatch(place):
        from edgelm.bundle.installed import find_installed  # importlib.metadata takes longer than reading a bundle

        if (model := find_installed(place)) is not None:
            return model.folder()
    if (name := HubName.parsed(place)) is not None:
        return find_pulled(name)
    return path
