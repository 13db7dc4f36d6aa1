"""Models of the peers, made from the same weights by each peer's own means and kept for the next run."""

import subprocess
import sys
from pathlib import Path

from benchmarks.engines import ENVIRONMENT
from benchmarks.peers.catalogue import Converter, Peer
from benchmarks.peers.environments import python_of
from benchmarks.prepare import Source, graph_modules, hash_of, keep
from benchmarks.rounds import ROOT


class ConversionFailed(Exception):
    """A peer's model cannot be made. The message says why in one line."""


def model_of(peer: Peer, source: Source, cache: Path) -> Path:
    """The folder of the peer's model, which is made from `source` if it is missing or was made by other code.

    Raises:
        ConversionFailed: the peer's converter failed; its output is on stderr.
        EnvironmentFailed: the peer's converter cannot be installed.
    """
    if peer.model == "checkpoint":
        return source.checkpoint
    folder = source.folder / peer.model
    converter = peer.converter
    if peer.builder and not source.is_gpt2:
        converter = peer.builder
    if converter:
        python = Path(sys.executable) if converter.environment is None else python_of(converter.environment, cache)
        keep(folder, _made_by(converter, source), lambda new: _convert(converter, python, source.checkpoint, new))
    return folder


def _made_by(converter: Converter, source: Source) -> str:
    code = [ROOT / f"{converter.module.replace('.', '/')}.py"]
    if converter.environment is None:
        code += graph_modules()
        return f"{source.made_by}, {converter.module} {hash_of(*code)}"
    return f"{source.made_by}, {', '.join(converter.environment.requirements)}, {converter.module} {hash_of(*code)}"


def _convert(converter: Converter, python: Path, checkpoint: Path, folder: Path) -> None:
    command = [str(python), "-m", converter.module, str(checkpoint), str(folder), *converter.arguments]
    # Converters print to stdout, where the tables belong, so their stdout goes to stderr.
    if subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, stdout=sys.stderr).returncode:
        raise ConversionFailed(f"{converter.module} could not make its model; the reason is on stderr")
