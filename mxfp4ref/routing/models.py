"""The routers of the published models in numbers, one record each (docs/arithmetic.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mxfp4ref._choices import Normalize
from mxfp4ref._shown import Shown
from mxfp4ref.routing.scoring import raw_logits, sigmoid, softmax, sqrt_softplus

__all__ = ["DEEPSEEK_V3", "DEEPSEEK_V4", "GPT_OSS", "MIXTRAL", "PRESETS", "Preset"]


@dataclass(frozen=True, repr=False)
class Preset(Shown):
    """The router of a family of models; the function of this name in `presets.py` computes it.

    Attributes:
        name: that of the function.
        score: from logits to scores.
        normalize: how scores become weights, see `routing_weights`.
        top_k: experts per token.
        epsilon: added to the sum of the scores, see `routing_weights`.
        n_group, topk_group: see `select_experts`.
        factor: the routed scaling factor; None where the models of the family differ.
        temperature: what the logits are divided by before they are scored.
    """

    name: str
    score: Callable[[Tensor], Tensor]
    normalize: Normalize
    top_k: int
    epsilon: float = 0.0
    n_group: int = 1
    topk_group: int = 1
    factor: float | None = 1.0
    temperature: float = 1.0


DEEPSEEK_V3 = Preset(
    "deepseek_v3", sigmoid, "sum", top_k=8, epsilon=1e-20, n_group=8, topk_group=4, factor=2.5
)
DEEPSEEK_V4 = Preset("deepseek_v4", sqrt_softplus, "sum", top_k=6, factor=None)
GPT_OSS = Preset("gpt_oss", raw_logits, "softmax", top_k=4)
MIXTRAL = Preset("mixtral", softmax, "sum", top_k=2)

PRESETS = {preset.name: preset for preset in (DEEPSEEK_V3, DEEPSEEK_V4, GPT_OSS, MIXTRAL)}
