"""Small checkpoints with the published names, dtypes and shapes: three layers of four experts each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxfp4ref.formats.experts import Experts

INDEX = "model.safetensors.index.json"
EXPERTS, TOP_K, VOCABULARY = 4, 2, 16
# DeepSeek-V4's sizes are multiples of 128; gpt-oss's are not (2880), so that they are padded.
DEEPSEEK_H, DEEPSEEK_I = 256, 128
GPT_OSS_H, GPT_OSS_I = 96, 160
LAYERS = 3
Tensors = dict[str, Tensor]


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8)


def deepseek_layer(layer: int, prefix: str = "") -> Tensors:
    p = f"{prefix}layers.{layer}.ffn."
    tensors = {f"{p}gate.weight": torch.randn(EXPERTS, DEEPSEEK_H).to(torch.bfloat16)}
    if layer == 0:
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(VOCABULARY)])
        tensors[f"{p}gate.tid2eid"] = ids
    else:
        tensors[f"{p}gate.bias"] = 8.08 + torch.randn(EXPERTS) / 16
    shapes = {
        "w1": (DEEPSEEK_I, DEEPSEEK_H),
        "w2": (DEEPSEEK_H, DEEPSEEK_I),
        "w3": (DEEPSEEK_I, DEEPSEEK_H),
    }
    for part, (rows, depth) in shapes.items():
        for e in range(EXPERTS):
            tensors[f"{p}experts.{e}.{part}.weight"] = random_bytes(rows, depth // 2).view(torch.int8)
            scales = random_bytes(rows, depth // 32, low=110, high=130)
            tensors[f"{p}experts.{e}.{part}.scale"] = scales.view(torch.float8_e8m0fnu)
        weight = torch.randn(rows, depth).to(torch.float8_e4m3fn)
        tensors[f"{p}shared_experts.{part}.weight"] = weight
        scale = random_bytes(rows // 128, depth // 128, low=120, high=130).view(torch.float8_e8m0fnu)
        tensors[f"{p}shared_experts.{part}.scale"] = scale
    return tensors


# The other formats whose experts have three matrices of their own: what the prefix of layer N is, the names of
# gate, up and down, the ends of weights and scales, and the correction bias.
HUGGING_FACE, W123 = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
PER_EXPERT = {
    "deepseek_v4_quark": ("layers.{}.ffn.", W123, (".weight", ".weight_scale"), "gate.bias"),
    "weight_scale": (
        "model.layers.{}.mlp.",
        HUGGING_FACE,
        (".weight", ".weight_scale"),
        "gate.e_score_correction_bias",
    ),
    "compressed_tensors": (
        "language_model.model.layers.{}.mlp.",
        HUGGING_FACE,
        (".weight_packed", ".weight_scale"),
        "gate.e_score_correction_bias",
    ),
    "kimi_k3": (
        "language_model.model.layers.{}.block_sparse_moe.",
        W123,
        (".weight_packed", ".weight_scale"),
        "gate.e_score_correction_bias",
    ),
    "block_sparse_moe": (
        "model.layers.{}.block_sparse_moe.",
        W123,
        (".weight", ".weight_scale"),
        "gate.e_score_correction_bias",
    ),
}
LATENT = 128  # where Kimi-K3's experts work


def per_expert_layer(layer: int, kind: str) -> Tensors:
    """Experts in bytes, a router, and a shared expert in bf16, as these formats have it."""
    template, names, (weights, scales), bias = PER_EXPERT[kind]
    p = template.format(layer)
    width = LATENT if kind == "kimi_k3" else DEEPSEEK_H
    tensors = {
        f"{p}gate.weight": torch.randn(EXPERTS, DEEPSEEK_H).to(torch.bfloat16),
        f"{p}{bias}": torch.randn(EXPERTS) / 16,
    }
    shapes = [(DEEPSEEK_I, width), (DEEPSEEK_I, width), (width, DEEPSEEK_I)]
    for e in range(EXPERTS):
        for name, (rows, depth) in zip(names, shapes, strict=True):
            tensors[f"{p}experts.{e}.{name}{weights}"] = random_bytes(rows, depth // 2)
            tensors[f"{p}experts.{e}.{name}{scales}"] = random_bytes(rows, depth // 32, low=110, high=130)
    shared = ((DEEPSEEK_I, DEEPSEEK_H), (DEEPSEEK_I, DEEPSEEK_H), (DEEPSEEK_H, DEEPSEEK_I))
    for name, shape in zip(HUGGING_FACE, shared, strict=True):
        tensors[f"{p}shared_experts.{name}.weight"] = torch.randn(*shape).to(torch.bfloat16)
    if kind == "kimi_k3":
        tensors[f"{p}routed_expert_down_proj.weight"] = torch.randn(LATENT, DEEPSEEK_H).to(torch.bfloat16)
        tensors[f"{p}routed_expert_norm.weight"] = torch.randn(LATENT).to(torch.bfloat16)
        tensors[f"{p}routed_expert_up_proj.weight"] = torch.randn(DEEPSEEK_H, LATENT).to(torch.bfloat16)
    return tensors


def bfloat16_layer(layer: int) -> Tensors:
    """A gpt-oss that somebody fine-tuned: transposed, not quantised."""
    stored = gpt_oss_layer(layer, original=False)
    p = f"model.layers.{layer}.mlp.experts."
    for name, rows, depth in (
        ("gate_up_proj", GPT_OSS_H, 2 * GPT_OSS_I),
        ("down_proj", GPT_OSS_I, GPT_OSS_H),
    ):
        del stored[f"{p}{name}_blocks"], stored[f"{p}{name}_scales"]
        stored[f"{p}{name}"] = torch.randn(EXPERTS, rows, depth).to(torch.bfloat16)
    return stored


def gpt_oss_layer(layer: int, original: bool) -> Tensors:
    p = f"block.{layer}.mlp." if original else f"model.layers.{layer}.mlp."
    up, down = (
        ("mlp1_weight.", "mlp2_weight.") if original else ("experts.gate_up_proj_", "experts.down_proj_")
    )
    up_bias, down_bias = ("mlp1_bias", "mlp2_bias") if original else (f"{up}bias", f"{down}bias")
    router = "gate" if original else "router"
    tensors = {
        f"{up}blocks": random_bytes(EXPERTS, 2 * GPT_OSS_I, GPT_OSS_H // 32, 16),
        f"{up}scales": random_bytes(EXPERTS, 2 * GPT_OSS_I, GPT_OSS_H // 32, low=110, high=130),
        up_bias: torch.randn(EXPERTS, 2 * GPT_OSS_I).to(torch.bfloat16),
        f"{down}blocks": random_bytes(EXPERTS, GPT_OSS_H, GPT_OSS_I // 32, 16),
        f"{down}scales": random_bytes(EXPERTS, GPT_OSS_H, GPT_OSS_I // 32, low=110, high=130),
        down_bias: torch.randn(EXPERTS, GPT_OSS_H).to(torch.bfloat16),
        f"{router}.weight": torch.randn(EXPERTS, GPT_OSS_H).to(torch.bfloat16),
        f"{router}.bias": torch.randn(EXPERTS).to(torch.bfloat16),
    }
    return {f"{p}{name}": tensor for name, tensor in tensors.items()}


def with_images(tensors: Tensors) -> None:
    """DeepSeek's layers in models that see."""
    prefix = next(iter(tensors)).partition("ffn.")[0] + "ffn."
    tensors[f"{prefix}gate.bias_vl"] = (
        8.08 + torch.randn(EXPERTS, generator=torch.Generator().manual_seed(3)) / 16
    )


