"""Checkpoints: small ones with the published names, dtypes and shapes, and everything that can be wrong with them."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import resource
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp4ref.checkpoint import CheckpointError, read_layer, router_logits, run_layer, shards, write_layer
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import GENERATIONS, NEWEST, Generation
from mxfp4ref.formats.layout import pad_halves
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, dequantize
from mxfp4ref.formats.resize import resize_experts, to_logical, to_sm90
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.routing.presets import deepseek_v4, gpt_oss, mixtral

INDEX = "model.safetensors.index.json"
EXPERTS, TOP_K, VOCABULARY = 4, 2, 16
# DeepSeek-V4's sizes are multiples of 128; gpt-oss's are not (2880), so that they are padded.
DEEPSEEK_H, DEEPSEEK_I = 256, 128
GPT_OSS_H, GPT_OSS_I = 96, 160
FORMATS = ("deepseek_v4", "deepseek_v4_prefixed", "gpt_oss", "gpt_oss_original")
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


CONFIGS = {
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
    if kind.startswith("deepseek"):
        return deepseek_layer(layer, "model." if kind.endswith("prefixed") else "")
    return gpt_oss_layer(layer, original=kind.endswith("original"))


def write_config(folder: Path, kind: str, **changes: object) -> None:
    config = CONFIGS[kind.removesuffix("_prefixed")] | changes
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


# --- reading ---


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


def test_arguments_go_before_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    experts = read_layer(tmp_path, 1, alpha=1.5, beta=0.0, limit=math.inf).experts
    assert experts.swiglu_alpha.tolist() == [1.5] * EXPERTS
    assert experts.swiglu_beta.tolist() == [0.0] * EXPERTS
    assert experts.swiglu_limit is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": 0.0}, ValueError, "limit: expected a positive float32 number, got 0"),
        ({"limit": math.nan}, ValueError, "limit: expected a finite float32 number"),
        ({"alpha": 1e39}, ValueError, "alpha: expected a finite float32 number"),
        ({"beta": "1"}, TypeError, "beta: expected a float, got str"),
        ({"multiple": 0}, ValueError, "multiple: expected an int at least 1"),
        ({"multiple": 100}, ValueError, "hidden_size: expected a multiple of 32, got 100"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, arguments: dict[str, float], error: type[Exception], message: str
) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    with pytest.raises(error, match=message):
        read_layer(tmp_path, 1, **arguments)


def test_deepseek_limit_of_zero_is_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    write_config(tmp_path, "deepseek_v4", swiglu_limit=0.0)
    assert read_layer(tmp_path, 1).experts.swiglu_limit is None


def test_without_index_or_config(tmp_path: Path) -> None:
    """One file by its path, and a folder of files that nothing lists, as OpenAI's original format is."""
    save_file(layer_tensors("gpt_oss", 0), tmp_path / "any.safetensors")
    alone = read_layer(tmp_path / "any.safetensors", 0, limit=7.0)
    save_file(layer_tensors("gpt_oss", 2), tmp_path / "model--00007-of-00007.safetensors")
    assert_same_experts(read_layer(tmp_path, 0, limit=7.0).experts, alone.experts)
    assert read_layer(tmp_path, 2, limit=7.0).prefix == "model.layers.2.mlp."
    with pytest.raises(CheckpointError, match=r"config\.json.*expected swiglu_limit, or an argument limit"):
        read_layer(tmp_path, 0)
    save_file(layer_tensors("gpt_oss", 2), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"expected in one file, is in .*00007.* and .*other"):
        read_layer(tmp_path, 0, limit=7.0)


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


# --- writing back ---


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("number", [0, 1])
def test_round_trip_is_bit_identical(tmp_path: Path, kind: str, number: int) -> None:
    make_checkpoint(tmp_path, kind)
    write_layer(tmp_path / "back.safetensors", read_layer(tmp_path, number))
    stored, back = layer_tensors(kind, number), load_file(tmp_path / "back.safetensors")
    assert sorted(back) == sorted(stored)
    assert all(same_bits(back[name], tensor) for name, tensor in stored.items())


def test_writing_over_the_file_that_is_mapped(tmp_path: Path) -> None:
    """The tensors of a layer may be views of the very file, which must not change under them."""
    file = tmp_path / "model.safetensors"
    stored = layer_tensors("gpt_oss", 0)
    save_file(stored, file)
    layer = read_layer(file, 0, limit=7.0, multiple=32)
    write_layer(file, replace(layer, format="gpt_oss_original", prefix="block.0.mlp."))
    assert same_bits(layer.router_weight, stored["model.layers.0.mlp.router.weight"])
    assert_same_experts(read_layer(file, 0, limit=7.0, multiple=32).experts, layer.experts)
    assert list(tmp_path.iterdir()) == [file]


