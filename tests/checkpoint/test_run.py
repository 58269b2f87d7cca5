"""A layer run from a checkpoint against its parts run one by one."""

from __future__ import annotations

from collections.abc import Callable
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
    layer_call,
    open_layer,
    read_layer,
    router_logits,
    run_layer,
)
from mxfp4ref.checkpoint.run import route_input
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks, forward_all_ranks, gather, rank_calls
from mxfp4ref.routing.presets import deepseek_v4, gpt_oss, mixtral
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers.checkpoints import (
    DEEPSEEK_H,
    EXPERTS,
    GPT_OSS_H,
    TOP_K,
    layer_tensors,
    make_checkpoint,
    same_bits,
    write_config,
)


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
    result = run_layer(read_layer(tmp_path, 1), tmp_path / "x", tmp_path / "y")
    layer = read_layer(tmp_path, 1)
    logits = router_logits(layer, hidden)
    reference = (hidden.double() @ layer.router_weight.double().T).float()
    assert torch.allclose(logits, reference, rtol=1e-6, atol=1e-6)
    routing = deepseek_v4(logits, layer.router_bias, top_k=TOP_K, routed_scaling_factor=1.5, padded=padded)
    routed = forward(MoeCall(hidden, routing.ids, routing.scales, layer.experts))
    assert torch.equal(result["token_selected_experts"], routing.ids)
    assert same_bits(result["token_final_scales"], routing.scales)
    assert same_bits(result["output"], (shared.float() + routed.float()).to(torch.bfloat16))
    written = load_file(tmp_path / "y")
    assert sorted(written) == sorted(result)
    assert all(same_bits(written[name], result[name]) for name in result)


