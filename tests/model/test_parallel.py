from __future__ import annotations

import multiprocessing
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.formats.generations import GENERATIONS
from mxfp4ref.formats.resize import resize_experts, to_logical, to_sm90
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import (
    Ranks,
    forward_all_ranks,
    gather,
    global_to_local,
    local_experts,
    local_to_global,
    split_experts,
    split_intermediate,
)
from tests.helpers import bits, layers

E, K, H, M = 8, 3, 128, 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_experts(intermediate: int = 128) -> Experts:
    return layers.random_experts(
        0, num_experts=E, hidden=H, inner=intermediate, biases=True, parameters=("swiglu_limit",)
    )


def make_inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(M)]).to(torch.int32)
    ids[3] = -1  # a padded row
    x = torch.randn(M, H, generator=generator).bfloat16()
    return x, ids, torch.rand(M, K, generator=generator)


# Ids


def test_ids_of_each_rank():
    ids = torch.tensor([[0, 3, 7], [-1, 4, 2]], dtype=torch.int32)
    options = {"num_experts": 8, "ep_size": 4}
    assert local_experts(ids, **options, ep_rank=1).tolist() == [[False, True, False], [False, False, True]]
    assert global_to_local(ids, **options, ep_rank=1).tolist() == [[-1, 1, -1], [-1, -1, 0]]
    assert global_to_local(ids, **options, ep_rank=3).tolist() == [[-1, -1, 1], [-1, -1, -1]]


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
def test_ranks_partition_the_slots_and_the_maps_are_inverse(ep_size):
    _, ids, _ = make_inputs()
    rejoined = torch.full_like(ids, -1)
    owners = torch.zeros_like(ids)
    for ep_rank in range(ep_size):
        options = {"num_experts": E, "ep_size": ep_size, "ep_rank": ep_rank}
        mine = local_experts(ids, **options)
        local = global_to_local(ids, **options)
        assert local.dtype == torch.int32
        assert (local[~mine] == -1).all()
        assert ((local[mine] >= 0) & (local[mine] < E // ep_size)).all()
        back = local_to_global(local, **options)
        assert back.dtype == torch.int32
        assert (back[~mine] == -1).all()
        rejoined = torch.where(mine, back, rejoined)
        owners += mine
    assert rejoined.tolist() == ids.tolist()
    assert owners.tolist() == (ids >= 0).int().tolist()


def test_local_ids_are_not_for_the_kernel():
    """Handed over as if they were global, they lose every expert of rank 1: the double mapping."""
    x, ids, scales = make_inputs()
    rank1 = split_experts(make_experts(), 2)[1]
    local = global_to_local(ids, num_experts=E, ep_size=2, ep_rank=1)
    right = forward(MoeCall(x, ids, scales, rank1, ep_size=2, ep_rank=1))
    wrong = forward(MoeCall(x, local, scales, rank1, ep_size=2, ep_rank=1, strict=False))
    assert right.abs().max() > 0
    assert not bits.bits_of(wrong).any()
    # As a rank that owns everything it holds, it gives the right bits.
    bits.assert_same(forward(MoeCall(x, local, scales, rank1)), right)


# Shards


def test_split_experts():
    experts = make_experts()
    ranks = split_experts(experts, 4)
    assert [rank.num_experts for rank in ranks] == [2, 2, 2, 2]
    for field in fields(Experts):
        whole = getattr(experts, field.name)
        parts = [getattr(rank, field.name) for rank in ranks]
        assert parts == [None] * 4 if whole is None else torch.equal(torch.cat(parts), whole)


def test_split_intermediate():
    experts = make_experts(256)
    shards = split_intermediate(experts, 2)
    for name in ("fc1_weights", "fc1_scales", "fc1_biases"):
        up, gate = getattr(experts, name).chunk(2, dim=1)
        for rank, shard in enumerate(shards):
            half = slice(rank * 128, (rank + 1) * 128)
            assert torch.equal(getattr(shard, name), torch.cat([up[:, half], gate[:, half]], dim=1))
    for name in ("fc2_weights", "fc2_scales"):
        assert torch.equal(torch.cat([getattr(s, name) for s in shards], dim=2), getattr(experts, name))
        assert all(getattr(s, name).is_contiguous() for s in shards)
    assert [s.fc2_biases is None for s in shards] == [False, True]
    assert all(torch.equal(s.swiglu_limit, experts.swiglu_limit) for s in shards)
    assert [s.intermediate_size for s in shards] == [128, 128]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_split_of_experts_in_sm90_layout(generation, tp_size):
    experts = make_experts(256)
    wanted = split_intermediate(experts, tp_size)
    for got, expected in zip(split_intermediate(to_sm90(experts, generation), tp_size), wanted, strict=True):
        if isinstance(got, Sm90Experts):  # the only shard
            got = to_logical(got)
        for field in fields(Experts):
            one, other = getattr(got, field.name), getattr(expected, field.name)
            assert one is other is None or torch.equal(one, other)


def test_split_of_experts_that_are_not_quantized():
    experts = layers.random_experts(2, num_experts=2, hidden=64, inner=128, quantized=False)
    first, second = split_intermediate(experts, 2)
    assert torch.equal(torch.cat([first.fc2_weights, second.fc2_weights], dim=2), experts.fc2_weights)
    assert torch.equal(second.fc1_weights[:, :64], experts.fc1_weights[:, 64:128])
    assert first.fc1_scales is second.fc2_scales is None


@pytest.mark.parametrize(
    ("tp_size", "widths", "size"),
    [
        (1, [480], 512),
        (2, [256, 224], 256),
        (4, [128, 128, 128, 96], 128),
        (8, [64] * 7 + [32], 128),
        (16, [32] * 15 + [0], 128),
    ],
)
def test_blocks_are_shared_out_and_shards_padded(tp_size, widths, size):
    """I = 480 is 15 blocks of 32. What it was padded to does not move the cuts."""
    experts = layers.random_experts(3, num_experts=2, hidden=128, inner=480, biases=True)
    shards = split_intermediate(resize_experts(experts, 128, 512), tp_size, intermediate_size=480)
    assert [shard.intermediate_size for shard in shards] == [size] * tp_size
    start = 0
    for shard, width in zip(shards, widths, strict=True):
        for name in ("fc1_weights", "fc1_scales", "fc1_biases"):
            for whole, half in zip(
                getattr(experts, name).chunk(2, 1), getattr(shard, name).chunk(2, 1), strict=True
            ):
                assert torch.equal(half[:, :width], whole[:, start : start + width])
                assert not half[:, width:].any()
        for name, unit in (("fc2_weights", 2), ("fc2_scales", 32)):
            part = getattr(shard, name)
            kept = slice(start // unit, (start + width) // unit)
            assert torch.equal(part[..., : width // unit], getattr(experts, name)[..., kept])
            assert not part[..., width // unit :].any()
        start += width
    assert start == 480


def test_padding_before_the_split_changes_no_bit():
    x, ids, scales = make_inputs()
    experts = layers.random_experts(3, num_experts=E, hidden=H, inner=384, biases=True)
    wide = resize_experts(experts, H, 512)
    for tp_size in (1, 2, 4, 8):
        bare = forward_all_ranks(MoeCall(x, ids, scales, experts), Ranks(tp_size=tp_size))
        ranks = Ranks(tp_size=tp_size, intermediate_size=384)
        bits.assert_same(forward_all_ranks(MoeCall(x, ids, scales, wide), ranks), bare)
    # Without being told I the cut of two ranks lies elsewhere.
    call = MoeCall(x, ids, scales, wide)
    other = forward_all_ranks(call, Ranks(tp_size=2))
    assert not torch.equal(other, forward_all_ranks(call, Ranks(tp_size=2, intermediate_size=384)))


# Sums


def test_reductions():
    rows = [[1.0, 256.0, -0.0], [2.0**-8, 1.0, -0.0], [2.0**-8, 1.0, -0.0]]
    outputs = [torch.tensor([row], dtype=torch.bfloat16) for row in rows]
    # 1 + 2^-8 is a tie, to even: 1. In float32 the two small terms add up to 2^-7, one bf16 step.
    assert gather(outputs).tolist() == [[1 + 2.0**-7, 258.0, 0.0]]
    assert gather(outputs, reduction="bf16").tolist() == [[1.0, 256.0, 0.0]]
    assert gather(outputs[::-1], reduction="bf16").tolist() == [[1 + 2.0**-7, 258.0, 0.0]]
    assert (
        bits.bits_of(gather(outputs))[0, 2] == bits.bits_of(gather(outputs[:1]))[0, 2] == 0x8000
    )  # -0 stays


def test_float32_sums_are_taken_in_rank_order():
    parts = [torch.tensor([[v]], dtype=torch.bfloat16) for v in (1.0, 2.0**30, -(2.0**30))]
    assert gather(parts).item() == 0.0
    assert gather(parts[::-1]).item() == 1.0


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_expert_parallelism_against_one_rank(ep_size):
    """The same bits where one rank has all of a token's experts, elsewhere within the roundings of the ranks."""
    x, ids, scales = make_inputs()
    experts = make_experts()
    alone = forward_all_ranks(MoeCall(x, ids, scales, experts), Ranks())
    bits.assert_same(alone, forward(MoeCall(x, ids, scales, experts)))
    together = forward_all_ranks(MoeCall(x, ids, scales, experts), Ranks(ep_size=ep_size))
    outputs = [
        forward(MoeCall(x, ids, scales, part, ep_size=ep_size, ep_rank=rank))
        for rank, part in enumerate(split_experts(experts, ep_size))
    ]
    bits.assert_same(together, gather(outputs))
    error = (together.double() - alone.double()).abs()
    assert (error <= 2.0**-7 * sum(o.double().abs() for o in outputs)).all()
    assert not torch.equal(together, alone)

    rank = ids // (E // ep_size)
    one_rank_a_token = ids.where(rank == rank[:, :1], -1)
    alone = forward_all_ranks(MoeCall(x, one_rank_a_token, scales, experts), Ranks())
    assert alone.abs().max() > 0
    for reduction in ("float32", "bf16"):
        got = forward_all_ranks(
            MoeCall(x, one_rank_a_token, scales, experts), Ranks(ep_size=ep_size, reduction=reduction)
        )
        bits.assert_same(got, alone)


def test_tensor_parallelism_against_one_rank():
    """With the second shard's columns of fc2 zero its rank gives 0, and the bias must not come twice."""
    x, ids, scales = make_inputs()
    experts = make_experts(256)
    general = forward_all_ranks(MoeCall(x, ids, scales, experts), Ranks(tp_size=2))
    assert not torch.equal(general, forward_all_ranks(MoeCall(x, ids, scales, experts), Ranks()))

    weights = experts.fc2_weights.clone()
    weights[:, :, 64:] = 0
    experts = replace(experts, fc2_weights=weights)
    alone = forward(MoeCall(x, ids, scales, experts))
    bits.assert_same(forward_all_ranks(MoeCall(x, ids, scales, experts), Ranks(tp_size=2)), alone)
    # The shards are the same to a kernel that is told its tp_rank and to one that is not.
    second = split_intermediate(experts, 2)[1]
    told = forward(MoeCall(x, ids, scales, second, tp_size=2, tp_rank=1))
    bits.assert_same(told, forward(MoeCall(x, ids, scales, second)))
    assert (told == 0).all()


# Several processes

WORLD = 4
LAYOUTS = [(4, 1), (2, 2)]


def run_rank(rank: int, folder: str) -> None:
    """One process: its rank's output in every layout, exchanged with the others and combined."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )
    x, ids, scales = make_inputs()
    experts = make_experts(256)
    results = {}
    for ep_size, tp_size in LAYOUTS:
        ep_rank, tp_rank = divmod(rank, tp_size)
        shard = split_intermediate(split_experts(experts, ep_size)[ep_rank], tp_size)[tp_rank]
        output = forward(
            MoeCall(x, ids, scales, shard, ep_size=ep_size, ep_rank=ep_rank, tp_size=tp_size, tp_rank=tp_rank)
        )
        others = [torch.empty(M, 2 * H, dtype=torch.uint8) for _ in range(WORLD)]
        dist.all_gather(others, output.view(torch.uint8))  # as bytes: gloo knows few dtypes
        for reduction in ("float32", "bf16"):
            combined = gather([o.view(torch.bfloat16) for o in others], reduction=reduction)
            results[ep_size, tp_size, reduction] = combined.view(torch.int16).tolist()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo")
def test_processes_get_the_bits_of_the_simulation(tmp_path):
    # Forked from a process that has imported this file once, and has no threads yet.
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        run_rank, args=(str(tmp_path),), nprocs=WORLD, start_method="forkserver"
    )
    x, ids, scales = make_inputs()
    experts = make_experts(256)
    for ep_size, tp_size in LAYOUTS:
        for reduction in ("float32", "bf16"):
            wanted = forward_all_ranks(
                MoeCall(x, ids, scales, experts), Ranks(ep_size=ep_size, tp_size=tp_size, reduction=reduction)
            )
            for rank in range(WORLD):
                results = torch.load(tmp_path / f"rank{rank}.pt")
                assert results[ep_size, tp_size, reduction] == wanted.view(torch.int16).tolist()


# Refusals

IDS = torch.tensor([[0, 7]], dtype=torch.int32)
ONE = torch.zeros(2, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: slots(ep_size=3), ValueError, "ep_size: expected a divisor of the 8 experts, got 3"),
        (lambda: slots(ep_rank=2), ValueError, "ep_rank: expected an int from 0 to 1, got 2"),
        (lambda: slots(ep_size=0), ValueError, "ep_size: .* at least 1, got 0"),
        (lambda: slots(ids=IDS + 1), ValueError, r"ids: expected ids from -1 to 7, got 8 at \[0, 1\]"),
        (lambda: slots(ids=IDS - 2), ValueError, r"ids: .* got -2 at \[0, 0\]"),
        (lambda: slots(ids=IDS.long()), TypeError, "ids: expected an int32 tensor"),
        (lambda: slots(ids=IDS[0]), ValueError, r"ids: .*\[M, k\]"),
        (
            lambda: local_to_global(IDS, num_experts=8, ep_size=2, ep_rank=1),
            ValueError,
            "ids: expected ids from -1 to 3, got 7",
        ),
        (lambda: split_experts(make_experts(), 3), ValueError, "ep_size: .* got 3"),
        (lambda: split_experts(make_experts(), 0), ValueError, "ep_size: "),
        (
            lambda: split_intermediate(make_experts(), 3),
            ValueError,
            "tp_size: expected a divisor of the intermediate size 128, such as 1, 2, 4, 8, 16, got 3",
        ),
        (
            lambda: split_intermediate(make_experts(), 3, intermediate_size=64),
            ValueError,
            "tp_size: expected a divisor of the intermediate size 64, such as 1, 2, 4, 8, 16, got 3",
        ),
        (
            lambda: split_intermediate(make_experts(), 2, intermediate_size=160),
            ValueError,
            "intermediate_size: expected an int from 32 to 128, got 160",
        ),
        (
            lambda: split_intermediate(make_experts(), 2, intermediate_size=48),
            ValueError,
            "intermediate_size: expected a multiple of 32, got 48",
        ),
        (
            lambda: split_intermediate(make_experts(), 2, intermediate_size=64),
            ValueError,
            "fc1_weights: expected zeros beyond H=128, I=64",
        ),
        (
            lambda: Ranks(intermediate_size=0),
            ValueError,
            "intermediate_size: expected an int at least 32, got 0",
        ),
        (lambda: split_intermediate(make_experts(), 0), ValueError, "tp_size: "),
        (lambda: gather([]), ValueError, "outputs: expected at least one"),
        (lambda: gather([ONE, ONE[:1]]), ValueError, r"outputs\[1\]: .*\[2, 3\], got bfloat16 \[1, 3\]"),
        (lambda: gather([ONE.float()]), TypeError, r"outputs\[0\]: "),
        (lambda: gather([ONE], reduction="tree"), ValueError, "reduction: expected one of 'float32', 'bf16'"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def slots(ids=IDS, num_experts=8, ep_size=2, ep_rank=0):
    return local_experts(ids, num_experts=num_experts, ep_size=ep_size, ep_rank=ep_rank)
