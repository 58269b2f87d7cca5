"""The layout of flashinfer up to 0.6.9 (`PLAIN`): weights in logical order, scales folded as `bytewise` folds them.

That release has no helper that interleaves weights.
"""

from __future__ import annotations

from torch import Tensor

from mxfp4ref.formats import bytewise

SCALE_ROWS = bytewise.SCALE_ROWS
SCALE_AXES = bytewise.SCALE_AXES
ORDERS = 0, bytewise.ORDERS[1]

fold = bytewise.fold
folded_shape = bytewise.folded_shape
logical_shape = bytewise.logical_shape


def interleave(packed: Tensor) -> Tensor:
    """A copy: the order stays."""
    return packed.clone()


def deinterleave(interleaved: Tensor) -> Tensor:
    """A copy: the order stays."""
    return interleaved.clone()


def unfold(folded: Tensor) -> Tensor:
    """The inverse of `fold`.

    Raises:
        NotImplementedError: a byte 255, which this kernel alone takes for NaN.
    """
    check(folded)
    return bytewise.unfold(folded)


def check(scales: Tensor) -> None:
    """Raise NotImplementedError if there is a byte 255, which this kernel alone takes for NaN."""
    if bool((scales == 255).any()):
        raise NotImplementedError(
            "scales: expected bytes up to 254, got 255, which the kernel of flashinfer up to 0.6.9 takes for NaN and "
            "later ones for Inf; that is not modelled"
        )
