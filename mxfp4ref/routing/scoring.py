"""Router scores, correctly rounded: softmax, sigmoid, sqrt(softplus) and the raw logits.

Float32 logits in, float32 scores out, each the float32 nearest to the exact value (ties cannot occur, see
`_decide`; `sqrt_softplus` by default rounds at both of its steps). No libm, torch version or device can change
a bit, because no result rests on the exact bits of an approximation:

1. An estimate is formed in float64 from IEEE +, -, *, / and square roots alone, with a generous bound on
   its relative error. A machine that fuses a product and a sum, or sums in another order, gets another estimate
   within the same bound. (Eager torch fuses nothing across operations; a compiler may.)
2. If both ends of the interval "estimate +- bound" round to the same float32, so does the exact value.
3. The few elements for which they do not (about one in a million random logits) are evaluated in
   decimal arithmetic, with integers in software and as many digits as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from fractions import Fraction

import torch
from torch import Tensor

from mxfp4ref._choices import ROUNDINGS, Rounding
from mxfp4ref._compiler import uncompiled
from mxfp4ref._ieee import to_fp32, to_fp64
from mxfp4ref._validate import check_choice, check_tensor

__all__ = ["raw_logits", "sigmoid", "softmax", "softplus", "sqrt_softplus"]

SOFTPLUS_THRESHOLD = 20.0

# The estimates below are good to 2^-50 (truncation below 2^-57, a few roundings of 2^-53, the largest error that
# the tests meet is 2^-51). Softmax adds the rounding of x - max, at most 2^-47 for |x - max| < 128;
# beyond that every result is 0.
_ERROR = 2.0**-46
# e^-250 < 2^-360: nothing beyond changes a float32 result, and float64 stays far from its limits.
_FARTHEST = 250.0

_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
# ln 2 in two parts; the first has 21 trailing zero bits, so that its small multiples are exact.
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_EXP_COEFFICIENTS = [1.0 / math.factorial(n) for n in range(14)]  # |r| <= 0.347: cut off below 2^-57
_ATANH_COEFFICIENTS = [1.0 / (2 * n + 1) for n in range(18)]  # |u| <= 1/3: cut off below 2^-62


@uncompiled
def raw_logits(logits: Tensor) -> Tensor:
    """The logits themselves, `[..., E]` float32 or bf16 (widened, which is exact), as float32.

    Every scoring function takes what this one takes: -inf is a masked expert, NaN and +inf are refused.

    Raises:
        TypeError: another dtype.
        ValueError: no expert, or a logit that is NaN or +inf.
    """
    check_tensor("logits", logits, dtype=(torch.float32, torch.bfloat16), shape=("...", "E"))
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: expected at least one expert, got shape {list(logits.shape)}")
    values = logits.detach().to(torch.float32)
    bad = torch.isnan(values) | (values == math.inf)
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(f"logits: expected numbers below +inf, got {values[tuple(index)].item()} at {index}")
    return values


@uncompiled
def sigmoid(logits: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))` of `[..., E]` logits, float32, correctly rounded."""
    values = raw_logits(logits)
    x = values.to(torch.float64).clamp(-_FARTHEST, _FARTHEST)
    return _certified(1.0 / (1.0 + _exp(-x)), _ERROR, _elementwise(values, _exact_sigmoid))


@uncompiled
def softplus(logits: Tensor) -> Tensor:
    """`log(1 + exp(x))` of `[..., E]` logits, float32, correctly rounded.

    Above 20 it is `x` itself, as in torch and in every kernel; the correctly rounded value is `x` there too.
    """
    values = raw_logits(logits)
    return _certified(_softplus(values), _ERROR, _elementwise(values, _exact_softplus))


