"""Every format: which stored row becomes which, what is carried along, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp4ref.checkpoint import (
    FORMATS,
    CheckpointError,
    ReadOptions,
    find_layers,
    open_layer,
    open_shards,
    read_layer,
    read_name_map,
    run_layer,
    write_layer,
)
from mxfp4ref.checkpoint.router import router_to_run
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.formats.quantize import quantize
from mxfp4ref.routing import Gate, Tokens, route, scoring
from mxfp4ref.sm90.activation import SITU
from tests.helpers import usual
from tests.helpers.checkpoints import (
    DEEPSEEK_H,
    DEEPSEEK_I,
    EXPERTS,
    GPT_OSS_H,
    GPT_OSS_I,
    LATENT,
    NAME_MAP,
    PER_EXPERT,
    TOP_K,
    Tensors,
    assert_same_experts,
    layer_tensors,
    make_checkpoint,
    mine,
    same_bits,
    with_images,
    write_config,
)


@pytest.mark.parametrize("kind", PER_EXPERT)
def test_rows_are_up_then_gate(tmp_path: Path, kind: str) -> None:
    stored = make_checkpoint(tmp_path, kind)
    layer = read_layer(tmp_path, 1)
    template, (gate, up, down), (weights, scales), bias = PER_EXPERT[kind]
    p = template.format(1)
    assert (layer.format, layer.prefix) == (kind, p)
    for e in range(EXPERTS):
        for rows, module in ((slice(0, DEEPSEEK_I), up), (slice(DEEPSEEK_I, None), gate)):
            assert same_bits(layer.experts.fc1_weights[e, rows], stored[f"{p}experts.{e}.{module}{weights}"])
            assert same_bits(layer.experts.fc1_scales[e, rows], stored[f"{p}experts.{e}.{module}{scales}"])
        assert same_bits(layer.experts.fc2_weights[e], stored[f"{p}experts.{e}.{down}{weights}"])
        assert same_bits(layer.experts.fc2_scales[e], stored[f"{p}experts.{e}.{down}{scales}"])
    assert same_bits(layer.router_weight, stored[f"{p}gate.weight"])
    assert same_bits(layer.router_bias, stored[p + bias])
    assert len(layer.shared_experts) == 3
    assert layer.top_k == TOP_K


@pytest.mark.parametrize("kind", PER_EXPERT)
def test_what_is_missing_is_named(tmp_path: Path, kind: str) -> None:
    template, names, ends, _ = PER_EXPERT[kind]
    p = template.format(1)
    for number, name in enumerate(
        (f"experts.2.{names[1]}{ends[1]}", f"experts.0.{names[0]}{ends[0]}", "gate.weight")
    ):
        folder = tmp_path / str(number)
        make_checkpoint(folder, kind, lambda tensors, name=p + name: tensors.pop(name))
        with pytest.raises(CheckpointError, match=f"{re.escape(p + name)}: expected in the checkpoint"):
            read_layer(folder, 1)


@pytest.mark.parametrize("name", ["gate.bias_v2", "gate.scale", "experts.0.w1.zero_point", "norm.weight"])
def test_no_tensor_below_the_prefix_is_dropped(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, "deepseek_v4", lambda t: t.update({f"layers.1.ffn.{name}": torch.zeros(2)}))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(name)} \(model.*: expected no such tensor in .*1 unknown"
    ):
        read_layer(tmp_path, 1)


def test_scales_of_activations_are_carried_along(tmp_path: Path) -> None:
    """ModelOpt's W4A8 and Quark's have them; the kernel's activations are bf16."""
    added = {
        f"model.layers.1.mlp.experts.{e}.{m}_proj.input_scale": torch.tensor([0.5 + e])
        for e in range(EXPERTS)
        for m in ("gate", "up", "down")
    }
    stored = make_checkpoint(tmp_path, "weight_scale", lambda tensors: tensors.update(added))
    layer = read_layer(tmp_path, 1)
    assert len(layer.others) == len(added)
    write_layer(tmp_path / "back.safetensors", layer)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == stored.keys()
    assert all(same_bits(back[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.bfloat16, "got bfloat16"),
        (torch.float8_e4m3fn, "got float8_e4m3fn"),
        (torch.int32, "got int32"),
    ],
)
def test_experts_that_are_not_mxfp4_are_refused_by_their_dtype(
    tmp_path: Path, dtype: torch.dtype, message: str
) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = torch.zeros(tensors[name].shape).to(dtype)

    make_checkpoint(tmp_path, "weight_scale", change)
    with pytest.raises(
        CheckpointError, match=rf"experts\.0\.gate_proj\.weight .*expected a uint8 or int8.*{message}"
    ):
        read_layer(tmp_path, 1)


