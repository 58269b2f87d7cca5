"""Hypotheses on matrix fragments: square blocks that are transposed on their way into a GEMM."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.fragment_maps import ACTIVATION, INPUT, moved_elements
from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.model.call import MoeCall

__all__ = ["fragment_hypotheses"]

_SIZES = (8, 16)


def fragment_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Blocks of 8 x 8 (`ldmatrix` with or without `.trans`) and 16 x 16, of either operand of either GEMM."""
    for size in _SIZES:
        of = f"blocks of {size} x {size}"
        for fc in ("fc1", "fc2"):
            yield Hypothesis(
                "values",
                (fc,),
                f"GEMM{fc[-1]}'s weights (codes without the scales) are transposed in {of}",
                mapped((f"{fc}_weights",), lambda _, t, s=size: _codes_transposed(t, s)),
                1.6,
            )
        for apart, words in ((False, ""), (True, ", the last, unfilled rows of an expert apart")):
            for what, matrix in (("input rows", INPUT), ("activation", ACTIVATION)):
                yield moved_elements(
                    matrix,
                    f"an expert's {what} (rows x columns) are transposed in {of}{words}",
                    lambda r, c, s=size: (r // s * s + c % s, c // s * s + r % s),
                    1.6 + 0.1 * apart,
                    whole=size if apart else 1,
                )


def _codes_transposed(packed: Tensor, size: int) -> Tensor:
    blocks = unpack_codes(packed).unflatten(2, (-1, size)).unflatten(1, (-1, size))  # type: ignore[no-untyped-call]
    return pack_codes(blocks.transpose(2, 4).flatten(3).flatten(1, 2).contiguous())
