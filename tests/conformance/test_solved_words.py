"""Wrong routers, quantisers, dequantisers and layouts of families with random numbers, solved from their outputs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref import dequantize, quantize
from mxfp4ref.conformance.diagnosis import diagnose
from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.conformance.routers.routing_words import routing_finding
from mxfp4ref.conformance.values.format_words import format_finding
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, pack_codes, unpack_codes
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from mxfp4ref.routing.models import PRESETS
from tests.helpers import usual
from tests.helpers.torch_routers import router

GOLDENS = open_goldens()
DRAW = random.Random(31)


def quantised(values: Tensor, packed_of: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Codes of values at given scales: those of a group are the same for every scale rule of a shifted group."""
    groups = packed_of.reshape(-1, GROUP_SIZE).double() * torch.exp2(127 - scales.flatten().double())[:, None]
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    up = torch.tensor([False, True] * 3 + [False])
    size = groups.abs()[..., None]
    code = ((size > middle) | ((size == middle) & up)).sum(-1) + 8 * groups.signbit()
    code = code.view(*values.shape).to(torch.uint8)
    return {"packed": code[..., ::2] | code[..., 1::2] << 4, "scales": scales}


def found(outputs: dict[str, Tensor], values: Tensor, rule: str = "floor") -> Finding:
    right = dict(zip(("packed", "scales"), quantize(values, rule=rule), strict=True))  # type: ignore[arg-type]
    return format_finding("quantize", {"values": values, "rule": rule}, outputs, right)


def some_values(seed: int) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    spread = torch.randint(-30, 30, (32, 4, 1), generator=drawn).float().exp2()
    return (torch.randn(32, 4, GROUP_SIZE, generator=drawn) * spread).flatten(1)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
def test_a_least_scale(rule: str) -> None:
    values = some_values(1)
    least = DRAW.randrange(110, 125)
    scales = quantize(values, rule=rule)[1].clamp_min(least)  # type: ignore[arg-type]
    finding = found(quantised(values, values, scales), values, rule)
    assert finding.exact
    assert f"byte {least} (2^{least - 127})" in finding.sentence


@pytest.mark.parametrize("factor", usual.first(2, [0.55, 0.8, 0.9, 1.1, 1.3]))
def test_a_scaled_largest_magnitude(factor: float) -> None:
    values = some_values(2)
    scales = quantize(values.view(-1, GROUP_SIZE) * factor)[1].view(32, 4)
    finding = found(quantised(values, values, scales), values)
    assert finding.exact
    point = 2 / factor if factor > 1 else 1 / factor
    low, high = (float(word) for word in finding.sentence.split("between ")[1].split(" on;")[0].split()[:3:2])
    assert low <= point <= high


@pytest.mark.parametrize(
    ("words", "statistic"),
    [
        ("elements 8 to 15 of 32", lambda x: x.abs()[:, 8:16]),
        ("every 4th element, from 3 on", lambda x: x.abs()[:, 3::4]),
        ("the second largest magnitude", lambda x: x.abs().topk(2).values[:, 1:]),
        ("without taking magnitudes", lambda x: x.clamp_min(0)),
    ],
)
def test_scales_of_another_statistic(words: str, statistic: Any) -> None:
    values = some_values(3)
    largest = torch.zeros(128, GROUP_SIZE)
    largest[:, 0] = statistic(values.view(-1, GROUP_SIZE)).amax(1)
    scales = quantize(largest)[1].view(32, 4)
    finding = found(quantised(values, values, scales), values)
    assert finding.exact
    assert words in finding.sentence


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_values_rounded_twice(name: str) -> None:
    values = some_values(4).clamp(-60000, 60000)
    rounded = values.to({"bf16": torch.bfloat16, "fp16": torch.float16}[name]).float()
    outputs = dict(zip(("packed", "scales"), quantize(rounded), strict=True))
    finding = found(outputs, values)
    assert finding.exact
    assert f"rounded to {name} before they are quantised" in finding.sentence


def test_codes_that_give_way_elsewhere() -> None:
    values = torch.linspace(-6, 6, 32 * 128).view(32, 128)
    scales = torch.full((32, 4), 127, dtype=torch.uint8)
    right = dict(zip(("packed", "scales"), quantize(values), strict=True))
    moved = quantised(values, torch.where(values.abs() > 4.25, values.sign() * 6, values), scales)
    outputs = {"packed": moved["packed"], "scales": scales}
    assert outputs["packed"].shape == right["packed"].shape
    finding = format_finding(
        "quantize", {"values": values, "rule": "floor"}, outputs, {**right, "scales": scales}
    )
    assert "4 gives way to 6 at" in finding.sentence
    assert not finding.exact


