"""Experts read some at a time, one rank's part of them, the shared one beside them: the bits of all at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp4ref.checkpoint import (
    CheckpointError,
    CheckpointLayer,
    ReadOptions,
    fuse_shared,
    open_layer,
    read_layer,
    run_layer,
    streaming,
    write_layer,
)
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.formats.quantize import quantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks, forward_all_ranks, gather
from mxfp4ref.model.placement import STRATEGIES, place_experts
from mxfp4ref.routing.route import Routing
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers.checkpoints import (
    DEEPSEEK_H,
    DEEPSEEK_I,
    EXPERTS,
    GPT_OSS_H,
    INDEX,
    Tensors,
    assert_same_experts,
    make_checkpoint,
    random_bytes,
    same_bits,
)
from tests.helpers.forward_calls import underflowing_call


def write_input(path: Path, width: int = DEEPSEEK_H, tokens: int = 7, **more: Tensor) -> Path:
    torch.manual_seed(5)
    save_file({"hidden": torch.randn(tokens, width).to(torch.bfloat16), **more}, path / "x")
    return path / "x"


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_BYTES_AT_ONCE", 1)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    "ranks",
    [
        *(Ranks(), Ranks(2), Ranks(1, 2), Ranks(2, 2, "bf16"), Ranks(4, 2)),
        *(Ranks(3, 2, expert_map=place_experts(4, 3, strategy)) for strategy in STRATEGIES),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["deepseek_v4", "gpt_oss"])
def test_experts_in_files_give_the_bits_of_those_in_memory(tmp_path: Path, kind: str, ranks: Ranks) -> None:
    """With biases, padding and a width that the ranks do not divide into whole tiles (gpt-oss)."""
    make_checkpoint(tmp_path, kind)
    x = write_input(tmp_path, GPT_OSS_H if kind == "gpt_oss" else DEEPSEEK_H)
    steps: list[tuple[str, int]] = []
    got = run_layer(open_layer(tmp_path, 1), x, ranks=ranks, step=lambda *a: steps.append(a))
    wanted = run_layer(read_layer(tmp_path, 1), x, ranks=ranks)
    assert got.keys() == wanted.keys()
    assert all(same_bits(got[name], wanted[name]) for name in wanted)
    assert len(steps) == len(got["token_selected_experts"].unique()) == steps[0][1]


@pytest.mark.usefixtures("one_at_a_time")
def test_positions_are_those_of_the_whole_call() -> None:
    """A row's position among all rows of its expert shows where the first two groups underflow."""
    kernel = Sm90Kernel.of_tiles((256, 128))
    one = underflowing_call(600, kernel=kernel)
    experts = one.experts.select(torch.zeros(3, dtype=torch.int64))
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [-1, 1]], dtype=torch.int32).repeat(150, 1)
    scales = one.token_final_scales[:1].expand(600, 2).contiguous()
    call = MoeCall(one.input, ids, scales, experts, kernel=kernel)
    assert not same_bits(forward(call)[1:], forward(call.select(slice(1, None))))
    for ranks in (Ranks(), Ranks(3)):
        routing = Routing(ids, scales, torch.zeros(600, dtype=torch.bool))
        got = streaming.forward_in_parts(one.input, routing, experts, ranks, kernel)
        assert same_bits(got, forward_all_ranks(call, ranks))


def test_no_tokens(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    assert run_layer(open_layer(tmp_path, 1), write_input(tmp_path, tokens=0))["routed_output"].shape == (
        0,
        DEEPSEEK_H,
    )


def test_experts_that_no_token_chose_are_not_read(tmp_path: Path) -> None:
    """Their files may even be missing."""
    stored = make_checkpoint(tmp_path, "deepseek_v4")
    index = json.loads((tmp_path / INDEX).read_text())
    for name in stored:
        if "layers.1.ffn.experts.3." in name:
            index["weight_map"][name] = "absent.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    logits = torch.randn(7, EXPERTS)
    logits[:, 3] = -1e4
    layer = open_layer(tmp_path, 1)
    layer = replace(layer, router_bias=torch.zeros(EXPERTS))
    run_layer(layer, write_input(tmp_path, logits=logits))
    logits[:, 3] = 1e4
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.ffn\.experts\.3\.w1\.weight: expected in .*absent"
    ):
        run_layer(layer, write_input(tmp_path, logits=logits))


