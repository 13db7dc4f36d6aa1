"""The numerical reference: optimum's own export of the checkpoint. It judges the lean graph and never ships."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from edgelm_export.model.families import describe
from edgelm_export.source.checkpoint import quiet_torch

TASK = "text-generation-with-past"

_TRACED_TOKENS = 16


class OptimumGraph:
    """optimum's graph of a model. It computes the logits of whole texts."""

    def __init__(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Export `model`, in float32 with eager attention, into `folder`, and load the graph.

        Raises:
            ExportError: the context is too short for optimum to trace.
        """
        # optimum traces with as many past tokens as new tokens; together they must fit the context.
        context = describe(model).context_length
        tokens = min(_TRACED_TOKENS, context // 2)
        if tokens < 2:
            raise ExportError(f"the context is only {context} tokens long; edgelm exports contexts of 4 or more")
        torch.onnx.register_custom_op_symbolic("aten::expm1", _expm1, 1)  # xielu needs it; torch's exporter lacks it
        name = model.config._name_or_path
        # optimum looks for a tokenizer under this name: in a local folder, or else on the hub.
        model.config._name_or_path = str(folder)
        try:
            with quiet_torch(), _silenced_stderr():
                onnx_export_from_model(model, folder, task=TASK, do_validation=False, sequence_length=tokens)
        finally:
            model.config._name_or_path = name
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = default_threads()
        path = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(self, ids: IdArray) -> Logits:
        """Logits (T, V) of the text `ids` (T,)."""
        rows = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(ids))}
        feeds: dict[str, npt.NDArray[Any]] = {}
        for node in self._session.get_inputs():
            if node.name in rows:
                feeds[node.name] = rows[node.name][None]
            else:  # past_key_values.N.key / value: (B, H, past tokens, h), without past tokens
                feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        logits: Logits = self._session.run(["logits"], feeds)[0][0]
        return logits


def _expm1(graph: Any, x: Any) -> Any:
    return graph.op("Sub", graph.op("Exp", x), graph.op("Constant", value_t=torch.tensor(1.0)))


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Discards what is written to the file descriptor of stderr, as torch's tracer does."""
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
