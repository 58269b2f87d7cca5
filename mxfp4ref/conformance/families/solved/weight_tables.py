"""What GEMM2 made of its weights, solved: values of codes, factors of scale bytes, how often K groups count.

The activations and the bytes are known, and GEMM2 is linear in what the bytes stand for: a table of 16 values, one of
factors, or one factor for each K group. It is fitted to every second token and has to predict the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.places import named_columns
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.families.solved.solved_weights import unsure_of
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, unpack_codes
from mxfp4ref.model.call import MoeCall

__all__ = ["weight_tables"]

_FEWEST, _MOST = 4, 12  # tokens
_LOUD = 4.0  # times the roundings
_SEEN = 9.0  # in a column, of the squares of its roundings
# Of the errors' squares that roundings do not make: the most that may be left, and of the best of several ways.
_LEFT, _LEAST = 0.03, 1e-4
_WORSE = 4.0  # times that the other ways have to leave
_ALIKE = 2.0**-5  # of a factor or value
_NAMED = 6  # entries
_SIZE = 1 << 25  # of the products of a token


@dataclass(frozen=True)
class _Fit:
    """A way to explain the errors: of each unknown how much it is off, and how far that may be; what is left."""

    off: Tensor
    unsure: Tensor
    left: float

    def changed(self, right: Tensor) -> list[int]:
        """Which unknowns are off for certain."""
        far = self.off.abs() > self.unsure + _ALIKE * right.abs().clamp(min=0.25)
        return far.nonzero().flatten().tolist()

    def uniform(self, right: Tensor) -> bool:
        """Whether one factor on all that is right gives it as well."""
        sizes = torch.maximum(right.abs(), (right + self.off).abs()).clamp(min=0.25)
        known = self.unsure < 0.25 * sizes
        off, right = self.off[known], right[known]
        factor = float((off * right).sum() / right.square().sum().clamp(min=1e-300))
        apart = (off - factor * right).abs()
        return bool((apart <= self.unsure[known] + _ALIKE * (right + off).abs()).all())


def weight_tables(call: MoeCall, some: Sequence[Sample], *, everywhere: bool = True) -> Evidence | None:
    """What follows, if one of these ways, and no other, explains the errors.

    Args:
        call: the right one.
        some: tokens that are wrong.
        everywhere: whether all tokens are.
    """
    loud = [s for s in some if s.loudness > _LOUD]
    loud = loud[:: max(len(loud) // _MOST, 1)][:_MOST]
    if len(loud) < _FEWEST or call.experts.fc2_scales is None or loud[0].second.numel() > _SIZE:
        return None
    seen = torch.stack([s.error.square() > _SEEN * s.noise for s in loud]).sum(0) > 1
    if not bool(seen.any()):
        return None
    ways: list[tuple[_Fit, Evidence | None]] = []
    for words, experts in _whose(call, loud):
        where = _columns(call, seen) + ("" if everywhere else " in tokens that differ")
        for features, told in (
            (_by_group, _of_groups),
            (_by_code, _of_codes),
            (_by_byte, _of_bytes),
        ):
            found = _fitted(loud, seen, lambda s, f=features, e=experts: f(call, s, e))
            if found is not None and found.left <= _LEFT:
                ways.append((found, told(call, found, f"{words}{where}")))
        if ways:
            break
    ways.sort(key=lambda way: way[0].left)
    if not ways or (len(ways) > 1 and ways[1][0].left < _WORSE * max(ways[0][0].left, _LEAST)):
        return None
    return ways[0][1]


def _whose(call: MoeCall, loud: Sequence[Sample]) -> list[tuple[str, set[int] | None]]:
    """All experts, or one that all of these tokens have."""
    shared = set.intersection(*(set(s.experts.tolist()) for s in loud))
    first = call.ep_rank * call.experts.num_experts
    return [("", None), *((f" of expert {e + first}", {e}) for e in sorted(shared))]


def _columns(call: MoeCall, seen: Tensor) -> str:
    if bool(seen.all()) or len(seen) != call.experts.hidden_size:
        return ""
    named = named_columns(seen)
    return f", {named[0]}," if named else ""


def _fitted(loud: Sequence[Sample], seen: Tensor, features: Callable[[Sample], Tensor]) -> _Fit | None:
    """The unknowns that explain the errors in the columns `seen`, with `features(sample) [H, m]`."""
    units = [s.roundings.sqrt()[seen] for s in loud]
    parts = [features(s)[seen] / unit[:, None] for s, unit in zip(loud, units, strict=True)]
    errors = [s.error[seen] / unit for s, unit in zip(loud, units, strict=True)]
    used = torch.cat(parts).square().sum(0) > 0
    if int(used.sum()) * 2 > sum(map(len, errors)) // 2:
        return None
    left = []
    for half in (0, 1):
        system, target = torch.cat(parts[half::2])[:, used], torch.cat(errors[half::2])
        others, right = torch.cat(parts[1 - half :: 2])[:, used], torch.cat(errors[1 - half :: 2])
        rest = (right - others @ _solution(system, target)).square().sum() - len(right)
        left.append(float(rest.clamp(min=0) / (right.square().sum() - len(right)).clamp(min=1e-300)))
    system, target = torch.cat(parts)[:, used], torch.cat(errors)
    off, unsure = (torch.zeros(len(used), dtype=torch.float64) for _ in range(2))
    off[used] = _solution(system, target)
    spread = float((target - system @ off[used]).square().mean().clamp(min=1))
    unsure[used] = unsure_of(system.T, torch.full_like(target, spread))
    unsure[~used] = torch.inf
    return _Fit(off, unsure, max(left))


def _solution(system: Tensor, target: Tensor) -> Tensor:
    lengths = system.norm(dim=0).clamp(min=1e-300)
    solution = torch.linalg.lstsq(system / lengths, target[:, None], driver="gelsd").solution[:, 0]
    found: Tensor = solution / lengths
    return found


def _slots(sample: Sample, experts: set[int] | None) -> list[int]:
    return [i for i, e in enumerate(sample.experts.tolist()) if experts is None or e in experts]


def _by_group(call: MoeCall, sample: Sample, experts: set[int] | None) -> Tensor:
    """What each K group adds, `[H, K/32]`."""
    return torch.stack([_products(sample, slot) for slot in _slots(sample, experts)]).sum(0)


def _products(sample: Sample, slot: int) -> Tensor:
    """What each K group of a slot adds, `[H, K/32]`."""
    products = sample.weights[slot] * sample.second[slot] * sample.activation[slot]
    return products.view(len(products), -1, GROUP_SIZE).sum(2)


def _bytes(call: MoeCall, sample: Sample, slot: int) -> tuple[Tensor, Tensor]:
    """The codes `[H, K]` and scale bytes `[H, K/32]`, both int64, of a slot's expert, in the sample's columns."""
    experts, expert = call.experts, int(sample.experts[slot])
    assert experts.fc2_scales is not None
    step = -(-experts.hidden_size // sample.second.shape[1])
    packed, scales = experts.fc2_weights[expert, ::step], experts.fc2_scales[expert, ::step]
    return unpack_codes(packed.contiguous()).long(), scales.view(torch.uint8).long()


def _by_code(call: MoeCall, sample: Sample, experts: set[int] | None) -> Tensor:
    """What is multiplied with each of the 16 values, `[H, 16]`."""
    total = torch.zeros(len(sample.error), 16, dtype=torch.float64)
    for slot in _slots(sample, experts):
        codes, scales = _bytes(call, sample, slot)
        factors = (scales - 127).double().exp2().repeat_interleave(GROUP_SIZE, 1)
        total.scatter_add_(1, codes, sample.weights[slot] * factors * sample.activation[slot])
    return total


def _by_byte(call: MoeCall, sample: Sample, experts: set[int] | None) -> Tensor:
    """What is multiplied with the factor of each scale byte, over that factor, `[H, 256]`."""
    total = torch.zeros(len(sample.error), 256, dtype=torch.float64)
    for slot in _slots(sample, experts):
        _, scales = _bytes(call, sample, slot)
        total.scatter_add_(1, scales, _products(sample, slot))
    return total


def _of_groups(call: MoeCall, fit: _Fit, where: str) -> Evidence | None:
    ones = torch.ones_like(fit.off)
    changed = fit.changed(ones)
    if not changed or fit.uniform(ones):
        return None
    told = (
        f"{g} (K {g * GROUP_SIZE} to {g * GROUP_SIZE + GROUP_SIZE - 1}) {_times(1 + float(fit.off[g]))}"
        for g in changed
    )
    return Evidence.of_kind(
        ("fc2", "activation"),
        f"in GEMM2{where} these K groups do not count once",
        f"{shortened(told, _NAMED)}; GEMM1 is right",
        3,
    )


def _times(factor: float) -> str:
    known = {0: "is left out", 2: "counts twice", -1: "is subtracted"}
    near = round(factor)
    return known[near] if near in known and abs(factor - near) < 0.05 else f"counts {factor:.3g} times"


def _of_codes(call: MoeCall, fit: _Fit, where: str) -> Evidence | None:
    right = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    changed = fit.changed(right)
    if not changed or fit.uniform(right):
        return None
    told = (f"{c} ({right[c]:g}) as {float(right[c] + fit.off[c]):.3g}" for c in changed)
    return Evidence.of_kind(
        ("fc2",),
        f"GEMM2{where} reads codes of its weights as other values than E2M1 has, as by another table",
        f"code {shortened(told, _NAMED)}; GEMM1 is right",
        3,
    )


def _of_bytes(call: MoeCall, fit: _Fit, where: str) -> Evidence | None:
    ones = torch.ones_like(fit.off)
    changed = [b for b in fit.changed(ones) if bool(fit.unsure[b].isfinite())]
    if not changed or fit.uniform(ones):
        return None
    told = (f"{b} (2^{b - 127}) {1 + float(fit.off[b]):.3g}x" for b in changed)
    return Evidence.of_kind(
        ("fc2",),
        f"GEMM2{where} decodes its scale bytes otherwise than as exponents E8M0, each byte alike wherever it stands, "
        "as of another format or dtype",
        f"byte {shortened(told, _NAMED)} of what it means; GEMM1 is right",
        3,
    )