# One rank's part


def part(root: Path, experts: object, **more: object) -> CheckpointLayer:
    return open_layer(root, 1, options=ReadOptions(experts=experts), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ranks",
    [
        [range(0, 2), range(2, 4)],
        [range(0, 3), range(3, 4)],  # uneven
        [[0, 2], [1, 3]],  # round-robin
        [[3, 1], [2, 0]],  # an expert map
    ],
)
def test_parts_add_up_to_the_layer(tmp_path: Path, ranks: list[list[int]]) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    x = write_input(tmp_path)
    outputs = []
    for ids in ranks:
        layer = part(tmp_path, ids)
        assert layer.expert_ids == tuple(ids)
        assert layer.num_experts == EXPERTS
        result = run_layer(layer, x)
        outputs.append(result["rank_output"])
        # The same by hand: slots of other ranks are skipped.
        whole = read_layer(tmp_path, 1)
        chosen = result["token_selected_experts"]
        mine = torch.where(torch.isin(chosen, torch.tensor([*ids])), chosen, -1)
        call = MoeCall(load_file(x)["hidden"], mine.int(), result["token_final_scales"], whole.experts)
        assert same_bits(result["rank_output"], forward(call))
    if ranks[0] == range(0, 2):
        expected = run_layer(read_layer(tmp_path, 1), x, ranks=Ranks(2))["routed_output"]
        assert same_bits(gather(outputs), expected)


def test_a_redundant_expert_is_the_same_expert(tmp_path: Path) -> None:
    """EPLB's: a rank may hold a replica of what it has; the first one is used."""
    make_checkpoint(tmp_path, "deepseek_v4")
    x = write_input(tmp_path)
    assert same_bits(
        run_layer(part(tmp_path, [1, 0, 1]), x)["rank_output"],
        run_layer(part(tmp_path, [0, 1]), x)["rank_output"],
    )
    loaded = part(tmp_path, [1, 0, 1]).experts.select(torch.tensor([0, 2]))
    assert same_bits(loaded.fc1_weights[0], loaded.fc1_weights[1])


def test_only_a_rank_s_files_are_needed(tmp_path: Path) -> None:
    stored = make_checkpoint(tmp_path / "whole", "deepseek_v4")
    mine = {n: t for n, t in stored.items() if "experts.0." not in n and "experts.1." not in n}
    (tmp_path / "rank").mkdir()
    save_file(mine, tmp_path / "rank" / "rank1.safetensors")
    (tmp_path / "rank" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"found 2, the last of them 3; experts= \(--experts"):
        open_layer(tmp_path / "rank", 1)
    x = write_input(tmp_path)
    got = run_layer(part(tmp_path / "rank", range(2, 4)), x)["rank_output"]
    assert same_bits(got, run_layer(part(tmp_path / "whole", range(2, 4)), x)["rank_output"])
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.1\.\*: expected in the checkpoint"):
        part(tmp_path / "rank", [1, 2])


@pytest.mark.parametrize("kind", ["gpt_oss", "gpt_oss_original"])
def test_parts_of_stacked_experts(tmp_path: Path, kind: str) -> None:
    make_checkpoint(tmp_path, kind)
    whole = read_layer(tmp_path, 1).experts
    some = read_layer(tmp_path, 1, options=ReadOptions(experts=[3, 1])).experts
    assert_same_experts(some, whole.select(torch.tensor([3, 1])))


