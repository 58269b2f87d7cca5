"""Recorded calls in words: one in a line, and what all of a replay have in common."""

from __future__ import annotations

from contextlib import suppress

import torch

from mxfp4ref.conformance.finding import counted
from mxfp4ref.engine.calls import release_of
from mxfp4ref.engine.recordings import Recording, Unreadable
from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace

__all__ = ["LOOKED_AT", "Calls", "described", "reaches_limit", "zeros_words"]

LOOKED_AT = 64  # tokens of a call, for its limit
_MOST = 8  # ranks, or activations, that are listed


class Calls:
    """What the calls of a replay were made by and with, each thing once."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, None]] = {}

    def add_release(self, recording: Recording) -> None:
        """The release that made it, if it can be read."""
        with suppress(Unreadable):
            self._add("recorded by flashinfer", release_of(recording.metadata()) or "unknown")

    def add(self, call: MoeCall) -> None:
        """On which rank it ran, and its activation."""
        self._add("ranks", *(words.replace(" rank", "") for words in _ranks(call)))
        self._add("activation", _activation(call))

    def _add(self, name: str, *words: str) -> None:
        self._found.setdefault(name, {}).update(dict.fromkeys(words))

    @property
    def environment(self) -> dict[str, str]:
        """For a report, by name."""
        return {name: _listed(sorted(words)) for name, words in self._found.items() if words}


def _listed(words: list[str]) -> str:
    more = [f"{len(words) - _MOST:,} others"] if len(words) > _MOST else []
    return ", ".join([*words[:_MOST], *more])


def described(call: MoeCall) -> str:
    """A call in a line."""
    experts = call.experts
    words = (
        f"{counted(call.num_tokens, 'token')}, top {call.top_k} of {call.num_global_experts} experts, hidden size "
        f"{experts.hidden_size}, intermediate size {experts.intermediate_size}"
    )
    return ", ".join([words, *_ranks(call), _activation(call)])


def zeros_words(call: MoeCall) -> str:
    """What there is to say of a right output that is all zeros."""
    first = call.ep_rank * call.experts.num_experts
    last = first + call.experts.num_experts - 1
    ids = call.token_selected_experts
    why = f"no id lies in {first} to {last}, which the rank owns: "
    owned = bool(((ids >= first) & (ids <= last)).any())
    return f"{'' if owned else why}all of the output is zero, so that this call alone proves nothing"


def reaches_limit(call: MoeCall) -> bool | None:
    """Whether an up or gate value of the first `LOOKED_AT` tokens reaches `swiglu_limit`; None without a limit."""
    experts = call.experts
    limits = experts.swiglu_limit
    if limits is None or not call.num_tokens or not experts.tactics_show or not bool(limits.isfinite().any()):
        return None
    rows = trace(call.select(slice(LOOKED_AT)))
    up, gate = rows.fc1_output.to(torch.float32).chunk(2, dim=1)
    if experts.fc1_biases is not None:
        biases = experts.fc1_biases[rows.expert].to(torch.float32).chunk(2, dim=1)
        up, gate = up + biases[0], gate + biases[1]
    limit = limits[rows.expert][:, None]
    return bool(((up.abs() >= limit) | (gate >= limit)).any())


def _ranks(call: MoeCall) -> list[str]:
    """Which rank it is of how many, where there are several."""
    sizes = ("ep", call.ep_size, call.ep_rank), ("tp", call.tp_size, call.tp_rank)
    return [f"{kind} rank {rank} of {size}" for kind, size, rank in sizes if size > 1]


def _activation(call: MoeCall) -> str:
    """Its name and parameters, each one's least and largest value where the experts' differ."""
    given = []
    for name in PARAMETERS:
        if (values := getattr(call.experts, name)) is not None:
            low, high = float(values.min()), float(values.max())
            given.append(f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}")
    return call.activation.name + (f" with {' and '.join(given)}" if given else "")