# A checkpoint with names of its own, and those of a `weight_scale` layer in them.
NAME_MAP = """
like = "weight_scale"
name = "mine"
prefixes = ["transformer.h.{layer}.moe."]
carried = ["statistics."]
[names]
gate_weights = "experts.{expert}.gate.qweight"
gate_scales = "experts.{expert}.gate.scales"
up_weights = "experts.{expert}.up.qweight"
up_scales = "experts.{expert}.up.scales"
down_weights = "experts.{expert}.down.qweight"
down_scales = "experts.{expert}.down.scales"
router_bias = "router.correction"
router_weight = "router.weight"
"""


def mine(name: str) -> str:
    name = name.replace("model.layers.1.mlp.", "transformer.h.1.moe.").replace("gate.weight", "router.weight")
    name = name.replace("gate.e_score_correction_bias", "router.correction").replace(
        "_proj.weight_scale", ".scales"
    )
    return name.replace("_proj.weight", ".qweight") if ".experts." in name else name


_ROUTED = {
    "hidden_size": DEEPSEEK_H,
    "moe_intermediate_size": DEEPSEEK_I,
    "intermediate_size": 4096,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_QUARK = {
    "dtype": "fp4",
    "qscheme": "per_group",
    "group_size": 32,
    "scale_format": "e8m0",
    "is_dynamic": False,
}
_QUANTIZATION = {
    "quark": {
        "quant_method": "quark",
        "global_quant_config": {"weight": _QUARK, "input_tensors": {**_QUARK, "is_dynamic": True}},
        "layer_quant_config": {},
        "algo_config": None,
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}},
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        "hidden_size": DEEPSEEK_H,
        "moe_intermediate_size": DEEPSEEK_I,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
    },
    "gpt_oss": {
        "hidden_size": GPT_OSS_H,
        "intermediate_size": GPT_OSS_I,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "swiglu_limit": 7.0,
    },
    "deepseek_v4_quark": _ROUTED
    | {"scoring_func": "sqrtsoftplus", "swiglu_limit": 10.0, "quantization_config": _QUANTIZATION["quark"]},
    "weight_scale": _ROUTED | {"n_group": 1, "topk_group": 1, "quantization_config": _QUANTIZATION["quark"]},
    "compressed_tensors": {
        "text_config": _ROUTED | {"quantization_config": _QUANTIZATION["compressed-tensors"]},
        "vision_config": {"hidden_size": 32},
    },
    "kimi_k3": {
        "text_config": {
            "hidden_size": DEEPSEEK_H,
            "routed_expert_hidden_size": LATENT,
            "latent_moe_use_norm": True,
            "moe_intermediate_size": DEEPSEEK_I,
            "num_experts": EXPERTS,
            "num_shared_experts": 1,
            "num_experts_per_token": TOP_K,
            "moe_router_activation_func": "sigmoid",
            "moe_renormalize": True,
            "routed_scaling_factor": 1.0,
            "num_expert_group": 1,
            "topk_group": 1,
            "use_grouped_topk": True,
            "topk_method": "noaux_tc",
            "hidden_act": "situ",
            "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 25.0,
            "quantization_config": _QUANTIZATION["compressed-tensors"],
        },
    },
    "block_sparse_moe": _ROUTED
    | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MXFP4"}},
    "gpt_oss_bfloat16": {
        "hidden_size": GPT_OSS_H,
        "intermediate_size": GPT_OSS_I,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "swiglu_limit": 7.0,
    },
    "gpt_oss_original": {
        "hidden_size": GPT_OSS_H,
        "intermediate_size": GPT_OSS_I,
        "num_experts": EXPERTS,
        "experts_per_token": TOP_K,
        "swiglu_limit": 7.0,
    },
}


