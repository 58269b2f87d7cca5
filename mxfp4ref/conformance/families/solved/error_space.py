"""Before GEMM2, in it or after it: where the errors of many tokens lie, as a question of likelihood.

Where GEMM2 got another activation, a token's error is a sum of columns of GEMM2's weights, and its covariance over
the output's columns is theirs, though there be more of them than outputs. Where GEMM2's weights are others, errors go
together over the tokens, as the activations do that these weights multiply. Noise does neither. For each it is asked
how many times likelier the errors are with a covariance than without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.families.solved.gains import gains, grows_alike, of_another_fc2_bias, of_one_row
from mxfp4ref.conformance.findings.finding import Evidence

__all__ = ["Space"]

_TOKENS, _FEWEST, _PROFILED = 16, 5, 5
_FEWEST_TOGETHER = 8  # tokens from which it is asked how errors go together over them
_ONE_ROW = Evidence.of_kind(
    ("slots", "finalize"),
    "the errors are multiples of one row in all tokens, though these share no expert",
    "a row that is none of theirs is added to them",
    2,
)
_SURE = 20.0  # of a log likelihood ratio
_NO_DOUBT = 80.0
_NEARLY = 3.0
_LITTLE = 0.1  # of GEMM1's output: more is no rounding
_SHARES = torch.tensor([0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0], dtype=torch.float64, device="cpu")
# Of the variance, around what it seems to be.
_SIZES = torch.logspace(-4, 4, 33, base=2, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Space:
    """How likely errors are sums of columns of GEMM2's weights.

    Attributes:
        samples: the tokens.
        likelihoods: the log likelihoods by the share of the errors that are.
        chosen: those of the tokens that were looked at, with the slots that are wrong.
    """

    samples: list[Sample]
    likelihoods: Tensor
    chosen: list[tuple[Sample, list[int]]]

    @classmethod
    def of(cls, some: list[Sample]) -> Space | None:
        """None where there is too little to tell."""
        some = [s for s in some if s.second.shape[1] >= 2 * len(s.experts) + 8 and bool(s.error.any())]
        if sum(s.second.shape[1] for s in some) < 128:
            return None
        return cls(some, *_in_the_space_of_gemm2(some[:: max(len(some) // _TOKENS, 1)][:_TOKENS]))

    @property
    def inside(self) -> bool:
        """Whether most of the error is surely such a sum."""
        return _ratio(self.likelihoods) >= _SURE

    def placed(self, *, biased: bool, function: bool) -> Evidence | None:
        """Where the errors come from; None where that cannot be told.

        Args:
            biased: whether there is an fc1 bias.
            function: whether the activation may be another function of up and gate.
        """
        if of_one_row(self.samples):
            return _ONE_ROW
        best, after = float(self.likelihoods.max()), self.likelihoods[_SHARES <= 0.2]
        if self.inside and float(self.likelihoods[_SHARES >= 0.8].max()) > best - _NEARLY:
            together = _together(self.samples, self.chosen)
            return _before(self.samples, self.chosen, together, biased=biased, function=function)
        if _ratio(self.likelihoods) <= -_SURE and float(after.max()) > best - _NEARLY:
            return _after(self.samples, _together(self.samples, []))
        return None


def _before(
    some: list[Sample],
    chosen: list[tuple[Sample, list[int]]],
    together: dict[str, float],
    *,
    biased: bool,
    function: bool,
) -> Evidence | None:
    """Of errors that are sums of columns of GEMM2's weights."""
    lie = "the errors are sums of columns of GEMM2's weights, as of another activation"
    activation, bias = together.get("activation", 0.0), together.get("fc1 bias", 0.0) if biased else -1e9
    if activation >= _SURE and activation > bias + _SURE / 2:
        return Evidence.of_kind(
            (),
            f"{lie} that follows from the right one alike for all tokens, as in another order",
            f"K of GEMM2, the activation's columns, rows of GEMM1{', or the fc1 bias' * biased}",
            2,
        )
    if bias >= _SURE and bias > activation + _SURE / 2:
        return Evidence.of_kind(
            ("fc1", "activation"),
            f"{lie} that is off by the same in all tokens",
            "the fc1 bias, where it is added or which it is",
            2,
        )
    profile = _profile(chosen)
    fc1 = max(value for name, value in profile.items() if name.startswith("fc1"))
    proportional, other = profile["activation"], max(profile["another"], profile["even"])
    excluded = max(activation, bias if biased else -1e9) <= -_SURE / 2
    if not excluded and max(fc1, proportional) < other + _SURE:
        return None  # K of GEMM2 may be in another order
    unlike = f"{lie}, and what is wrong in it differs from token to token"
    if proportional > max(fc1, other) + _SURE:
        found = Evidence.of_kind(
            ("activation", "fc2"),
            f"{unlike} in proportion to it",
            "it is rounded or scaled otherwise on its way to GEMM2",
            2,
        )
        return replace(found, rounding=True)
    relative = max(proportional, profile["fc1 relative"])
    if proportional > fc1 - _SURE and max(proportional, fc1) > other:
        additive = max(profile[name] for name in ("fc1 0.02", "fc1 0.3", "fc1 1"))
        if relative < additive + 1.5 * _SURE or grows_alike(some):  # so may another input, or a factor on it
            return Evidence.of_kind(
                (),
                f"{unlike}, about in proportion to it",
                "GEMM1, its input or the activation is rounded, scaled or summed otherwise",
                2,
            )
        found = Evidence.of_kind(
            ("fc1", "activation"),
            f"{unlike} in proportion to it",
            "a rounding of GEMM1 or of the activation",
            2,
        )
        return replace(found, rounding=True)
    if function:
        return Evidence.of_kind(
            ("fc1", "activation"),
            unlike,
            "GEMM1 or the activation is wrong; GEMM2 and the sum are right",
            2,
        )
    if profile["even"] > profile["another"] - _SURE:
        kind = f"{unlike}, as if it were another row's or column's"
        what = (
            "GEMM1 has other weights, scales or input, or the activation is written or read at other places"
        )
        details = f"{what}; GEMM2's weights and the sum are right"
        return replace(Evidence.of_kind(("fc1", "activation"), kind, details, 2), hedged=True)
    as_by_little = fc1 == profile["fc1 0.02"] > other + _SURE and _off(chosen) < _LITTLE
    little = ", by little beside its size, as by a rounding" * as_by_little
    surely = fc1 > max(proportional, other) + _SURE
    single = ", or single elements of the activation are" * (not surely)
    what = f"GEMM1 or its input is wrong{little}{single}; GEMM2 and the sum are right"
    found = Evidence.of_kind(("fc1", "input" if surely else "activation"), unlike, what, 2)
    return replace(found, hedged=True)


