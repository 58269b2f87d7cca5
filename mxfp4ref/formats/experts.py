"""The experts of one rank: packed weights, scales, biases and the parameters of the activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._shown import Shown
from mxfp4ref._validate import check_ids, check_int, check_same_device, check_tensor
from mxfp4ref.formats import plain
from mxfp4ref.formats.generations import GENERATIONS, PLAIN, Generation
from mxfp4ref.formats.layout import deinterleave_weights_sm90, folded_bytes_shape, unfold_scales_sm90
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["PARAMETERS", "Experts", "PlainExperts", "Sm90Experts", "StoredWeights"]

# Of the activation, each for every expert; `sm90/activation.py` says which activation reads which.
PARAMETERS = ("swiglu_alpha", "swiglu_beta", "swiglu_limit", "situ_beta", "situ_linear_beta")


class StoredWeights(NamedTuple):
    """The MXFP4 weights of one GEMM of all experts as they lie in memory.

    Attributes:
        packed: `[E, N, K/2] uint8`.
        scales: `[E, N * K/32] uint8`.
        orders: the byte orders of the two, `ORDERS` of the module that describes them, 0 for the logical one.
    """

    packed: Tensor
    scales: Tensor
    orders: tuple[int, int]


@dataclass(frozen=True, repr=False)
class Experts(Shown):
    """What a rank holds of a mixture-of-experts layer, in logical layout (`docs/arithmetic.md`, section 2).

    Attributes:
        fc1_weights: `[E, 2I, H/2] uint8`, two E2M1 codes a byte, rows [up(w3); gate(w1)]; or
            `[E, 2I, H] bf16` for experts that are not quantised. For an activation without a gate I rows.
        fc1_scales: `[E, 2I, H/32] uint8`, UE8M0, rows as in `fc1_weights`; None with bf16 weights.
        fc2_weights: `[E, H, I/2] uint8` or `[E, H, I] bf16`.
        fc2_scales: `[E, H, I/32] uint8`; None with bf16 weights.
        fc1_biases: `[E, 2I] bf16`, rows as in `fc1_weights`, or None.
        fc2_biases: `[E, H] bf16`, or None.
        swiglu_alpha, swiglu_beta, swiglu_limit, situ_beta, situ_linear_beta: `[E] float32` each, or None; those that
            the call's activation does not read have no effect.

    Raises:
        TypeError, ValueError: a tensor has another dtype, shape or device than the others call for.
    """

    fc1_weights: Tensor
    fc1_scales: Tensor | None
    fc2_weights: Tensor
    fc2_scales: Tensor | None
    fc1_biases: Tensor | None = None
    fc2_biases: Tensor | None = None
    swiglu_alpha: Tensor | None = None
    swiglu_beta: Tensor | None = None
    swiglu_limit: Tensor | None = None
    situ_beta: Tensor | None = None
    situ_linear_beta: Tensor | None = None

    @uncompiled
    def __post_init__(self) -> None:
        weight_dtypes = (torch.uint8, torch.bfloat16)
        fc1 = check_tensor("fc1_weights", self.fc1_weights, dtype=weight_dtypes, shape=("E", "2I", "K"))
        check_tensor("fc2_weights", self.fc2_weights, dtype=fc1.dtype, shape=(fc1.shape[0], "H", "K"))
        if self.num_experts == 0:
            raise ValueError("fc1_weights: expected at least one expert, got none")
        experts, hidden, inner = self.num_experts, self.hidden_size, self.intermediate_size
        packing = 2 if self.quantized else 1
        fc1_rows = 2 * inner if self.gated else inner
        check_tensor("fc1_weights", fc1, dtype=fc1.dtype, shape=(experts, fc1_rows, hidden // packing))
        for name, rows, depth in (("fc1", fc1_rows, hidden), ("fc2", hidden, inner)):
            if depth % GROUP_SIZE or not depth:
                wanted = f"a multiple of {GROUP_SIZE} values along K" + ", not 0" * (not depth)
                raise ValueError(f"{name}_weights: expected {wanted}, got {depth}")
            scales = getattr(self, f"{name}_scales")
            if self.quantized:
                self._check_scales(f"{name}_scales", scales, (experts, rows, depth // GROUP_SIZE))
            elif scales is not None:
                raise ValueError(f"{name}_scales: expected None with bfloat16 weights, got a tensor")
        optional: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "fc1_biases": (self._bias_dtypes, (experts, fc1_rows)),
            "fc2_biases": (self._bias_dtypes, (experts, hidden)),
        }
        optional |= dict.fromkeys(PARAMETERS, ((torch.float32,), (experts,)))
        for name, (dtypes, shape) in optional.items():
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name), dtype=dtypes, shape=shape)
        check_same_device(self._tensors())

    @property
    def quantized(self) -> bool:
        """Whether the weights are MXFP4 rather than bf16."""
        return self.fc1_weights.dtype == torch.uint8

    @property
    def tactics_show(self) -> bool:
        """Whether outputs may depend on the tactics of the kernel that these experts are for."""
        return self.quantized

    @property
    def num_experts(self) -> int:
        return self.fc1_weights.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.fc2_weights.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.fc2_weights.shape[2] * (2 if self.quantized else 1)

    @property
    def gated(self) -> bool:
        """Whether fc1 has 2I rows, up and gate, rather than the I of an activation without a gate."""
        return self.fc1_weights.shape[1] != self.intermediate_size

    @property
    def gemm_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Weight rows and K of GEMM1 and of GEMM2."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (self.fc1_weights.shape[1], hidden), (hidden, inner)

    @property
    def device(self) -> torch.device:
        return self.fc1_weights.device

    def slice(self, start: int, stop: int) -> Self:
        """Experts `start` to `stop`, as views: what an expert-parallel rank holds of the whole layer.

        Raises:
            ValueError: the range is empty or not within 0 .. num_experts.
        """
        check_int("start", start, minimum=0, maximum=self.num_experts - 1)
        check_int("stop", stop, minimum=start + 1, maximum=self.num_experts)
        return self._map(lambda tensor: tensor[start:stop])

    def select(self, index: Tensor) -> Experts:
        """The experts of an index tensor `[B] int64`, copied, in logical layout."""
        self._check_index(index)
        return self._map(lambda tensor: tensor[index])

    def weights(self, gemm: str, expert: int) -> tuple[Tensor, Tensor | None]:
        """Weights `[1, N, ...]` and scales of "fc1" or "fc2" of one expert, in logical layout."""
        scales = getattr(self, f"{gemm}_scales")
        one = slice(expert, expert + 1)
        return self._in_logical_layout(
            getattr(self, f"{gemm}_weights")[one], None if scales is None else scales[one]
        )

    def stored(self, gemm: str, used: Sequence[int]) -> StoredWeights:
        """MXFP4 weights of "fc1" or "fc2", as they are; those `used` have to be modelled."""
        scales = getattr(self, f"{gemm}_scales").flatten(1).view(torch.uint8)
        return StoredWeights(getattr(self, f"{gemm}_weights"), scales, self._orders)

    def to(self, device: torch.device | str) -> Self:
        """The same experts on another device."""
        return self._map(lambda tensor: tensor.to(device))

    @property
    def _bias_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,)

    @property
    def _orders(self) -> tuple[int, int]:
        return 0, 0

    def _in_logical_layout(self, weights: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weights, scales

    def _check_index(self, index: Tensor) -> None:
        check_tensor("index", index, dtype=torch.int64, shape=("B",))
        check_ids("index", index, maximum=self.num_experts - 1)
        if len(index) == 0:
            raise ValueError("index: expected at least one expert, got none")

    def _check_scales(self, name: str, scales: Tensor | None, shape: tuple[int, int, int]) -> None:
        check_tensor(name, scales, dtype=torch.uint8, shape=shape)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {n: None if t is None else function(t) for n, t in self._tensors().items()}
        return replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, repr=False)
class Sm90Experts(Experts):
    """The same in the layouts that the real call takes; `select` brings experts into logical layout.

    `fc1_weights` and `fc2_weights` are interleaved (`docs/arithmetic.md`, section 2); the scales are folded in
    the manner of either generation of the kernel, as uint8 or viewed as int32. Whole layers are never
    unfolded at once, so memory does not grow with the number of experts.
    """

    _possible: ClassVar[tuple[Generation, ...]] = GENERATIONS

    def __post_init__(self) -> None:
        if isinstance(self.fc1_weights, Tensor) and self.fc1_weights.dtype == torch.bfloat16:
            raise TypeError(
                "fc1_weights: expected uint8, since bfloat16 weights have no SM90 layout, got bfloat16"
            )
        super().__post_init__()

    def select(self, index: Tensor) -> Experts:
        """The experts of an index tensor `[B] int64`, in logical layout."""
        self._check_index(index)
        chosen: dict[str, Any] = {n: None if t is None else t[index] for n, t in self._tensors().items()}
        for gemm in ("fc1", "fc2"):
            names = f"{gemm}_weights", f"{gemm}_scales"
            chosen |= zip(names, self._in_logical_layout(*(chosen[name] for name in names)), strict=True)
        return Experts(**chosen)

    @cached_property
    def generation(self) -> Generation:
        """Whose layouts these are, by the shape of the scales."""
        assert self.fc1_scales is not None
        shape = folded_bytes_shape(self.fc1_scales)
        return next(g for g in self._possible if g.layout.logical_shape(shape) is not None)

    @property
    def _orders(self) -> tuple[int, int]:
        return self.generation.layout.ORDERS

    def _in_logical_layout(self, weights: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert scales is not None
        generation = self.generation
        return deinterleave_weights_sm90(weights, generation), unfold_scales_sm90(scales, generation)

    def _check_scales(self, name: str, scales: Tensor | None, shape: tuple[int, int, int]) -> None:
        check_tensor(name, scales, dtype=(torch.uint8, torch.int32), shape=("...",))
        assert scales is not None
        _, rows, groups = shape
        possible = self._possible if name == "fc1_scales" else (self.generation,)  # both of one generation
        folded = {g.name: g.layout.folded_shape(*shape) for g in possible}
        if rows % 64 or groups % 4 or folded_bytes_shape(scales) not in folded.values():
            unit = scales.element_size()
            wanted = " or ".join(f"{[*dims[:-1], dims[-1] // unit]} ({g})" for g, dims in folded.items())
            raise ValueError(
                f"{name}: expected folded scales {wanted} as {scales.dtype} for {rows} rows, a multiple of 64, and "
                f"{groups} K groups, a multiple of 4; got {list(scales.shape)}"
            )


@dataclass(frozen=True, repr=False)
class PlainExperts(Sm90Experts):
    """Logical weights beside scales folded by `BYTEWISE`, as flashinfer up to 0.6.9 takes them (`PLAIN`).

    Their shapes are those of the older of the two SM90 layouts, so that no tensor tells the two apart.
    """

    _possible: ClassVar[tuple[Generation, ...]] = (PLAIN,)

    def stored(self, gemm: str, used: Sequence[int]) -> StoredWeights:
        weights = super().stored(gemm, used)
        plain.check(weights.scales[list(used)])
        return weights
