"""The groups of a quantiser's case, and the codes of the nearest values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, SCALE_BIAS, unpack_codes

__all__ = [
    "ENOUGH",
    "MAGNITUDES",
    "MIDPOINTS",
    "NAN_BYTE",
    "Groups",
    "Words",
    "nearest_codes",
    "other_rule",
]

NAN_BYTE = 255
ENOUGH = 4  # groups or values from which something is told
MAGNITUDES = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64, device="cpu")
MIDPOINTS = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
_EVEN_ABOVE = torch.tensor([False, True] * 3 + [False])

Words = tuple[list[str], bool]  # what is wrong, and whether that accounts for all


@dataclass(frozen=True)
class Groups:
    """The groups of a case.

    Attributes:
        values: `[..., K]`, as they came.
        groups: `[G, 32] float64`.
        rule: the right one.
        scales, right: `[G] int64`, bytes as they are and as they should be.
        codes, right_codes: `[G, 32] int64`.
        ordinary: `[G] bool`, neither zeros alone nor with NaN or Inf.
        columns: how many groups a row has.
    """

    values: Tensor
    groups: Tensor
    rule: str
    scales: Tensor
    right: Tensor
    codes: Tensor
    right_codes: Tensor
    ordinary: Tensor
    columns: int

    @classmethod
    def of(cls, values: Tensor, rule: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Groups:
        groups = values.to(torch.float64).reshape(-1, GROUP_SIZE)
        scales, right = (t["scales"].flatten().to(torch.int64) for t in (got, want))
        codes, right_codes = (
            unpack_codes(t["packed"]).reshape(-1, GROUP_SIZE).to(torch.int64) for t in (got, want)
        )
        ordinary = groups.isfinite().all(1) & groups.any(1)
        columns = values.shape[-1] // GROUP_SIZE
        return cls(values, groups, rule, scales, right, codes, right_codes, ordinary, columns)

    @property
    def largest(self) -> Tensor:
        return self.groups.abs().amax(1)

    def scaled(self, chosen: Tensor) -> Tensor:
        """The values of some groups over the scales that they were given."""
        exponents = (SCALE_BIAS - self.scales[chosen]).to(torch.float64)
        return self.groups[chosen] * exponents.exp2()[:, None]

    def places(self) -> dict[str, Tensor]:
        """What a condition on a group may be about, `[G]` each."""
        index = torch.arange(len(self.groups))
        largest = self.groups.abs().max(1)
        significand = torch.frexp(largest.values).mantissa * 2
        return {
            "whose largest magnitude is": largest.values,
            "where the significand of the largest magnitude is": significand,
            "that are in rows": index // self.columns,
            "that are of their row number": index % self.columns,
            "whose largest magnitude is at index": largest.indices,
            "whose right scale byte is": self.right,
            "where the last bit of the right scale byte is": self.right & 1,
        }


def nearest_codes(scaled: Tensor, ties_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Magnitudes' codes, ties to even, or away from zero where that is said of the numbers."""
    size = scaled.abs()[..., None]
    up = _EVEN_ABOVE if ties_up is None else ties_up(scaled)[..., None]
    return ((size > MIDPOINTS) | ((size == MIDPOINTS) & up)).sum(-1)


def other_rule(rule: str, right: str) -> str:
    return f"scales follow the rule {rule!r} instead of {right!r}"
