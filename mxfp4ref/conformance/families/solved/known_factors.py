"""What a factor is that everything is off by: a number of the call, or one that kernels are full of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

from mxfp4ref.model.call import MoeCall

__all__ = ["factor_in_words", "parameter_in_words", "simple_between"]

_T = TypeVar("_T")
_SAME = 2.0**-20  # relative: of two that were computed in float32
_SAME_SUM = 2.0**-8  # of weights that were rounded, to bf16 at worst
_EXACT_SUM = 2.0**-9
_MOST_TOLD = 2
_CUT = 2.0**-8  # what a number loses that is cut off to bf16
_NUMBERS = {
    6.0: "the largest E2M1 number",
    448.0: "the largest E4M3 number",
    448 / 6: "the largest E4M3 number by the largest E2M1 number",
    1.702: "the alpha of quick GELU",
}
_MODELS = {2.5: "DeepSeek-V3's", 1.5: "DeepSeek-V4-Flash's", 2.827: "Kimi-K2's"}
_PARAMETERS = {
    "alpha": {1.702: "gpt-oss's, the alpha of quick GELU"},
    "limit": {7.0: "gpt-oss's", 10.0: "DeepSeek-V4's"},
}
_CONSTANTS = {
    1 / math.log(2): "log2(e)",
    math.log(2): "ln 2",
    **_NUMBERS,
    **{1 / number: f"1 / {words}" for number, words in _NUMBERS.items()},
}


def parameter_in_words(words: str) -> str:
    """Whose the alpha or limit is that a sentence says to be used for all: "7 is gpt-oss's"; "" if it says none."""
    said = re.search(
        r"SwiGLU (alpha|limit) is (?:hard-coded as )?(\d+(?:\.\d+)?)(?: for all experts)?$", words
    )
    known = said and _PARAMETERS[said[1]].get(float(said[2]))
    return f"{said[2]} is {known}" if said and known else ""


def factor_in_words(factor: float, calls: Iterable[MoeCall], *, unsure: float = _SAME) -> str:
    """ "2.5 is what each token's routing weights add up to, ...", which holds for each call; "" if nothing is known.

    Args:
        factor: that everything is multiplied with, too many.
        calls: in which it is.
        unsure: how far the factor may be off, relative.
    """
    size = abs(factor)
    if not 0 < size < math.inf or abs(size - 1) <= unsure:
        return ""
    calls = list(calls)
    known = [*_of_weights(size, calls, unsure)] or [
        *_of_calls(size, calls, unsure),
        *_of_numbers(size, unsure),
    ]
    return f"{size:.4g} is {', or '.join(known[:_MOST_TOLD])}" if known else ""


def _of_weights(factor: float, calls: list[MoeCall], unsure: float) -> Iterator[str]:
    total = _common(_sum(call) for call in calls)
    if total is None or abs(total - 1) <= 2 * _SAME_SUM:
        return
    sums, as_if = "what each token's routing weights add up to", "as if the routed scaling factor were"
    if _near(factor, total, unsure + _EXACT_SUM):
        yield f"{sums}: {as_if} applied twice"
    if _near(factor, 1 / total, unsure + _EXACT_SUM):
        yield f"1 / {sums}, {total:.3g}: {as_if} left out, or the weights normalised again"


def _of_calls(factor: float, calls: list[MoeCall], unsure: float) -> Iterator[str]:
    for name, counts in (
        ("the number of experts per token", (call.top_k for call in calls)),
        ("tp_size", (call.tp_size for call in calls)),
        ("ep_size", (call.ep_size for call in calls)),
    ):
        if (count := _common(counts)) is not None and count > 1:
            yield from _number_or_reciprocal(factor, count, f"{name} ({count})", unsure)


def _of_numbers(factor: float, unsure: float) -> Iterator[str]:
    yield from (words for number, words in _CONSTANTS.items() if _near(factor, number, unsure))
    for number, model in _MODELS.items():
        yield from _number_or_reciprocal(factor, number, f"{model} routed scaling factor", unsure)
    power = round(math.log2(factor))
    if power and _near(factor, 2.0**power, unsure):
        yield f"what an exponent {abs(power)} too {'high' if power > 0 else 'low'} gives"


def _number_or_reciprocal(factor: float, number: float, words: str, unsure: float) -> Iterator[str]:
    if _near(factor, number, unsure):
        yield words
    if _near(factor, 1 / number, unsure):
        yield f"1 / {words}"


def _near(a: float, b: float, unsure: float) -> bool:
    return abs(a - b) <= unsure * abs(b)


def _common(values: Iterable[_T]) -> _T | None:
    """What all are, if they are one."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _sum(call: MoeCall) -> float | None:
    """What the routing weights of each token add up to, to three digits, if that is one number."""
    sums = call.token_final_scales.double().sum(1)
    if not len(sums) or bool((call.token_selected_experts < 0).any()):
        return None
    total = float(f"{float(sums.median()):.3g}")
    if not 0 < total < math.inf or not bool(((sums - total).abs() <= _SAME_SUM * total).all()):
        return None
    return total


def simple_between(low: float, high: float) -> list[float]:
    """Powers of two, numbers that kernels are full of, short decimals, and quotients and roots of small integers."""
    found: dict[float, None] = {}
    near = 2.0 ** round(math.log2(high))
    exponents = [near] if low * (1 - _CUT) <= near <= high * (1 + _CUT) else []
    decimals = [n / 10**d for d in range(4) for n in range(int(low * 10**d), int(high * 10**d) + 2)][:64]
    fractions = [a / b for b in range(1, 17) for a in range(1, 33)]
    roots = [n**0.5 for n in range(2, 17)] + [n**-0.5 for n in range(2, 17)]
    found.update(dict.fromkeys(exponents))  # also where all numbers are cut off besides
    for number in (*_CONSTANTS, *decimals, *fractions, *roots):
        if low <= number <= high and number > 0:
            found[number] = None
    return list(found)[:8]
