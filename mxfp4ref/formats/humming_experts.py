"""The experts of one rank as the W4A8 ("Humming") kernel takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._validate import check_instance, check_tensor
from mxfp4ref.formats import humming, wordwise
from mxfp4ref.formats.experts import PARAMETERS, Experts, StoredWeights
from mxfp4ref.formats.generations import WORDWISE
from mxfp4ref.formats.layout import folded_bytes_shape, unfold_scales_sm90

__all__ = ["HummingExperts", "Sm90HummingExperts"]


@dataclass(frozen=True, repr=False)
class HummingExperts(Experts):
    """Experts prepared for FP8 activations, in logical order (`docs/arithmetic.md`, section 11).

    As `Experts`, but that `fc1_scales` and `fc2_scales` are exponent offsets, 1 to 12, codes are rewritten, and
    biases are bf16 or fp16, as the input of the call is.

    Attributes:
        fc1_residual, fc2_residual: `[E] float32`, `PreparedWeights.residual` times `COMPENSATION`, as the call takes
            them.
    """

    fc1_residual: Tensor = field(kw_only=True)
    fc2_residual: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.fc1_weights, Tensor) and self.fc1_weights.dtype == torch.bfloat16:
            raise TypeError("fc1_weights: expected uint8, since W4A8 takes no bfloat16 weights, got bfloat16")
        residuals = {name: getattr(self, name) for name in ("fc1_residual", "fc2_residual")}
        for name, residual in residuals.items():
            check_tensor(name, residual, dtype=torch.float32, shape=("E",))
        super().__post_init__()
        for name, residual in residuals.items():
            check_tensor(name, residual, dtype=torch.float32, shape=(self.num_experts,))

    @property
    def _bias_dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.bfloat16, torch.float16

    @property
    def tactics_show(self) -> bool:
        return False

    @classmethod
    def prepare(cls, experts: Experts) -> HummingExperts:
        """MXFP4 experts as flashinfer prepares them, which rounds weights: see `preparation_loss`.

        Raises:
            TypeError: no experts.
            ValueError: bf16 experts, or experts that are prepared already.
        """
        check_instance("experts", experts, Experts)
        if not experts.quantized or isinstance(experts, HummingExperts):
            raise ValueError(f"experts: expected MXFP4 experts, got {type(experts).__name__} of another kind")
        logical = experts.select(torch.arange(experts.num_experts, device=experts.device))
        assert logical.fc1_scales is not None
        assert logical.fc2_scales is not None
        fc1 = humming.prepare(logical.fc1_weights, logical.fc1_scales)
        fc2 = humming.prepare(logical.fc2_weights, logical.fc2_scales)
        names = ("fc1_biases", "fc2_biases", *PARAMETERS)
        return HummingExperts(
            fc1_weights=fc1.packed,
            fc1_scales=fc1.offsets,
            fc2_weights=fc2.packed,
            fc2_scales=fc2.offsets,
            fc1_residual=fc1.residual * humming.COMPENSATION,
            fc2_residual=fc2.residual * humming.COMPENSATION,
            **{name: getattr(logical, name) for name in names},
        )

    def stored(self, gemm: str, used: Sequence[int]) -> StoredWeights:
        raise TypeError("experts: these are exponent offsets and not scales; take weights()")


@dataclass(frozen=True, repr=False)
class Sm90HummingExperts(HummingExperts):
    """The same in the layouts that the real call takes: weights "fp4_fp8", offsets folded as uint8 or int32."""

    def select(self, index: Tensor) -> HummingExperts:
        """The experts of an index tensor `[B] int64`, in logical layout."""
        self._check_index(index)
        chosen: dict[str, Any] = {n: None if t is None else t[index] for n, t in self._tensors().items()}
        for gemm in ("fc1", "fc2"):
            names = f"{gemm}_weights", f"{gemm}_scales"
            chosen |= zip(names, self._in_logical_layout(*(chosen[name] for name in names)), strict=True)
        return HummingExperts(**chosen)

    def _in_logical_layout(self, weights: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert scales is not None
        return humming.deinterleave(weights), unfold_scales_sm90(scales, WORDWISE)

    def _check_scales(self, name: str, scales: Tensor | None, shape: tuple[int, int, int]) -> None:
        check_tensor(name, scales, dtype=(torch.uint8, torch.int32), shape=("...",))
        assert scales is not None
        _, rows, groups = shape
        folded = wordwise.folded_shape(*shape)
        if rows % 64 or groups % 4 or folded_bytes_shape(scales) != folded:
            wanted = [*folded[:-1], folded[-1] // scales.element_size()]
            raise ValueError(
                f"{name}: expected folded offsets {wanted} as {scales.dtype} for {rows} rows, a multiple of 64, and "
                f"{groups} K groups, a multiple of 4; got {list(scales.shape)}"
            )