def test_parts_that_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    x = write_input(tmp_path)
    for experts, message in (
        ([], "at least one"),
        ([4], "from 0 to 3, got 4"),
        ([-1], "from 0 to 3, got -1"),
    ):
        with pytest.raises(ValueError, match=f"experts: expected .*{message}"):
            part(tmp_path, experts)
    with pytest.raises(TypeError, match="experts: expected an int"):
        part(tmp_path, ["0"])
    with pytest.raises(ValueError, match="ep_size: expected 1 with the experts of one rank, got 2"):
        run_layer(part(tmp_path, [0, 1]), x, ranks=Ranks(2))
    with pytest.raises(ValueError, match="ep_size: expected a divisor of the 4 experts, got 3"):
        run_layer(open_layer(tmp_path, 1), x, ranks=Ranks(3))
    with pytest.raises(ValueError, match=r"expected all 4, got those of \(0, 1\)"):
        write_layer(tmp_path / "y", read_layer(tmp_path, 1, options=ReadOptions(experts=[0, 1])))
    with pytest.raises(TypeError, match=r"layer\.experts: expected Experts, got ExpertsInFiles"):
        write_layer(tmp_path / "y", open_layer(tmp_path, 1))
    with pytest.raises(ValueError, match="expected all experts to put the shared one beside them"):
        fuse_shared(part(tmp_path, [0]), "floor")
    shared = write_input(tmp_path, shared_output=torch.zeros(7, DEEPSEEK_H).bfloat16())
    with pytest.raises(ValueError, match="shared_output: expected none"):
        run_layer(part(tmp_path, [0, 1]), shared)


# The shared expert as one more


