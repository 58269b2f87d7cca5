"""From a checkpoint on disk to what the model and the real kernel take, and back; one layer at a time.

    layer = read_layer("DeepSeek-V4-Flash", 3)
    kernel_experts = to_sm90(layer.experts)
    outputs = run_layer(layer, "hidden.safetensors")

`to_sm90` is in `mxfp4ref.formats.resize`. Here, `shards.py` finds and maps tensors and `config.py` reads config.json;
`formats.py` has a record for each format, `per_expert.py`, `stacked.py` and `gguf.py` the ways in which experts are
stored; `disk.py` reads layers and `writing.py` writes them; `router.py` routes, and `run.py` runs a layer, by
`streaming.py` if its experts are still in their files; `inspection.py` says what is in a checkpoint.
"""

from mxfp4ref.checkpoint.disk import FORMATS, ReadOptions, find_layers, open_layer, read_layer
from mxfp4ref.checkpoint.format import CheckpointFormat
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles
from mxfp4ref.checkpoint.name_map import read_name_map
from mxfp4ref.checkpoint.router import router_logits
from mxfp4ref.checkpoint.run import layer_call, run_layer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards, open_shards
from mxfp4ref.checkpoint.shared import fuse_shared
from mxfp4ref.checkpoint.writing import write_layer

__all__ = [
    "FORMATS",
    "CheckpointError",
    "CheckpointFormat",
    "CheckpointLayer",
    "ExpertsInFiles",
    "ReadOptions",
    "Shards",
    "find_layers",
    "fuse_shared",
    "layer_call",
    "open_layer",
    "open_shards",
    "read_layer",
    "read_name_map",
    "router_logits",
    "run_layer",
    "write_layer",
]
