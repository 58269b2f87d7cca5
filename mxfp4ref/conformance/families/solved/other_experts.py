"""What GEMM2 gives for a row where some tensors are another expert's: of each of the rank's experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.row_offsets import by_two_experts
from mxfp4ref.conformance.families.hypothesis import Pipeline, SlotRows
from mxfp4ref.conformance.families.solved.pursuit import Candidates, Rows, biases_of
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize
from mxfp4ref.sm90.fp32 import bf16_to_fp64, to_bf16

__all__ = ["OtherExperts", "with_others"]

_SIZE = 1 << 26  # weights of all experts
_KEPT = 64  # rows, of which GEMM1's products are


class OtherExperts:
    """The rows of a call by other experts' tensors.

    Args:
        pipeline: the right one, of experts in MXFP4.
        slots: what its weighted sum is made of.
    """

    def __init__(self, pipeline: Pipeline, slots: SlotRows) -> None:
        self.pipeline, self.slots, self.experts = pipeline, slots, pipeline.call.experts
        self.rows = Rows.of(slots.local)
        self._products: dict[int, Tensor] = {}

    @property
    def usable(self) -> bool:
        """Whether there are other experts, and not too many weights."""
        experts = self.experts
        size = experts.num_experts * 3 * experts.hidden_size * experts.intermediate_size
        return experts.num_experts > 1 and experts.quantized and size <= _SIZE and len(self.rows) > 0

    @cached_property
    def _weights(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of each GEMM the codes `[K/32, E, N, 32]` and the scales `[K/32, E, N]`, float32."""
        found = []
        for fc in ("fc1", "fc2"):
            packed, scales = getattr(self.experts, f"{fc}_weights"), getattr(self.experts, f"{fc}_scales")
            codes = dequantize(packed, torch.full_like(scales, 127), convention="sm90", dtype=torch.float32)
            grouped = codes.view(*codes.shape[:2], -1, GROUP_SIZE).permute(2, 0, 1, 3)
            factors = (scales.view(torch.uint8).float() - 127).exp2()
            found.append((grouped.contiguous(), factors.permute(2, 0, 1).contiguous()))
        return tuple(found)

    def candidates(self, names: Iterable[str]) -> Candidates:
        """Of a sorted row, what it is where tensors of these names are each expert's, `[E, H] float64`."""
        others = set(names)
        return lambda row: self._of(row, others)

    def _of(self, row: int, others: set[str]) -> Tensor:
        call, experts = self.pipeline.call, self.experts
        own, every = self.rows.expert[row].expand(1), torch.arange(experts.num_experts)

        def whose(name: str) -> Tensor:
            return every if name in others else own

        def given(name: str, count: int) -> Tensor | None:
            tensor = getattr(experts, name)
            return None if tensor is None else tensor[whose(name)].expand(count, *tensor.shape[1:])

        (codes1, scales1), (codes2, scales2) = self._weights
        if row not in self._products:
            self._products = {r: t for r, t in self._products.items() if len(self._products) < _KEPT}
            self._products[row] = _by_group(codes1, call.input[self.rows.token[row]][None])
        fc1 = (self._products[row][:, whose("fc1_weights")] * scales1[:, whose("fc1_scales")]).sum(0)
        before = any(name in others for name in ("fc1_biases", *call.activation.defaults))
        count = len(every) if before else len(fc1)
        bias, parameters = (
            given("fc1_biases", count),
            [given(name, count) for name in call.activation.defaults],
        )
        activation = self.pipeline.stages.activate(
            call.activation,
            self.pipeline.stages.round_fc1(fc1.expand(count, -1).contiguous()),
            None if bias is None else bias.contiguous(),
            [None if p is None else p.contiguous()[:, None] for p in parameters],
        )
        products = _by_group(
            codes2[:, whose("fc2_weights")], self.pipeline.stages.round_activation(activation)
        )
        y = to_bf16((products * scales2[:, whose("fc2_scales")]).sum(0))
        found = bf16_to_fp64(y) + biases_of(self.slots, whose("fc2_biases"))
        return found.expand(len(every), -1)


def _by_group(codes: Tensor, x: Tensor) -> Tensor:
    """What K groups of rows `[1 or C, K]` give by codes `[K/32, 1 or C, N, 32]`, `[K/32, C, N]`."""
    grouped = x.float().view(len(x), -1, GROUP_SIZE).transpose(0, 1)
    if codes.shape[1] == 1:
        return grouped @ codes[:, 0].transpose(1, 2)
    found: Tensor = (codes @ grouped.expand(-1, codes.shape[1], -1)[..., None])[..., 0]
    return found


def with_others(slots: SlotRows, names: Iterable[str], other: Tensor) -> SlotRows:
    """With tensors of these names of other experts, `other [R]` by sorted row."""
    rows, some = Rows.of(slots.local), set(names)
    found = slots
    if some - {"fc2_biases"}:
        found = by_two_experts(slots, rows.flat, rows.expert, other, some.__contains__)
    if "fc2_biases" in some:
        local = slots.local.flatten().clone()
        local[rows.flat] = other
        found = replace(found, local=local.view_as(slots.local))
    return found
