"""Which tensors of an expert go together, so that all of them, or none, are those of another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from torch import Tensor

from mxfp4ref.model.call import MoeCall

__all__ = [
    "GEMMS",
    "WHOLE",
    "Group",
    "both_gemms",
    "gemm_groups",
    "groups_of",
    "parameter_groups",
    "whole_experts",
]

WHOLE = ("fc1", "slots")  # stages of all that an expert has
_SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


@dataclass(frozen=True)
class Group:
    """Tensors of an expert that go together: in words, the stages they belong to, their names."""

    words: str
    stages: tuple[str, ...]
    names: tuple[str, ...]
    verb: str = "are those of"
    has: str = "has those of"

    def given(self, call: MoeCall) -> bool:
        return any(getattr(call.experts, name) is not None for name in self.names)

    def of(self, whose: str) -> str:
        """Whose they are, in words."""
        return f"{self.words} {self.verb} {whose}"

    @property
    def kind(self) -> str:
        """Of all hypotheses on whose they are."""
        return self.of("other experts")


# One GEMM's tensors, or both alike: the prefixes of their names, and whose they are.
GEMMS = ((("fc1",), "GEMM1's"), (("fc2",), "GEMM2's"), (("fc1", "fc2"), "both GEMMs'"))


def gemm_groups() -> Iterator[Group]:
    """Of one GEMM."""
    for number, fc in enumerate(("fc1", "fc2"), 1):
        bias_stages = ("fc1", "activation") if number == 1 else ("finalize", "fc2")
        yield Group(f"GEMM{number}'s scales", (fc,), (f"{fc}_scales",))
        yield Group(f"GEMM{number}'s weights with their scales", (fc,), (f"{fc}_weights", f"{fc}_scales"))
        yield Group(f"GEMM{number}'s weights (codes without the scales)", (fc,), (f"{fc}_weights",))
        yield Group(f"the {fc} biases", bias_stages, (f"{fc}_biases",))
        every = tuple(f"{fc}_{what}" for what in ("weights", "scales", "biases"))
        yield Group(f"GEMM{number}'s weights, scales and biases", (fc,), every)


def _beside_the_codes() -> Iterator[Group]:
    for number, fc in enumerate(("fc1", "fc2"), 1):
        words = f"GEMM{number}'s scales and biases, not its codes,"
        yield Group(words, (fc, ("activation", "finalize")[number - 1]), (f"{fc}_scales", f"{fc}_biases"))


def both_gemms() -> Iterator[Group]:
    """Of both GEMMs."""
    for words, names in (
        ("the scales of both GEMMs", ("scales",)),
        ("the weights of both GEMMs, with their scales,", ("weights", "scales")),
        ("the weights of both GEMMs, without the scales,", ("weights",)),
        ("the biases of both GEMMs", ("biases",)),
    ):
        yield Group(words, ("fc1", "fc2"), tuple(f"{fc}_{name}" for fc in ("fc1", "fc2") for name in names))


def parameter_groups() -> Iterator[Group]:
    """Of the SwiGLU."""
    for name in _SWIGLU:
        yield Group(f"the SwiGLU {name.removeprefix('swiglu_')}", ("activation",), (name,))
    yield Group("all SwiGLU parameters", ("activation",), _SWIGLU)


def groups_of(call: MoeCall) -> Iterator[Group]:
    """All that an expert may have of another one; the expert as a whole is taken for a slot, too."""
    names = _given(call)
    beside = () if call.experts.fc2_biases is None else _beside_the_codes()
    every = Group("the fc1 biases and all SwiGLU parameters", ("activation", "fc1"), ("fc1_biases", *_SWIGLU))
    more = (every,) if "fc1_biases" in names and names & set(_SWIGLU) else ()
    for group in (*gemm_groups(), *both_gemms(), *parameter_groups(), *more, *beside):
        if group.given(call):
            yield replace(group, stages=WHOLE) if names <= set(group.names) else group


def whole_experts(call: MoeCall) -> Group:
    """All tensors of an expert."""
    return Group("slots", ("slots",), tuple(sorted(_given(call))), "are computed by", "is replaced by")


def _given(call: MoeCall) -> set[str]:
    return {f.name for f in fields(call.experts) if isinstance(getattr(call.experts, f.name), Tensor)}