def test_writing_refuses_what_would_be_lost(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    layer = read_layer(tmp_path, 1)
    weights = layer.experts.fc1_weights.clone()
    weights[3, GPT_OSS_I] = 1  # in the padding of the up half
    touched = replace(layer, experts=replace(layer.experts, fc1_weights=weights))
    with pytest.raises(ValueError, match=r"fc1_weights: expected zeros beyond H=96, I=160"):
        write_layer(tmp_path / "x.safetensors", touched)
    bare = replace(layer, experts=replace(layer.experts, fc1_biases=None))
    with pytest.raises(ValueError, match="got None for fc1_biases"):
        write_layer(tmp_path / "x.safetensors", bare)
    deepseek = replace(layer, format="deepseek_v4")
    with pytest.raises(ValueError, match=r"layer\.experts: expected no biases in deepseek_v4"):
        write_layer(tmp_path / "x.safetensors", deepseek)
    bare = replace(layer.experts, fc1_biases=None, fc2_biases=None)
    with pytest.raises(ValueError, match="expected exactly one of router_bias and tid2eid"):
        write_layer(tmp_path / "x.safetensors", replace(deepseek, experts=bare, router_bias=None))
    with pytest.raises(ValueError, match="expected neither tid2eid nor shared_experts in gpt_oss"):
        write_layer(tmp_path / "x.safetensors", replace(layer, shared_experts={"w1.weight": weights}))
    dense = Experts(torch.zeros(1, 64, 32).bfloat16(), None, torch.zeros(1, 32, 32).bfloat16(), None)
    with pytest.raises(ValueError, match="expected MXFP4 weights, got bfloat16"):
        write_layer(tmp_path / "x.safetensors", replace(layer, experts=dense))
    with pytest.raises(ValueError, match="expected MXFP4 weights, got bfloat16"):
        to_sm90(dense)
    with pytest.raises(ValueError, match=r"layer\.format: expected one of"):
        write_layer(tmp_path / "x.safetensors", replace(layer, format="gguf"))
    with pytest.raises(CheckpointError, match="expected a file that can be written"):
        write_layer(tmp_path / "absent" / "x.safetensors", layer)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", ["deepseek_v4", "gpt_oss"])
def test_kernel_layouts_and_back(tmp_path: Path, kind: str, generation: Generation) -> None:
    make_checkpoint(tmp_path, kind)
    experts = read_layer(tmp_path, 1).experts
    kernel = to_sm90(experts, generation)
    assert kernel.fc1_scales.dtype == torch.int32
    assert kernel.fc1_scales.dim() == (5 if generation is NEWEST else 3)
    assert not same_bits(kernel.fc1_weights, experts.fc1_weights)
    assert_same_experts(to_logical(kernel), experts)
    hidden = torch.randn(2, experts.hidden_size).to(torch.bfloat16)
    ids, scales = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32), torch.rand(2, 2)
    assert same_bits(
        forward(MoeCall(hidden, ids, scales, kernel)), forward(MoeCall(hidden, ids, scales, experts))
    )


def test_kernel_layouts_refuse_other_experts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    with pytest.raises(ValueError, match=r"K % 64 == 0, got \[4, 320, 48\]"):
        to_sm90(read_layer(tmp_path, 1, multiple=32).experts)


