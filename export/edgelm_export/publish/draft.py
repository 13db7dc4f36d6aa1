"""A small model that guesses tokens: its graph is taken over from a finished bundle into the one that is being made."""

from dataclasses import replace
from pathlib import Path

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import DRAFT_FEATURE, DraftFacts, Manifest
from edgelm.bundle.onnx_file import with_weights_at
from edgelm.errors import BundleError, ExportError
from edgelm.text.tokenizer import Tokenizer

_GRAPH, _WEIGHTS = "draft.onnx", "draft.onnx.data"


def plan_draft(path: Path) -> Bundle:
    """Read the bundle of the small model; raises ExportError if it cannot be used."""
    try:
        bundle = Bundle.read(path)
        bundle.verify()
    except BundleError as error:
        raise ExportError(f"cannot take the model that drafts: {error}") from None
    return bundle


def check_draft(small: Bundle, tokenizer: Tokenizer) -> None:
    """Raise ExportError unless the small model has the vocabulary of `tokenizer`."""
    if Tokenizer.of_bundle(small).vocabulary() != tokenizer.vocabulary():
        raise ExportError(
            f"the model that drafts, {small.name!r}, has another vocabulary than the source: give a bundle whose model "
            "was trained with the source's tokenizer"
        )


def add_draft(small: Bundle, draft: Path, manifest: Manifest) -> Manifest:
    """Write the graph and the weights of the small model into the folder `draft`; returns the manifest with it."""
    facts = small.manifest
    (draft / _GRAPH).write_bytes(with_weights_at(small.graph_content(), _WEIGHTS, 0))
    with (draft / _WEIGHTS).open("wb") as stream:
        for block in small.blocks(facts.graph.weights_file):
            stream.write(block)
    graph = replace(facts.graph, file=_GRAPH, weights_file=_WEIGHTS)
    of_graph = (feature for feature in graph.features if feature not in manifest.required_features)
    return replace(
        manifest,
        draft=DraftFacts(facts.source.name, facts.architecture, graph, facts.recipe),
        required_features=(*manifest.required_features, DRAFT_FEATURE, *of_graph),
    )
