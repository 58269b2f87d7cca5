"""What a server gave for a layer of a checkpoint, right and with mistakes of an engine's, by `layer --served`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import (
    CheckpointError,
    CheckpointLayer,
    ReadOptions,
    fuse_shared,
    layer_call,
    open_layer,
    router_logits,
    run_layer,
)
from mxfp4ref.engine.served import ServedOptions, check_served
from mxfp4ref.formats.layout import fold_scales_sm90, unfold_scales_sm90
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import usual
from tests.helpers.checkpoints import DEEPSEEK_H, TOP_K, make_checkpoint

FACTOR = 1.5
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_checkpoint(root / "model", "deepseek_v4")
    hidden = torch.randn(8, DEEPSEEK_H, generator=torch.Generator().manual_seed(1))
    save_file({"hidden": (hidden / 16).to(torch.bfloat16)}, root / "x")
    return root


def check(root: Path, served: Tensors, *options: str) -> Result:
    save_file({name: tensor.contiguous() for name, tensor in served.items()}, root / "served")
    arguments = ["layer", "--checkpoint", root / "model", "--layer", 1, "--input", root / "x"]
    return CliRunner().invoke(commands, [*map(str, arguments), "--served", str(root / "served"), *options])


def routed(layer: CheckpointLayer, call: MoeCall, bug: str = "") -> Tensors:
    """A router as torch has it."""
    logits = call.input.float() @ layer.router_weight.float().T
    scores = torch.nn.functional.softplus(logits).sqrt()
    biased = scores + layer.router_bias
    ids = biased.topk(TOP_K).indices
    weights = (biased if bug == "bias in the weights" else scores).gather(1, ids)
    if bug == "factor before the norm":
        weights = weights * FACTOR / (weights * FACTOR).sum(1, keepdim=True)
    else:
        weights = weights / weights.sum(1, keepdim=True) * (FACTOR**2 if bug == "factor twice" else FACTOR)
    return {"token_selected_experts": ids, "token_final_scales": weights}


def test_what_this_package_wrote_is_no_servers(root: Path) -> None:
    """It was equal to itself, without a word, which says nothing of a server."""
    result = run_layer(open_layer(root / "model", 1), root / "x", root / "written")
    copied = check(root, load_file(root / "written"))  # its tensors may be, in a file of somebody's own
    assert (copied.exit_code, "equal: the output is the layer's" in copied.output) == (0, True)
    with pytest.raises(CheckpointError, match="written: expected what a server gave, got what run_layer of"):
        check_served(open_layer(root / "model", 1), root / "x", root / "written", result=result)


def called(root: Path, experts: list[int] | None = None) -> tuple[CheckpointLayer, MoeCall]:
    layer = open_layer(root / "model", 1, options=ReadOptions(experts=experts))
    return layer, layer_call(layer, root / "x")


def of(call: MoeCall, routing: Tensors) -> MoeCall:
    ids, weights = routing.values()
    return replace(call, token_selected_experts=ids.int(), token_final_scales=weights)


@pytest.mark.parametrize("tiles", [(128, 128), (256, 128)])
def test_a_right_server(root: Path, tiles: tuple[int, int]) -> None:
    """Its weights, by torch's float32, are a few ulp off, and other K tiles sum in another order."""
    layer, call = called(root)
    routing = routed(layer, call)
    kernel = Sm90Kernel.of_tiles(tiles)
    result = check(root, {"routed_output": forward(replace(of(call, routing), kernel=kernel)), **routing})
    assert (result.exit_code, "equal: the output is the layer's" in result.output) == (0, True), result.output
    result = check(root, {"output": forward(replace(call, kernel=kernel)), "logits": torch.zeros(1)})
    assert result.exit_code == 0, result.output
    assert "logits: not compared" in result.output
    assert "output: taken for the layer's routed_output" in result.output


@pytest.mark.parametrize(
    ("bug", "says"),
    [
        ("factor twice", "all weights are 1.5x the right ones"),
        ("factor before the norm", "the routed scaling factor 1.5 is left out, or multiplied in before"),
        ("bias in the weights", "weights are made of the scores with the correction bias"),
    ],
)
def test_a_mistake_of_the_router_is_not_the_experts(root: Path, bug: str, says: str) -> None:
    layer, call = called(root)
    routing = routed(layer, call, bug)
    result = check(root, {"routed_output": forward(of(call, routing)), **routing})
    assert result.exit_code == 1, result.output
    verdict = result.output.splitlines()[-1]
    assert "the router is wrong: " in verdict
    assert says in verdict
    assert verdict.endswith("the output is right for its ids and weights")


def test_logits_summed_in_float32_give_right_weights(root: Path) -> None:
    """Large logits, of which some weights are 33 ulp off."""
    layer, call = called(root)
    hidden = call.input * 16
    call = replace(call, input=hidden)
    routing = routed(layer, call)
    served = {"routed_output": forward(of(call, routing)), **routing}
    found = check_served(layer, {"hidden": hidden}, served, ServedOptions(diagnosis="none"))
    assert found.ok, found
    assert any(line.startswith("the router is right: a correct float32") for line in found.lines)
    logits = {"hidden": hidden, "logits": router_logits(layer, hidden)}
    assert not check_served(layer, logits, served, ServedOptions(diagnosis="none")).ok


def halves_not_swapped(call: MoeCall) -> MoeCall:
    scales = torch.cat(call.experts.fc1_scales.chunk(2, 1)[::-1], 1)
    return replace(call, experts=replace(call.experts, fc1_scales=scales))


