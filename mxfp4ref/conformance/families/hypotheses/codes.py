"""Hypotheses on one E2M1 code that is read as another value, in one or both GEMMs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.solved.tensor_groups import GEMMS
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.model.call import MoeCall

__all__ = ["code_hypotheses"]

_MAGNITUDES = ("0", "0.5", "1", "1.5", "2", "3", "4", "6")


def code_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Each magnitude read as its neighbour or as zero, with either sign."""
    for code in range(8):
        for other in dict.fromkeys((code - 1, code + 1, 0)):
            if other == code or other not in range(8):
                continue
            for fcs, whose in GEMMS:
                yield Hypothesis(
                    "values",
                    fcs,
                    f"{whose} weights have {_MAGNITUDES[code]} read as {_MAGNITUDES[other]}",
                    mapped(
                        tuple(f"{fc}_weights" for fc in fcs), lambda _, t, c=code, o=other: _read(t, c, o)
                    ),
                    1.5 + 0.1 * len(fcs),
                )


def _read(packed: Tensor, code: int, other: int) -> Tensor:
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8)[:, None])
    table = pack_codes(torch.where((codes & 7) == code, codes & 8 | other, codes)).flatten()
    return table.to(packed.device)[packed.to(torch.int32)]
