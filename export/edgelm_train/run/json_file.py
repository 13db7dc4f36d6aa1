"""Files of JSON that are there whole or not at all, whenever a run is ended."""

import json
from pathlib import Path


def write_json(path: Path, content: object) -> None:
    """Write `content` to `path`; what is there is replaced at once."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
