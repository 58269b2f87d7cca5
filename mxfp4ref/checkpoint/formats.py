"""The formats of checkpoints that are published, a record each."""

from __future__ import annotations

from dataclasses import replace

import torch

from mxfp4ref.checkpoint.format import CheckpointFormat, RowOrder
from mxfp4ref.checkpoint.gguf import GGML_BLOCKS
from mxfp4ref.checkpoint.per_expert import PER_EXPERT
from mxfp4ref.checkpoint.stacked import BFLOAT16, BLOCKS
from mxfp4ref.formats.layout import halves_to_interleaved, interleaved_to_halves

__all__ = ["FORMATS"]


def _matrices(gate: str, up: str, down: str, weights: str, scales: str) -> dict[str, str]:
    """The names of an expert's tensors from those of its modules and the ends that weights and scales have."""
    modules = {"gate": gate, "up": up, "down": down}
    ends = {"weights": weights, "scales": scales}
    return {
        f"{matrix}_{kind}": f"experts.{{expert}}.{module}{end}"
        for matrix, module in modules.items()
        for kind, end in ends.items()
    }


# Experts of an activation that is quantised as well have a scale for it, which the kernel has no use for.
_INPUT_SCALES = tuple(
    f"experts.{{expert}}.{module}.input_scale"
    for module in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
)
_HUGGING_FACE = ("gate_proj", "up_proj", "down_proj")
_W123 = ("w1", "w3", "w2")
_ROOTS = ("model.", "language_model.model.", "model.language_model.")