# DeepSeek's models that see, and draft heads


def write_input(path: Path, width: int = DEEPSEEK_H, **more: Tensor) -> Path:
    torch.manual_seed(5)
    save_file({"hidden": torch.randn(5, width).to(torch.bfloat16), **more}, path / "x")
    return path / "x"


IMAGES = torch.tensor([False, True, True, False, True])


def test_image_tokens_take_their_own_bias(tmp_path: Path) -> None:
    stored = make_checkpoint(tmp_path, "deepseek_v4", with_images)
    layer = read_layer(tmp_path, 1)
    assert same_bits(layer.image_bias, stored["layers.1.ffn.gate.bias_vl"])
    result = run_layer(layer, write_input(tmp_path, image_mask=IMAGES))
    preset = router_to_run(layer, None)
    wanted = route(
        preset, result["logits"], Gate(layer.router_bias, layer.image_bias), Tokens(image_mask=IMAGES)
    )
    assert torch.equal(result["token_selected_experts"], wanted.ids)
    text = run_layer(layer, write_input(tmp_path))
    assert not torch.equal(text["token_selected_experts"], wanted.ids)
    write_layer(tmp_path / "back.safetensors", layer)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == stored.keys()
    assert same_bits(back["layers.1.ffn.gate.bias_vl"], stored["layers.1.ffn.gate.bias_vl"])


def test_images_without_a_bias_for_them_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    with pytest.raises(ValueError, match="image_bias: expected a bias for the tokens of images"):
        run_layer(read_layer(tmp_path, 1), write_input(tmp_path, image_mask=IMAGES))


def test_hash_layers_of_models_that_see(tmp_path: Path) -> None:
    """They have a table for text, a bias for images, and one that nothing uses and that comes back all the same."""
    tensors = layer_tensors("deepseek_v4", 0)
    with_images(tensors)
    tensors["layers.0.ffn.gate.bias"] = torch.randn(EXPERTS)
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, "deepseek_v4")
    layer = read_layer(tmp_path, 0)
    token_ids = torch.where(IMAGES, 10**6, torch.tensor([3, 0, 15, 3, 7]))
    result = run_layer(layer, write_input(tmp_path, token_ids=token_ids, image_mask=IMAGES))
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert torch.equal(result["token_selected_experts"][~IMAGES].long(), table[token_ids[~IMAGES]])
    images = route(router_to_run(layer, None), result["logits"], Gate(layer.image_bias))
    assert torch.equal(result["token_selected_experts"][IMAGES], images.ids[IMAGES])
    write_layer(tmp_path / "back.safetensors", layer)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


def test_layers_of_a_draft_head(tmp_path: Path) -> None:
    """DeepSeek-V4.1's have their own number of experts and top_k."""
    torch.manual_seed(1)
    draft = {
        name.replace("layers.1.", "mtp.0."): tensor
        for name, tensor in layer_tensors("deepseek_v4", 1).items()
        if not re.search(r"experts\.[23]\.", name)
    }
    draft["mtp.0.ffn.gate.weight"], draft["mtp.0.ffn.gate.bias"] = (
        draft[f"mtp.0.ffn.gate.{name}"][:2].clone() for name in ("weight", "bias")
    )
    make_checkpoint(tmp_path, "deepseek_v4")
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(draft, tmp_path / "draft.safetensors")
    with pytest.raises(CheckpointError, match=r"expected experts 0 to 3, as config.json says, found 2"):
        read_layer(tmp_path, "mtp.0")
    write_config(tmp_path, "deepseek_v4", dspark_n_routed_experts=2, dspark_num_experts_per_tok=2)
    assert [*find_layers(open_shards(tmp_path))] == [0, 1, 2, "mtp.0"]
    layer = read_layer(tmp_path, "mtp.0")
    assert (layer.prefix, layer.num_experts, layer.top_k) == ("mtp.0.ffn.", 2, 2)
    assert read_layer(tmp_path, 1).num_experts == EXPERTS
    run_layer(layer, write_input(tmp_path))
    with pytest.raises(ValueError, match=r"layer: expected one of 0 to 2, mtp\.0 in"):
        read_layer(tmp_path, 7)


# Kimi-K3: experts in a space of their own, an activation of its own


