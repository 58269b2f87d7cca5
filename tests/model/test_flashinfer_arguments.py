"""Layouts, tactics and options of flashinfer's call, where a wrong guess would give wrong numbers without a word."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.experts import PlainExperts
from mxfp4ref.formats.generations import BYTEWISE, PLAIN, WORDWISE, Generation
from mxfp4ref.formats.resize import to_logical, to_sm90
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model import flashinfer_arguments
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import drop_in, torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import forward
from mxfp4ref.model.forward import trace as moe_trace
from mxfp4ref.model.skipped import reset_skipped_slots, skipped_slots
from mxfp4ref.sm90.tactics import Sm90Kernel, Tactic, runnable_tactics
from tests.helpers import bits, layers
from tests.helpers.drop_in import CALL, EXPECTED, EXPERTS, SM90_CALL, arguments_of, oracle

FOLDED = "logical_weights_folded_scales"


@pytest.fixture(autouse=True)
def _not_warned_yet() -> Iterator[None]:
    flashinfer_arguments._warn_of_two_layouts.cache_clear()
    yield
    flashinfer_arguments._warn_of_two_layouts.cache_clear()


# --- the layout of flashinfer up to 0.6.9 -----------------------------------------------------------------


def folded(scales: Tensor | None) -> Tensor:
    """`[E, R, G]` as vLLM 0.17.1 and TensorRT-LLM fold it, `[E, G/4, 4R]`."""
    assert scales is not None
    experts, rows, groups = scales.shape
    by_four = scales.reshape(experts, rows, groups // 4, 4).permute(0, 2, 1, 3)
    return by_four.reshape(experts, groups // 4, rows * 4).contiguous()


def with_folded_scales(call: MoeCall, **changes: Any) -> dict[str, Any]:
    scales = [folded(call.experts.fc1_scales), folded(call.experts.fc2_scales)]
    return arguments_of(call) | {"quant_scales": scales} | changes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e8m0fnu])
def test_logical_weights_beside_folded_scales(dtype: torch.dtype) -> None:
    arguments = with_folded_scales(CALL)
    arguments["quant_scales"] = [scales.view(dtype) for scales in arguments["quant_scales"]]
    bits.assert_same(torch_ref_cutlass_fused_moe(**arguments, weight_layout=FOLDED)[0], EXPECTED)
    (de_interleaved,) = torch_ref_cutlass_fused_moe(**arguments, weight_layout="sm90")
    assert not torch.equal(de_interleaved, EXPECTED)


def test_its_kernel_has_an_arithmetic_of_its_own() -> None:
    """Over more than two K tiles the groups come in another order; beyond float32's range the first pair does too."""
    experts = layers.random_experts(4, hidden=768, inner=768, num_experts=1)
    call = layers.random_call(4, experts, tokens=4, top_k=1)
    trace = torch_ref_cutlass_fused_moe(**with_folded_scales(call), weight_layout=FOLDED, trace=True)
    expected = replace(call, kernel=Sm90Kernel(generation=PLAIN))
    bits.assert_same(trace.output, forward(expected))
    other = torch_ref_cutlass_fused_moe(
        **with_folded_scales(call), weight_layout=FOLDED, kernel=Sm90Kernel(generation=BYTEWISE), trace=True
    )
    assert not torch.equal(trace.fc1_accumulators, other.fc1_accumulators)
    case = open_goldens().load("gemm/first_group_overflows")
    (output,) = torch_ref_cutlass_fused_moe(**with_folded_scales(case.call()), weight_layout=FOLDED)
    bits.assert_same(output, forward(replace(case.call(), kernel=Sm90Kernel(generation=PLAIN))))
    assert not torch.equal(output, forward(replace(case.call(), kernel=Sm90Kernel(generation=BYTEWISE))))


def test_its_generation_names_the_layout() -> None:
    kernel = Sm90Kernel(generation=PLAIN)
    bits.assert_same(torch_ref_cutlass_fused_moe(**with_folded_scales(CALL), kernel=kernel)[0], EXPECTED)