def _after(some: list[Sample], together: dict[str, float]) -> Evidence | None:
    """Of errors that have nothing to do with the columns of GEMM2's weights."""
    activation, bias = together.get("activation", 0.0), together.get("fc2 bias", 0.0)
    if activation >= _SURE and activation > bias + _SURE:
        return Evidence.of_kind(
            ("fc2",),
            "the errors go together over the tokens as the right activations do, and are no sums of columns of "
            "GEMM2's weights",
            "GEMM2 has other weights or scales; what it gets is right",
            2,
        )
    if bias >= _SURE and bias > activation + _SURE and of_another_fc2_bias(some):
        return Evidence.of_kind(
            ("finalize", "fc2"),
            "the errors are alike for tokens of the same expert, in proportion to the routing weight",
            "the fc2 bias",
            2,
        )
    return None


def _likelihoods(squares: Tensor, spectrum: Tensor, noise: float, shares: Tensor) -> Tensor:
    """Log likelihoods of numbers `[n, m]` by share, with the likeliest size of each of the m columns.

    Their variance along n is the size times (share x spectrum + 1 - share), plus the noise.
    """
    mixed = shares[:, None] * spectrum.clamp(min=0) + 1 - shares[:, None]
    seen = ((squares.mean(0) - noise) / spectrum.mean()).clamp(min=noise * 1e-3 + 1e-300)
    variance = _SIZES[:, None, None, None] * mixed[None, :, :, None] * seen + noise
    each = -0.5 * (variance.log() + squares / variance).sum(2)
    return each.max(0).values.sum(1)