def test_situ_with_the_numbers_of_the_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "kimi_k3")
    situ = {"activation_situ_beta": 2.0, "activation_situ_linear_beta": 9.0}
    layer = read_layer(tmp_path, 1, options=ReadOptions(config=situ))
    assert layer.activation_type == SITU
    assert isinstance(layer.experts, Experts)
    assert [
        set(t.tolist()) for t in (layer.experts.situ_beta, layer.experts.situ_linear_beta) if t is not None
    ] == [
        {2.0},
        {9.0},
    ]
    with pytest.raises(CheckpointError, match="expected activation_situ_beta, or"):
        read_layer(tmp_path, 1, options=ReadOptions(config={"activation_situ_beta": None}))


def test_experts_in_a_space_of_their_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "kimi_k3")
    layer = read_layer(tmp_path, 1)
    assert (layer.hidden_size, layer.router_weight.shape[1]) == (LATENT, DEEPSEEK_H)
    assert sorted(layer.others) == [f"routed_expert_{n}.weight" for n in ("down_proj", "norm", "up_proj")]
    with pytest.raises(
        ValueError, match=r"logits: expected in the input file, the experts of .* a space of their own"
    ):
        run_layer(layer, write_input(tmp_path, LATENT))
    logits = torch.randn(5, EXPERTS)
    result = run_layer(layer, write_input(tmp_path, LATENT, logits=logits))
    assert result["routed_output"].shape == (5, LATENT)
    assert router_to_run(layer, None).score is scoring.sigmoid


# gpt-oss in bf16


@pytest.mark.parametrize("rule", usual.first(1, ["floor", "ceil", "even"]))
def test_bf16_fine_tunes_are_quantised_by_a_named_rule(tmp_path: Path, rule: str) -> None:
    stored = make_checkpoint(tmp_path, "gpt_oss_bfloat16")
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj .*expected MXFP4 experts, got bfloat16; .*--quantize"
    ):
        open_layer(tmp_path, 1)
    layer = read_layer(tmp_path, 1, multiple=32, options=ReadOptions(quantize=rule))
    assert layer.format == "gpt_oss"
    columns = stored["model.layers.1.mlp.experts.gate_up_proj"]  # [E, H, 2I], gate and up next to each other
    for rows, first in ((slice(0, GPT_OSS_I), 1), (slice(GPT_OSS_I, None), 0)):
        packed, scales = quantize(columns[:, :, first::2].transpose(1, 2).contiguous(), rule=rule)
        assert same_bits(layer.experts.fc1_weights[:, rows], packed)
        assert same_bits(layer.experts.fc1_scales[:, rows], scales)
    packed, scales = quantize(
        stored["model.layers.1.mlp.experts.down_proj"].transpose(1, 2).contiguous(), rule=rule
    )
    assert same_bits(layer.experts.fc2_weights, packed)
    assert same_bits(layer.experts.fc2_scales, scales)
    values = dequantize(layer.experts.fc1_weights[2], layer.experts.fc1_scales[2], dtype=torch.float64)
    assert torch.allclose(values[5], columns[2, :, 11].double(), atol=1.0, rtol=0.3)
    write_layer(tmp_path / "back.safetensors", layer)  # as gpt-oss publishes it
    write_config(tmp_path, "gpt_oss")
    assert_same_experts(read_layer(tmp_path / "back.safetensors", 1, multiple=32).experts, layer.experts)
    assert layer.experts.hidden_size == GPT_OSS_H


# A user's own names


def test_a_name_map_reads_and_writes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "theirs", "weight_scale")
    tensors = {mine(name): t for name, t in layer_tensors("weight_scale", 1).items()}
    tensors["transformer.h.1.moe.statistics.load"] = torch.ones(EXPERTS)
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, "weight_scale")
    with pytest.raises(CheckpointError, match="expected experts in the naming of"):
        read_layer(tmp_path, 1)
    (tmp_path / "names.toml").write_text(NAME_MAP)
    format = read_name_map(tmp_path / "names.toml")
    layer = read_layer(tmp_path, 1, options=ReadOptions(format=format))
    assert (layer.format, [*layer.others]) == ("mine", ["statistics.load"])
    assert_same_experts(layer.experts, read_layer(tmp_path / "theirs", 1).experts)
    run_layer(layer, write_input(tmp_path))
    write_layer(tmp_path / "back.safetensors", layer, format=format)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


