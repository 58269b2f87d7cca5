"""Every public function with arguments that it takes, for `tests/whole/test_fuzz.py`."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats import experts, humming, layout, mxfp4, quantize, wordwise
from mxfp4ref.formats import resize as moved
from mxfp4ref.formats.generations import NEWEST, PLAIN
from mxfp4ref.formats.humming_experts import HummingExperts, Sm90HummingExperts
from mxfp4ref.goldens import generator as counter
from mxfp4ref.model import call, layer, parallel, placement
from mxfp4ref.model import flashinfer as oracle
from mxfp4ref.model import forward as moe
from mxfp4ref.routing import presets as routing
from mxfp4ref.routing import scoring, selection
from mxfp4ref.sm90.activation import SITU, SWIGLU_STEP
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import layers
from tests.helpers.fuzzing import Target

E, M, K, H, INNER = 4, 3, 2, 128, 128


@cache
def random_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7)).to(torch.uint8)


@cache
def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8)).to(dtype)


@cache
def make_experts() -> experts.Experts:
    return layers.random_experts(
        7, num_experts=E, hidden=H, inner=INNER, biases=True, parameters=experts.PARAMETERS
    )


def expert_arguments() -> dict[str, Any]:
    return {field.name: getattr(make_experts(), field.name) for field in fields(experts.Experts)}


@cache
def make_sm90_experts() -> experts.Sm90Experts:
    return moved.to_sm90(make_experts())


def sm90_arguments() -> dict[str, Any]:
    return {name: getattr(make_sm90_experts(), name) for name in expert_arguments()}


def plain_arguments() -> dict[str, Any]:
    made = moved.to_sm90(make_experts(), PLAIN)
    return {name: getattr(made, name) for name in expert_arguments()}


@cache
def make_humming_experts() -> HummingExperts:
    return HummingExperts.prepare(make_experts())


def humming_arguments() -> dict[str, Any]:
    return {field.name: getattr(make_humming_experts(), field.name) for field in fields(HummingExperts)}


def sm90_humming_arguments() -> dict[str, Any]:
    changed = {}
    for gemm in ("fc1", "fc2"):
        changed[f"{gemm}_weights"] = humming.interleave(getattr(make_humming_experts(), f"{gemm}_weights"))
        changed[f"{gemm}_scales"] = wordwise.fold(getattr(make_humming_experts(), f"{gemm}_scales"))
    return humming_arguments() | changed


def to_prepare() -> dict[str, Any]:
    scales = random_bytes(2, 16, 2, low=104, high=124)
    return {"packed": random_bytes(2, 16, 32), "scales": scales, "max_range": 11}


def routed() -> dict[str, Any]:
    return {
        "input": normal(M, H, dtype=torch.bfloat16),
        "token_selected_experts": torch.tensor([[0, 3], [2, 1], [3, -1]], dtype=torch.int32),
        "token_final_scales": normal(M, K).abs(),
        "experts": make_experts(),
    }


def rank() -> dict[str, Any]:
    return {"ep_size": 1, "ep_rank": 0, "tp_size": 1, "tp_rank": 0}


def call_arguments() -> dict[str, Any]:
    return {**routed(), **rank(), "kernel": Sm90Kernel(), "strict": True, "activation_type": SWIGLU_STEP}


def oracle_arguments() -> dict[str, Any]:
    given = {name: value for name, value in routed().items() if name != "experts"}
    made = make_sm90_experts()
    given |= {"fc1_expert_weights": made.fc1_weights, "fc2_expert_weights": made.fc2_weights}
    given |= {"output_dtype": torch.bfloat16, "quant_scales": [made.fc1_scales, made.fc2_scales]}
    given |= {"fc1_expert_biases": made.fc1_biases, "fc2_expert_biases": made.fc2_biases}
    given |= {name: getattr(made, name) for name in experts.PARAMETERS}
    return {**oracle_defaults(), **given, "use_w4_group_scaling": True}


@cache
def oracle_defaults() -> dict[str, Any]:
    signature = inspect.signature(oracle.torch_ref_cutlass_fused_moe)
    return {name: p.default for name, p in signature.parameters.items()}


def dense_oracle_arguments() -> dict[str, Any]:
    changed = {
        "fc1_expert_weights": normal(E, 2 * INNER, H, dtype=torch.bfloat16),
        "fc2_expert_weights": normal(E, H, INNER, dtype=torch.bfloat16),
        "quant_scales": None,
        "use_w4_group_scaling": False,
        "output": torch.zeros(M, H, dtype=torch.bfloat16),
        "activation_type": SITU,
    }
    return oracle_arguments() | changed


def logits() -> Tensor:
    return normal(M, 8)


def options(**others: Any) -> dict[str, Any]:
    padded = torch.tensor([False, True, False])
    return {"logits": logits(), "top_k": 2, **others, "padded": padded, "ambiguous_ulps": 8.0}


def scaling() -> dict[str, Any]:
    return {"routed_scaling_factor": 1.5, "routed_scaling": routing.RoutedScaling.IN_WEIGHTS}


def ids() -> Tensor:
    return torch.tensor([[0, 3], [2, 1], [3, 0]], dtype=torch.int32)


def on_rank() -> dict[str, Any]:
    return {"ids": ids(), "num_experts": 4, "ep_size": 1, "ep_rank": 0}


def expert_map() -> Tensor:
    return torch.tensor([[0, 1], [2, 3]])


def weights(name: str) -> dict[str, Any]:
    return {name: random_bytes(2, 16, 32), "generation": NEWEST}


def halves(**others: Any) -> dict[str, Any]:
    return {"t": normal(2, 6, 2), **others, "dim": 1}


STAGES = {"stages": None}
# The drop-in says of these that they have no effect.
IGNORED = (
    *("cluster_rank", "tune_max_num_tokens", "enable_pdl", "swizzled_input_sf", "use_fused_finalize"),
    "workspace_buffer",
)
FC1 = ("fc1_weights", "fc2_weights", "fc1_scales", "fc2_scales")
TARGETS: dict[str, Target] = {
    "formats.mxfp4.decode_ue8m0": Target(
        mxfp4.decode_ue8m0,
        lambda: {"scales": random_bytes(4, 3), "convention": "ocp", "dtype": torch.float32},
    ),
    "formats.mxfp4.dequantize": Target(
        mxfp4.dequantize,
        lambda: {
            "packed": random_bytes(3, 32),
            "scales": random_bytes(3, 2),
            "convention": "ocp",
            "dtype": torch.bfloat16,
            "out": None,
        },
    ),
    "formats.mxfp4.dequantize into out": Target(
        mxfp4.dequantize,
        lambda: {
            "packed": random_bytes(3, 32),
            "scales": random_bytes(3, 2),
            "out": torch.zeros(3, 64, dtype=torch.bfloat16),
        },
        written=("out",),
    ),
    "formats.quantize.fp32_to_ue8m0": Target(
        quantize.fp32_to_ue8m0, lambda: {"values": 2.0 ** torch.arange(6.0).reshape(3, 2)}
    ),
    "formats.mxfp4.pack_codes": Target(mxfp4.pack_codes, lambda: {"codes": random_bytes(3, 8, high=16)}),
    "formats.mxfp4.unpack_codes": Target(mxfp4.unpack_codes, lambda: {"packed": random_bytes(3, 8)}),
    "formats.quantize.quantize": Target(
        quantize.quantize, lambda: {"values": normal(3, 64), "rule": "floor"}
    ),
    "formats.layout.interleave_weights_sm90": Target(
        layout.interleave_weights_sm90, lambda: weights("packed")
    ),
    "formats.layout.deinterleave_weights_sm90": Target(
        layout.deinterleave_weights_sm90, lambda: weights("interleaved")
    ),
    "formats.layout.fold_scales_sm90": Target(
        layout.fold_scales_sm90, lambda: {"scales": random_bytes(2, 64, 4), "generation": NEWEST}
    ),
    "formats.layout.unfold_scales_sm90": Target(
        layout.unfold_scales_sm90,
        lambda: {"folded": layout.fold_scales_sm90(random_bytes(2, 64, 4)), "generation": None},
    ),
    "formats.layout.swap_gate_up": Target(layout.swap_gate_up, halves, generic=True),
    "formats.layout.interleaved_to_halves": Target(layout.interleaved_to_halves, halves, generic=True),
    "formats.layout.halves_to_interleaved": Target(layout.halves_to_interleaved, halves, generic=True),
    "formats.layout.pad_halves": Target(layout.pad_halves, lambda: halves(multiple=4), generic=True),
    "formats.layout.unpad_halves": Target(layout.unpad_halves, lambda: halves(size=2), generic=True),
    "formats.experts.Experts": Target(experts.Experts, expert_arguments),
    "formats.experts.Sm90Experts": Target(experts.Sm90Experts, sm90_arguments),
    "formats.experts.PlainExperts": Target(experts.PlainExperts, plain_arguments),
    "formats.humming.prepare": Target(humming.prepare, to_prepare),
    "formats.humming.preparation_loss": Target(humming.preparation_loss, to_prepare),
    "formats.humming.interleave": Target(humming.interleave, lambda: {"packed": random_bytes(2, 16, 32)}),
    "formats.humming.deinterleave": Target(
        humming.deinterleave, lambda: {"interleaved": random_bytes(2, 16, 32)}
    ),
    "formats.humming_experts.HummingExperts": Target(HummingExperts, humming_arguments),
    "formats.humming_experts.Sm90HummingExperts": Target(Sm90HummingExperts, sm90_humming_arguments),
    "formats.experts.Experts.slice": Target(
        lambda start, stop: make_experts().slice(start, stop), lambda: {"start": 1, "stop": 3}
    ),
    "formats.experts.Experts.select": Target(
        lambda index: make_experts().select(index), lambda: {"index": torch.tensor([2, 0])}
    ),
    "formats.experts.Sm90Experts.select": Target(
        lambda index: make_sm90_experts().select(index), lambda: {"index": torch.tensor([2, 0])}
    ),
    "model.call.MoeCall": Target(call.MoeCall, call_arguments),
    "model.forward.forward": Target(
        moe.forward, lambda: {"call": call.MoeCall(**call_arguments()), **STAGES}
    ),
    "model.forward.trace": Target(moe.trace, lambda: {"call": call.MoeCall(**call_arguments()), **STAGES}),
    "model.flashinfer.torch_ref_cutlass_fused_moe": Target(
        oracle.torch_ref_cutlass_fused_moe,
        oracle_arguments,
        ignored=IGNORED,
        without={"trace": ("True",)},  # gives a trace along with the output
    ),
    "model.flashinfer.torch_ref_cutlass_fused_moe, bf16, into output": Target(
        oracle.torch_ref_cutlass_fused_moe,
        dense_oracle_arguments,
        written=("output",),
        only=(
            "input",
            "fc1_expert_weights",
            "fc2_expert_weights",
            "quant_scales",
            "output",
            "weight_layout",
            "situ_beta",
        ),
    ),
    "model.flashinfer.drop_in": Target(
        oracle.drop_in, lambda: {"kernel": Sm90Kernel(), "weight_layout": "sm90", "strict": True}
    ),
    "routing.scoring.raw_logits": Target(scoring.raw_logits, lambda: {"logits": logits()}),
    "routing.scoring.sigmoid": Target(scoring.sigmoid, lambda: {"logits": logits()}),
    "routing.scoring.softmax": Target(scoring.softmax, lambda: {"logits": logits()}),
    "routing.scoring.softplus": Target(scoring.softplus, lambda: {"logits": logits()}),
    "routing.scoring.sqrt_softplus": Target(
        scoring.sqrt_softplus, lambda: {"logits": logits(), "rounding": "each_step"}
    ),
    "routing.selection.select_experts": Target(
        selection.select_experts,
        lambda: {
            "scores": logits(),
            "top_k": 2,
            "correction_bias": normal(8),
            "n_group": 4,
            "topk_group": 2,
            "ambiguous_ulps": 8.0,
        },
    ),
    "routing.selection.hash_experts": Target(
        selection.hash_experts,
        lambda: {"token_ids": torch.tensor([2, 0, 1]), "tid2eid": ids(), "num_experts": 4},
    ),
    "routing.route.routing_weights": Target(
        routing.routing_weights,
        lambda: {"scores": logits().abs(), "ids": ids(), "normalize": "sum", "epsilon": 0.0, "factor": 1.5},
    ),
    "routing.presets.deepseek_v3": Target(
        routing.deepseek_v3,
        lambda: options(correction_bias=normal(8), n_group=4, topk_group=2, **scaling()),
    ),
    "routing.presets.deepseek_v4": Target(
        routing.deepseek_v4,
        lambda: options(correction_bias=normal(8), token_ids=None, tid2eid=None, **scaling()),
        names=("scores",),  # which are zero where logits are -inf
    ),
    "routing.presets.deepseek_v4 by table": Target(
        routing.deepseek_v4,
        lambda: options(correction_bias=None, token_ids=torch.tensor([2, 0, 1]), tid2eid=ids(), **scaling()),
        names=("scores",),
    ),
    "routing.route.route": Target(
        routing.route,
        lambda: {
            "preset": replace(routing.PRESETS["deepseek_v4"], top_k=2, factor=1.5),
            "logits": logits(),
            "gate": routing.Gate(normal(8)),
            "tokens": routing.Tokens(torch.tensor([False, True, False])),
            "routed_scaling": routing.RoutedScaling.IN_WEIGHTS,
            "ambiguous_ulps": 8.0,
        },
        names=("scores", "padded", "correction_bias"),
    ),
    "routing.presets.gpt_oss": Target(routing.gpt_oss, options),
    "routing.presets.mixtral": Target(routing.mixtral, options),
    "routing.presets.pack_top_k": Target(routing.pack_top_k, lambda: {"ids": ids(), "scales": normal(M, K)}),
    "routing.presets.unpack_top_k": Target(routing.unpack_top_k, lambda: {"packed": ids() << 16}),
    "model.parallel.local_experts": Target(parallel.local_experts, on_rank),
    "model.parallel.global_to_local": Target(parallel.global_to_local, on_rank),
    "model.parallel.local_to_global": Target(parallel.local_to_global, on_rank),
    "model.parallel.split_experts": Target(
        parallel.split_experts, lambda: {"experts": make_experts(), "ep_size": 2, "expert_map": expert_map()}
    ),
    "model.parallel.split_intermediate": Target(
        parallel.split_intermediate,
        lambda: {
            "experts": make_experts(),
            "tp_size": 2,
            "intermediate_size": make_experts().intermediate_size,
        },
    ),
    "model.parallel.gather": Target(
        parallel.gather,
        lambda: {"outputs": [normal(M, H, dtype=torch.bfloat16)] * 2, "reduction": "float32"},
    ),
    "model.ranks.Ranks": Target(
        parallel.Ranks,
        lambda: {
            "ep_size": 2,
            "tp_size": 1,
            "reduction": "float32",
            "intermediate_size": 128,
            "expert_map": expert_map(),
            "physical_ids": ids(),
        },
    ),
    "model.parallel.forward_all_ranks": Target(
        parallel.forward_all_ranks,
        lambda: {"call": call.MoeCall(**routed()), "ranks": parallel.Ranks(ep_size=2), **STAGES},
        names=("outputs", "ep_rank"),
    ),
    "model.parallel.rank_calls": Target(
        parallel.rank_calls,
        lambda: {"call": call.MoeCall(**routed()), "ranks": parallel.Ranks(ep_size=2)},
    ),
    "model.placement.place_experts": Target(
        placement.place_experts, lambda: {"num_experts": 5, "ep_size": 2, "strategy": "linear"}
    ),
    "model.placement.check_expert_map": Target(
        placement.check_expert_map, lambda: {"expert_map": expert_map(), "ep_size": 2, "num_experts": 4}
    ),
    "model.placement.physical_ids": Target(
        placement.physical_ids, lambda: {"ids": ids(), "expert_map": expert_map(), "replica": ids()}
    ),
    "model.placement.check_physical_ids": Target(
        placement.check_physical_ids,
        lambda: {"physical": ids(), "ids": ids(), "expert_map": expert_map()},
        names=("physical_ids",),
    ),
    "model.placement.rank_arguments": Target(
        placement.rank_arguments, lambda: {"physical": ids(), "expert_map": expert_map()}
    ),
    "model.layer.moe_layer": Target(
        layer.moe_layer,
        lambda: {
            "hidden": normal(M, H, dtype=torch.bfloat16),
            "routing": routing.mixtral(normal(M, E)),
            "experts": make_experts(),
            "shared_output": normal(M, H, dtype=torch.bfloat16),
            "ranks": parallel.Ranks(),
            "kernel": Sm90Kernel(),
            "activation_type": SITU,
        },
    ),
    "model.layer.finish_output": Target(
        layer.finish_output,
        lambda: {
            "routed_output": normal(M, H, dtype=torch.bfloat16),
            "shared_output": normal(M, H, dtype=torch.bfloat16),
            "routed_scaling": routing.RoutedScaling.ON_OUTPUT_BF16,
            "routed_scaling_factor": 1.5,
        },
    ),
    "formats.resize.resize_experts": Target(
        moved.resize_experts,
        lambda: {"experts": make_experts(), "hidden_size": 256, "intermediate_size": 160},
        names=FC1,
    ),
    "formats.resize.to_sm90": Target(
        moved.to_sm90, lambda: {"experts": make_experts(), "generation": NEWEST}
    ),
    "formats.resize.to_logical": Target(moved.to_logical, lambda: {"experts": make_sm90_experts()}),
    "goldens.generator.key": Target(counter.key, lambda: {"seed": 1, "name": "w"}),
    "goldens.generator.random_bytes": Target(
        counter.random_bytes,
        lambda: {"seed": 1, "name": "w", "start": 3, "count": 9},
        without={"count": ("2^31",)},  # right, but 2 GiB
    ),
}