def _ratio(space: Tensor) -> float:
    """How much likelier most of the error is a sum of GEMM2's columns than not."""
    return float(space[_SHARES >= 0.65].max() - space[_SHARES <= 0.2].max())


class _Complement:
    """Numbers of a token in units of what GEMM2's columns would give, without what is a sum of the right rows `y`."""

    def __init__(self, sample: Sample, slots: list[int]) -> None:
        covariance = _covariance(sample, slots, torch.ones_like(sample.activation))
        self.units = covariance.diagonal().sqrt() + 1e-30
        rows = (sample.y / self.units).T
        self.basis = torch.linalg.qr(rows, mode="complete").Q[:, rows.shape[1] :]
        self.error = self.basis.T @ (sample.error / self.units)
        self.noise = float((sample.noise / self.units.square()).mean())
        self.covariance = covariance

    def likelihoods(self, covariance: Tensor, shares: Tensor) -> Tensor:
        scaled = covariance / (self.units[:, None] * self.units)
        spectrum, axes = torch.linalg.eigh(self.basis.T @ scaled @ self.basis)
        found = _likelihoods((axes.T @ self.error).square()[:, None], spectrum, self.noise, shares)
        return found - self.units.log().sum()


def _covariance(sample: Sample, slots: list[int], variances: Tensor) -> Tensor:
    """Of the output's columns, where the activations of some slots are off by these variances."""
    weighted = sample.second[slots] * (sample.weights[slots][:, None] * variances[slots].sqrt())[:, None]
    flat = weighted.permute(1, 0, 2).flatten(1)
    covariance: Tensor = flat @ flat.T
    return covariance


def _in_the_space_of_gemm2(some: list[Sample]) -> tuple[Tensor, list[tuple[Sample, list[int]]]]:
    """Log likelihoods by the share of the errors that are sums of GEMM2's columns; of all slots, or of one."""
    total, chosen = torch.zeros_like(_SHARES), []
    for sample in some:
        every = list(range(len(sample.experts)))
        options = [every, *([s] for s in every if len(every) > 1 and len(sample.error) <= 512)]
        best: tuple[Tensor, list[int]] | None = None
        for slots in options:
            space = _Complement(sample, slots)
            found = space.likelihoods(space.covariance, _SHARES)
            if best is None or float(found.max()) > float(best[0].max()):
                best = found, slots
        assert best is not None
        total += best[0]
        chosen.append((sample, best[1]))
        if len(chosen) >= _FEWEST and abs(_ratio(total)) > _NO_DOUBT:
            break
    return total, chosen


def _together(some: list[Sample], chosen: list[tuple[Sample, list[int]]]) -> dict[str, float]:
    """How much likelier it is that errors go together over the tokens than that they do not, by what they multiply.

    That is the activation for other weights of GEMM2, what the activation gains with GEMM1's output for another fc1
    bias, and the routing weight alone for another fc2 bias. A log likelihood ratio each, less what the best loses.
    """
    if len(some) < _FEWEST_TOGETHER:
        return {}
    features: dict[str, Callable[[Sample], Tensor]] = {
        "activation": lambda s: s.activation,
        "fc1 bias": gains,
        "fc2 bias": lambda s: torch.ones_like(s.activation[:, :1]),
    }
    everyone = [set(s.experts.tolist()) for s in some]
    ids = sorted(set.union(*everyone))
    errors = torch.stack([s.rest for s in some])
    noise = torch.stack([s.noise for s in some])
    found: dict[str, float] = {}
    wrong = {e for sample, slots in chosen for e in sample.experts[slots].tolist()}
    always = sorted(set.intersection(*everyone))
    if len(wrong) == 1 and wrong <= set(always):
        ids = always = sorted(wrong)
    for experts in (ids, *([e] for e in always if len(ids) > 1)):
        by_feature = {name: _over_tokens(some, errors, noise, of, experts) for name, of in features.items()}
        best = max(float(v[_SHARES >= 0.8].max()) for v in by_feature.values())
        for name, likelihoods in by_feature.items():
            full = float(likelihoods[_SHARES >= 0.8].max())
            ratio = full - float(likelihoods[_SHARES <= 0.2].max())
            found[name] = max(
                found.get(name, -1e300), min(ratio, full - best + abs(ratio)) if full < best else ratio
            )
    return found