def test_a_name_map_keeps_the_dtypes_of_what_it_is_like(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    tensors = {
        name.replace("layers.", "h.").replace(".scale", ".ue8m0")
        if ".experts." in name
        else name.replace("layers.", "h."): tensor
        for name, tensor in layer_tensors("deepseek_v4", 1).items()
    }
    save_file(tensors, tmp_path / "mine.safetensors")
    names = "".join(
        f'{matrix}_scales = "experts.{{expert}}.{module}.ue8m0"\n'
        for matrix, module in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    )
    (tmp_path / "names.toml").write_text(
        f'like = "deepseek_v4"\nprefixes = ["h.{{layer}}.ffn."]\n[names]\n{names}'
    )
    format = read_name_map(tmp_path / "names.toml")
    options = ReadOptions(format=format)
    layer = read_layer(tmp_path / "mine.safetensors", 1, options=options)
    write_layer(tmp_path / "back.safetensors", layer, format=format)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("like = ", "expected a TOML file, got TOMLDecodeError"),
        ("\xff", "expected a TOML file"),
        ("", "expected the key 'like'"),
        ('like = "pickle"', "like: expected one of 'deepseek_v4'"),
        ('like = "gpt_oss"\nrows = 1', "expected the keys .*got 'rows'"),
        ('like = "gpt_oss"\nprefixes = "x"', "prefixes: expected a list"),
        ('like = "gpt_oss"\nprefixes = ["layers."]', "prefixes: expected one of {layer} and {draft}"),
        (
            'like = "gpt_oss"\nprefixes = ["a.{layer}.{expert}."]',
            "prefixes: expected one of {layer} and {draft}, once",
        ),
        ('like = "deepseek_v4"\nname = "gpt_oss"', "name: expected another name than that of a known format"),
        (
            'like = "gpt_oss"\n[names]\nrouter = "x"',
            "names: expected roles among fc1_weights, .*got 'router'",
        ),
        (
            'like = "weight_scale"\n[names]\ngate_weights = "x"',
            "names.gate_weights: expected a name with {expert}",
        ),
        (
            'like = "gpt_oss"\ncarried = ["experts."]',
            "carried: expected the beginning of no role's name, got 'experts.'",
        ),
        (
            'like = "deepseek_v4"\nshared = "gate."',
            "shared: expected the beginning of no role's name, got 'gate.'",
        ),
        ('like = "gpt_oss"\n[names]\nfc1_weights = 3', "names.fc1_weights: expected str"),
        (
            'like = "deepseek_v4"\n[names]\nup_scales = "experts.{expert}.w1.scale"',
            "names: expected a name for each role, got 'experts.{expert}.w1.scale' for gate_scales and up_scales",
        ),
    ],
)
def test_name_maps_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        read_name_map(tmp_path / "names.toml")


# GGUF