def routed(name: str, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    (one,) = runs(GOLDENS.load(f"routing/{name}"))
    return one, router(**{**one.inputs, **changes}, stable=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", usual.first(1, ["deepseek_v3_groups", "deepseek_v4_flash", "mixtral"]))
def test_a_constant_in_the_sum(name: str) -> None:
    one, right = routed(name)
    constant = DRAW.choice((0.003, 0.02, 0.5))
    logits, preset = one.inputs["logits"].double(), PRESETS[one.inputs["preset"]]
    scores = {
        "deepseek_v3": logits.sigmoid(),
        "deepseek_v4": torch.nn.functional.softplus(logits).sqrt(),
        "mixtral": logits.softmax(1),
    }[preset.name].gather(1, right["ids"].long())
    total = scores.sum(1, keepdim=True)
    scales = (right["scales"].double() * total / (total + constant)).float()
    sentence = routing_finding(one.inputs, {**right, "scales": scales}, one.expected).sentence
    assert sentence.endswith(f"before dividing by it: {constant}")


@pytest.mark.slow
@pytest.mark.parametrize("name", usual.first(1, ["deepseek_v4_flash", "gpt_oss_bf16_ties"]))
def test_multiplied_logits(name: str) -> None:
    (one,) = runs(GOLDENS.load(f"routing/{name}"))
    factor = DRAW.choice((0.5, 0.8, 1.6))
    _, outputs = routed(name, logits=one.inputs["logits"].float() * factor)
    sentence = routing_finding(one.inputs, outputs, one.expected).sentence
    assert sentence == f"logits are multiplied by a number: {factor}, which explains ids and weights"


@pytest.mark.parametrize("name", ["deepseek_v4_flash", "deepseek_v3_groups"])
def test_a_shared_expert_in_the_last_slot(name: str) -> None:
    (one,) = runs(GOLDENS.load(f"routing/{name}"))
    top_k = one.inputs["top_k"] - 1
    _, fewer = routed(name, top_k=top_k)
    shared = DRAW.randrange(256, 300)
    tokens = len(fewer["ids"])
    outputs = {
        "ids": torch.cat([fewer["ids"], torch.full((tokens, 1), shared, dtype=torch.int32)], 1),
        "scales": torch.cat([fewer["scales"], torch.full((tokens, 1), 0.5)], 1),
    }
    sentence = routing_finding(one.inputs, outputs, one.expected).sentence
    assert f"slot {top_k} of {top_k + 1} is id {shared}, which is none of the 256 experts" in sentence
    assert sentence.endswith(f"the others are those of a router of fewer experts: top-{top_k}")


@pytest.mark.slow
@pytest.mark.parametrize("name", usual.first(1, ["deepseek_v4_flash", "deepseek_v4_pro"]))
def test_a_multiple_of_the_bias(name: str) -> None:
    (one,) = runs(GOLDENS.load(f"routing/{name}"))
    factor = DRAW.choice((0.3, 0.6, 3.0))
    _, changed = routed(name, correction_bias=one.inputs["correction_bias"] * factor)
    sentence = routing_finding(one.inputs, changed, one.expected).sentence
    low, high = (float(part.split()[0]) for part in sentence.split("all from ")[1].split(" to "))
    assert low <= factor <= high
    assert sentence.startswith("the correction bias is multiplied by a number in the selection: ")


@pytest.mark.slow
def test_weights_of_other_tokens() -> None:
    one, right = routed("deepseek_v4_flash")
    outputs = {**right, "scales": right["scales"].roll(1, 0)}
    sentence = routing_finding(one.inputs, outputs, one.expected).sentence
    assert sentence == "ids are right; weights are those of other tokens, 1 before them"


def test_a_ranks_ids() -> None:
    one, right = routed("deepseek_v4_flash")
    first = DRAW.randrange(40, 100)
    here = (right["ids"] >= first) & (right["ids"] < first + 64)
    outputs = {"ids": torch.where(here, right["ids"] - first, -1), "scales": right["scales"]}
    sentence = routing_finding(one.inputs, outputs, one.expected).sentence
    assert f"less {first}, of the others -1, and the weights stay" in sentence


@pytest.mark.slow
def test_rows_beyond_a_capacity() -> None:
    one, right = routed("gpt_oss_bf16_ties")
    flat = right["ids"].flatten()
    earlier = torch.tril(flat[:, None] == flat[None], -1).sum(1).view_as(right["ids"])
    outputs = {**right, "scales": right["scales"].masked_fill(earlier >= 7, 0.0)}
    sentence = routing_finding(one.inputs, outputs, one.expected).sentence
    assert "some weights are 0: " in sentence
    assert "as under a capacity, number at least 7" in sentence


@pytest.mark.parametrize("low", usual.first(1, [50, 90, 120]))
def test_clamped_scale_bytes(low: int) -> None:
    (one,) = runs(GOLDENS.load("formats/every_code_every_scale_ocp_float32"))
    scales = one.inputs["scales"]
    clamped = torch.where(scales == 255, scales, scales.clamp(low, 254))
    values = dequantize(one.inputs["packed"], clamped, convention="ocp", dtype=torch.float32)
    finding = format_finding("dequantize", one.inputs, {"values": values}, one.expected)
    assert finding.sentence == f"scale bytes are clamped: 0 to {low - 1} are taken as {low}"
    assert finding.exact


def test_rows_that_are_not_written() -> None:
    (one,) = runs(GOLDENS.load("formats/every_code_every_scale_sm90_bfloat16"))
    first = DRAW.randrange(20, 250)
    values = one.expected["values"].clone()
    values[first:] = 3
    finding = format_finding("dequantize", one.inputs, {"values": values}, one.expected)
    assert finding.sentence == f"some places hold 3 alone: rows {first} to 255 of 256"


def test_a_layout_of_one_expert_only() -> None:
    (one,) = runs(GOLDENS.load("layout/swap_halves"))
    after = one.expected["after"].clone()
    after[1] = one.inputs["before"][1]
    finding = format_finding("layout", one.inputs, {"after": after}, one.expected)
    assert finding.sentence == "swap_gate_up is left out in some places: in expert 1 of 2 only"


@pytest.mark.parametrize("seed", usual.first(1, [0, 1, 2]))
def test_scattered_codes_and_ids_are_not_explained(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    values = some_values(5)
    packed, scales = quantize(values)
    hit = torch.rand(packed.shape, generator=drawn) < 0.02
    assert found({"packed": torch.where(hit, packed ^ 1, packed), "scales": scales}, values).sentence == ""
    one, right = routed("mixtral_ties")
    other = torch.randint(0, 8, right["ids"].shape, generator=drawn).int()
    ids = torch.where(torch.rand(other.shape, generator=drawn) < 0.2, other, right["ids"])
    assert "logits" not in routing_finding(one.inputs, {**right, "ids": ids}, one.expected).sentence


def test_what_is_wrong_with_groups_of_nan_hides_nothing_else() -> None:
    """Scale bytes as of finite numbers, and codes of their own; besides, nothing, or codes that saturate to 4."""
    values = some_values(7)
    values[::5, 40] = torch.nan
    packed, scales = quantize(values)
    scales[::5, 1] = torch.arange(100, 107, dtype=torch.uint8)
    of_nan = "groups with NaN or Inf get several scale bytes, 100 to 106, instead of 255"
    alone = found({"packed": packed, "scales": scales}, values)
    assert (alone.sentence, alone.exact) == (of_nan, False)
    codes = unpack_codes(packed)
    saturated = pack_codes(torch.where(codes & 7 == 7, codes - 1, codes))
    both = found({"packed": saturated, "scales": scales}, values)
    assert both.sentence == f"{of_nan}; everything saturates to 4"


def test_a_lost_sign_of_zero_is_no_other_rounding() -> None:
    values = some_values(8)
    values[:, ::7] = -0.0
    packed, scales = quantize(values)
    codes = unpack_codes(packed)
    finding = found({"packed": pack_codes(torch.where(values == 0, 0, codes)), "scales": scales}, values)
    assert (finding.sentence, finding.exact) == ("values of -0 lose their sign", True)


def test_the_values_of_the_first_code_or_scale_that_differs_are_shown() -> None:
    values = some_values(9)
    packed, scales = quantize(values)
    right = {"packed": packed, "scales": scales}
    inputs = {"values": values, "rule": "floor"}
    for name, column in (("packed", 35), ("scales", 2)):
        other = right[name].clone()
        other[3, column] ^= 1
        found = diagnose("quantize", inputs, {**right, name: other}, right, diagnosis="quick")
        first = 70 if name == "packed" else 64
        assert found.feeds[0].startswith(f"values from {first} on: [{float(values[3, first]):.6g}, ")
        largest = float(values[3, 64:96].abs().max())
        assert found.feeds[1] == f"group 2 of the row, values [64, 95]: largest magnitude {largest:.9g}"
