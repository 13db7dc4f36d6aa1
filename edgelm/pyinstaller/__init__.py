"""What PyInstaller must know to put edgelm into a program; it finds this through the entry point ``pyinstaller40``."""

from pathlib import Path


def hook_folders() -> list[str]:
    """The folders with PyInstaller's hooks."""
    return [str(Path(__file__).parent)]
