"""Tensors that are not what their format calls for: the error names each one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfp4ref.checkpoint import CheckpointError, read_layer
from tests.helpers.checkpoints import (
    DEEPSEEK_H,
    DEEPSEEK_I,
    Tensors,
    make_checkpoint,
)


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, to(tensors[name]).contiguous())


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def not_a_power(scales: Tensor) -> Tensor:
    scales = scales.to(torch.float32)
    scales[7, 1] = 0.3
    return scales


D, G = "layers.1.ffn.", "model.layers.1.mlp."
WRONG: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("deepseek_v4", drop(D + "experts.2.w3.scale"), r"layers\.1\.ffn\.experts\.2\.w3\.scale: expected in"),
    ("deepseek_v4", drop(D + "experts.1.w2.weight"), r"experts\.1\.w2\.weight: expected in"),
    ("deepseek_v4", drop(D + "gate.weight"), r"layers\.1\.ffn\.gate\.weight: expected in"),
    ("deepseek_v4", drop(D + "gate.bias"), r"layers\.1\.ffn\.gate\.\*: .*found neither"),
    ("deepseek_v4", lambda t: t.update({D + "gate.tid2eid": torch.zeros(8, 2).long()}), "found both"),
    (
        "deepseek_v4",
        put(D + "experts.3.w1.weight", lambda t: t.view(torch.uint8).clone()),
        r"experts\.3\.w1\.weight \(model-0000.-of-00002\.safetensors\): expected an int8 tensor",
    ),
    (
        "deepseek_v4",
        put(D + "experts.3.w1.weight", lambda t: torch.zeros(DEEPSEEK_I, DEEPSEEK_H).to(torch.bfloat16)),
        r"experts\.3\.w1\.weight .*expected an int8 tensor.*got bfloat16",
    ),
    (
        "deepseek_v4",
        put(D + "experts.0.w1.weight", lambda t: torch.zeros(DEEPSEEK_I, DEEPSEEK_H).to(torch.float8_e4m3fn)),
        r"experts\.0\.w1\.weight .*got float8_e4m3fn",
    ),
    (
        "deepseek_v4",
        put(D + "experts.0.w1.weight", lambda t: t[:, :100]),
        "multiples of 32, got 4 with H=200",
    ),
    (
        "deepseek_v4",
        put(D + "experts.2.w2.weight", lambda t: t[:-1]),
        r"experts\.2\.w2\.weight .*shape \[256, 64\], got int8 \[255, 64\]",
    ),
    ("deepseek_v4", put(D + "experts.2.w2.scale", lambda t: t.T), r"experts\.2\.w2\.scale .*\[256, 4\]"),
    (
        "deepseek_v4",
        put(D + "experts.1.w3.scale", lambda t: t.view(torch.uint8).clone()),
        r"experts\.1\.w3\.scale .*expected a float8_e8m0fnu tensor.*got uint8",
    ),
    (
        "deepseek_v4",
        lambda t: [put(n, lambda s: s.to(torch.float64))(t) for n in t if n.endswith("scale")],
        r"experts\.0\.w[123]\.scale .*uint8 or float8_e8m0fnu or float32.*got float64",
    ),
    (
        "deepseek_v4",
        lambda t: [
            put(n, not_a_power if n == D + "experts.2.w1.scale" else lambda s: s.to(torch.float32))(t)
            for n in t
            if re.search(r"ffn\.experts.*scale", n)
        ],
        r"layers\.1\.ffn\.experts\.2\.w1\.scale \(model.*1 of 1024 that are not: \[7, 1\] = 0\.3",
    ),
    (
        "deepseek_v4",
        put(D + "gate.weight", lambda t: t.half()),
        r"gate\.weight .*expected a bfloat16 or float32",
    ),
    ("deepseek_v4", put(D + "gate.weight", lambda t: t[:3]), r"gate\.weight .*\[4, 256\], got bfloat16 \[3"),
    ("deepseek_v4", put(D + "gate.bias", lambda t: t.half()), r"gate\.bias .*expected a float32"),
    (
        "deepseek_v4",
        lambda t: [t.pop(n) for n in list(t) if ".experts.3." in n],
        r"expected experts 0 to 3, as config\.json says, found 3, the last of them 2",
    ),
    (
        "deepseek_v4",
        rename(D + "experts.0.w1.weight", D + "experts.00.w1.weight"),
        r"experts\.0\.w1\.weight: expected in the checkpoint",
    ),
    (
        "deepseek_v4",
        lambda t: t.update({D + "experts.1.w1.bias": torch.zeros(DEEPSEEK_I)}),
        r"layers\.1\.ffn\.experts\.1\.w1\.bias \(model.*expected no such tensor in the format deepseek_v4, 1 unknown",
    ),
    (
        "gpt_oss",
        lambda t: t.update({G + "experts.down_proj": torch.zeros(2)}),
        r"experts\.down_proj \(model.*expected no such tensor",
    ),
    ("gpt_oss", drop(G + "experts.down_proj_bias"), r"experts\.down_proj_bias: expected in"),
    ("gpt_oss", drop(G + "router.bias"), r"mlp\.router\.bias: expected in"),
    (
        "gpt_oss",
        put(G + "experts.gate_up_proj_blocks", lambda t: t[:3]),
        r"mlp\.experts\.\*: expected experts 0 to 3, as config\.json says, found 3",
    ),
    (
        "gpt_oss",
        put(G + "experts.gate_up_proj_blocks", lambda t: t[:, :-1]),
        r"gate_up_proj_blocks .*expected rows in pairs, gate and up, got 319",
    ),
    (
        "gpt_oss",
        put(G + "experts.gate_up_proj_blocks", lambda t: t.flatten(2)),
        r"gate_up_proj_blocks .*got uint8 \[4, 320, 48\]",
    ),
    (
        "gpt_oss",
        put(G + "experts.gate_up_proj_blocks", lambda t: t[:, :-4]),
        r"gate_up_proj_blocks .*multiples of 32, got 4 with H=96, I=158",
    ),
    ("gpt_oss", put(G + "experts.down_proj_blocks", lambda t: t.int()), r"down_proj_blocks .*got int32"),
    (
        "gpt_oss",
        put(G + "experts.down_proj_scales", lambda t: t.view(torch.float8_e8m0fnu)),
        r"down_proj_scales .*expected a uint8 tensor.*got float8_e8m0fnu",
    ),
    (
        "gpt_oss",
        put(G + "experts.gate_up_proj_bias", lambda t: t.float()),
        r"gate_up_proj_bias .*got float32",
    ),
    ("gpt_oss", put(G + "router.weight", lambda t: t[:, 1:]), r"router\.weight .*\[4, 96\]"),
]


@pytest.mark.parametrize(("kind", "change", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_wrong_tensors_are_named(
    tmp_path: Path, kind: str, change: Callable[[Tensors], object], message: str
) -> None:
    make_checkpoint(tmp_path, kind, change)
    with pytest.raises(CheckpointError, match=message):
        read_layer(tmp_path, 1)
    read_layer(tmp_path, 2)  # the fault of one layer is no other's