def mapped_twice(call: MoeCall) -> MoeCall:
    ids = call.token_selected_experts - 2
    return replace(call, token_selected_experts=ids.masked_fill(ids < 0, -1))


def not_folded(call: MoeCall) -> MoeCall:
    def read(scales: Tensor) -> Tensor:
        """Bytes as they are, in the folded shape, as the kernel reads them."""
        return unfold_scales_sm90(scales.contiguous().reshape(fold_scales_sm90(scales).shape))

    e = call.experts
    return replace(call, experts=replace(e, fc1_scales=read(e.fc1_scales), fc2_scales=read(e.fc2_scales)))


@pytest.mark.parametrize(
    ("bug", "experts", "says"),
    usual.first(
        1,
        [
            (halves_not_swapped, None, "scales_not_swapped"),
            (not_folded, None, "scales_not_folded"),
            (mapped_twice, [2, 3], "ep_double_mapping"),
        ],
    ),
)
def test_a_mistake_before_the_kernel_is_named(
    root: Path, bug: Callable[[MoeCall], MoeCall], experts: list[int] | None, says: str
) -> None:
    layer, call = called(root, experts)
    routing = routed(layer, call)
    output = forward(bug(of(call, routing)))
    name = "rank_output" if experts else "routed_output"
    options = ["--experts", "2-3"] if experts else []
    result = check(root, {name: output, **routing}, "--diagnosis", "quick", *options)
    assert result.exit_code == 1, result.output
    assert "token_selected_experts: equal" in result.output
    assert "the router is wrong" not in result.output
    assert says in result.output.splitlines()[-1]


def test_what_cannot_be_compared(root: Path) -> None:
    _, call = called(root)
    output = forward(call)
    for served, message in (
        ({"out": output}, "expected one of routed_output, output, rank_output, got out"),
        (
            {"output": output[:3]},
            "output: expected a bfloat16 tensor of shape [8, 256], got bfloat16 [3, 256]",
        ),
    ):
        result = check(root, served)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    right = run_layer(called(root, [0, 1])[0], root / "x")
    result = check(root, {"rank_output": right["rank_output"]})  # once compared with the whole layer's
    assert (result.exit_code, "routed_output  " in result.output) == (2, False), result.output
    assert all(option in result.output for option in ("--ep-rank", "--experts", "--tp-rank"))
    result = check(root, {"rank_output": right["rank_output"]}, "--experts", "0,1")
    assert result.exit_code == 0
    assert result.output.strip().endswith("equal: the output is the rank's part of the layer's in every bit")
    result = check(root, {"routed_output": torch.zeros_like(output)}, "--diagnosis", "none")
    assert result.exit_code == 1
    assert "all of the output is zero, which proves nothing" in result.output
    assert "the file has no token_selected_experts and token_final_scales" in result.output


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[3, 1], [0, 99]], "id 99 at token 1, slot 1 is no expert's"),
        ([[3, -2], [0, 1]], "id -2 at token 0, slot 1 is no expert's"),
        ([[3, 1], [0, 1 << 32]], "id 4294967296 at token 1, slot 1 is no expert's"),
        ([[3, 1], [2, 2]], r"token 1 names an expert twice: \[2, 2\]"),
    ],
)
@pytest.mark.parametrize("with_weights", [True, False])
def test_ids_that_are_no_routing_are_the_router_s(
    root: Path, ids: list[list[int]], says: str, with_weights: bool
) -> None:
    """Ids of 2^32 more once counted as equal, others as a file that cannot be read."""
    layer, call = called(root)
    served = {"routed_output": forward(call)[:2], "token_selected_experts": torch.tensor(ids)}
    served |= {"token_final_scales": torch.ones(2, 2)} if with_weights else {}
    found = check_served(layer, {"hidden": call.input[:2]}, served, ServedOptions(diagnosis="none"))
    assert not found.ok
    assert re.fullmatch(f"the router is wrong: {says}", found.verdict)
    assert any(line.startswith("routed_output: not compared") for line in found.lines)


@pytest.mark.parametrize("wrong", ["", "output", "weight"])
def test_slots_of_a_fused_shared_expert(root: Path, wrong: str) -> None:
    layer = fuse_shared(open_layer(root / "model", 1), "floor")
    hidden = {"hidden": called(root)[1].input}
    served = run_layer(layer, hidden)
    if wrong:
        served = {name: tensor.clone() for name, tensor in served.items()}
        served["output" if wrong == "output" else "token_final_scales"][3, -1] += 1
    found = check_served(layer, hidden, served, ServedOptions(diagnosis="none"))
    assert (found.ok, "output is wrong" in found.verdict) == (not wrong, wrong == "output"), found
    assert ("the router is wrong" in found.verdict) == (wrong == "weight")


def test_no_tokens_are_not_equal(root: Path) -> None:
    layer, call = called(root)
    with pytest.raises(
        ValueError, match=r"^routed_output: expected the output of one token or more, got \[0, "
    ):
        check_served(layer, {"hidden": call.input[:0]}, {"routed_output": call.input[:0]})


def test_a_diagnosis_that_fails_leaves_the_verdict(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise ValueError("of the kit")

    monkeypatch.setattr("mxfp4ref.engine.served.diagnose", broken)
    output = run_layer(open_layer(root / "model", 1), root / "x")["routed_output"]
    output.view(torch.int16)[1, 2] ^= 1
    result = check(root, {"routed_output": output})
    assert result.exit_code == 1
    assert "no diagnosis: ValueError: of the kit" in result.output
    assert "the output is wrong" in result.output
