"""The container of a rank's experts: what it refuses, and both SM90 layouts against the logical one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.experts import PARAMETERS, Experts, Sm90Experts
from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, Generation
from tests.helpers import bits, layers

ALL = layers.random_experts(1, num_experts=3, hidden=256, inner=128, biases=True, parameters=PARAMETERS)
NAMES = [field.name for field in fields(Experts)]


def test_sizes() -> None:
    assert (ALL.num_experts, ALL.hidden_size, ALL.intermediate_size) == (3, 256, 128)
    assert ALL.quantized
    assert ALL.device == torch.device("cpu")
    dense = layers.random_experts(1, num_experts=2, hidden=96, inner=32, quantized=False)
    assert (dense.num_experts, dense.hidden_size, dense.intermediate_size) == (2, 96, 32)
    assert not dense.quantized
    sm90 = layers.to_sm90(ALL)
    assert (sm90.num_experts, sm90.hidden_size, sm90.intermediate_size) == (3, 256, 128)


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ALL.fc1_biases = None  # type: ignore[misc]


def cut(dim: int, size: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda t: t.narrow(dim, 0, t.shape[dim] - size)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("fc1_weights", lambda t: None, TypeError, "a uint8 or bfloat16 tensor of shape [E, 2I, K], got None"),
        ("fc1_weights", lambda t: t.to(torch.float16), TypeError, "got float16 [3, 256, 128]"),
        ("fc1_weights", lambda t: t[0], ValueError, "[E, 2I, K], got uint8 [256, 128]"),
        ("fc1_weights", cut(1), ValueError, "shape [3, 256, 128], got uint8 [3, 255, 128]"),
        ("fc1_weights", cut(2, 16), ValueError, "shape [3, 256, 128], got uint8 [3, 256, 112]"),
        ("fc2_weights", lambda t: t.to(torch.bfloat16), TypeError, "a uint8 tensor of shape [3, H, K], got bfloat16"),
        ("fc2_weights", cut(0), ValueError, "shape [3, H, K], got uint8 [2, 256, 64]"),
        ("fc2_weights", cut(2), ValueError, "shape [3, 252, 128], got uint8 [3, 256, 128]"),
        ("fc1_scales", lambda t: None, TypeError, "expected a uint8 tensor of shape [3, 256, 8], got NoneType"),
        ("fc1_scales", lambda t: t.to(torch.int8), TypeError, "got int8 [3, 256, 8]"),
        ("fc1_scales", cut(2), ValueError, "shape [3, 256, 8], got uint8 [3, 256, 7]"),
        ("fc2_scales", cut(1), ValueError, "shape [3, 256, 4], got uint8 [3, 255, 4]"),
        ("fc2_scales", lambda t: t.view(torch.int32), TypeError, "got int32 [3, 256, 1]"),
        ("fc1_biases", cut(1), ValueError, "shape [3, 256], got bfloat16 [3, 255]"),
        ("fc1_biases", lambda t: t.float(), TypeError, "expected a bfloat16 tensor of shape [3, 256], got float32"),
        ("fc2_biases", cut(0), ValueError, "shape [3, 256], got bfloat16 [2, 256]"),
        ("swiglu_alpha", lambda t: t.double(), TypeError, "expected a float32 tensor of shape [3], got float64"),
        ("swiglu_beta", lambda t: t[:, None], ValueError, "shape [3], got float32 [3, 1]"),
        ("swiglu_limit", lambda t: 7.0, TypeError, "expected a float32 tensor of shape [3], got float"),
    ],
)  # fmt: skip
def test_refusals(
    name: str, change: Callable[[Tensor], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        replace(ALL, **{name: change(getattr(ALL, name))})
    # A size that two tensors must share may be blamed on the other one.
    blamed = str(caught.value).split(":")[0]
    assert blamed == name or {blamed, name} == {"fc1_weights", "fc2_weights"}


def test_refuses_scales_with_bf16_weights() -> None:
    dense = layers.random_experts(1, quantized=False)
    with pytest.raises(ValueError, match=r"^fc2_scales: expected None with bfloat16 weights, got a tensor$"):
        replace(dense, fc2_scales=torch.zeros(4, 128, 4, dtype=torch.uint8))


def test_refuses_part_of_a_group() -> None:
    def bf16(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    with pytest.raises(ValueError, match=r"^fc1_weights: expected a multiple of 32 values along K, got 48$"):
        Experts(bf16(1, 64, 48), None, bf16(1, 48, 32), None)
    with pytest.raises(ValueError, match=r"^fc2_weights: expected a multiple of 32 values along K, got 16$"):
        Experts(bf16(1, 32, 64), None, bf16(1, 64, 16), None)


def test_refuses_no_experts() -> None:
    empty = {name: getattr(ALL, name)[:0] for name in NAMES}
    with pytest.raises(ValueError, match=r"^fc1_weights: expected at least one expert, got none$"):
        Experts(**empty)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("hidden", "inner", "name"), [(0, 64, "fc1"), (64, 0, "fc2"), (0, 0, "fc1")])
def test_refuses_sizes_of_zero(quantized: bool, hidden: int, inner: int, name: str) -> None:
    def weights(rows: int, depth: int) -> tuple[Tensor, Tensor | None]:
        if not quantized:
            return torch.zeros(2, rows, depth, dtype=torch.bfloat16), None
        return bytes_of(2, rows, depth // 2), bytes_of(2, rows, depth // 32)

    def bytes_of(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    message = rf"^{name}_weights: expected a multiple of 32 values along K, not 0, got 0$"
    with pytest.raises(ValueError, match=message):
        Experts(*weights(2 * inner, hidden), *weights(hidden, inner))


def test_slice() -> None:
    part = ALL.slice(1, 3)
    assert part.num_experts == 2
    for name in NAMES:
        assert torch.equal(getattr(part, name), getattr(ALL, name)[1:3])
        assert getattr(part, name).data_ptr() == getattr(ALL, name)[1:].data_ptr(), "a view, not a copy"
    with pytest.raises(ValueError, match=r"^stop: expected an int from 3 to 3, got 4$"):
        ALL.slice(2, 4)
    with pytest.raises(ValueError, match=r"^start: expected an int from 0 to 2, got -1$"):
        ALL.slice(-1, 2)
    with pytest.raises(TypeError, match=r"^start: expected an int, got float"):
        ALL.slice(0.0, 2)  # type: ignore[arg-type]
    assert isinstance(layers.to_sm90(ALL).slice(0, 1), Sm90Experts)


def test_select_and_to() -> None:
    some = ALL.select(torch.tensor([2, 0]))
    for name in NAMES:
        assert torch.equal(getattr(some, name), getattr(ALL, name)[[2, 0]])
    without = replace(ALL, fc1_biases=None, swiglu_beta=None)
    assert without.select(torch.tensor([1])).fc1_biases is None
    assert without.to("cpu").swiglu_beta is None
    assert torch.equal(without.to("cpu").fc1_weights, ALL.fc1_weights)


SM90 = [(generation, dtype) for generation in GENERATIONS for dtype in (torch.uint8, torch.int32)]


@pytest.mark.parametrize(("generation", "dtype"), SM90)
def test_sm90_layouts_hold_the_same_experts(generation: Generation, dtype: torch.dtype) -> None:
    sm90 = layers.to_sm90(ALL, generation, dtype)
    assert sm90.fc1_scales.dtype == dtype  # type: ignore[union-attr]
    assert not torch.equal(sm90.fc1_weights, ALL.fc1_weights)
    for index in ([0, 1, 2], [2], [1, 0]):
        some = sm90.select(torch.tensor(index))
        assert type(some) is Experts
        for name in NAMES:
            bits.assert_same(getattr(some, name), getattr(ALL, name)[index])
    for name in NAMES:
        bits.assert_same(getattr(sm90.slice(1, 3).select(torch.tensor([0, 1])), name), getattr(ALL, name)[1:])


def test_sm90_refusals() -> None:
    new, old = layers.to_sm90(ALL), layers.to_sm90(ALL, BYTEWISE, torch.uint8)
    with pytest.raises(ValueError, match=r"^fc2_scales: expected folded scales .* \(wordwise\) as"):
        replace(new, fc2_scales=old.fc2_scales)  # two generations in one
    with pytest.raises(
        ValueError, match=r"^fc1_scales: expected folded scales .* or \[3, 4, 2, 16, 4\] \(wordwise\)"
    ):
        replace(new, fc1_scales=ALL.fc1_scales.view(torch.int32))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^fc2_scales: .* \[3, 1, 1024\] .*; got \[3, 1, 1020\]"):
        replace(old, fc2_scales=old.fc2_scales[..., :-4])  # type: ignore[index]
    with pytest.raises(TypeError, match=r"^fc2_scales: expected a uint8 or int32 tensor"):
        replace(new, fc2_scales=new.fc2_scales.view(torch.float32))  # type: ignore[union-attr]
    with pytest.raises(TypeError, match=r"^fc1_scales: expected a uint8 or int32 tensor"):
        replace(new, fc1_scales=None)
    with pytest.raises(TypeError, match=r"^fc1_weights: expected uint8, .* got bfloat16"):
        Sm90Experts(torch.zeros(1, 64, 32).bfloat16(), None, torch.zeros(1, 32, 32).bfloat16(), None)
    # 96 rows are no multiple of 64
    weights = torch.zeros(1, 128, 64, dtype=torch.uint8), torch.zeros(1, 96, 32, dtype=torch.uint8)
    folded = torch.zeros(1, 1, 512, dtype=torch.uint8), torch.zeros(1, 1, 384, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"scales: .* rows, a multiple of 64, and \d+ K groups, a multiple of 4"
    ):
        Sm90Experts(weights[0][..., :48], folded[0], weights[1], folded[1])


def test_refuses_two_devices() -> None:
    class Elsewhere(torch.Tensor):
        """Reports another device; a second real one is not at hand everywhere."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 0)

    with pytest.raises(
        ValueError, match=r"^swiglu_beta: expected a tensor on cpu like fc1_weights, got one on cuda:0$"
    ):
        replace(ALL, swiglu_beta=ALL.swiglu_beta.as_subclass(Elsewhere))  # type: ignore[union-attr]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda() -> None:
    moved = layers.to_sm90(ALL).to("cuda")
    assert moved.device.type == "cuda"
    bits.assert_same(moved.select(torch.tensor([1]).cuda()).fc1_weights.cpu(), ALL.fc1_weights[1:2])
    with pytest.raises(
        ValueError, match=r"^fc1_scales: expected a tensor on cpu like fc1_weights, got one on cuda:0$"
    ):
        replace(ALL, fc1_scales=ALL.fc1_scales.cuda())  # type: ignore[union-attr]
