"""The records of the presets: their functions do what they say, by default and in each part."""

from __future__ import annotations

from inspect import signature

import pytest
import torch

from mxfp4ref.routing import scoring
from mxfp4ref.routing.models import PRESETS
from mxfp4ref.routing.presets import ROUTERS, routing_weights
from mxfp4ref.routing.selection import select_experts


def test_each_record_has_a_function() -> None:
    assert set(ROUTERS) == set(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.name == name == ROUTERS[name].__name__


def test_published_numbers() -> None:
    """docs/arithmetic.md, section 7."""
    columns = ("score", "normalize", "epsilon", "top_k", "n_group", "topk_group", "factor", "temperature")
    assert {name: tuple(getattr(p, c) for c in columns) for name, p in PRESETS.items()} == {
        "deepseek_v3": (scoring.sigmoid, "sum", 1e-20, 8, 8, 4, 2.5, 1.0),
        "deepseek_v4": (scoring.sqrt_softplus, "sum", 0.0, 6, 1, 1, None, 1.0),
        "gpt_oss": (scoring.raw_logits, "softmax", 0.0, 4, 1, 1, 1.0, 1.0),
        "mixtral": (scoring.softmax, "sum", 0.0, 2, 1, 1, 1.0, 1.0),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_function_does_what_the_record_says(name: str) -> None:
    preset, generator = PRESETS[name], torch.Generator().manual_seed(1)
    logits = torch.randn(16, 256, generator=generator)
    bias = None
    if "correction_bias" in signature(ROUTERS[name]).parameters:
        bias = torch.randn(256, generator=generator) / 8
    arguments = {} if bias is None else {"correction_bias": bias}
    if preset.factor is None:  # the models of the family differ, and E does not tell which it is
        with pytest.raises(TypeError, match="routed_scaling_factor"):
            ROUTERS[name](logits, **arguments)
        arguments["routed_scaling_factor"] = 1.5
    routing = ROUTERS[name](logits, **arguments)
    scores = preset.score(logits)
    ids = select_experts(
        scores,
        preset.top_k,
        correction_bias=bias,
        n_group=preset.n_group,
        topk_group=preset.topk_group,
    ).ids
    factor = arguments.get("routed_scaling_factor", preset.factor)
    scales = routing_weights(scores, ids, normalize=preset.normalize, epsilon=preset.epsilon, factor=factor)
    assert routing.ids.tolist() == ids.tolist()
    assert routing.scales.view(torch.int32).tolist() == scales.view(torch.int32).tolist()
    assert routing.routed_scaling_factor == factor