def mxfp4_shared(tensors: Tensors) -> None:
    """AMD's DeepSeek-V4-Pro-MXFP4 has its shared expert in MXFP4, too."""
    for name in [n for n in tensors if "shared_experts" in n]:
        del tensors[name]
    torch.manual_seed(77)
    for name, rows, depth in (
        ("w1", DEEPSEEK_I, DEEPSEEK_H),
        ("w2", DEEPSEEK_H, DEEPSEEK_I),
        ("w3", DEEPSEEK_I, DEEPSEEK_H),
    ):
        p = f"layers.1.ffn.shared_experts.{name}"
        tensors[f"{p}.weight"] = random_bytes(rows, depth // 2)
        tensors[f"{p}.weight_scale"] = random_bytes(rows, depth // 32, low=110, high=130)


@pytest.mark.parametrize("source", ["memory", "files"])
def test_a_shared_expert_in_mxfp4_is_slot_e(tmp_path: Path, source: str) -> None:
    stored = make_checkpoint(tmp_path, "deepseek_v4_quark", mxfp4_shared)
    layer = read_layer(tmp_path, 1) if source == "memory" else open_layer(tmp_path, 1)
    fused = fuse_shared(layer)
    assert (fused.fused, fused.experts.num_experts) == (1, EXPERTS + 1)
    shared = fused.experts.select(torch.tensor([EXPERTS]))
    p = "layers.1.ffn.shared_experts."
    assert same_bits(shared.fc1_weights[0, :DEEPSEEK_I], stored[f"{p}w3.weight"])
    assert same_bits(shared.fc1_weights[0, DEEPSEEK_I:], stored[f"{p}w1.weight"])
    assert same_bits(shared.fc1_scales[0, DEEPSEEK_I:], stored[f"{p}w1.weight_scale"])
    assert same_bits(shared.fc2_weights[0], stored[f"{p}w2.weight"])
    assert shared.swiglu_limit.tolist() == [10.0]
    padded = torch.tensor([False, True, False, False, False, False, False])
    x = write_input(tmp_path, padded=padded)
    result = run_layer(fused, x)
    ids, scales = result["token_selected_experts"], result["token_final_scales"]
    assert ids[:, -1].tolist() == [-1 if p else EXPERTS for p in padded.tolist()]
    assert scales[:, -1].tolist() == [0.0 if p else 1.0 for p in padded.tolist()]
    routed = run_layer(layer, x)
    assert torch.equal(ids[:, :-1], routed["token_selected_experts"])
    assert same_bits(scales[:, :-1].contiguous(), routed["token_final_scales"])
    everything = fused.experts.select(torch.arange(EXPERTS + 1))
    assert same_bits(result["output"], forward(MoeCall(load_file(x)["hidden"], ids, scales, everything)))
    with pytest.raises(ValueError, match="expected weights to quantise by floor, it is MXFP4 already"):
        fuse_shared(layer, "floor")
    with pytest.raises((TypeError, ValueError), match=r"layer\.experts"):
        write_layer(tmp_path / "y", fused)


@pytest.mark.parametrize("kind", ["deepseek_v4", "weight_scale"])
@pytest.mark.parametrize("rule", ["ceil", "floor"])
def test_a_shared_expert_in_fp8_or_bf16_is_requantised(tmp_path: Path, kind: str, rule: str) -> None:
    stored = make_checkpoint(tmp_path, kind)
    layer = open_layer(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"expected MXFP4, got .*--fuse-shared on the command line\) floor"
    ):
        fuse_shared(layer)
    shared = fuse_shared(layer, rule).experts.select(torch.tensor([EXPERTS]))
    if kind == "deepseek_v4":
        p = "layers.1.ffn.shared_experts.w2"
        scale = dequantize_blocks(stored[f"{p}.scale"])
        values = stored[f"{p}.weight"].double() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        values = stored["model.layers.1.mlp.shared_experts.down_proj.weight"].double()
    packed, scales = quantize(values.float(), rule=rule)
    assert same_bits(shared.fc2_weights[0], packed)
    assert same_bits(shared.fc2_scales[0], scales)
    back = dequantize(packed, scales, dtype=torch.float64)
    assert float((back - values).abs().max() / values.abs().max()) < 0.5
    assert "output" in run_layer(fuse_shared(layer, rule), write_input(tmp_path))


def dequantize_blocks(scale: Tensor) -> Tensor:
    return torch.exp2(scale.view(torch.uint8).double() - 127)


def test_a_shared_expert_twice_as_wide_takes_two_slots(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        torch.manual_seed(9)
        p = "model.layers.1.mlp.shared_experts."
        tensors[f"{p}gate_proj.weight"] = torch.randn(2 * DEEPSEEK_I, DEEPSEEK_H).bfloat16()
        tensors[f"{p}up_proj.weight"] = torch.randn(2 * DEEPSEEK_I, DEEPSEEK_H).bfloat16()
        tensors[f"{p}down_proj.weight"] = torch.randn(DEEPSEEK_H, 2 * DEEPSEEK_I).bfloat16()

    stored = make_checkpoint(tmp_path, "weight_scale", widen)
    fused = fuse_shared(read_layer(tmp_path, 1), "floor")
    assert fused.fused == 2
    p = "model.layers.1.mlp.shared_experts."
    gate = quantize(stored[f"{p}gate_proj.weight"])[0]
    down = quantize(stored[f"{p}down_proj.weight"])[0]
    for slot in range(2):
        inner = slice(slot * DEEPSEEK_I, (slot + 1) * DEEPSEEK_I)
        assert same_bits(fused.experts.fc1_weights[EXPERTS + slot, DEEPSEEK_I:], gate[inner])
        columns = slice(slot * DEEPSEEK_I // 2, (slot + 1) * DEEPSEEK_I // 2)
        assert same_bits(fused.experts.fc2_weights[EXPERTS + slot], down[:, columns].contiguous())
    result = run_layer(fused, write_input(tmp_path))
    assert result["token_selected_experts"][0, -2:].tolist() == [EXPERTS, EXPERTS + 1]


def test_a_shared_expert_by_compressed_tensors_names(tmp_path: Path) -> None:
    p = "language_model.model.layers.1.mlp.shared_experts."

    def pack(tensors: Tensors) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            codes, scales = quantize(tensors.pop(f"{p}{name}.weight"))
            tensors |= {f"{p}{name}.weight_packed": codes, f"{p}{name}.weight_scale": scales}

    stored = make_checkpoint(tmp_path, "compressed_tensors", pack)
    fused = fuse_shared(read_layer(tmp_path, 1))
    assert same_bits(fused.experts.fc2_weights[EXPERTS], stored[f"{p}down_proj.weight_packed"])
    assert same_bits(fused.experts.fc2_scales[EXPERTS], stored[f"{p}down_proj.weight_scale"])


def test_no_shared_expert_to_fuse(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    layer = read_layer(tmp_path, 1)
    with pytest.raises(ValueError, match=r"expected a shared expert in .*, found none"):
        fuse_shared(layer, "floor")
    gated = replace(layer, others={"shared_expert.up_proj.weight": layer.router_weight})  # as Qwen's
    with pytest.raises(ValueError, match=r"found shared_expert\.up_proj\.weight: one with a gate of its own"):
        fuse_shared(gated, "floor")
