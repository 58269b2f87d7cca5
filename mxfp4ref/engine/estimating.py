"""How long a replay will take, from the sizes of the recorded calls: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import Diagnosing
from mxfp4ref._words import duration
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.looking import REAL_SECONDS, SECONDS
from mxfp4ref.engine.calls import arguments_of
from mxfp4ref.engine.fitting import PROBED
from mxfp4ref.engine.recordings import Recording

__all__ = ["Estimate", "estimate"]

# Seconds of one core of a server (2 to 3 GHz), measured on layers with H = 4096 and I = 2048.
_PRODUCT = 6e-11  # of an activation and a weight
_WEIGHT = 3.5e-10  # of an expert that is used, in each forward
_BYTE = 4e-9  # of the experts, once a call: read, told from those of other layers, unpacked
_START = 10  # at most, to load the compiled loops: 1 where the files were read before
_FORWARDS = 4  # of a whole call: for pairs of K tiles that fit the first tokens
_PAIRS = 9  # at most, each of which is tried on the first tokens
_LARGE = 1 << 25  # products of a token, in a layer of real size


@dataclass(frozen=True)
class Estimate:
    """What a replay will take.

    Attributes:
        calls: how many there are.
        large: how many of them are of real size.
        comparing: seconds to compare all of them, by as many threads as torch has, once all is loaded.
        diagnosing: seconds more, if all differ.
    """

    calls: int
    large: int
    comparing: float
    diagnosing: float

    def __str__(self) -> str:
        """In a line."""
        words = f"{counted(self.calls, 'recorded call')}{f', {self.large:,} of real size' if self.large else ''}: "
        words += f"about {duration(self.comparing)} to compare, after up to {_START} s to load compiled loops"
        return words + (
            f"; up to {duration(self.diagnosing)} of the processor more if all differ"
            if self.diagnosing
            else ""
        )


def estimate(recordings: Sequence[Recording], diagnosis: Diagnosing = "full") -> Estimate:
    """What it takes to replay these calls; those that cannot be read take nothing.

    Args:
        recordings: the calls.
        diagnosis: as in `ReplayOptions`.
    """
    comparing, more, large = 0.0, 0.0, 0
    for recording in recordings:
        try:
            arguments = arguments_of(recording)
            seconds, products = _cost(arguments)
        except Exception:  # whatever is recorded there: it is told when the call is compared
            continue
        comparing += seconds / torch.get_num_threads()
        large += products >= _LARGE
        if diagnosis != "none":
            more += (REAL_SECONDS if products >= _LARGE else SECONDS)[diagnosis]
    return Estimate(len(recordings), large, comparing, more)


def _cost(arguments: Mapping[str, Any]) -> tuple[float, int]:
    """Seconds of one core for a call, and the products of one of its tokens."""
    names = ("token_selected_experts", "fc1_expert_weights", "fc2_expert_weights")
    ids, fc1, fc2 = (arguments[name] for name in names)
    if not all(isinstance(t, Tensor) and t.dim() > 1 and len(t) for t in (ids, fc1, fc2)):
        return 0.0, 0
    packed = 1 if fc1.dtype == torch.bfloat16 else 2
    weights = packed * (fc1.numel() + fc2.numel()) // len(fc1)  # of an expert
    slots = ids.numel() / max(int(arguments["ep_size"]), 1)  # of this rank
    top_k = slots / len(ids)

    def forward(tokens: float) -> float:
        used = min(len(fc1), tokens * top_k)
        return float(weights * (_WEIGHT * used + _PRODUCT * tokens * top_k))

    seconds = (
        _FORWARDS * forward(len(ids))
        + _PAIRS * forward(min(PROBED, len(ids)))
        + _BYTE * (fc1.nbytes + fc2.nbytes)
    )
    return seconds, int(weights * top_k)
