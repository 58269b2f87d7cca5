"""Make a checkpoint of random weights, with a published one's names, dtypes and shapes, and an input for its layers.

    python tools/make_checkpoint.py checkpoint                        # DeepSeek-V4's, small: two layers, a megabyte
    python tools/make_checkpoint.py checkpoint --format gpt_oss --hidden 2880 --inner 2880 --experts 32 --top-k 4
    python tools/make_checkpoint.py checkpoint --experts 256 --hidden 4096 --inner 2048 --top-k 6 --shards 5

The last has two layers of DeepSeek-V4-Flash's size, 3.4 GB each; `--layers 1` makes one. The first layer of
DeepSeek-V4 has a table of the experts of each token id in place of a bias, as its hash layers do.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxfp4ref.checkpoint import FORMATS
from mxfp4ref.checkpoint.config import HONOURED
from mxfp4ref.checkpoint.format import CheckpointFormat
from mxfp4ref.checkpoint.per_expert import PER_EXPERT, names_of
from mxfp4ref.checkpoint.stacked import BLOCKS

VOCABULARY = 1000
GROUP = 32
FP8_BLOCK = 128  # rows and columns that share a scale in DeepSeek's shared expert
MADE = [
    name for name, format in FORMATS.items() if format.storage in (PER_EXPERT, BLOCKS) and name != "kimi_k3"
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder; input.safetensors is written into it, too")
    parser.add_argument("--format", choices=MADE, default="deepseek_v4")
    sizes = f"a multiple of {GROUP}, of {FP8_BLOCK} in deepseek_v4; "
    for name, default, words in (
        ("layers", 2, ""),
        ("experts", 8, ""),
        ("hidden", 256, sizes),
        ("inner", 128, sizes),
        ("top-k", 2, ""),
        ("shards", 2, ""),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{words}default: {default}")
    parser.add_argument("--tokens", type=int, default=5, help="of the input; default: 5")
    parser.add_argument(
        "--images", action="store_true", help="DeepSeek-V4: a second bias, for the tokens of images"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.layers, options.experts, options.shards) < 1 or not 0 < options.top_k <= options.experts:
        parser.error("expected at least one layer, expert and shard, and top-k from 1 to experts")
    multiple = FP8_BLOCK if options.format == "deepseek_v4" else GROUP
    if options.hidden % multiple or options.inner % multiple or min(options.hidden, options.inner) < multiple:
        parser.error(
            f"expected --hidden and --inner to be multiples of {multiple} in {options.format}, "
            f"got {options.hidden} and {options.inner}"
        )
    try:
        options.folder.mkdir(parents=True)
    except OSError as error:
        parser.error(f"folder: expected a new one, got {options.folder}: {error.strerror}")
    torch.manual_seed(options.seed)
    format = FORMATS[options.format]
    parts = [part for layer in range(options.layers) for part in layer_parts(format, layer, options)]
    weight_map: dict[str, str] = {}
    for shard in range(options.shards):
        tensors = {name: tensor for part in parts[shard :: options.shards] for name, tensor in made(part)}
        if tensors:
            file = f"model-{shard + 1:05}-of-{options.shards:05}.safetensors"
            save_file(tensors, options.folder / file)
            weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (options.folder / "config.json").write_text(json.dumps(config(format, options), indent=2))
    given = {"hidden": torch.randn(options.tokens, options.hidden).to(torch.bfloat16)}
    if "tid2eid" in format.names:
        given["token_ids"] = torch.randint(VOCABULARY, (options.tokens,))
    if options.images and "image_bias" in format.names:
        given["image_mask"] = torch.arange(options.tokens) % 2 == 1
    save_file(given, options.folder / "input.safetensors")
    print(f"{options.folder}: {len(weight_map):,} tensors in {len(set(weight_map.values()))} files")


# A part is what one expert has, or all that is not an expert's: shards are filled with whole parts, one at a time.
Part = dict[str, tuple[str, tuple[int, ...]]]


def layer_parts(format: CheckpointFormat, layer: int, options: argparse.Namespace) -> Iterator[Part]:
    """The tensors of a layer, by name: what they are and their shape."""
    prefix = format.prefixes[0].replace("{layer}", str(layer))
    count, hidden, inner = options.experts, options.hidden, options.inner
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    router = "bfloat16" if format.router else "bias"
    rest: Part = {
        format.names["router_weight"]: ("bfloat16", (count, hidden)),
        format.names["router_bias"]: (router, (count,)),
    }
    if layer == 0 and "tid2eid" in format.names:
        if not options.images:  # models that see have both, and use the table
            del rest[format.names["router_bias"]]
        rest[format.names["tid2eid"]] = ("table", (VOCABULARY, options.top_k, count))
    if options.images and "image_bias" in format.names:
        rest[format.names["image_bias"]] = ("bias", (count,))
    if format.name == "deepseek_v4":
        for name, (rows, depth) in zip(("w1", "w3", "w2"), shapes.values(), strict=True):
            rest[f"{format.shared}{name}.weight"] = ("float8", (rows, depth))
            rest[f"{format.shared}{name}.scale"] = (
                "scale of float8",
                (rows // FP8_BLOCK, depth // FP8_BLOCK),
            )
    elif format.shared:
        for name, shape in zip(("gate_proj", "up_proj", "down_proj"), shapes.values(), strict=True):
            rest[f"{format.shared}{name}.weight"] = ("bfloat16", shape)
    own = torch.int8 in format.dtypes  # DeepSeek's
    if format.storage is PER_EXPERT:
        for expert in range(count):
            part: Part = {}
            for role, name in names_of(format, expert).items():
                rows, depth = shapes[role.partition("_")[0]]
                kind, per_value = ("scale", GROUP) if role.endswith("scales") else ("code", 2)
                part[prefix + name] = (kind if own else f"{kind} byte", (rows, depth // per_value))
            yield part
    else:
        for gemm, rows, depth in (("fc1", 2 * inner, hidden), ("fc2", hidden, inner)):
            yield {
                prefix + format.names[f"{gemm}_weights"]: (
                    "code byte",
                    (count, rows, depth // GROUP, GROUP // 2),
                ),
                prefix + format.names[f"{gemm}_scales"]: ("scale byte", (count, rows, depth // GROUP)),
                prefix + format.names[f"{gemm}_biases"]: ("bfloat16", (count, rows)),
            }
    yield {prefix + name: what for name, what in rest.items()}


def made(part: Part) -> Iterator[tuple[str, Tensor]]:
    for name, (kind, shape) in part.items():
        yield name, tensor(kind, shape)


def tensor(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers of a kind; scales so that some of what GEMM1 gives is beyond SwiGLU's limit, whatever K."""
    if kind == "table":
        vocabulary, top_k, experts = shape
        return torch.rand(vocabulary, experts).argsort(1)[:, :top_k].contiguous()
    if kind == "bias":
        return 8.08 + torch.randn(shape) / 50
    if kind == "bfloat16":
        return (torch.randn(shape) / 16).to(torch.bfloat16)
    if kind == "float8":
        return torch.randn(shape).to(torch.float8_e4m3fn)
    if kind.startswith("scale"):
        # Rows of weights whose norm is about 5: of hidden states of size 1 they make numbers of size 5.
        block, size = (FP8_BLOCK, 1.0) if kind.endswith("float8") else (GROUP, 2.9)
        middle = 127 + round(math.log2(5 / size / math.sqrt(shape[-1] * block)))
        scales = torch.randint(middle - 2, middle + 2, shape, dtype=torch.uint8)
        return scales if kind.endswith("byte") else scales.view(torch.float8_e8m0fnu)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    return codes if kind.endswith("byte") else codes.view(torch.int8)


def config(format: CheckpointFormat, options: argparse.Namespace) -> dict[str, object]:
    """The config.json that a model of this format would have."""
    values: dict[str, object] = {
        "num_experts": options.experts,
        "hidden_size": options.hidden,
        "top_k": options.top_k,
    }
    values["dense_intermediate_size" if format.router else "intermediate_size"] = options.inner
    if format.needs_limit:
        values["limit"] = 7.0 if format.router else 10.0
    if format.router is None:
        values |= {
            "score": format.defaults.get("score", "sigmoid"),
            "normalize": True,
            "routed_scaling_factor": 1.5,
            "shared_experts": 1,
            "method": "noaux_tc",
        }
    if "tid2eid" in format.names:
        values["hash_layers"] = 1
    keys = {
        HONOURED[role][1 if role == "num_experts" and format.router else 0]: v for role, v in values.items()
    }
    return {"model_type": format.router or format.name, "num_hidden_layers": options.layers} | keys


if __name__ == "__main__":
    main()