def _over_tokens(
    some: list[Sample], errors: Tensor, noise: Tensor, of: Callable[[Sample], Tensor], experts: list[int]
) -> Tensor:
    """Log likelihoods by the share of the errors that go together as these features of these experts do."""
    rows = torch.zeros(len(some), len(experts), of(some[0]).shape[1], dtype=torch.float64)
    for row, sample in zip(rows, some, strict=True):
        for weight, expert, feature in zip(sample.weights, sample.experts.tolist(), of(sample), strict=True):
            if expert in experts:
                row[experts.index(expert)] += weight * feature
    flat = rows.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
    spectrum, axes = torch.linalg.eigh(flat @ flat.T)
    units = errors.square().mean(1, keepdim=True).sqrt() + 1e-300  # of a token's size nothing is said
    quiet = float((noise / units.square()).mean())
    return _likelihoods((axes.T @ (errors / units)).square(), spectrum, quiet, _SHARES)


def _profile(chosen: list[tuple[Sample, list[int]]]) -> dict[str, float]:
    """Log likelihoods of how large an activation's error is where, by what it comes from."""
    found: dict[str, float] = {}
    share = torch.ones(1, dtype=torch.float64)
    for sample, slots in chosen[:_PROFILED]:
        space = _Complement(sample, slots)
        for name, variances in _variances(sample).items():
            covariance = _covariance(sample, slots, variances / variances[slots].mean())
            found[name] = found.get(name, 0.0) + float(space.likelihoods(covariance, share))
    return found


def _off(chosen: list[tuple[Sample, list[int]]]) -> float:
    """How far GEMM1's output is off, in standard deviations of it, that gives errors of this size: the median."""
    found = []
    for sample, slots in chosen[:_PROFILED]:
        of_little = _covariance(sample, slots, _variances(sample)["fc1 0.02"]).diagonal().sum()
        error = (sample.error.square() - sample.noise).sum().clamp(min=0)
        found.append(0.02 * float((error / of_little).sqrt()))
    return sorted(found)[len(found) // 2]


def _variances(sample: Sample) -> dict[str, Tensor]:
    """Of the activation's error by element, where GEMM1's output is off by so much, or the activation itself."""
    right = sample.activation.square()
    found = {
        "activation": right + 1e-6 * right.mean(),
        "another": right + right.mean(),
        "even": torch.ones_like(right),
    }
    random = torch.Generator().manual_seed(0)
    silu = _silu(sample.gate) * sample.up

    def off(size: Tensor) -> Tensor:
        return size * torch.randn(size.shape, generator=random, dtype=torch.float64)

    for name, scale in (("fc1 0.02", 0.02), ("fc1 0.3", 0.3), ("fc1 1", 1.0), ("fc1 relative", 0.0)):
        sizes = [
            t.abs() * 0.01 if not scale else torch.full_like(t, float(t.std()) * scale)
            for t in (sample.up, sample.gate)
        ]
        drawn = [(sample.up + off(sizes[0])) * _silu(sample.gate + off(sizes[1])) - silu for _ in range(12)]
        found[name] = torch.stack(drawn).square().mean(0)
    return found


def _silu(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate)
