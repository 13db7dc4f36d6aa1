"""The numerical reference: optimum's own export of the checkpoint. It judges the lean graph and never ships."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from optimum.exporters.onnx import onnx_export_from_model

from edgelm.engine.device import import_onnxruntime
from edgelm.engine.machine import default_threads
from edgelm.errors import ExportError
from edgelm.ids import IdArray, Logits
from edgelm_export.source.checkpoint import quiet_torch

TASK = "text-generation-with-past"

_TRACED_TOKENS = 16


class OptimumGraph:
    """optimum's graph of a model. It computes the logits of whole texts."""

    def __init__(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Export a model and load its graph.

        Args:
            model: in float32, with eager attention.
            folder: where the graph goes.

        Raises:
            ExportError: the context is too short for optimum to trace.
        """
        # optimum traces with as many past tokens as new tokens; together they must fit the context.
        context = model.config.max_position_embeddings
        tokens = min(_TRACED_TOKENS, context // 2)
        if tokens < 2:
            raise ExportError(f"the context is only {context} tokens long; edgelm exports contexts of 4 or more")
        torch.onnx.register_custom_op_symbolic("aten::expm1", _expm1, 1)  # xielu needs it; torch's exporter lacks it
        with quiet_torch(), _silenced_stderr():
            onnx_export_from_model(model, folder, task=TASK, do_validation=False, sequence_length=tokens)
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = default_threads()
        self._session = onnxruntime.InferenceSession(
            os.fspath(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def logits(self, ids: IdArray) -> Logits:
        """Logits (T, V) of the text `ids` (T,)."""
        tokens = len(ids)
        feeds: dict[str, npt.NDArray[Any]] = {}
        for node in self._session.get_inputs():
            if node.name == "input_ids":
                feeds[node.name] = ids[None]
            elif node.name == "attention_mask":
                feeds[node.name] = np.ones((1, tokens), np.int64)
            elif node.name == "position_ids":
                feeds[node.name] = np.arange(tokens, dtype=np.int64)[None]
            else:  # past_key_values.N.key / value: (B, H, past tokens, h), without past tokens
                feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        logits: Logits = self._session.run(["logits"], feeds)[0][0]
        return logits


def _expm1(graph: Any, x: Any) -> Any:
    return graph.op("Sub", graph.op("Exp", x), graph.op("Constant", value_t=torch.tensor(1.0)))


class _silenced_stderr:
    """Discards what is written to the file descriptor of stderr, as torch's tracer does."""

    def __enter__(self) -> None:
        self._saved = os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
