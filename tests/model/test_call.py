"""The arguments of a forward: what is refused, and with which words."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mxfp4ref.model.call import PADDING_ID, MoeCall
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import layers

EXPERTS = layers.random_experts(1, num_experts=4, hidden=256, inner=128)
CALL = layers.random_call(1, EXPERTS, tokens=5, top_k=2)


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def with_ids(*rows: list[int], **changes: object) -> MoeCall:
    """A call of as many tokens as there are rows of ids."""
    count, top_k = len(rows), len(rows[0])
    return replace(
        CALL,
        input=CALL.input[:1].expand(count, -1),
        token_selected_experts=ids(*rows),
        token_final_scales=torch.ones(count, top_k),
        **changes,  # type: ignore[arg-type]
    )


def test_properties() -> None:
    assert (CALL.num_tokens, CALL.top_k, CALL.num_global_experts) == (5, 2, 4)
    assert replace(CALL, ep_size=3, ep_rank=2).num_global_experts == 12
    part = CALL.select(slice(1, 3))
    assert part.num_tokens == 2
    assert torch.equal(part.input, CALL.input[1:3])
    assert torch.equal(part.token_selected_experts, CALL.token_selected_experts[1:3])
    assert torch.equal(part.token_final_scales, CALL.token_final_scales[1:3])
    assert part.experts is CALL.experts


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"experts": None}, TypeError, "experts: expected Experts, got NoneType"),
        (
            {"input": CALL.input.float()},
            TypeError,
            "input: expected a bfloat16 tensor of shape [M, 256], got float32",
        ),
        (
            {"input": CALL.input[:, :128]},
            ValueError,
            "input: expected a bfloat16 tensor of shape [M, 256], got",
        ),
        ({"input": CALL.input[0]}, ValueError, "input: expected a bfloat16 tensor of shape [M, 256], got"),
        (
            {"token_selected_experts": CALL.token_selected_experts.long()},
            TypeError,
            "token_selected_experts: expected an int32 tensor of shape [M=5, k], got int64 [5, 2]",
        ),
        (
            {"token_selected_experts": CALL.token_selected_experts[:4]},
            ValueError,
            "token_selected_experts: expected an int32 tensor of shape [M=5, k], got int32 [4, 2]",
        ),
        (
            {"token_final_scales": CALL.token_final_scales.bfloat16()},
            TypeError,
            "token_final_scales: expected a float32 tensor of shape [M=5, k=2], got bfloat16 [5, 2]",
        ),
        (
            {"token_final_scales": CALL.token_final_scales[:, :1]},
            ValueError,
            "token_final_scales: expected a float32 tensor of shape [M=5, k=2], got float32 [5, 1]",
        ),
        ({"ep_size": 0}, ValueError, "ep_size: expected an int from 1 to "),
        ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank: expected an int from 0 to 1, got 2"),
        ({"ep_rank": -1}, ValueError, "ep_rank: expected an int from 0 to 0, got -1"),
        ({"ep_rank": 0.0}, TypeError, "ep_rank: expected an int, got float 0.0"),
        ({"tp_size": True}, TypeError, "tp_size: expected an int, got bool True"),
        ({"tp_size": 2, "tp_rank": 3}, ValueError, "tp_rank: expected an int from 0 to 1, got 3"),
        ({"kernel": (128, 128)}, TypeError, "kernel: expected Sm90Kernel, got tuple"),
        (
            {"kernel": Sm90Kernel.of_tiles((512, 128))},
            ValueError,
            "kernel: expected a K tile that divides GEMM1's K = 256, got tactic 64x16x512/1x1",
        ),
        (
            {"kernel": Sm90Kernel.of_tiles((256, 256))},
            ValueError,
            "kernel: expected a K tile that divides GEMM2's K = 128, got tactic 64x16x256/1x1",
        ),
    ],
)
def test_refusals(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        replace(CALL, **changes)  # type: ignore[arg-type]


def test_legitimate_tiles() -> None:
    for tile_k in ((128, 128), (256, 128)):
        for tile_n in ((16, 16), (256, 64)):
            kernel = Sm90Kernel.of_tiles(tile_k, tile_n)
            assert replace(CALL, kernel=kernel).kernel.tile_k == tile_k


def test_bf16_experts_have_no_tactic_to_fit() -> None:
    experts = layers.random_experts(2, hidden=96, inner=32, quantized=False)
    kernel = Sm90Kernel.of_tiles((512, 512))
    assert layers.random_call(2, experts, kernel=kernel).kernel == kernel


@pytest.mark.parametrize("bad", [4, 5, -2, 2**31 - 1, -(2**31)])
def test_refuses_an_id_that_no_rank_owns(bad: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^token_selected_experts: expected global ids from 0 to 3, or -1 for padding, got {bad} "
        r"at token 1, slot 1 \(2 in all\); strict=False skips such slots",
    ):
        with_ids([0, 1], [2, bad], [bad, 3])
    assert with_ids([0, 1], [2, bad], strict=False).strict is False


def test_ids_of_other_ranks_are_legitimate() -> None:
    for rank in (0, 1, 2):
        with_ids([0, 11], [4, 7], ep_size=3, ep_rank=rank)
    with pytest.raises(ValueError, match=r"expected global ids from 0 to 11, .* got 12 at token 0, slot 0"):
        with_ids([12, 0], ep_size=3)


def test_refuses_an_expert_named_twice() -> None:
    with pytest.raises(
        ValueError,
        match=r"^token_selected_experts: expected each expert at most once per token, got \[3, 0, 3\] at token 1 "
        r"\(2 tokens in all\); strict=False counts the first slot only",
    ):
        with_ids([0, 1, 2], [3, 0, 3], [1, 1, 1])
    # Not even one of another rank.
    with pytest.raises(ValueError, match="at most once per token"):
        with_ids([7, 7], ep_size=2)
    assert with_ids([3, 3], strict=False).top_k == 2


def test_padding_may_repeat() -> None:
    with_ids([PADDING_ID, PADDING_ID, 0])


def test_empty_batches_and_no_slots() -> None:
    empty = CALL.select(slice(0, 0))
    assert (empty.num_tokens, empty.top_k) == (0, 2)
    none = replace(
        CALL,
        token_selected_experts=torch.zeros(5, 0, dtype=torch.int32),
        token_final_scales=torch.zeros(5, 0),
    )
    assert none.top_k == 0


def test_any_routing_weight_is_legitimate() -> None:
    replace(CALL, token_final_scales=torch.full((5, 2), torch.nan))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_refuses_two_devices() -> None:
    with pytest.raises(
        ValueError, match=r"^experts: expected a tensor on cpu like input, got one on cuda:0$"
    ):
        replace(CALL, experts=EXPERTS.to("cuda"))
    with pytest.raises(ValueError, match=r"^token_final_scales: .* got one on cuda:0$"):
        replace(CALL, token_final_scales=CALL.token_final_scales.cuda())
