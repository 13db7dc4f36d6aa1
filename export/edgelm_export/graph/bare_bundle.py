"""A bundle of a graph alone, without tokenizer, settings and certificate: the runtime computes it, nobody ships it."""

from pathlib import Path

from edgelm import __version__
from edgelm.bundle.folder import Bundle, file_fact
from edgelm.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, Recipe, Source
from edgelm_export.graph.decoder import write_graph
from edgelm_export.quantize.calibrate import StoredDecoder


def write_bare_bundle(model: StoredDecoder, folder: Path) -> Bundle:
    """Write the graph of `model` and its manifest into `folder`, an empty one; raises ExportError as `write_graph`."""
    graph, matrices = write_graph(model, folder)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        required_features=(),
        created_by=f"edgelm {__version__}",
        architecture=model.source.architecture,
        graph=graph,
        recipe=Recipe(model.recipe.name, None, matrices),
        source=Source("", None, None, model.source.model_type, 1),
        certificate=None,
        files={name: file_fact(folder / name) for name in (graph.file, graph.weights_file)},
    ).sealed()
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(folder, manifest)
