"""From a checkpoint on disk to what the model and the real kernel take, and back; one layer at a time.

    layer = read_layer("DeepSeek-V4-Flash", 3)
    kernel_experts = to_sm90(layer.experts)
    outputs = run_layer(layer, "hidden.safetensors")

`to_sm90` is in `mxfp4ref.formats.resize`. Here, `shards.py` finds and maps tensors; `deepseek_v4.py` and
`gpt_oss.py` have a record for each format, with the names of its tensors and the functions that read and write
them; `disk.py` has the table of formats and reads and writes layers; `run.py` runs one.
"""

from mxfp4ref.checkpoint.disk import FORMATS, find_layers, read_layer, write_layer
from mxfp4ref.checkpoint.format import CheckpointFormat
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.run import router_logits, run_layer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards, open_shards

__all__ = [
    "FORMATS",
    "CheckpointError",
    "CheckpointFormat",
    "CheckpointLayer",
    "Shards",
    "find_layers",
    "open_shards",
    "read_layer",
    "router_logits",
    "run_layer",
    "write_layer",
]
