"""Networks as ONNX files, for the Hub and for the page that runs in the browser."""

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import nn


def onnx_file(network: nn.Module, example: torch.Tensor, name: str, outputs: Sequence[str]) -> bytes:
    """A network as one ONNX file that takes batches of any size; the same network gives the same bytes.

    Args:
        network: in eval mode.
        example: an input with two or more items in its first dimension, the batch.
        name: of the input.
        outputs: names of the outputs, in their order.
    """
    if lacking := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise ValueError(f"the export needs {' and '.join(lacking)}: pip install -e '.[onnx]'")
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        program = torch.onnx.export(
            network, (example,), dynamo=True, verbose=False, input_names=[name], output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    graph = proto.graph
    # the exporter notes where the source files are: nothing that a published file should tell
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
