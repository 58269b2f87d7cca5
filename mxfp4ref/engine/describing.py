"""Recorded calls in words: one in a line, and what all of a replay have in common."""

from __future__ import annotations

from contextlib import suppress

from mxfp4ref._words import listed
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.engine.calls import release_of
from mxfp4ref.engine.recordings import Recording, Unreadable
from mxfp4ref.engine.unshown import owned
from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.activation import ACTIVATIONS

__all__ = ["Calls", "described", "zeros_words"]


class Calls:
    """What the calls of a replay were made by and with, each thing once."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, None]] = {}

    def add_release(self, recording: Recording) -> None:
        """The release that made it, if it can be read."""
        with suppress(Unreadable):
            if release := release_of(recording.metadata()):  # none of a recording without flashinfer
                self._add("recorded with flashinfer", release)

    def add(self, call: MoeCall) -> None:
        """On which rank it ran, and its activation."""
        self._add("ranks", *(words.replace(" rank", "") for words in _ranks(call)))
        self._add("activation", _activation(call))

    def _add(self, name: str, *words: str) -> None:
        self._found.setdefault(name, {}).update(dict.fromkeys(words))

    @property
    def environment(self) -> dict[str, str]:
        """For a report, by name."""
        return {name: listed(sorted(words)) for name, words in self._found.items() if words}


def described(call: MoeCall) -> str:
    """A call in a line."""
    experts = call.experts
    words = (
        f"{counted(call.num_tokens, 'token')}, top {call.top_k} of {call.num_global_experts} experts, hidden size "
        f"{experts.hidden_size}, intermediate size {experts.intermediate_size}"
    )
    return ", ".join([words, *_ranks(call), _activation(call)])


def local_ids(call: MoeCall) -> bool:
    """Whether no id is this rank's, and all look as if they were numbered from its first expert."""
    ids = call.token_selected_experts
    if not call.ep_rank or bool(owned(call).any()) or not bool((ids >= 0).any()):
        return False
    return int(ids.max()) < call.experts.num_experts


def zeros_words(call: MoeCall) -> str:
    """What there is to say of a right output that is all zeros."""
    count = call.experts.num_experts
    first, ids = call.ep_rank * count, call.token_selected_experts
    why = ""
    if not bool(owned(call).any()):
        why = f"no id lies in {first} to {first + count - 1}, which the rank owns: "
        if local_ids(call):
            why = why.replace(": ", f"; they are {int(ids.min())} to {int(ids.max())}: ")
            why += "are these local ids already? The kernel takes global ones. As they are, "
    return f"{why}all of the output is zero, so that this call alone proves nothing"


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
    named = ACTIVATIONS.get(call.activation_type, call.activation) if given else call.activation
    return named.name + (f" with {' and '.join(given)}" if given else "")