# layers.3.ffn.experts.E.w1.weight [I, H/2] int8, .scale [I, H/32] float8_e8m0fnu; w3 likewise, w2 [H, I/2]
#             .gate.weight [E, H] bf16, .gate.bias [E] float32 or, in hash layers, .gate.tid2eid [V, k] int64
#             .gate.bias_vl [E] float32, for the tokens of images; .shared_experts.* in float8_e4m3fn blocks
DEEPSEEK_V4 = CheckpointFormat(
    name="deepseek_v4",
    stores="DeepSeek-V4 and V4.1, as published",
    prefixes=(
        "layers.{layer}.ffn.",
        "model.layers.{layer}.ffn.",
        "language_model.model.layers.{layer}.ffn.",
        "mtp.{draft}.ffn.",
        "model.mtp.{draft}.ffn.",
    ),
    storage=PER_EXPERT,
    names=_matrices(*_W123, ".weight", ".scale")
    | {
        "router_weight": "gate.weight",
        "router_bias": "gate.bias",
        "image_bias": "gate.bias_vl",
        "tid2eid": "gate.tid2eid",
    },
    shared="shared_experts.",
    defaults={"score": "sqrtsoftplus", "normalize": True},
    dtypes=(torch.int8, torch.float8_e8m0fnu),
    needs_limit=True,
)
DEEPSEEK_V4_QUARK = replace(
    DEEPSEEK_V4,
    name="deepseek_v4_quark",
    stores="DeepSeek-V4 by AMD Quark",
    names={**DEEPSEEK_V4.names} | _matrices(*_W123, ".weight", ".weight_scale"),
    carried=_INPUT_SCALES,
    dtypes=(torch.uint8, torch.uint8),
)
# model.layers.3.mlp.experts.E.gate_proj.weight [I, H/2] uint8, .weight_scale [I, H/32] uint8
#                   .gate.weight [E, H] bf16, .gate.e_score_correction_bias [E] float32
WEIGHT_SCALE = CheckpointFormat(
    name="weight_scale",
    stores="AMD Quark and ModelOpt: Kimi-K2, DeepSeek-V3, Qwen3, GLM",
    prefixes=tuple(f"{root}layers.{{layer}}.mlp." for root in _ROOTS),
    storage=PER_EXPERT,
    names=_matrices(*_HUGGING_FACE, ".weight", ".weight_scale")
    | {"router_weight": "gate.weight", "router_bias": "gate.e_score_correction_bias"},
    shared="shared_experts.",
    carried=("shared_expert.", "shared_expert_gate.", *_INPUT_SCALES),
)
COMPRESSED_TENSORS = replace(
    WEIGHT_SCALE,
    name="compressed_tensors",
    stores="compressed-tensors, mxfp4-pack-quantized: llm-compressor's",
    names={**WEIGHT_SCALE.names} | _matrices(*_HUGGING_FACE, ".weight_packed", ".weight_scale"),
)
# Below block_sparse_moe, experts.E.w1 [I, L/2] where L is routed_expert_hidden_size
KIMI_K3 = replace(
    COMPRESSED_TENSORS,
    name="kimi_k3",
    stores="Kimi-K3 and Mixtral (compressed-tensors)",
    prefixes=tuple(name.replace(".mlp.", ".block_sparse_moe.") for name in WEIGHT_SCALE.prefixes),
    names={**COMPRESSED_TENSORS.names} | _matrices(*_W123, ".weight_packed", ".weight_scale"),
    carried=(
        "routed_expert_down_proj.",
        "routed_expert_norm.",
        "routed_expert_up_proj.",
        *_INPUT_SCALES,
    ),
)
BLOCK_SPARSE_MOE = replace(
    KIMI_K3,
    name="block_sparse_moe",
    stores="AMD Quark and ModelOpt: Mixtral",
    names={**KIMI_K3.names} | _matrices(*_W123, ".weight", ".weight_scale"),
)
# model.layers.3.mlp.experts.gate_up_proj_blocks [E, 2I, H/32, 16] uint8, rows gate0, up0, gate1, ...; _scales
#                   [E, 2I, H/32] uint8; _bias [E, 2I] bf16; down_proj_* likewise; .router.weight, .bias bf16
GPT_OSS = CheckpointFormat(
    name="gpt_oss",
    stores="gpt-oss, as Hugging Face has it",
    prefixes=("model.layers.{layer}.mlp.",),
    storage=BLOCKS,
    names={
        "fc1_weights": "experts.gate_up_proj_blocks",
        "fc1_scales": "experts.gate_up_proj_scales",
        "fc1_biases": "experts.gate_up_proj_bias",
        "fc2_weights": "experts.down_proj_blocks",
        "fc2_scales": "experts.down_proj_scales",
        "fc2_biases": "experts.down_proj_bias",
        "router_weight": "router.weight",
        "router_bias": "router.bias",
    },
    router="gpt_oss",
    rows=RowOrder(interleaved_to_halves, halves_to_interleaved),
    alpha=1.702,
    beta=1.0,
    needs_limit=True,
    no_limit=None,
)
GPT_OSS_ORIGINAL = replace(
    GPT_OSS,
    name="gpt_oss_original",
    stores="gpt-oss, as OpenAI has it",
    prefixes=("block.{layer}.mlp.",),
    names={
        "fc1_weights": "mlp1_weight.blocks",
        "fc1_scales": "mlp1_weight.scales",
        "fc1_biases": "mlp1_bias",
        "fc2_weights": "mlp2_weight.blocks",
        "fc2_scales": "mlp2_weight.scales",
        "fc2_biases": "mlp2_bias",
        "router_weight": "gate.weight",
        "router_bias": "gate.bias",
    },
    carried=("norm.",),
)
# A fine-tune in bf16: [E, H, 2I] and [E, I, H], transposed, columns gate0, up0, gate1, ...
GPT_OSS_BFLOAT16 = replace(
    GPT_OSS,
    name="gpt_oss_bfloat16",
    stores="gpt-oss fine-tuned in bf16, quantised on request",
    storage=BFLOAT16,
    names={
        "fc1_weights": "experts.gate_up_proj",
        "fc1_biases": "experts.gate_up_proj_bias",
        "fc2_weights": "experts.down_proj",
        "fc2_biases": "experts.down_proj_bias",
        "router_weight": "router.weight",
        "router_bias": "router.bias",
    },
)
# blk.3.ffn_gate_exps.weight [E, I, H], .ffn_up_exps, .ffn_down_exps [E, H, I] in blocks; .ffn_gate_inp.weight [E, H]
#      .exp_probs_b.bias [E] float32, .exp_probs_b_vl.bias, .ffn_gate_tid2eid.weight [V, k] int32
GGUF = CheckpointFormat(
    name="gguf",
    stores="GGUF with MXFP4 experts: DeepSeek, Kimi, Qwen",
    prefixes=("blk.{layer}.",),
    storage=GGML_BLOCKS,
    names={
        "gate_weights": "ffn_gate_exps.weight",
        "up_weights": "ffn_up_exps.weight",
        "down_weights": "ffn_down_exps.weight",
        "router_weight": "ffn_gate_inp.weight",
        "router_bias": "exp_probs_b.bias",
        "image_bias": "exp_probs_b_vl.bias",
        "tid2eid": "ffn_gate_tid2eid.weight",
    },
    carried=(
        *("attn", "ffn_norm", "post_", "indexer", "hc_", "engram", "ssm", "nextn", "layer_output"),
        *("ffn_gate_shexp.", "ffn_up_shexp.", "ffn_down_shexp.", "ffn_gate_inp_shexp."),
    ),
)
GGUF_GPT_OSS = replace(
    GPT_OSS,
    name="gguf_gpt_oss",
    stores="gpt-oss in GGUF",
    prefixes=GGUF.prefixes,
    storage=GGML_BLOCKS,
    names={role: name for role, name in GGUF.names.items() if role.endswith("weights")}
    | {
        "gate_biases": "ffn_gate_exps.bias",
        "up_biases": "ffn_up_exps.bias",
        "down_biases": "ffn_down_exps.bias",
        "router_weight": "ffn_gate_inp.weight",
        "router_bias": "ffn_gate_inp.bias",
    },
    carried=GGUF.carried,
)

FORMATS = {
    format.name: format
    for format in (
        DEEPSEEK_V4,
        DEEPSEEK_V4_QUARK,
        WEIGHT_SCALE,
        COMPRESSED_TENSORS,
        KIMI_K3,
        BLOCK_SPARSE_MOE,
        GPT_OSS,
        GPT_OSS_ORIGINAL,
        GPT_OSS_BFLOAT16,
        GGUF,
        GGUF_GPT_OSS,
    )
}