@uncompiled
def sqrt_softplus(logits: Tensor, *, rounding: Rounding = "each_step") -> Tensor:
    """`sqrt(softplus(x))` of `[..., E]` logits, float32: DeepSeek-V4's score (docs/arithmetic.md, section 7).

    Args:
        logits: `[..., E]` float32 or bf16.
        rounding: "each_step" rounds softplus to float32 and its root again, each correctly, as float32 code
            does; "once" rounds the exact value of the whole function. On ordinary logits one result in eight
            differs, by 1 ulp; below -87 softplus is subnormal and the first loses digits, below -104 it is 0.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    if rounding == "each_step":
        # The float64 root of a float32 number rounds to its float32 root: 53 >= 2 * 24 + 2 bits.
        return to_fp32(to_fp64(softplus(logits)).sqrt())
    values = raw_logits(logits)
    return _certified(_softplus(values).sqrt(), _ERROR, _elementwise(values, _exact_sqrt_softplus))


@uncompiled
def softmax(logits: Tensor) -> Tensor:
    """`exp(x_i) / sum_j exp(x_j)` over the last dimension of `[..., E]` logits, float32, correctly rounded.

    Raises:
        ValueError: every logit of a row is -inf.
    """
    values = raw_logits(logits)
    largest = values.amax(dim=-1, keepdim=True)
    if bool((largest == -math.inf).any()):
        row = (largest == -math.inf).nonzero()[0].tolist()[:-1]
        raise ValueError(f"logits: expected a logit above -inf in every row, got none in row {row}")
    x = values.to(torch.float64) - largest.to(torch.float64)
    powers = _exp(x.clamp_min(-_FARTHEST))
    # However the machine orders the sum, its relative error is below E * 2^-53.
    error = _ERROR + values.shape[-1] * 2.0**-53
    return _certified(powers / powers.sum(dim=-1, keepdim=True), error, _by_row(values))


def _exp(x: Tensor) -> Tensor:
    """e^x for float64 |x| <= 250: 2^n e^r with n = round(x / ln 2), e^r by its Taylor polynomial."""
    n = torch.round(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    power_of_two = ((n.to(torch.int64) + 1023) << 52).view(torch.float64)
    return _polynomial(r, _EXP_COEFFICIENTS) * power_of_two


def _softplus(values: Tensor) -> Tensor:
    """max(x, 0) + log(1 + t) with t = e^-|x| in (0, 1], and log(1 + t) = 2 artanh(t / (2 + t))."""
    x = values.to(torch.float64)
    t = _exp(-x.abs().clamp_max(_FARTHEST))
    u = t / (2.0 + t)
    log1p = 2.0 * u * _polynomial(u * u, _ATANH_COEFFICIENTS)
    return torch.where(x > SOFTPLUS_THRESHOLD, x, x.clamp_min(0.0) + log1p)


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def _certified(estimate: Tensor, error: float, exact: Callable[[Tensor], list[float]]) -> Tensor:
    """Positive float64 estimates with a relative error below `error` to float32, as their exact values round.

    `exact` gives the results for the elements of a mask, in order.
    """
    low, high = to_fp32(estimate * (1.0 - error)), to_fp32(estimate * (1.0 + error))
    # As integers: a CPU that flushes subnormals takes them for equal.
    undecided = low.view(torch.int32) != high.view(torch.int32)
    if bool(undecided.any()):
        low[undecided] = to_fp32(torch.tensor(exact(undecided), dtype=torch.float64, device=low.device))
    return low


def _elementwise(values: Tensor, function: Callable[[Decimal], Decimal]) -> Callable[[Tensor], list[float]]:
    def exact(undecided: Tensor) -> list[float]:
        known: dict[float, float] = {}
        for x in values[undecided].tolist():
            if x not in known:
                known[x] = _decide(lambda x=x: function(Decimal(x)))  # type: ignore[misc]
        return [known[x] for x in values[undecided].tolist()]

    return exact


def _by_row(values: Tensor) -> Callable[[Tensor], list[float]]:
    def exact(undecided: Tensor) -> list[float]:
        results = []
        rows = values.reshape(-1, values.shape[-1])
        masks = undecided.reshape(rows.shape)
        for index in masks.any(dim=1).nonzero().flatten().tolist():
            row = rows[index].tolist()
            for i in masks[index].nonzero().flatten().tolist():
                results.append(_decide(lambda row=row, i=i: _exact_softmax(row, i)))  # type: ignore[misc]
        return results

    return exact


def _exact_sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def _exact_softplus(x: Decimal) -> Decimal:
    return x if x > SOFTPLUS_THRESHOLD else max(x, Decimal(0)) + (1 + (-abs(x)).exp()).ln()


def _exact_sqrt_softplus(x: Decimal) -> Decimal:
    return _exact_softplus(x).sqrt()


def _exact_softmax(row: list[float], i: int) -> Decimal:
    # The largest of the terms is near 1 or above, so that nothing is lost where another underflows to 0.
    x = Decimal(row[i])
    return 1 / sum(((Decimal(y) - x).exp() for y in row), start=Decimal(0))


def _decide(function: Callable[[], Decimal]) -> float:
    """The float32 nearest to the exact value of `function`, which computes in the current decimal context.

    Ends because no exact value lies on a boundary between two float32 numbers: for arguments that are not
    all equal it is transcendental (Lindemann and Weierstrass), for equal ones it is 1/n, and a power of two
    is a float32 number itself; nor does the square root of a float32 number lie on one.
    """
    digits = 40
    while True:
        # The standard library's exp, ln, / and square root are correctly rounded at any precision. log(1 + t)
        # with t >= e^-250 loses up to 109 digits, everything else a few.
        with localcontext(Context(prec=digits + 120, traps=[])):
            value = Fraction(function())
        low, high = (_to_float32(value * (1 + sign * Fraction(1, 10**digits))) for sign in (-1, 1))
        if low == high:
            return low
        digits *= 2


def _to_float32(value: Fraction) -> float:
    """A positive fraction rounded to nearest even at 24 bits or, below 2^-126, to a multiple of 2^-149."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if value < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** max(exponent - 23, -149)
    return float(round(value / quantum) * quantum)
