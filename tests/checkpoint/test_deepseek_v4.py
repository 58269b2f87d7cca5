"""DeepSeek-V4: which tensor becomes which rows, and what can be wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfp4ref.checkpoint import read_layer
from tests.helpers.checkpoints import (
    DEEPSEEK_I,
    EXPERTS,
    TOP_K,
    Tensors,
    assert_same_experts,
    layer_tensors,
    make_checkpoint,
    same_bits,
    write_config,
)


@pytest.mark.parametrize("kind", ["deepseek_v4", "deepseek_v4_prefixed"])
def test_deepseek_rows_are_up_then_gate(tmp_path: Path, kind: str) -> None:
    stored = make_checkpoint(tmp_path, kind)
    layer = read_layer(tmp_path, 1)
    p = f"{'model.' if kind.endswith('prefixed') else ''}layers.1.ffn."
    assert (layer.format, layer.prefix) == ("deepseek_v4", p)
    for e in range(EXPERTS):
        for rows, part in ((slice(0, DEEPSEEK_I), "w3"), (slice(DEEPSEEK_I, None), "w1")):
            weight, scale = (stored[f"{p}experts.{e}.{part}.{kind}"] for kind in ("weight", "scale"))
            assert same_bits(layer.experts.fc1_weights[e, rows], weight.view(torch.uint8))
            assert same_bits(layer.experts.fc1_scales[e, rows], scale.view(torch.uint8))
        assert same_bits(layer.experts.fc2_weights[e], stored[f"{p}experts.{e}.w2.weight"].view(torch.uint8))
        assert same_bits(layer.experts.fc2_scales[e], stored[f"{p}experts.{e}.w2.scale"].view(torch.uint8))
    assert same_bits(layer.router_weight, stored[f"{p}gate.weight"])
    assert same_bits(layer.router_bias, stored[f"{p}gate.bias"])
    assert layer.tid2eid is None
    assert sorted(layer.shared_experts) == [f"w{n}.{kind}" for n in (1, 2, 3) for kind in ("scale", "weight")]
    assert layer.experts.swiglu_limit.tolist() == [10.0] * EXPERTS
    assert layer.experts.swiglu_alpha is layer.experts.swiglu_beta is None
    assert (layer.top_k, layer.routed_scaling_factor) == (TOP_K, 1.5)


def test_deepseek_hash_layers_have_a_table(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    layer = read_layer(tmp_path, 0)
    assert layer.router_bias is None
    assert torch.equal(layer.tid2eid, layer_tensors("deepseek_v4", 0)["layers.0.ffn.gate.tid2eid"])


def test_deepseek_limit_of_zero_is_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    write_config(tmp_path, "deepseek_v4", swiglu_limit=0.0)
    assert read_layer(tmp_path, 1).experts.swiglu_limit is None


def test_lossless_scales_of_other_dtypes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a", "deepseek_v4")
    expected = read_layer(tmp_path / "a", 1).experts

    def rewrite(to: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            for name in [n for n in tensors if re.search(r"experts\.[0-9]\.w[123]\.scale", n)]:
                tensors[name] = to(tensors[name])

        return change

    for folder, to in (("b", lambda t: t.to(torch.float32)), ("c", lambda t: t.view(torch.uint8).clone())):
        make_checkpoint(tmp_path / folder, "deepseek_v4", rewrite(to))
        assert_same_experts(read_layer(tmp_path / folder, 1).experts, expected)