def gguf_blocks(packed: Tensor, scales: Tensor) -> Any:
    """ggml's blocks of codes and scales, written down a second time: an element at a time."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).unflatten(-1, (-1, 32))
    blocks = [scales[..., None], codes[..., :16] | codes[..., 16:] << 4]
    return torch.cat(blocks, dim=-1).flatten(-2).numpy()


def write_gguf(path: Path, arch: str, layer: Tensors, experts: Any, **values: object) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_array(f"{arch}.attention.head_count", [2, 2])
    writer.add_tensor("blk.1.attn_norm.weight", torch.ones(4).numpy())
    for name, tensor in layer.items():
        writer.add_tensor(f"blk.1.{name}", tensor.float().numpy())
    inner = experts.intermediate_size
    halves = {"up": slice(0, inner), "gate": slice(inner, None)}
    for name, rows in halves.items():
        data = gguf_blocks(experts.fc1_weights[:, rows], experts.fc1_scales[:, rows])
        writer.add_tensor(f"blk.1.ffn_{name}_exps.weight", data, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
    data = gguf_blocks(experts.fc2_weights, experts.fc2_scales)
    writer.add_tensor("blk.1.ffn_down_exps.weight", data, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def deepseek_gguf(folder: Path, **changes: Any) -> Any:
    make_checkpoint(folder / "hf", "deepseek_v4")
    layer = read_layer(folder / "hf", 1)
    values = {
        "expert_count": EXPERTS,
        "expert_used_count": TOP_K,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
        "expert_gating_func": 4,
        "embedding_length": DEEPSEEK_H,
        "expert_feed_forward_length": DEEPSEEK_I,
        "swiglu_clamp_exp": 10.0,
        "block_count": 2,
    } | changes
    tensors = {"ffn_gate_inp.weight": layer.router_weight, "exp_probs_b.bias": layer.router_bias}
    write_gguf(
        folder / "model.gguf",
        "deepseek4",
        tensors,
        layer.experts,
        **{k: v for k, v in values.items() if v is not None},
    )
    return layer


def test_gguf_gives_the_bits_of_the_safetensors_file(tmp_path: Path) -> None:
    """ggml's own order of codes, a router in float32, and metadata in place of config.json."""
    expected = deepseek_gguf(tmp_path)
    layer = read_layer(tmp_path / "model.gguf", 1)
    assert (layer.format, layer.top_k, layer.routed_scaling_factor) == ("gguf", TOP_K, 1.5)
    assert_same_experts(layer.experts, expected.experts)
    assert layer.router_weight.dtype == torch.float32
    x = write_input(tmp_path)
    got = run_layer(layer, x)
    wanted = run_layer(replace(expected, shared_experts={}), x)
    assert got.keys() == wanted.keys()
    assert all(same_bits(got[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="expected a format of safetensors files to write to, got gguf"):
        write_layer(tmp_path / "back.safetensors", layer)
    (tmp_path / "hf").rename(tmp_path.parent / f"{tmp_path.name}-hf")
    assert_same_experts(read_layer(tmp_path, 1).experts, expected.experts)  # by its folder


def test_gguf_of_gpt_oss_has_biases(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", "gpt_oss")
    expected = read_layer(tmp_path / "hf", 1, multiple=32)
    biases, inner = expected.experts.fc1_biases, GPT_OSS_I
    tensors = {
        "ffn_gate_inp.weight": expected.router_weight,
        "ffn_gate_inp.bias": expected.router_bias,
        "ffn_up_exps.bias": biases[:, :inner].contiguous(),
        "ffn_gate_exps.bias": biases[:, inner:].contiguous(),
        "ffn_down_exps.bias": expected.experts.fc2_biases,
    }
    values = {"expert_count": EXPERTS, "expert_used_count": TOP_K, "embedding_length": GPT_OSS_H}
    write_gguf(tmp_path / "model.gguf", "gpt-oss", tensors, expected.experts, **values, expert_gating_func=3)
    with pytest.raises(
        CheckpointError, match=r"model\.gguf: expected swiglu_limit, or an argument limit \(--limit"
    ):
        read_layer(tmp_path / "model.gguf", 1)
    layer = read_layer(tmp_path / "model.gguf", 1, limit=7.0, multiple=32)
    assert layer.format == "gguf_gpt_oss"
    assert_same_experts(layer.experts, expected.experts)


def test_gguf_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepseek_gguf(tmp_path, expert_gating_func=7, expert_router_shift=1.0)
    file = tmp_path / "model.gguf"
    with pytest.raises(
        CheckpointError, match=r"model\.gguf: expert_router_shift=1\.0: expected keys whose effect"
    ):
        read_layer(file, 1)
    with pytest.raises(CheckpointError, match=r"scoring_func: expected one of .*got 'number 7'"):
        read_layer(file, 1, options=ReadOptions(config={"expert_router_shift": None}))
    whole = file.read_bytes()
    for damaged in (b"", b"GGUF", whole[:40], whole[:-900], b"GGUF" + b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            read_layer(file, 1)


def test_gguf_experts_of_another_type_are_refused_by_its_name(tmp_path: Path) -> None:
    """Q8_0 has blocks of 34 bytes, which MXFP4's 17 divide."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    for name in ("gate", "up", "down"):
        blocks = torch.zeros(EXPERTS, 32, 34, dtype=torch.uint8).numpy()
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"ffn_gate_exps\.weight \(model\.gguf\): expected MXFP4, got Q8_0"
    ):
        read_layer(tmp_path, 0)


def test_a_gguf_file_of_the_vision_tower_lies_beside_the_model(tmp_path: Path) -> None:
    expected = deepseek_gguf(tmp_path)
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "mmproj-F16.gguf", "clip")
    writer.add_uint32("clip.projection_dim", 64)
    writer.add_tensor("v.patch_embd.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "model.gguf").rename(tmp_path / "the-model.gguf")
    layer = read_layer(tmp_path, 1)
    assert layer.top_k == TOP_K
    assert_same_experts(layer.experts, expected.experts)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        CheckpointError, match=r"expected the package gguf to read it: pip install 'mxfp4ref\[gguf\]'"
    ):
        read_layer(tmp_path, 1)


def test_every_format_is_tried_here() -> None:
    made = {
        *PER_EXPERT,
        "deepseek_v4",
        "gpt_oss",
        "gpt_oss_original",
        "gpt_oss_bfloat16",
        "gguf",
        "gguf_gpt_oss",
    }
    assert made == set(FORMATS)