def test_its_experts() -> None:
    experts = to_sm90(EXPERTS, PLAIN)
    assert isinstance(experts, PlainExperts)
    assert experts.generation is PLAIN
    back, some = to_logical(experts), experts.slice(1, 3)
    assert isinstance(some, PlainExperts)
    for name in ("fc1_weights", "fc1_scales", "fc2_weights", "fc2_scales"):
        bits.assert_same(getattr(back, name), getattr(EXPERTS, name))
    assert experts.stored("fc1", [2]).orders == (0, to_sm90(EXPERTS, BYTEWISE).stored("fc1", [2]).orders[1])
    wordwise = layers.to_sm90(EXPERTS).fc1_scales
    with pytest.raises(ValueError, match=r"^fc1_scales: expected folded scales .* \(plain\) as torch.int32"):
        replace(experts, fc1_scales=wordwise)


def test_its_kernel_takes_255_for_nan() -> None:
    arguments = with_folded_scales(CALL)
    expert = int(CALL.token_selected_experts[CALL.token_selected_experts >= 0][0])
    arguments["quant_scales"][0][expert, 1, 5] = 255
    with pytest.raises(NotImplementedError, match=r"^scales: expected bytes up to 254, got 255.* NaN"):
        torch_ref_cutlass_fused_moe(**arguments, weight_layout=FOLDED)


def test_a_call_that_may_be_in_two_layouts_warns_once() -> None:
    call = replace(CALL, experts=layers.to_sm90(EXPERTS, BYTEWISE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            bits.assert_same(torch_ref_cutlass_fused_moe(**arguments_of(call))[0], EXPECTED)
    (warning,) = caught
    assert warning.category is UserWarning
    assert "weight_layout='sm90' or weight_layout='logical_weights_folded_scales'" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        (WORDWISE, {}),
        (BYTEWISE, {"weight_layout": "sm90"}),
        (BYTEWISE, {"kernel": Sm90Kernel(generation=BYTEWISE)}),
    ],
)
def test_others_do_not_warn(generation: Generation, named: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bits.assert_same(
            oracle(replace(CALL, experts=layers.to_sm90(EXPERTS, generation)), **named), EXPECTED
        )


# --- scales as float8_e8m0fnu -----------------------------------------------------------------------------


def test_scales_of_a_dtype_of_their_own_are_their_bytes() -> None:
    for call in (CALL, replace(CALL, experts=layers.to_sm90(EXPERTS, dtype=torch.uint8))):
        scales = [s.view(torch.float8_e8m0fnu) for s in arguments_of(call)["quant_scales"]]
        layout = "logical" if call is CALL else "sm90"
        bits.assert_same(oracle(call, quant_scales=scales, weight_layout=layout), EXPECTED)


# --- profile_ids ------------------------------------------------------------------------------------------

DEEP = layers.random_call(
    4, layers.random_experts(4, hidden=768, inner=768, num_experts=1), tokens=4, top_k=1
)
DEEP_SM90 = replace(DEEP, experts=layers.to_sm90(DEEP.experts))


@pytest.mark.parametrize(
    ("profile_ids", "tile_k"),
    [([4, 120], (256, 256)), ([-1, 120], (128, 256)), ((4, -1), (256, 128)), ([-1, -1], (128, 128))],
)
def test_profile_ids_decide(profile_ids: Any, tile_k: tuple[int, int]) -> None:
    got = torch_ref_cutlass_fused_moe(**arguments_of(DEEP_SM90), profile_ids=profile_ids, trace=True)
    for tiles in itertools.product((128, 256), repeat=2):
        expected = moe_trace(with_tiles(tiles))
        for number, name in enumerate(("fc1_accumulators", "fc2_accumulators")):
            same = torch.equal(getattr(got, name), getattr(expected, name))
            assert same == (tiles[number] == tile_k[number])
    bits.assert_same(got.output, forward(with_tiles(tile_k)))
    bits.assert_same(oracle(DEEP_SM90, profile_ids=profile_ids), got.output)


def with_tiles(tile_k: tuple[int, int]) -> MoeCall:
    return replace(DEEP, kernel=Sm90Kernel.of_tiles(tile_k))


def test_every_id_reaches_the_call_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sm90Kernel] = []

    def record(call: MoeCall) -> Tensor:
        seen.append(call.kernel)
        return EXPECTED

    monkeypatch.setattr("mxfp4ref.model.flashinfer.moe.forward", record)
    shapes = (
        (2 * EXPERTS.intermediate_size, EXPERTS.hidden_size),
        (EXPERTS.hidden_size, EXPERTS.intermediate_size),
    )
    for gemm, shape in enumerate(shapes):
        runnable = runnable_tactics(*shape)
        assert 0 < len(runnable) < 116
        for number in range(116):
            ids = [-1, -1]
            ids[gemm] = number + 116 * gemm
            tactic = Sm90Kernel.of_profile_ids(ids).tactics[gemm]
            if tactic in runnable:
                oracle(profile_ids=ids)
                assert seen.pop().tactics[gemm] == tactic
                continue
            message = (
                rf"^profile_ids\[{gemm}\]: expected a tactic that the kernel can run .*, which is {tactic}$"
            )
            with pytest.raises(ValueError, match=message):
                oracle(profile_ids=ids)
    assert not seen


