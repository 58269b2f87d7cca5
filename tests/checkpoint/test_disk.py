"""Layers read and written back: arguments, config.json, padding, and that nothing else is read."""

from __future__ import annotations

import json
import math
import resource
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp4ref.checkpoint import CheckpointError, read_layer, shards, write_layer
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import GENERATIONS, NEWEST, Generation
from mxfp4ref.formats.layout import pad_halves
from mxfp4ref.formats.resize import resize_experts, to_logical, to_sm90
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from tests.helpers.checkpoints import (
    EXPERTS,
    GPT_OSS_H,
    GPT_OSS_I,
    PER_EXPERT,
    assert_same_experts,
    layer_tensors,
    make_checkpoint,
    same_bits,
    write_config,
)

FORMATS = ("deepseek_v4", "deepseek_v4_prefixed", "gpt_oss", "gpt_oss_original", *PER_EXPERT)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 8}, "expected experts 0 to 7"),
        ({"hidden_size": 4096}, r"layers\.1\.ffn\.\*: expected hidden_size=4096 of config\.json, got 256"),
        ({"moe_intermediate_size": 2048}, "expected moe_intermediate_size=2048"),
        ({"swiglu_limit": None}, "expected swiglu_limit, or an argument limit"),
        (
            {"swiglu_limit": 10**400},
            r"config\.json: swiglu_limit: expected a finite float32 number, got 1000",
        ),
        ({"swiglu_limit": "10"}, r"config\.json: swiglu_limit: expected a float, got str '10'"),
        ({"n_routed_experts": True}, r"config\.json: n_routed_experts: expected int, got True"),
    ],
)
def test_config_must_agree(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    write_config(tmp_path, "deepseek_v4", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_layer(tmp_path, 1)


def test_layer_out_of_range(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    with pytest.raises(ValueError, match=r"layer: expected one of 0 to 2 in .*, got 3"):
        read_layer(tmp_path, 3)
    with pytest.raises(ValueError, match=r"layer: expected an int at least 0"):
        read_layer(tmp_path, -1)
    with pytest.raises(TypeError, match=r"layer: expected an int"):
        read_layer(tmp_path, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer: expected one of 0 to 2 in .*, got 'mtp\.0'"):
        read_layer(tmp_path, "mtp.0")
    with pytest.raises(CheckpointError, match=r"expected .*index\.json or a .*safetensors or .*gguf file"):
        read_layer(tmp_path / "absent", 0)


def test_two_sets_of_experts_in_a_layer(tmp_path: Path) -> None:
    save_file(layer_tensors("gpt_oss", 0), tmp_path / "a.safetensors")
    save_file(layer_tensors("deepseek_v4", 0), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"expected one set of experts, .* are there too"):
        read_layer(tmp_path, 0, limit=7.0)


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
    with pytest.raises(ValueError, match="expected router_bias or tid2eid in deepseek_v4, got neither"):
        write_layer(tmp_path / "x.safetensors", replace(deepseek, experts=bare, router_bias=None))
    with pytest.raises(ValueError, match="expected neither tid2eid nor shared_experts in gpt_oss"):
        write_layer(tmp_path / "x.safetensors", replace(layer, shared_experts={"w1.weight": weights}))
    dense = Experts(torch.zeros(1, 64, 32).bfloat16(), None, torch.zeros(1, 32, 32).bfloat16(), None)
    with pytest.raises(ValueError, match="expected MXFP4 weights, got bfloat16"):
        write_layer(tmp_path / "x.safetensors", replace(layer, experts=dense))
    with pytest.raises(ValueError, match="expected MXFP4 weights, got bfloat16"):
        to_sm90(dense)
    with pytest.raises(ValueError, match=r"layer\.format: expected one of"):
        write_layer(tmp_path / "x.safetensors", replace(layer, format="onnx"))
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
    assert set(read) == set(layer_tensors("deepseek_v4", 2))


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
