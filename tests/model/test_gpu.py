"""The forward on a GPU: there, and by Triton's interpreter on numbers that ordinary arithmetic gets right."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, WORDWISE, Generation
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90, unfold_scales_sm90
from mxfp4ref.model import gpu, gpu_trial
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, forward, select_local, trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import (
    ACTIVATIONS,
    GEGLU,
    GEGLU_TANH,
    GELU,
    IDENTITY,
    RELU,
    RELU2,
    SILU,
    SITU,
    SWIGLU,
    SWIGLU_BIAS,
    SWIGLU_STEP,
    activate,
)
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gpu.tiles import MIDDLE, NARROW, OFFERED, WIDE, Tiles, tiles_for
from mxfp4ref.sm90.tactics import Sm90Kernel, Tactic
from tests.helpers import bits
from tests.helpers.usual import first

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow and the like
LAYOUTS = (None, *GENERATIONS)  # None are logical weights
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """The kernels are run by Triton's interpreter, on CPU tensors."""
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    if torch.cuda.is_available():
        pytest.skip("the kernels themselves are tested")

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("mxfp4ref.sm90.gpu")]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton's own functions are for a GPU if it was imported before.
        for module in (triton.language, triton.language.standard):
            for name, function in list(vars(module).items()):
                if isinstance(function, triton.runtime.JITFunction):
                    patch.setattr(module, name, InterpretedFunction(function.fn))
        forget()
        yield
        forget()


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator)


