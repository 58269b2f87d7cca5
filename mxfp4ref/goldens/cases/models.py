"""Suite `models`: layers of real size. Weights are derived from the generator, outputs are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.goldens.case import derive
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall
from mxfp4ref.routing.presets import Routing, deepseek_v4, gpt_oss

_SCALES = {"low": 117, "high": 121}


def _recipes(
    source: Source,
    num_experts: int,
    used: list[int],
    hidden: int,
    inner: int,
    *,
    first_expert: int = 0,
    biases: bool = False,
) -> dict[str, dict[str, Any]]:
    """How the weights are derived; sizes are padded to multiples of 128, each half of fc1 on its own."""
    padded_hidden, padded_inner = (-(-size // 128) * 128 for size in (hidden, inner))

    def recipe(
        rule: str, blocks: int, padded: list[int], content: list[int], **limits: int
    ) -> dict[str, Any]:
        return {
            "seed": source.seed,
            "rule": rule,
            **limits,
            "shape": [num_experts, *padded],
            "content": [blocks, *content],
            "first_expert": first_expert,
            "experts": used,
        }

    recipes = {
        "fc1_weights": recipe("bytes", 2, [2 * padded_inner, padded_hidden // 2], [inner, hidden // 2]),
        "fc1_scales": recipe(
            "range", 2, [2 * padded_inner, padded_hidden // 32], [inner, hidden // 32], **_SCALES
        ),
        "fc2_weights": recipe("bytes", 1, [padded_hidden, padded_inner // 2], [hidden, inner // 2]),
        "fc2_scales": recipe(
            "range", 1, [padded_hidden, padded_inner // 32], [hidden, inner // 32], **_SCALES
        ),
    }
    if biases:
        recipes["fc1_biases"] = recipe("bf16", 2, [2 * padded_inner], [inner], low=-6)
        recipes["fc2_biases"] = recipe("bf16", 1, [padded_hidden], [hidden], low=-6)
    return recipes


def recipes_and_tensors(
    source: Source, num_experts: int, used: list[int], hidden: int, inner: int, **how: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The recipes of an expert's tensors, with their hashes, and the tensors; arguments as of `_recipes`."""
    recipes = _recipes(source, num_experts, used, hidden, inner, **how)
    tensors = {}
    for name, recipe in recipes.items():
        tensors[name], recipe["sha256"] = derive(name, recipe)
    return recipes, tensors


def _content(
    derived: tuple[dict[str, dict[str, Any]], dict[str, Tensor]],
    x: Tensor,
    routing: Routing,
    extra: dict[str, Tensor],
    *,
    ep_size: int = 1,
    ep_rank: int = 0,
    parameters: Mapping[str, Tensor],
) -> Content:
    recipes, tensors = derived
    call = MoeCall(
        x,
        routing.ids,
        routing.scales,
        Experts(**tensors, **parameters),
        ep_size=ep_size,
        ep_rank=ep_rank,
    )
    return moe_content(call, derived=recipes, extra=extra)


def _deepseek_v4(
    source: Source,
    num_tokens: int,
    hidden: int,
    inner: int,
    num_experts: int,
    *,
    same_experts: bool = False,
    expert_rank: tuple[int, int] = (0, 1),
) -> Content:
    """A layer of these sizes; `expert_rank` is (rank, ranks)."""
    ep_rank, ep_size = expert_rank
    logits = source.normal("logits", num_tokens, num_experts).to(torch.float32)
    if same_experts:  # all tokens to the same six, with their own weights
        logits = logits[:1] + source.uniform("logits.fraction", num_tokens, num_experts) * 2.0**-10
    extra = {
        "router.logits": logits,
        "router.correction_bias": 8.08 + source.uniform("bias", num_experts) * 2.0**-4,
    }
    # The factors of config.json: V4-Flash has 256 experts, V4-Pro 384.
    factor = {256: 1.5, 384: 2.5}[num_experts]
    routing = deepseek_v4(logits, extra["router.correction_bias"], routed_scaling_factor=factor)
    num_local = num_experts // ep_size
    first = ep_rank * num_local
    used = sorted({expert - first for expert in routing.ids.flatten().tolist()} & set(range(num_local)))
    derived = recipes_and_tensors(source, num_local, used, hidden, inner, first_expert=first)
    limit = torch.full((num_local,), 10.0)
    x = source.normal("input", num_tokens, hidden)
    return _content(
        derived, x, routing, extra, ep_size=ep_size, ep_rank=ep_rank, parameters={"swiglu_limit": limit}
    )


@define(unique_for="whole size, all 256 experts")
def deepseek_v4_flash(source: Source) -> Content:
    """A whole DeepSeek-V4-Flash layer: H 4096, I 2048, 256 experts, six a token by its own router, limit 10."""
    return _deepseek_v4(source, 4, 4096, 2048, 256)


@define(unique_for="whole size under expert parallelism")
def deepseek_v4_flash_expert_rank_5_of_8(source: Source) -> Content:
    """A whole DeepSeek-V4-Flash layer (H 4096, I 2048) on expert rank 5 of 8, which has 32 of the 256
    experts; six tokens, of which some have no expert there.
    """
    return _deepseek_v4(source, 6, 4096, 2048, 256, expert_rank=(5, 8))


@define(unique_for="whole size, all 384 experts")
def deepseek_v4_pro(source: Source) -> Content:
    """A whole DeepSeek-V4-Pro layer: H 7168, I 3072, 384 experts; four tokens share their six experts."""
    return _deepseek_v4(source, 4, 7168, 3072, 384, same_experts=True)


@define(unique_for="whole size, padding, biases and all parameters")
def gpt_oss_20b(source: Source) -> Content:
    """A whole gpt-oss-20b layer: H = I = 2880 padded to 2944 with zeros, each half of fc1 on its own, 32
    experts, four a token, biases, alpha 1.702, beta 1, limit 7.
    """
    logits = source.normal("logits", 4, 32)
    routing = gpt_oss(logits)
    used = sorted(set(routing.ids.flatten().tolist()))
    derived = recipes_and_tensors(source, 32, used, 2880, 2880, biases=True)
    x = torch.cat((source.normal("input", 4, 2880), torch.zeros(4, 64, dtype=torch.bfloat16)), dim=1)
    values = {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0}
    parameters = {name: torch.full((32,), value) for name, value in values.items()}
    return _content(derived, x, routing, {"router.logits": logits}, parameters=parameters)


@define(unique_for="H of 2,880 padded to 2,944 in small")
def hidden_2880_padded_to_2944(source: Source) -> Content:
    """gpt-oss's hidden size with an inner size of 128: 23 K tiles, of which the last is half padding, with zero
    weights under numbers that are not zero, and 64 columns of output that have to be zeros. Two tokens.
    """
    recipes, tensors = recipes_and_tensors(source, 2, [0, 1], 2880, 128)
    call = MoeCall(
        source.normal("input", 2, 2944),
        source.distinct("ids", 2, 2, 2),
        source.weights(2, 2),
        Experts(**tensors),
    )
    return moe_content(call, derived=recipes)