def layer_tensors(kind: str, layer: int) -> Tensors:
    torch.manual_seed(1000 + layer)
    if kind in PER_EXPERT:
        return per_expert_layer(layer, kind)
    if kind == "gpt_oss_bfloat16":
        return bfloat16_layer(layer)
    if kind.startswith("deepseek"):
        return deepseek_layer(layer, "model." if kind.endswith("prefixed") else "")
    return gpt_oss_layer(layer, original=kind.endswith("original"))


def write_config(folder: Path, kind: str, **changes: object) -> None:
    config: dict[str, object] = {**CONFIGS[kind.removesuffix("_prefixed")], **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def make_checkpoint(folder: Path, kind: str, change: Callable[[Tensors], object] | None = None) -> Tensors:
    """Three layers in two shards, the border inside layer 1; `change` edits layer 1 before it is written."""
    folder.mkdir(exist_ok=True)
    tensors = [layer_tensors(kind, layer) for layer in range(LAYERS)]
    if change is not None:
        change(tensors[1])
    names = list(tensors[1])
    first = tensors[0] | {name: tensors[1][name] for name in names[::2]}
    second = {name: tensors[1][name] for name in names[1::2]} | tensors[2]
    weight_map = {}
    for number, shard in enumerate((first, second), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(folder, kind)
    return tensors[1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same_experts(a: Experts, b: Experts) -> None:
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None) == (right is None), field.name
        assert left is None or same_bits(left, right), field.name
