"""The stage up to which a wrong output can be reconciled with the right computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.conformance.families.distances import solvable
from mxfp4ref.conformance.families.solved.known_factors import factor_in_words
from mxfp4ref.conformance.families.solved.solved_weights import digits
from mxfp4ref.conformance.findings.exposed import exposed
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.findings.reduction import is_heavy, local_experts, one_token, reduce_call
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.sm90 import fp32

__all__ = ["Reach", "Reconciled", "fit_finalize", "numbers", "reconcile"]

_TOKENS = 1  # of a large call, whose interval is computed: for each expert it takes as long as ten forwards
_FITTED_TOKENS, _LOOKED_AT = 4, 32
_INDEPENDENT = (
    2.0**-3
)  # the least singular value of expert outputs of length 1 from which weights can be told
_SAME = 2.0**-6  # relative; bf16 outputs tell weights to about 2^-9
_SPECIAL = (
    "these have to be the SM90 kernel's, and are not those of a kernel that takes scale byte 255 for NaN, keeps NaN "
    "in a clamp, or adds up what overflows in another order"
)
_UNSURE = "up to what correct evaluations may differ by"
_ANOTHER_ACTIVATION = "it is GEMM2 of another activation"


Reach = Literal["", "before finalize", "other than the sum's weights", "rounding"]


@dataclass(frozen=True)
class _Fit:
    """A token's weights that give its output, `[S] float64` each, by slot; without any where that cannot be told.

    Attributes:
        found, asked: the weights.
        unsure: how far those found may be off.
        loose: whether they give it only as any correct evaluation might, and not up to roundings to bf16.
    """

    found: Tensor
    asked: Tensor
    unsure: Tensor
    loose: bool = False

    @property
    def is_right(self) -> bool:
        return bool(((self.found - self.asked).abs() <= self.unsure).all())


@dataclass(frozen=True)
class Reconciled:
    """How far a wrong output can be reconciled with the right computation.

    Attributes:
        words: the stage, and why.
        reach: "other than the sum's weights" where these do not explain it, "before finalize" where besides
            it is GEMM2 of another activation; "rounding" where every element lies within the
            interval of all correct evaluations; else "".
    """

    words: str
    reach: Reach = ""


def reconcile(call: MoeCall, outputs: Mapping[str, Tensor], mask: Tensor) -> Reconciled:
    """The latest stage up to which the kernel and the trace agree, as far as can be told.

    Args:
        call: the call.
        outputs: the kernel's `output`, and any intermediates under the names of `MoeTrace`.
        mask: `[M, H] bool`, where the output differs from the expected one, or where it leaves its bounds.
    """
    if (shown := exposed(call, outputs)) is not None:
        return Reconciled(shown.words)
    if not call.experts.tactics_show:
        return Reconciled("")
    wrong = mask.any(1)
    tokens = mask.sum(1).argsort(descending=True, stable=True)
    tokens = tokens[: _TOKENS if is_heavy(call) else len(tokens)].sort().values
    part = reduce_call(call, tokens)
    right = forward(part)
    inside = bound(part).contains(outputs["output"][tokens], right)
    where = "" if len(tokens) == call.num_tokens else f" of token{_of(tokens.tolist())}"
    if bool(inside.all()) and int(mask.sum()) == 1:
        return Reconciled(
            "rounding or damage: the one element that differs lies within the interval of all correct evaluations"
        )
    if bool(inside.all()):
        return Reconciled(
            f"rounding: every element{where} lies within the interval of all correct evaluations, so the kernel sums "
            "or rounds in another way than the SM90 kernel, or is wrong by less than that",
            "rounding",
        )
    if not bool(fp32.widen(outputs["output"][wrong]).any()):
        return Reconciled(
            "nothing was added up: tokens that differ came out as zeros, which says nothing of the stages before"
        )
    outside = int((~inside).sum())
    words = f"{counted(outside, 'element')}{where} {'lies' if outside == 1 else 'lie'} outside the interval of all "
    words += "correct evaluations"
    got, want = outputs["output"][tokens][~inside], right[~inside]
    if not bool((got.isfinite() & want.isfinite()).any()):
        return Reconciled(f"unknown: {words}, all of them NaN or infinite, or expected to be: {_SPECIAL}")
    if not solvable(fp32.widen(outputs["output"][wrong]).nan_to_num(nan=1.0)):
        return Reconciled(f"unknown: {words}, too near to underflow to be solved for more")
    beyond = torch.zeros_like(mask)  # what lies inside its interval says nothing of the others
    beyond[tokens] = ~inside
    fitted = fit_finalize(call, outputs["output"], beyond)
    if fitted is None:
        return Reconciled(f"unknown: {words}, and of these tokens no weights of the sum can be solved for")
    if fitted:
        return Reconciled(fitted)
    words += ", and other weights for the right expert outputs do not explain it"
    gemm2 = _fit_gemm2(call, outputs["output"], beyond)
    reach: Reach = "before finalize" if _ANOTHER_ACTIVATION in gemm2 else "other than the sum's weights"
    return Reconciled(f"{reach}: {words}{gemm2}", reach)


def _of(tokens: list[int]) -> str:
    return f" {tokens[0]}" if len(tokens) == 1 else f"s {', '.join(map(str, tokens))}"


def fit_finalize(call: MoeCall, output: Tensor, mask: Tensor) -> str | None:
    """Whether the output is a sum of the right expert outputs with other weights: "" if not, None if nothing tells.

    It is only where every token looked at is such a sum, up to roundings to bf16 or as far as a correct
    evaluation may be off, with weights that these outputs determine. Even then a factor that all slots share may
    as well come from before.
    """
    fits = []
    wrong = mask.sum(1)
    looked_at = (
        wrong.argsort(descending=True, stable=True)[: 1 if is_heavy(call) else _LOOKED_AT].sort().values
    )
    for token in looked_at[wrong[looked_at] > 0].tolist():
        fit = _fit_weights(call, output, token)
        if fit is None:
            return ""
        fits += [(token, fit)] if len(fit.found) else []
        if len(fits) == _FITTED_TOKENS:
            break
    if not fits:
        return None
    found = torch.cat([fit.found for _, fit in fits])
    asked, unsure = (torch.cat([getattr(fit, name) for _, fit in fits]) for name in ("asked", "unsure"))
    loose = any(fit.loose for _, fit in fits)
    largest = int((asked / unsure).abs().argmax())
    factor = found[largest] / asked[largest]
    if bool(((found - factor * asked).abs() <= (1 + factor.abs()) * unsure).all()):
        known = factor_in_words(float(factor), [call], unsure=2.0**-8)
        return (
            f"a factor, in finalize or before: {_each(fits)} the right output times {float(factor):.3g}, "
            f"{_UNSURE if loose else 'as far as bf16 shows'}{'; ' * bool(known)}{known}"
        )
    token, fit = fits[0]
    told = ", ".join(digits(*pair) for pair in zip(fit.found.tolist(), fit.unsure.tolist(), strict=True))
    words = (
        f"token {token} is the sum of the right expert outputs with weights [{told}], where {numbers(fit.asked)} "
        f"were asked for{_likewise(fits)}"
    )
    if loose:
        return f"finalize, or a factor of each slot before it: {words}, {_UNSURE}"
    return f"finalize: {words}: GEMM1, activation and GEMM2 are right, up to a factor of each slot"


def _each(fits: list[tuple[int, _Fit]]) -> str:
    tokens = [token for token, _ in fits]
    return f"token{_of(tokens)} {'is' if len(fits) == 1 else 'are'}"


def _likewise(fits: list[tuple[int, _Fit]]) -> str:
    others = [token for token, _ in fits[1:]]
    return f", and likewise token{_of(others)} with other weights" if len(others) else ""


def _fit_weights(call: MoeCall, output: Tensor, token: int) -> _Fit | None:
    """Weights of the token's experts that give its output, which is no correct evaluation's with those asked for.

    None if it is proved that no weights do. Nothing can be told of no expert, numbers that are not finite, a row of
    zeros, or outputs too much alike, nor of weights too near to those asked for.
    """
    one = trace(one_token(call, token))
    y = fp32.widen(one.fc2_output).to(torch.float64)
    order = one.slot.argsort()
    y, slots = y[order], one.slot[order]
    if call.experts.fc2_biases is not None and call.tp_rank == 0:
        y = y + fp32.widen(call.experts.fc2_biases[local_experts(call)[token, slots]]).to(torch.float64)
    target = fp32.widen(output[token]).to(torch.float64)
    asked = call.token_final_scales[token, slots].to(torch.float64)
    lengths = y.norm(dim=1)
    usable = torch.isfinite(y).all() & torch.isfinite(target).all() & torch.isfinite(asked).all()
    if len(y) == 0 or not bool(usable & (lengths > 0).all() & (asked != 0).all()):
        return _Fit(asked[:0], asked[:0], asked[:0])
    if not solvable(target):  # zeros, which weights of zero give, or numbers near underflow
        return _Fit(asked[:0], asked[:0], asked[:0])
    nothing = _Fit(asked[:0], asked[:0], asked[:0])
    columns, sizes, _ = torch.linalg.svd((y / lengths[:, None]).T, full_matrices=False)
    if float(sizes.min()) < _INDEPENDENT or len(y) * 4 > y.shape[1]:
        return nothing
    found = (
        torch.linalg.lstsq((y / lengths[:, None]).T, target[:, None], driver="gelsd").solution[:, 0] / lengths
    )
    share = (
        found.abs() * lengths
    ).max() / lengths  # a weight for which the slot would be as large as the largest
    off = (target - found @ y).abs()
    # As many roundings to bf16 as there are slots, of sums that are no larger than that of the magnitudes; these make
    # the weights unsure, the least squares' way.
    allowed = 2.0**-8 * (found.abs() @ y.abs()) + 2.0**-7 * y.shape[1] ** -0.5 * (share @ y.abs())
    fit = _Fit(found, asked, _SAME * (asked.abs() + share))
    if bool((off <= allowed).all()) and not fit.is_right:
        return fit
    reach = found.abs() @ _reach(one_token(call, token), slots, y) + 2.0**-8 * (found @ y).abs()
    if not bool(torch.isfinite(reach).all()):
        return nothing
    # What weights give it by reach, the least squares miss by no more than its projection on the outputs besides.
    if bool((off > reach + reach.norm() * columns.norm(dim=1)).any()):
        return None
    fit = replace(fit, unsure=fit.unsure + reach.norm() / (lengths * sizes.min()), loose=True)
    return nothing if fit.is_right or bool((off > reach).any()) else fit


def _reach(one: MoeCall, slots: Tensor, y: Tensor) -> Tensor:
    """How far a correct evaluation may be from the outputs of these slots of a token, `[S, H] float64` like these."""
    each = replace(
        one,
        input=one.input.expand(len(slots), -1).contiguous(),
        token_selected_experts=one.token_selected_experts[0, slots][:, None].contiguous(),
        token_final_scales=torch.ones(len(slots), 1, dtype=torch.float32, device=y.device),
    )
    bounds = bound(each)
    ends = torch.stack((bounds.lower, bounds.upper)).to(torch.float64)
    return torch.where(bounds.overflows, torch.inf, (ends - y).abs().amax(0))


def _fit_gemm2(call: MoeCall, output: Tensor, mask: Tensor) -> str:
    """For a token with one expert: whether the output is GEMM2 of another activation."""
    local = local_experts(call)
    single = mask.any(1) & ((local >= 0).sum(1) == 1)
    if call.experts.intermediate_size > call.experts.hidden_size or not bool(single.any()) or is_heavy(call):
        return ""  # of a real layer it would take long
    token = int(single.nonzero()[0])
    slot = int((local[token] >= 0).nonzero()[0])
    some = call.experts.select(local[token, slot][None])
    assert some.fc2_scales is not None
    weights = dequantize(some.fc2_weights[0], some.fc2_scales[0], convention="sm90", dtype=torch.float32)
    weights = weights.to(torch.float64)
    y = fp32.widen(output[token]).to(torch.float64) / float(call.token_final_scales[token, slot])
    if some.fc2_biases is not None and call.tp_rank == 0:
        y = y - fp32.widen(some.fc2_biases[0]).to(torch.float64)
    if not bool(torch.isfinite(y).all() & torch.isfinite(weights).all()) or not solvable(y):
        return ""
    said = weights.any(1)  # a row of zeros is no equation
    weights, y = weights[said], y[said]
    if not solvable(y):
        return ""
    solution = torch.linalg.lstsq(weights, y[:, None], driver="gelsd").solution[:, 0]
    rest = _residual(y, weights @ solution)
    # With as many unknowns as equations anything can be fitted.
    if call.experts.intermediate_size * 2 > len(y) or rest > 2.0**-6:
        return ""
    right = fp32.widen(trace(one_token(call, token)).activation[0]).to(torch.float64)
    if _residual(y, weights @ right) < 4 * max(rest, 2.0**-7):
        return ""  # the right activation, summed in another way, gives it about as well
    wrong = ((solution - right).abs() > 0.05 * right.abs().max()).nonzero().flatten().tolist()
    shown = f"; {len(wrong)} of {len(right)} activation columns are off, first {wrong[:4]}" if wrong else ""
    return f"; {_ANOTHER_ACTIVATION} (token {token}): GEMM1 or the activation is wrong{shown}"


def _residual(y: Tensor, fitted: Tensor) -> float:
    return float((y - fitted).norm() / y.norm())


def numbers(values: Tensor) -> str:
    """Values for a sentence, with six digits."""
    return "[" + ", ".join(f"{value:.6g}" for value in values.tolist()) + "]"