def easy_experts(
    generator: torch.Generator, layout: Generation | None, experts: int, hidden: int, inner: int
) -> Experts:
    """Sums of products are small multiples of 1/2; adding groups up rounds, so that their order shows.

    Gates are so large that their sigmoid is 0 or 1, and the limit keeps GEMM2's input to multiples of 32.
    """
    codes, scales = [], []
    for rows, depth, spread in ((2 * inner, hidden, 14), (hidden, inner, 20)):
        codes.append(integers(generator, 0, 255, experts, rows, depth // 2).to(torch.uint8))
        scales.append(integers(generator, 127, 127 + spread, experts, rows, depth // 32).to(torch.uint8))
    gate = 2.0**24 * (2 * integers(generator, 0, 1, experts, inner) - 1)
    optional = {
        "fc1_biases": torch.cat((integers(generator, -9, 9, experts, inner), gate), 1).to(torch.bfloat16),
        "fc2_biases": integers(generator, -9, 9, experts, hidden).to(torch.bfloat16),
        "swiglu_alpha": 0.5 * integers(generator, 1, 4, experts),
        "swiglu_beta": integers(generator, -2, 2, experts).float(),
        "swiglu_limit": torch.full((experts,), 64.0),
    }
    if layout is None:
        return Experts(codes[0], scales[0], codes[1], scales[1], **optional)
    codes = [interleave_weights_sm90(t, layout) for t in codes]
    scales = [fold_scales_sm90(t, layout) for t in scales]
    return Sm90Experts(codes[0], scales[0], codes[1], scales[1], **optional)


def easy_call(layout: Generation | None, **changes: Any) -> MoeCall:
    generator = torch.Generator().manual_seed(1)
    experts = easy_experts(generator, layout, 2, 256, 128)
    arguments: dict[str, Any] = {
        "input": integers(generator, -2, 2, 5, 256).to(torch.bfloat16),
        # Of rank 1 are 2 and 3: padding, other ranks' experts, one named twice, one token without any.
        "token_selected_experts": torch.tensor([[2, 3], [3, 2], [-1, 3], [3, 3], [0, 9]], dtype=torch.int32),
        "token_final_scales": 0.25 * integers(generator, 1, 9, 5, 2),
        "ep_size": 2,
        "ep_rank": 1,
        "strict": False,
        "experts": experts,
    }
    return MoeCall(**{**arguments, **changes})


def assert_same_trace(parts: list[tuple[Tensor, dict[str, Tensor]]], expected: MoeTrace) -> None:
    bits.assert_same(torch.cat([output for output, _ in parts]), expected.output)
    for name in parts[0][1]:
        got = torch.cat([kept[name] for _, kept in parts])
        order = torch.argsort(torch.cat([kept["expert"] for _, kept in parts]), stable=True)
        bits.assert_same(got[order], getattr(expected, name))


# --- interpreted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", first(1, LAYOUTS))
def test_the_forward_interpreted(interpreted: None, layout: Generation | None) -> None:
    call = easy_call(layout)
    parts = list(gpu.forward_in_parts(call, keep=True, tiles=MIDDLE))
    assert len(parts) == 1
    assert {*parts[0][1], "output"} == {field.name for field in dataclasses.fields(MoeTrace)}
    assert_same_trace(parts, trace(call))


def test_some_tokens_at_a_time(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows count from the first token on: their positions decide which swap the first two groups."""
    call = easy_call(WORDWISE, kernel=Sm90Kernel.of_tiles((128, 128), (64, 64)), tp_size=2, tp_rank=1)
    # These two products overflow each; which rows give Inf depends on the order in which they are rounded.
    for name in ("fc1_scales", "fc2_scales"):
        scales = unfold_scales_sm90(getattr(call.experts, name))
        scales[:, ::2, :2] = 252
        getattr(call.experts, name).copy_(fold_scales_sm90(scales))
    monkeypatch.setattr(gpu, "_INTERMEDIATE_BYTES", 3 * 2 * (2 * (3 * 128 + 256) + 4 * (2 * 128 + 256)))
    parts = list(gpu.forward_in_parts(call, keep=True, tiles=MIDDLE))
    assert [len(output) for output, _ in parts] == [3, 2]
    assert_same_trace(parts, trace(call))


@pytest.mark.parametrize("tokens", [0, 2])
def test_calls_without_rows(interpreted: None, tokens: int) -> None:
    call = easy_call(None)
    ids = call.token_selected_experts[:tokens].clone().fill_(-1)
    scales = call.token_final_scales[:tokens]
    call = dataclasses.replace(
        call, input=call.input[:tokens], token_selected_experts=ids, token_final_scales=scales
    )
    assert_same_trace(list(gpu.forward_in_parts(call, keep=True)), trace(call))
    output = torch.cat([output for output, _ in gpu.forward_in_parts(call, keep=False)])
    bits.assert_same(output, torch.zeros(tokens, 256, dtype=torch.bfloat16))


def test_routing_interpreted(interpreted: None) -> None:
    from mxfp4ref.sm90.gpu.routing import route

    num_experts, tiles = 5, MIDDLE
    ids = torch.randint(-1, 12, (600, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    local = select_local(ids, num_experts, 2, 1).flatten()
    before = torch.arange(num_experts, dtype=torch.int32)
    rows = route(ids, num_experts, num_experts, tiles, before)
    counts = [int((local == expert).sum()) for expert in range(num_experts)]
    slots = torch.cat([(local == expert).nonzero().flatten() for expert in range(num_experts)])
    assert rows.slot[: len(slots)].tolist() == slots.tolist()
    assert rows.expert[: len(slots)].tolist() == local[slots].tolist()
    row = torch.full_like(local, -1)
    row[slots] = torch.arange(len(slots))
    assert rows.row.tolist() == row.tolist()
    start = [sum(counts[:expert]) for expert in range(num_experts + 1)]
    assert rows.start.tolist() == start
    assert rows.count.tolist() == counts
    expected = [(e, start[e] + at) for e, count in enumerate(counts) for at in range(0, count, tiles.rows)]
    cut = list(zip(rows.tile_expert.tolist(), rows.tile_start.tolist(), strict=True))
    assert cut[: len(expected)] == expected
    assert {expert for expert, _ in cut[len(expected) :]} <= {-1}


@pytest.mark.parametrize(
    ("layout", "tactic", "generation", "tiles"),
    first(
        2,
        [
            (None, Tactic((64, 16, 256)), BYTEWISE, NARROW),
            (BYTEWISE, Tactic((64, 32, 256)), WORDWISE, WIDE),
            (WORDWISE, Tactic((64, 64, 256)), WORDWISE, MIDDLE),
        ],
    ),
)
def test_the_gemm_interpreted(
    interpreted: None, layout: Generation | None, tactic: Tactic, generation: Generation, tiles: Tiles
) -> None:
    """A K tile of 256 in the middle, and the first two products out of range."""
    from mxfp4ref.sm90.gpu.gemm import Packed, gemm
    from mxfp4ref.sm90.gpu.routing import route
    from mxfp4ref.sm90.gpu.weights import layout_of

    generator = torch.Generator().manual_seed(3)
    num_columns = 128
    x = integers(generator, -2, 2, 2, 768).to(torch.bfloat16)
    codes = integers(generator, 0, 255, 1, num_columns, 384).to(torch.uint8)
    scales = integers(generator, 110, 140, 1, num_columns, 24).to(torch.uint8)
    scales[:, ::2, :2] = 252
    expected = group_scaled_gemm(x[None], codes, scales, tactic=tactic, generation=generation)
    stored = (codes, scales)
    if layout is not None:
        stored = (interleave_weights_sm90(codes, layout), fold_scales_sm90(scales, layout))
    rows = route(torch.zeros(2, 1, dtype=torch.int32), 1, 0, tiles, torch.zeros(1, dtype=torch.int32))
    accumulators = torch.full((2, num_columns), torch.nan)
    output = gemm(
        x,
        Packed(*stored, num_columns, 768, layout_of(layout)),
        rows,
        tile_k=tactic.tile_k,
        swapped=gpu._first_pair_swapped(generation, tactic, x.device),
        gathered=False,
        accumulators=accumulators,
    )
    bits.assert_same(accumulators, expected[0])
    bits.assert_same(output, fp32.to_bf16(expected[0]))


@pytest.mark.parametrize(
    ("activation_type", "given"),
    [
        (SWIGLU, ""),
        (SWIGLU, "bias"),
        (GEGLU, ""),
        (GEGLU, "bias"),
        (GEGLU_TANH, "bias"),
        (GELU, "bias"),
        (RELU, ""),
        (RELU, "bias"),
        (SILU, "bias"),
        (RELU2, "bias"),
        (IDENTITY, "bias"),
        (SWIGLU_BIAS, ""),
        (SWIGLU_BIAS, "swiglu_alpha"),
        (SWIGLU_BIAS, "bias swiglu_beta swiglu_limit"),
        (SWIGLU_STEP, ""),
        (SWIGLU_STEP, "bias swiglu_limit"),
        (SITU, ""),
        (SITU, "bias situ_linear_beta"),
        (SITU, "situ_beta"),
    ],
)
def test_the_activation_and_the_weighted_sum_interpreted(
    interpreted: None, activation_type: int, given: str
) -> None:
    from mxfp4ref.sm90.gpu import elementwise
    from mxfp4ref.sm90.gpu.routing import route

    generator = torch.Generator().manual_seed(4)
    ids = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    rows = route(ids, 2, 0, NARROW, torch.zeros(2, dtype=torch.int32))
    expert = rows.expert[:3].long()
    fc1 = integers(generator, -9, 9, 4, 12).to(torch.bfloat16)
    fc1[:, 6:] *= 1024.0  # gates whose sigmoid is 0 or 1, or 0
    optional = {
        "bias": integers(generator, -9, 9, 2, 12).to(torch.bfloat16) * 64.0,
        "swiglu_alpha": torch.tensor([0.5, 2.0]),
        "swiglu_beta": torch.tensor([1.0, -0.0]),
        "swiglu_limit": torch.tensor([64.0, 32.0]),
        "situ_beta": torch.tensor([4.0, 0.5]),
        "situ_linear_beta": torch.tensor([0.125, 2.0]),
    }
    activation = ACTIVATIONS[activation_type]
    if activation_type == SITU:
        fc1 *= 1024.0  # a tanh of 1, 0 or -1
    if not activation.gated:
        fc1, optional["bias"] = (tensor[:, 6:].contiguous() for tensor in (fc1, optional["bias"]))
    chosen = {name: t if name in given.split() else None for name, t in optional.items()}
    parameters = [chosen[name] for name in activation.defaults]
    per_row = [None if t is None else t[expert][:, None] for t in parameters]
    bias = None if chosen["bias"] is None else chosen["bias"][expert]
    got = elementwise.activate(activation, fc1, rows, chosen["bias"], parameters)
    bits.assert_same(got[:3], fp32.to_bf16(activate(activation, fc1[:3], bias, per_row)))
    assert len(got[:3].unique()) > 2

    scales = torch.tensor([[0.5, 2.0], [0.25, torch.nan]])
    bias = optional["bias"] if given else None
    by_slot = torch.zeros(2, 2, fc1.shape[1], dtype=torch.bfloat16)
    by_slot.view(4, -1)[rows.slot[:3].long()] = fc1[:3]
    expected = finalize(by_slot, select_local(ids, 2, 1, 0), scales, bias)
    bits.assert_same(elementwise.finalize(fc1, rows, scales, bias), fp32.to_bf16(expected))


# --- trust ------------------------------------------------------------------------------------------------


def test_the_trial_finds_one_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    call = next(iter(gpu_trial.trial_calls(WORDWISE)))
    right = trace(call)

    def as_traced(_call: MoeCall, *, keep: bool, tiles: Tiles) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        kept = {field.name: getattr(right, field.name).clone() for field in dataclasses.fields(right)}
        kept[wrong].view(torch.uint8)[-1, -1] ^= 1
        yield kept.pop("output"), kept

    monkeypatch.setattr(gpu, "forward_in_parts", as_traced)
    for wrong in ("fc1_accumulators", "activation", "fc2_output", "output"):
        with pytest.raises(ArithmeticError, match=f"1 rows of {wrong} of a trial are wrong"):
            gpu_trial.check(call, right, torch.device("cpu"), NARROW)


def test_the_trial_has_numbers_of_every_kind() -> None:
    calls = list(gpu_trial.trial_calls(None))
    traces = [trace(call) for call in calls]
    for number, (call, rows) in enumerate(zip(calls, traces, strict=True)):
        for name in ("fc1_accumulators", "fc2_accumulators"):
            values = getattr(rows, name)
            assert values.isnan().any()
            assert values.isinf().any()
            assert values.isfinite().float().mean() > 0.7
        assert rows.expert.bincount().max() > max(tiles.rows for tiles in OFFERED)
        other = dataclasses.replace(call, kernel=calls[1 - number].kernel)
        name = f"fc{number + 1}_accumulators"
        assert not torch.equal(getattr(trace(other), name), getattr(rows, name))


def test_the_trial_has_the_same_numbers_in_every_layout() -> None:
    for layout in GENERATIONS:
        for call, other in zip(gpu_trial.trial_calls(None), gpu_trial.trial_calls(layout), strict=True):
            assert gpu.stored_for(other.experts) == layout
            assert torch.equal(call.token_final_scales, other.token_final_scales)
            assert torch.equal(other.experts.select(torch.arange(3)).fc2_weights, call.experts.fc2_weights)


def test_only_a_forward_by_tensor_cores_is_compared() -> None:
    with pytest.raises(ValueError, match="call: expected MXFP4 experts on a Hopper GPU whose kernels run"):
        gpu_trial.compare_with_emulated(easy_call(None))


def test_tiles_by_the_number_of_rows() -> None:
    flash = [tiles_for(tokens * 6, 256) for tokens in (1, 2, 8, 64, 1024, 4096)]
    assert flash == [NARROW, NARROW, MIDDLE, MIDDLE, MIDDLE, WIDE]
    assert {tiles.rows for tiles in OFFERED} == {16, 32, 128}
    assert {128 % tiles.columns for tiles in OFFERED} == {0}


def test_a_gpu_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ArithmeticError("3 rows of activation of a trial are wrong")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_trial, "check", fail)
    with pytest.warns(RuntimeWarning, match="do not run here: ArithmeticError: 3 rows of activation"):
        assert not gpu_trial._try(torch.device("cuda", 0), None, NARROW)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not gpu_trial._try(torch.device("cuda", 0), None, NARROW)


# --- on a GPU ---------------------------------------------------------------------------------------------


def on_cuda(call: MoeCall) -> MoeCall:
    names = ("input", "token_selected_experts", "token_final_scales", "experts")
    return dataclasses.replace(call, **{name: getattr(call, name).to("cuda") for name in names})


@on_gpu
@pytest.mark.parametrize("tiles", OFFERED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gpu_passes_its_trial(layout: Generation | None, tiles: Tiles) -> None:
    device = torch.device("cuda", 0)
    for activation in ACTIVATIONS.values():
        for call in gpu_trial.trial_calls(layout, activation):
            gpu_trial.check(call, trace(call), device, tiles)
            assert gpu.usable(on_cuda(call))
        assert gpu_trial.passed(device, layout, tiles, activation)


def test_the_environment_is_read_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4REF_GPU_GEMM", "emulate")
    with pytest.raises(ValueError, match=r"^MXFP4REF_GPU_GEMM: .* did you mean emulated"):
        gpu.usable(next(iter(gpu_trial.trial_calls(WORDWISE))))


@on_gpu
def test_the_environment_keeps_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4REF_GPU_GEMM", "emulated")
    call = next(iter(gpu_trial.trial_calls(WORDWISE)))
    assert not gpu.usable(on_cuda(call))
    bits.assert_same(forward(on_cuda(call)).cpu(), forward(call))


@on_gpu
def test_term_by_term_gives_the_same() -> None:
    for call in gpu_trial.trial_calls(BYTEWISE):
        found = gpu_trial.compare_with_emulated(on_cuda(call), share=1.0)
        num_rows = len(trace(call).token)
        assert found == {"fc1": (0, num_rows * 256), "fc2": (0, num_rows * 384)}


@on_gpu
def test_a_cuda_graph_captures_a_forward() -> None:
    *_, last = map(on_cuda, gpu_trial.trial_calls(WORDWISE))
    changing = dataclasses.replace(
        last,
        **{
            name: getattr(last, name).clone()
            for name in ("input", "token_selected_experts", "token_final_scales")
        },
    )
    forward(changing)  # the trial, and what is compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(changing)
    for order in (slice(None), torch.arange(len(last.input) - 1, -1, -1, device="cuda")):
        other = dataclasses.replace(
            last,
            input=last.input[order],
            token_selected_experts=last.token_selected_experts[order].flip(1),
            token_final_scales=last.token_final_scales[order],
        )
        changing.input.copy_(other.input)
        changing.token_selected_experts.copy_(other.token_selected_experts)
        changing.token_final_scales.copy_(other.token_final_scales)
        graph.replay()
        bits.assert_same(output.cpu(), forward(other).cpu())
    elsewhere = torch.zeros(1, device="cuda")

    def capture_a_strict_call() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            elsewhere.add_(1)  # an empty graph would be warned of
            dataclasses.replace(changing, strict=True)

    with pytest.raises(ValueError, match="while a CUDA graph is being captured"):
        capture_a_strict_call()


@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_synchronises() -> None:
    call = on_cuda(next(iter(gpu_trial.trial_calls(WORDWISE))))
    forward(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
