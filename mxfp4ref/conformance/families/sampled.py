"""The errors of some tokens, and what they may be sums of: GEMM2's weights times what it got."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mxfp4ref.conformance.families.distances import last_place, solvable
from mxfp4ref.conformance.families.hypothesis import Pipeline
from mxfp4ref.conformance.families.solved.solved_weights import Weights, unsure_of
from mxfp4ref.conformance.findings.reduction import local_experts
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import up_and_gate

__all__ = ["Sample", "samples"]

_TOKENS, _COLUMNS = 48, 1024
_ROUNDING = 2.0**-9  # of bf16, relative
_LEAST = 1e-6  # singular value of rows of length 1, which are distinct
_SIZE = 1 << 26  # elements of GEMM2's weights, of the experts that are used


@dataclass(frozen=True)
class Sample:
    """A token of `n` slots and `H` columns (all, or some of a large layer); all float64 but `token` and `experts`.

    Attributes:
        token: its number.
        experts: `[n] int64`, the rank's experts, by slot.
        weights: `[n]`, the routing weights.
        second: `[n, H, I]`, GEMM2's weights.
        activation, up, gate: `[n, I]`, the right ones; up and gate with their bias.
        y: `[n, H]`, what GEMM2 gives, with the fc2 bias.
        bias: `[n, H]`, the fc2 bias; zeros without one.
        error: `[H]`, the kernel's row less the right sum, neither it nor `y` rounded.
        noise: `[H]`, the variance of the roundings to bf16 in the error.
    """

    token: int
    experts: Tensor
    weights: Tensor
    second: Tensor
    activation: Tensor
    up: Tensor
    gate: Tensor
    y: Tensor
    bias: Tensor
    error: Tensor
    noise: Tensor

    @property
    def roundings(self) -> Tensor:
        """The variance of the roundings `[H]`, which are coarser where the error is far larger than the right row."""
        return self.noise + _ROUNDING**2 * self.error.square().mean()

    @property
    def loudness(self) -> float:
        """How many times larger than the roundings the error is."""
        return self.loudness_of(self.error)

    def loudness_of(self, error: Tensor) -> float:
        """How many times larger than the roundings an error `[H]` is."""
        return float((error.square() / self.noise).mean().sqrt())

    @cached_property
    def own_weights(self) -> Tensor:
        """The weights `[n]` with which the right rows come nearest to the kernel's."""
        solution = torch.linalg.lstsq(self.y.T, self.error[:, None], driver="gelsd").solution[:, 0]
        found: Tensor = self.weights + solution
        return found

    def solved(self, call: MoeCall) -> Weights:
        """These weights, with what was asked for and how far they may be off."""
        here = local_experts(call)[self.token] >= 0
        first = call.ep_rank * call.experts.num_experts
        numbers = (self.weights, self.own_weights, unsure_of(self.y, self.noise))
        return Weights(
            self.token,
            tuple(here.nonzero().flatten().tolist()),
            tuple((self.experts + first).tolist()),
            *(tuple(t.tolist()) for t in numbers),
        )

    @cached_property
    def rest(self) -> Tensor:
        """The error less what is a sum of the right rows, `[H]`."""
        left: Tensor = self.error - (self.own_weights - self.weights) @ self.y
        return left

    @cached_property
    def directions(self) -> Tensor:
        """Of what GEMM2 gives without the bias, and of the bias, `[H, m]`, orthonormal."""
        parts = torch.cat((self.y - self.bias, self.bias))
        lengths = parts.norm(dim=1, keepdim=True)
        axes, sizes, _ = torch.linalg.svd((parts / lengths)[lengths[:, 0] > 0].T, full_matrices=False)
        found: Tensor = axes[:, sizes > _LEAST]
        return found

    def beside_rows(self, values: Tensor) -> Tensor:
        """Less what is a sum of the right rows and of their biases, `[H]` or `[H, m]`."""
        left: Tensor = values - self.directions @ (self.directions.T @ values)
        return left

    @property
    def finite(self) -> bool:
        numbers = (self.second, self.activation, self.up, self.gate, self.y, self.error, self.noise)
        return all(bool(t.isfinite().all()) for t in numbers)


def samples(pipeline: Pipeline, got: Tensor, wrong: Tensor, local: Tensor) -> list[Sample]:
    """Of wrong tokens with finite numbers, the most wrong ones, in order; none of a layer that is too large.

    Args:
        pipeline: the right one.
        got: `[M, H] bf16`, the kernel's output.
        wrong: `[M, H] bool`.
        local: `[M, k]`, the rank's expert of each slot, -1 for none.
    """
    call, experts = pipeline.call, pipeline.call.experts
    amount = wrong.sum(1)
    usable = (amount > 0) & got.isfinite().all(1) & (local >= 0).any(1)
    order = amount.argsort(descending=True, stable=True)
    index = order[usable[order]][:_TOKENS].sort().values
    columns = torch.arange(0, experts.hidden_size, -(-experts.hidden_size // _COLUMNS), device=got.device)
    used = torch.unique(local[index][local[index] >= 0])
    if not len(index) or len(used) * len(columns) * experts.intermediate_size > _SIZE:
        return []
    some = experts.select(used)
    assert some.fc2_scales is not None
    codes, scales = some.fc2_weights[:, columns], some.fc2_scales[:, columns]
    dense = dequantize(codes, scales, convention="sm90", dtype=torch.float32).double()
    rows = trace(call.select(index))
    y = rows.fc2_accumulators[:, columns].double()
    units = last_place(y)  # of what is rounded, which is without the bias
    bias = torch.zeros_like(y)
    if experts.fc2_biases is not None and call.tp_rank == 0:
        bias = fp32.widen(experts.fc2_biases[rows.expert][:, columns].contiguous()).double()
    y = y + bias
    fc1 = fp32.widen(rows.fc1_output).double()
    if experts.fc1_biases is not None:
        fc1 = fc1 + fp32.widen(experts.fc1_biases[rows.expert]).double()
    up, gate = up_and_gate(fc1, gated=experts.gated)
    activation = fp32.widen(rows.activation).double()
    place = torch.searchsorted(used, rows.expert)
    found = []
    for number, token in enumerate(index.tolist()):
        mine = (rows.token == number).nonzero().flatten()
        mine = mine[rows.slot[mine].argsort()]
        weights = call.token_final_scales[token, rows.slot[mine]].double()
        target = fp32.widen(got[token, columns].contiguous()).double()
        rounded = torch.cat((weights[:, None] * units[mine], last_place(target)[None]))
        found.append(
            Sample(
                token,
                rows.expert[mine],
                weights,
                dense[place[mine]],
                *(t[mine] for t in (activation, up, gate, y, bias)),
                error=target - weights @ y[mine],
                noise=rounded.square().sum(0) / 12,
            )
        )
    telling = solvable(fp32.widen(got[index].contiguous()))
    return [one for one in found if telling and one.finite and bool((one.noise > 0).all())]
