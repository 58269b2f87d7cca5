"""gpt-oss, as Hugging Face and as OpenAI publish it: which rows become which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxfp4ref.checkpoint import read_layer
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, dequantize
from tests.helpers.checkpoints import (
    EXPERTS,
    GPT_OSS_H,
    GPT_OSS_I,
    make_checkpoint,
    same_bits,
)


@pytest.mark.parametrize("kind", ["gpt_oss", "gpt_oss_original"])
def test_gpt_oss_rows_are_parted_and_each_half_is_padded(tmp_path: Path, kind: str) -> None:
    stored = list(make_checkpoint(tmp_path, kind).values())
    layer = read_layer(tmp_path, 1)
    blocks, scales, bias = (stored[n].reshape(EXPERTS, 2 * GPT_OSS_I, -1) for n in range(3))
    for name, rows in (("weights", blocks), ("scales", scales), ("biases", bias)):
        value = getattr(layer.experts, f"fc1_{name}").reshape(EXPERTS, 2, 256, -1)
        assert same_bits(value[:, 0, :GPT_OSS_I, : rows.shape[2]].contiguous(), rows[:, 1::2].contiguous())
        assert same_bits(value[:, 1, :GPT_OSS_I, : rows.shape[2]].contiguous(), rows[:, 0::2].contiguous())
        assert not value[:, :, GPT_OSS_I:].any()
        assert not value[..., rows.shape[2] :].any()
    assert (layer.experts.hidden_size, layer.experts.intermediate_size) == (128, 256)
    assert (layer.hidden_size, layer.intermediate_size) == (GPT_OSS_H, GPT_OSS_I)
    assert same_bits(
        layer.experts.fc2_weights[:, :GPT_OSS_H, : GPT_OSS_I // 2].contiguous(), stored[3].flatten(2)
    )
    assert same_bits(layer.experts.fc2_scales[:, :GPT_OSS_H, : GPT_OSS_I // 32].contiguous(), stored[4])
    assert same_bits(layer.experts.fc2_biases[:, :GPT_OSS_H].contiguous(), stored[5])
    assert layer.experts.swiglu_alpha.tolist() == [torch.tensor(1.702).item()] * EXPERTS
    assert layer.experts.swiglu_beta.tolist() == [1.0] * EXPERTS
    assert layer.experts.swiglu_limit.tolist() == [7.0] * EXPERTS


def test_low_nibble_is_the_even_index(tmp_path: Path) -> None:
    """Decoded by hand, from the bytes as stored: gate row 5, the third of expert 2's pairs."""
    stored = make_checkpoint(tmp_path, "gpt_oss")
    row = stored["model.layers.1.mlp.experts.gate_up_proj_blocks"][2, 10, 1].tolist()
    scale = 2.0 ** (int(stored["model.layers.1.mlp.experts.gate_up_proj_scales"][2, 10, 1]) - 127)
    values = [E2M1_VALUES[code] * scale for byte in row for code in (byte & 15, byte >> 4)]
    experts = read_layer(tmp_path, 1, multiple=32).experts
    weights = dequantize(experts.fc1_weights[2], experts.fc1_scales[2], dtype=torch.float64)
    assert weights[GPT_OSS_I + 5, 32:64].tolist() == values