def test_padding_each_half_is_what_layout_does(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    bare = read_layer(tmp_path, 1, multiple=32).experts
    assert (bare.hidden_size, bare.intermediate_size) == (GPT_OSS_H, GPT_OSS_I)
    padded = resize_experts(bare, GPT_OSS_H, 256)
    for name in ("fc1_weights", "fc1_scales", "fc1_biases"):
        assert same_bits(getattr(padded, name), pad_halves(getattr(bare, name), 128))
    assert_same_experts(resize_experts(padded, GPT_OSS_H, GPT_OSS_I), bare)
    # Bigger along one, smaller along the other.
    assert_same_experts(resize_experts(resize_experts(bare, 128, 160), 96, 256), padded)
    for sizes in ((100, 256), (96, 0)):
        with pytest.raises(ValueError, match=r"(hidden|intermediate)_size: expected"):
            resize_experts(bare, *sizes)


# --- what can be wrong ---


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
        r"experts\.3\.w1\.weight \(model-0000.-of-00002\.safetensors\): expected a int8 tensor",
    ),
    (
        "deepseek_v4",
        put(D + "experts.3.w1.weight", lambda t: torch.zeros(DEEPSEEK_I, DEEPSEEK_H).to(torch.bfloat16)),
        r"experts\.3\.w1\.weight .*expected a int8 tensor.*got bfloat16",
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
    ("deepseek_v4", put(D + "gate.weight", lambda t: t.float()), r"gate\.weight .*expected a bfloat16"),
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
        r"\.00\.w1\.weight .*no such tensor",
    ),
    (
        "deepseek_v4",
        lambda t: t.update({D + "experts.1.w1.bias": torch.zeros(DEEPSEEK_I)}),
        r"layers\.1\.ffn\.experts\.1\.w1\.bias \(model.*expected no such tensor in this format, 1 unknown",
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
        r"gate_up_proj_blocks .*\[4, 2I, H/32, 16\], got uint8 \[3,",
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 8}, "expected experts 0 to 7"),
        ({"hidden_size": 4096}, r"layers\.1\.ffn\.\*: expected hidden_size=4096 of config\.json, got 256"),
        ({"moe_intermediate_size": 2048}, "expected moe_intermediate_size=2048"),
        ({"swiglu_limit": None}, "expected swiglu_limit, or an argument limit"),
        ({"swiglu_limit": 10**400}, r"config\.json: swiglu_limit: expected float, got 1000"),
        ({"swiglu_limit": "10"}, r"config\.json: swiglu_limit: expected float, got '10'"),
        ({"n_routed_experts": True}, r"config\.json: n_routed_experts: expected int, got True"),
    ],
)
def test_config_must_agree(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    write_config(tmp_path, "deepseek_v4", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_layer(tmp_path, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON file, got JSONDecodeError"),
        ("\x00\xff", "expected a JSON file"),
        ("[" * 100_000, "expected a JSON file, got RecursionError"),
        ("[]", "expected a JSON object, got list"),
        ("{}", 'expected an object "weight_map"'),
        ('{"weight_map": []}', 'expected an object "weight_map"'),
        ('{"weight_map": {"a": 3}}', "a: expected the name of a .safetensors file beside it, got 3"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "got 'pytorch_model.bin'"),
        ('{"weight_map": {"a": "x.safetensors"}}', "expected experts in the naming of deepseek_v4, gpt_oss"),
        ('{"version": 1, "cells": []}', 'expected an object "weight_map"'),
    ],
)
def test_foreign_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        read_layer(tmp_path, 0)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
    ],
)
def test_index_cannot_leave_its_folder(tmp_path: Path, path: str) -> None:
    save_file(layer_tensors("gpt_oss", 0), tmp_path / "secret.safetensors")
    folder = tmp_path / "checkpoint"
    make_checkpoint(folder, "gpt_oss")
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.0.mlp.router.bias"
    index["weight_map"][name] = path
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=f"{re.escape(name)}: expected the name .* got {re.escape(repr(path))}"
    ):
        read_layer(folder, 0)


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    """Download caches keep the shards elsewhere under their hashes."""
    make_checkpoint(tmp_path / "a", "gpt_oss")
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "b" / file.name).symlink_to(f"../a/{file.name}")
    assert_same_experts(read_layer(tmp_path / "b", 1).experts, read_layer(tmp_path / "a", 1).experts)


def test_missing_truncated_and_swapped_shards(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    for damaged in (b"", whole[:5], whole[:1000], whole[:-1], b"\xff" * 64, whole + b"\0"):
        second.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"layers\.1\..*00002-of-00002.*cannot be read"):
            read_layer(tmp_path, 1)
    second.unlink()
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.ffn\..*expected in .*model-00002-of-00002.*No such file"
    ):
        read_layer(tmp_path, 1)
    read_layer(tmp_path, 0)  # in the other shard
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.2\..*where the index puts it, not there"):
        read_layer(tmp_path, 2)


def test_layer_out_of_range(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    with pytest.raises(ValueError, match=r"layer: expected one of 0 to 2 in .*, got 3"):
        read_layer(tmp_path, 3)
    with pytest.raises(ValueError, match=r"layer: expected an int at least 0"):
        read_layer(tmp_path, -1)
    with pytest.raises(TypeError, match=r"layer: expected an int"):
        read_layer(tmp_path, "1")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"expected .*index\.json or a .*safetensors file"):
        read_layer(tmp_path / "absent", 0)