def test_numbers_that_no_router_takes_are_told_by_their_argument(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    layer = read_layer(tmp_path, 1)
    hidden = torch.zeros(5, DEEPSEEK_H, dtype=torch.bfloat16)
    hidden[3] = 3e38 * layer.router_weight[0].sign()
    with pytest.raises(ValueError, match=r"^hidden: expected .*got inf at token 3, expert 0$"):
        route_input(layer, {"hidden": hidden})
    hidden[3, 7] = torch.nan
    with pytest.raises(
        ValueError, match=r"^hidden: expected .*got nan at token 3, .*, as hidden\[3, 7\] is nan$"
    ):
        route_input(layer, {"hidden": hidden})


def test_without_the_shared_expert_it_is_no_output(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    hidden = write_input(tmp_path / "x", DEEPSEEK_H)
    layer = replace(read_layer(tmp_path, 1, limit=0.5), top_k=3, routed_scaling_factor=2.5)
    result = run_layer(layer, tmp_path / "x")
    assert "output" not in result
    routing = deepseek_v4(result["logits"], layer.router_bias, top_k=3, routed_scaling_factor=2.5)
    expected = forward(MoeCall(hidden, routing.ids, routing.scales, layer.experts))
    assert same_bits(result["routed_output"], expected)


def test_run_hash_layer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    token_ids = torch.tensor([3, 0, 15, 3, 7])
    write_input(tmp_path / "x", DEEPSEEK_H, token_ids=token_ids)
    result = run_layer(read_layer(tmp_path, 0), tmp_path / "x")
    table = layer_tensors("deepseek_v4", 0)["layers.0.ffn.gate.tid2eid"]
    assert torch.equal(result["token_selected_experts"].long(), table[token_ids])
    write_input(tmp_path / "x", DEEPSEEK_H)
    with pytest.raises(
        ValueError, match=r"token_ids: expected in the input file, layers\.0\.ffn\.\* is a hash"
    ):
        run_layer(read_layer(tmp_path, 0), tmp_path / "x")


@pytest.mark.parametrize("kind", ["gpt_oss", "gpt_oss_original"])
def test_run_gpt_oss_layer(tmp_path: Path, kind: str) -> None:
    make_checkpoint(tmp_path, kind)
    hidden = write_input(tmp_path / "x", GPT_OSS_H)
    result = run_layer(read_layer(tmp_path, 1), tmp_path / "x")
    layer = read_layer(tmp_path, 1)
    linear = hidden.double() @ layer.router_weight.double().T + layer.router_bias.double()
    assert result["logits"].dtype == torch.bfloat16
    assert torch.allclose(result["logits"].double(), linear, rtol=2**-8, atol=0)
    routing = gpt_oss(result["logits"], top_k=TOP_K)
    wide = torch.nn.functional.pad(hidden, (0, 128 - GPT_OSS_H))
    expected = forward(MoeCall(wide, routing.ids, routing.scales, layer.experts))
    assert not expected[:, GPT_OSS_H:].any()
    assert same_bits(result["output"], expected[:, :GPT_OSS_H].contiguous())


def test_given_ids_and_weights_take_the_router_s_place(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    layer = read_layer(tmp_path, 1)
    hidden = write_input(tmp_path / "x", DEEPSEEK_H)
    routed = run_layer(layer, tmp_path / "x")
    names = ("token_selected_experts", "token_final_scales")
    ids, weights = (routed[name] for name in names)
    given = {"hidden": hidden, names[0]: ids.roll(1, 0).long(), names[1]: weights * 2}
    result = run_layer(layer, given)
    expected = forward(MoeCall(hidden, ids.roll(1, 0), weights * 2, layer.experts))
    assert [*result] == ["routed_output", *names]
    assert same_bits(result["routed_output"], expected)
    assert same_bits(forward(layer_call(layer, given)), expected)
    for wrong, message in (
        ({"logits": routed["logits"]}, "logits: expected none beside token_selected_experts and"),
        ({names[0]: ids + EXPERTS}, f"token_selected_experts: expected ids from -1 to {EXPERTS - 1}, got"),
        ({names[1]: weights[:, :1]}, r"token_final_scales: expected a float32 tensor of shape \[5, 2\]"),
        (
            {"padded": torch.ones(5, dtype=torch.bool)},
            "padded: expected none .*; ids of padded tokens are -1$",
        ),
        ({"hiden": hidden}, "did you mean hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            run_layer(layer, given | wrong)
    del given[names[1]]
    with pytest.raises(ValueError, match="token_final_scales: expected in the input, too"):
        run_layer(layer, given)


@pytest.mark.parametrize("options", [{}, {"experts": [2, 3]}, {"experts": [3, 1]}])
@pytest.mark.parametrize("ranks", [Ranks(), Ranks(tp_size=2, tp_rank=1)])
def test_the_call_of_a_rank(tmp_path: Path, options: dict[str, list[int]], ranks: Ranks) -> None:
    """Consecutive experts are a rank of the kernel's; of others it is given local ids."""
    make_checkpoint(tmp_path, "gpt_oss")
    write_input(tmp_path / "x", GPT_OSS_H)
    layer = open_layer(tmp_path, 1, options=ReadOptions(**options))
    call = layer_call(layer, tmp_path / "x", ranks=ranks)
    name = "rank_output" if options or ranks.tp_rank else "output"
    assert same_bits(forward(call)[:, :GPT_OSS_H], run_layer(layer, tmp_path / "x", ranks=ranks)[name])
    assert (call.ep_size, call.ep_rank) == ((2, 1) if options == {"experts": [2, 3]} else (1, 0))
    with pytest.raises(ValueError, match="ranks: expected one rank"):
        layer_call(layer, tmp_path / "x", ranks=Ranks(ep_size=2))


def test_given_logits_and_another_router(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    logits = torch.randn(5, EXPERTS)
    write_input(tmp_path / "x", GPT_OSS_H, logits=logits)
    layer = read_layer(tmp_path, 1)
    result = run_layer(layer, tmp_path / "x", router="mixtral", ranks=Ranks(ep_size=2))
    assert same_bits(result["logits"], logits)
    assert same_bits(result["token_final_scales"], mixtral(logits, top_k=TOP_K).scales)
    with pytest.raises(ValueError, match=r"router: expected one of .*'deepseek_v4', 'gpt_oss', 'mixtral'"):
        run_layer(layer, tmp_path / "x", router="sigmoid")
    with pytest.raises(ValueError, match="router: expected a router without a correction bias"):
        run_layer(layer, tmp_path / "x", router="deepseek_v4")
    with pytest.raises(ValueError, match="routed_scaling_factor: expected None with the router gpt_oss"):
        run_layer(replace(layer, routed_scaling_factor=1.5), tmp_path / "x")


def test_deepseek_layer_with_other_routers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    logits = torch.randn(5, EXPERTS)
    write_input(tmp_path / "x", DEEPSEEK_H, logits=logits)
    layer = read_layer(tmp_path, 1)
    result = run_layer(layer, tmp_path / "x", router="mixtral")  # without the factor
    assert same_bits(result["token_final_scales"], mixtral(logits, top_k=TOP_K).scales)
    with pytest.raises(ValueError, match="n_group: expected a divisor of E=4"):
        run_layer(layer, tmp_path / "x", router="deepseek_v3")
    with pytest.raises(ValueError, match=r"without a correction bias for layers\.0\.ffn\.\*"):
        run_layer(read_layer(tmp_path, 0), tmp_path / "x", router="deepseek_v3")


def test_ranks_and_kernel_are_passed_on(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    hidden = write_input(tmp_path / "x", DEEPSEEK_H)
    layer, kernel, ranks = read_layer(tmp_path, 1), Sm90Kernel.of_tiles((256, 128)), Ranks(ep_size=4)
    result = run_layer(layer, tmp_path / "x", ranks=ranks, kernel=kernel)
    routing = result["token_selected_experts"], result["token_final_scales"]
    call = MoeCall(hidden, *routing, layer.experts, kernel=kernel)
    assert same_bits(result["routed_output"], forward_all_ranks(call, ranks))
    assert not same_bits(result["routed_output"], forward(call))  # each rank rounds its own output
    with pytest.raises(ValueError, match="512"):  # does not divide K
        run_layer(layer, tmp_path / "x", kernel=Sm90Kernel.of_tiles((512, 128)))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_padded_layer_is_cut_where_the_checkpoint_ends(tmp_path: Path, tp_size: int) -> None:
    """gpt-oss on several ranks: I = 160 is five blocks, and four of what it was padded to would be cut elsewhere."""
    make_checkpoint(tmp_path, "gpt_oss")
    hidden = write_input(tmp_path / "x", GPT_OSS_H)
    layer = read_layer(tmp_path, 1)
    result = run_layer(layer, tmp_path / "x", ranks=Ranks(tp_size=tp_size))
    wide = torch.nn.functional.pad(hidden, (0, 128 - GPT_OSS_H))
    call = MoeCall(wide, result["token_selected_experts"], result["token_final_scales"], layer.experts)
    expected = forward_all_ranks(call, Ranks(tp_size=tp_size, intermediate_size=160))
    assert same_bits(result["output"], expected[:, :GPT_OSS_H].contiguous())
    moved = forward_all_ranks(call, Ranks(tp_size=tp_size))[:, :GPT_OSS_H].contiguous()
    assert same_bits(result["output"], moved) == (tp_size != 2)


@pytest.mark.parametrize("open_it", [read_layer, open_layer])
def test_one_tensor_parallel_rank(tmp_path: Path, open_it: Callable[..., CheckpointLayer]) -> None:
    """It is the rank's own kernel call, and all together are what all ranks give; the first has the bias."""
    make_checkpoint(tmp_path, "gpt_oss")
    hidden = write_input(tmp_path / "x", GPT_OSS_H)
    layer = open_it(tmp_path, 1)
    whole = run_layer(layer, tmp_path / "x", ranks=Ranks(tp_size=2))
    wide = torch.nn.functional.pad(hidden, (0, 128 - GPT_OSS_H))
    routing = whole["token_selected_experts"], whole["token_final_scales"]
    call = MoeCall(wide, *routing, read_layer(tmp_path, 1).experts)
    calls = rank_calls(call, Ranks(tp_size=2, intermediate_size=160))
    parts = []
    for tp_rank, of_rank in enumerate(calls):
        result = run_layer(layer, tmp_path / "x", ranks=Ranks(tp_size=2, tp_rank=tp_rank))
        assert "output" not in result
        parts.append(result["rank_output"])
        assert same_bits(parts[-1], forward(of_rank)[:, :GPT_OSS_H].contiguous())
    assert same_bits(gather(parts), whole["output"])
    with pytest.raises(ValueError, match="tp_rank: expected an int from 0 to 1, got 2"):
        Ranks(tp_size=2, tp_rank=2)
    with pytest.raises(ValueError, match="tp_rank: expected None with an ep_size of 2, got 0"):
        Ranks(ep_size=2, tp_size=2, tp_rank=0)


def test_wrong_inputs(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    good = torch.zeros(2, GPT_OSS_H, dtype=torch.bfloat16)
    for tensors, message in (
        ({"x": good}, "expected the tensor hidden and optionally logits, .*got x"),
        ({"routed_output": good}, "got routed_output$"),
        ({"hidden": good, "tokens": good.clone()}, "expected the tensor hidden .*got hidden, tokens"),
        ({"hidden": good.float()}, "hidden: expected a bfloat16 tensor"),
        ({"hidden": good[:, 1:].contiguous()}, r"hidden: expected .*\[M, 96\], got bfloat16 \[2, 95\]"),
        ({"hidden": good, "logits": torch.zeros(3, EXPERTS)}, "logits: expected"),
        ({"hidden": good, "padded": torch.zeros(3, dtype=torch.bool)}, "padded: expected"),
        ({"hidden": good, "shared_output": good[:1].clone()}, "shared_output: expected"),
    ):
        save_file(tensors, tmp_path / "x")
        with pytest.raises((TypeError, ValueError), match=message):
            run_layer(read_layer(tmp_path, 1), tmp_path / "x")
    with pytest.raises(CheckpointError):
        run_layer(read_layer(tmp_path, 1), tmp_path / "absent")
    write_config(tmp_path, "gpt_oss", num_experts_per_tok=None)
    save_file({"hidden": good}, tmp_path / "x")
    with pytest.raises(
        CheckpointError,
        match=r"expected num_experts_per_tok or .*, or top_k in the layer \(--top-k on the command line",
    ):
        run_layer(read_layer(tmp_path, 1), tmp_path / "x")