def test_profile_ids_and_kernel() -> None:
    kernel = Sm90Kernel(Tactic((64, 16, 256)), Tactic((64, 32, 128)))
    bits.assert_same(oracle(kernel=kernel, profile_ids=kernel.profile_ids), oracle(kernel=kernel))
    message = (
        r"^profile_ids: expected \[4, 128\], which are the tactics of kernel \(64x16x256/1x1, 64x32x128/1x1\), got "
        r"\[4, -1\], which are 64x16x256/1x1, 64x16x128/1x1; leave one of the two out$"
    )
    with pytest.raises(ValueError, match=message.replace("128\\]", f"{kernel.profile_ids[1]}\\]")):
        oracle(kernel=kernel, profile_ids=[4, -1])


@pytest.mark.parametrize("generation", [BYTEWISE, PLAIN])
def test_older_releases_ignore_profile_ids(generation: Generation) -> None:
    experts = to_sm90(EXPERTS, generation)
    layout = FOLDED if generation is PLAIN else "sm90"
    call = replace(CALL, experts=experts)
    bits.assert_same(oracle(call, weight_layout=layout, profile_ids=[4, 500]), EXPECTED)


# --- a function with flashinfer's arguments alone ---------------------------------------------------------


def test_drop_in_has_flashinfers_signature() -> None:
    ours = inspect.signature(torch_ref_cutlass_fused_moe).parameters
    theirs = inspect.signature(drop_in()).parameters
    assert list(ours.values())[: len(theirs)] == list(theirs.values())
    assert list(ours)[len(theirs) :] == ["kernel", "weight_layout", "strict", "trace"]
    assert drop_in().__name__ == "cutlass_fused_moe"
    bits.assert_same(drop_in()(**arguments_of(SM90_CALL))[0], EXPECTED)


def test_drop_in_keeps_what_it_is_given() -> None:
    ids = CALL.token_selected_experts.clone()
    ids[0] = 2
    ids[1, 0] = 99
    expected = oracle(token_selected_experts=ids, strict=False)
    reset_skipped_slots()
    lenient = drop_in(strict="count")
    bits.assert_same(lenient(**arguments_of(SM90_CALL) | {"token_selected_experts": ids})[0], expected)
    assert (skipped_slots().owned_by_none, skipped_slots().repeated) == (1, 1)
    reset_skipped_slots()
    bits.assert_same(drop_in(weight_layout=FOLDED)(**with_folded_scales(CALL))[0], EXPECTED)
    kernel = Sm90Kernel.of_tiles((256, 256))
    bits.assert_same(drop_in(kernel=kernel)(**arguments_of(DEEP_SM90))[0], forward(with_tiles((256, 256))))
    with pytest.raises(TypeError, match="strict"):
        drop_in()(**arguments_of(SM90_CALL), strict=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "wordwise"}, "kernel: expected Sm90Kernel, got str"),
        ({"weight_layout": "hopper"}, "weight_layout: expected one of 'sm90'"),
        ({"strict": None}, "strict: expected one of True, False, 'count', got None"),
    ],
)
def test_drop_in_refuses_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        drop_in(**options)