def test_two_sets_of_experts_in_a_layer(tmp_path: Path) -> None:
    save_file(layer_tensors("gpt_oss", 0), tmp_path / "a.safetensors")
    save_file(layer_tensors("deepseek_v4", 0), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"expected one set of experts, .* are there too"):
        read_layer(tmp_path, 0, limit=7.0)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    payload = pickle.dumps(Payload())
    assert pickle.loads(payload) is None
    assert marker.exists()  # it would work
    marker.unlink()
    (tmp_path / "model.safetensors").write_bytes(payload)
    (tmp_path / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        read_layer(tmp_path, 0)
    (tmp_path / INDEX).write_text(
        '{"weight_map": {"model.layers.0.mlp.experts.down_proj_bias": "model.safetensors"}}'
    )
    with pytest.raises(CheckpointError):
        read_layer(tmp_path, 0)
    assert not marker.exists()


def test_flipped_bytes_never_surprise(tmp_path: Path) -> None:
    """Headers, index and config with one byte changed: the layer, or a CheckpointError; nothing else."""
    folder = tmp_path / "c"
    make_checkpoint(folder, "gpt_oss")
    generator = random.Random(7)
    outcomes = {"read": 0, "refused": 0}
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        header = 8 + struct.unpack("<Q", whole[:8])[0] if file.suffix == ".safetensors" else len(whole)
        for _ in range(60):
            changed = bytearray(whole)
            changed[generator.randrange(header)] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            try:
                read_layer(folder, 1)
                outcomes["read"] += 1
            except CheckpointError:
                outcomes["refused"] += 1
        file.write_bytes(whole)
    assert outcomes["read"] + outcomes["refused"] == 240
    assert outcomes["refused"] > 60


# --- only one layer is read ---


def test_only_the_layer_and_its_shards_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    opened, read = [], []

    class Counting:
        def __init__(self, file: Path, framework: str) -> None:
            opened.append(file.name)
            self.reader = safetensors.safe_open(file, framework=framework)

        def __enter__(self) -> Counting:
            self.reader.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.reader.__exit__(*error)

        def keys(self) -> list[str]:
            return self.reader.keys()

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.reader.get_tensor(name)

    monkeypatch.setattr(shards, "safe_open", Counting)
    read_layer(tmp_path, 2)
    assert set(opened) == {"model-00002-of-00002.safetensors"}
    assert sorted(read) == sorted(layer_tensors("deepseek_v4", 2))


def test_memory_is_that_of_the_layer(tmp_path: Path) -> None:
    """The file has a second layer of 2 GiB of zeros, sparse on disk: mapped, but never read."""
    file = tmp_path / "model.safetensors"
    save_file(layer_tensors("gpt_oss", 0), file)
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    huge = 2 << 30
    header["model.layers.1.mlp.experts.gate_up_proj_blocks"] = {
        "dtype": "U8",
        "shape": [EXPERTS, huge // EXPERTS // 16, 1, 16],
        "data_offsets": [len(data), len(data) + huge],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with file.open("r+b") as stream:
        stream.truncate(8 + len(text) + len(data) + huge)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_layer(tmp_path, 0, limit=7.0).experts.num_experts == EXPERTS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


# --- a layer from disk ---


def write_input(path: Path, hidden_size: int, **more: Tensor) -> Tensor:
    torch.manual_seed(5)
    hidden = torch.randn(5, hidden_size).to(torch.bfloat16)
    save_file({"hidden": hidden, **more}, path)
    return hidden


def test_run_deepseek_layer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    shared = torch.randn(5, DEEPSEEK_H).to(torch.bfloat16)
    padded = torch.tensor([False, False, True, False, False])
    hidden = write_input(tmp_path / "x", DEEPSEEK_H, shared_output=shared, padded=padded)
    result = run_layer(tmp_path, 1, tmp_path / "x", tmp_path / "y")
    layer = read_layer(tmp_path, 1)
    logits = router_logits(layer, hidden)
    reference = (hidden.double() @ layer.router_weight.double().T).float()
    torch.testing.assert_close(logits, reference, rtol=1e-6, atol=1e-6)
    routing = deepseek_v4(logits, layer.router_bias, top_k=TOP_K, routed_scaling_factor=1.5, padded=padded)
    routed = forward(MoeCall(hidden, routing.ids, routing.scales, layer.experts))
    assert torch.equal(result["token_selected_experts"], routing.ids)
    assert same_bits(result["token_final_scales"], routing.scales)
    assert same_bits(result["output"], (shared.float() + routed.float()).to(torch.bfloat16))
    written = load_file(tmp_path / "y")
    assert sorted(written) == sorted(result)
    assert all(same_bits(written[name], result[name]) for name in result)


def test_without_the_shared_expert_it_is_no_output(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    hidden = write_input(tmp_path / "x", DEEPSEEK_H)
    result = run_layer(tmp_path, 1, tmp_path / "x", top_k=3, routed_scaling_factor=2.5, limit=0.5)
    assert "output" not in result
    layer = read_layer(tmp_path, 1, limit=0.5)
    routing = deepseek_v4(result["logits"], layer.router_bias, top_k=3, routed_scaling_factor=2.5)
    expected = forward(MoeCall(hidden, routing.ids, routing.scales, layer.experts))
    assert same_bits(result["routed_output"], expected)


def test_run_hash_layer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    token_ids = torch.tensor([3, 0, 15, 3, 7])
    write_input(tmp_path / "x", DEEPSEEK_H, token_ids=token_ids)
    result = run_layer(tmp_path, 0, tmp_path / "x")
    table = layer_tensors("deepseek_v4", 0)["layers.0.ffn.gate.tid2eid"]
    assert torch.equal(result["token_selected_experts"].long(), table[token_ids])
    write_input(tmp_path / "x", DEEPSEEK_H)
    with pytest.raises(
        ValueError, match=r"token_ids: expected in the input file, layers\.0\.ffn\.\* is a hash"
    ):
        run_layer(tmp_path, 0, tmp_path / "x")


@pytest.mark.parametrize("kind", ["gpt_oss", "gpt_oss_original"])
def test_run_gpt_oss_layer(tmp_path: Path, kind: str) -> None:
    make_checkpoint(tmp_path, kind)
    hidden = write_input(tmp_path / "x", GPT_OSS_H)
    result = run_layer(tmp_path, 1, tmp_path / "x")
    layer = read_layer(tmp_path, 1)
    linear = hidden.double() @ layer.router_weight.double().T + layer.router_bias.double()
    assert result["logits"].dtype == torch.bfloat16
    torch.testing.assert_close(result["logits"].double(), linear, rtol=2**-8, atol=0)
    routing = gpt_oss(result["logits"], top_k=TOP_K)
    wide = torch.nn.functional.pad(hidden, (0, 128 - GPT_OSS_H))
    expected = forward(MoeCall(wide, routing.ids, routing.scales, layer.experts))
    assert not expected[:, GPT_OSS_H:].any()
    assert same_bits(result["output"], expected[:, :GPT_OSS_H].contiguous())


def test_given_logits_and_another_router(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    logits = torch.randn(5, EXPERTS)
    write_input(tmp_path / "x", GPT_OSS_H, logits=logits)
    result = run_layer(tmp_path, 1, tmp_path / "x", router="mixtral", ep_size=2)
    assert same_bits(result["logits"], logits)
    assert same_bits(result["token_final_scales"], mixtral(logits, top_k=TOP_K).scales)
    with pytest.raises(ValueError, match="router: expected one of 'deepseek_v4', 'gpt_oss', 'mixtral'"):
        run_layer(tmp_path, 1, tmp_path / "x", router="sigmoid")
    with pytest.raises(ValueError, match="router: expected a router without a correction bias"):
        run_layer(tmp_path, 1, tmp_path / "x", router="deepseek_v4")
    with pytest.raises(ValueError, match="routed_scaling_factor: expected None with the router gpt_oss"):
        run_layer(tmp_path, 1, tmp_path / "x", routed_scaling_factor=1.5)


def test_wrong_inputs(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    good = torch.zeros(2, GPT_OSS_H, dtype=torch.bfloat16)
    for tensors, message in (
        ({"x": good}, "expected the tensor hidden and optionally logits, .*got x"),
        ({"hidden": good, "tokens": good.clone()}, "expected the tensor hidden .*got hidden, tokens"),
        ({"hidden": good.float()}, "hidden: expected a bfloat16 tensor"),
        ({"hidden": good[:, 1:].contiguous()}, r"hidden: expected .*\[M, 96\], got bfloat16 \[2, 95\]"),
        ({"hidden": good, "logits": torch.zeros(3, EXPERTS)}, "logits: expected"),
        ({"hidden": good, "padded": torch.zeros(3, dtype=torch.bool)}, "padded: expected"),
        ({"hidden": good, "shared_output": good[:1].clone()}, "shared_output: expected"),
    ):
        save_file(tensors, tmp_path / "x")
        with pytest.raises((TypeError, ValueError), match=message):
            run_layer(tmp_path, 1, tmp_path / "x")
    with pytest.raises(CheckpointError):
        run_layer(tmp_path, 1, tmp_path / "absent")
    write_config(tmp_path, "gpt_oss", num_experts_per_tok=None)
    save_file({"hidden": good}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="expected num_experts_per_tok or experts_per_token"):
        run_layer(tmp_path, 1, tmp_path / "x")
