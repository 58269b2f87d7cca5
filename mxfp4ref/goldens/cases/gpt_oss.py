"""Suite `gpt_oss`: gpt-oss's activation with biases, at sizes beyond one tile of rows, columns and experts.

The other suites see options one by one, on calls that one tile holds: a bias or a parameter that a kernel does not
advance from tile to tile is right there. Weights are derived from the generator, so that the files stay small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.models import recipes_and_tensors
from mxfp4ref.goldens.cases.source import Source, float32
from mxfp4ref.model.call import MoeCall

_H, _I = 384, 256


def _content(
    source: Source, ids: Tensor, num_experts: int, *, hidden: int = _H, inner: int = _I, **ranks: Any
) -> Content:
    """A call with these ids; every expert has biases and its own alpha, beta and limit."""
    recipes, tensors = recipes_and_tensors(
        source, num_experts, list(range(num_experts)), hidden, inner, biases=True
    )
    step = [1.0 + expert / num_experts for expert in range(num_experts)]
    parameters = {
        "swiglu_alpha": float32([1.702 * one for one in step]),
        "swiglu_beta": float32([2.0 - one for one in step]),
        "swiglu_limit": float32([0.75 * one for one in step]),
    }
    x = torch.zeros(len(ids), tensors["fc2_weights"].shape[1], dtype=torch.bfloat16)
    x[:, :hidden] = source.normal("input", len(ids), hidden)
    experts = Experts(**tensors, **parameters)
    call = MoeCall(x, ids.to(torch.int32), source.weights(*ids.shape), experts, **ranks)
    return moe_content(call, derived=recipes)


@define(unique_for="gpt-oss's options beyond one tile")
def beyond_one_tile(source: Source) -> Content:
    """Biases and gpt-oss's parameters where everything takes several tiles: H 384 and I 256, and experts with
    129, 65 and 18 rows, a token each. What is read of a bias, a parameter or a routing weight once for all tiles
    of an expert, or not advanced to the next one, shows, and is in no other expert's sum.
    """
    rows = torch.tensor([129, 65, 18])
    ids = torch.repeat_interleave(torch.arange(3), rows)
    return _content(source, ids[source.words("order", len(ids)).argsort(stable=True), None], 3)


@define(catches="bias2_on_every_tp_rank", unique_for="gpt-oss's options on a rank beyond one tile")
def expert_and_tensor_rank_1(source: Source) -> Content:
    """Rank 1 of 2 of expert and of tensor parallelism, with biases, gpt-oss's parameters, four slots a token, H 384
    and I 256: parameters and the fc1 bias are those of local experts, and the fc2 bias, which tensor rank 0 adds, is
    added in no tile of columns.
    """
    ids = source.distinct("ids", 40, 4, 8)
    return _content(source, ids, 4, ep_size=2, ep_rank=1, tp_size=2, tp_rank=1)


@define(catches="params_of_first_expert", unique_for="gpt-oss's options of many experts, padded")
def many_experts_padded(source: Source) -> Content:
    """36 experts, each with biases and its own alpha, beta and limit, four slots a token, and sizes of 320 and 192
    that are padded to 384 and 256, biases included: a parameter that is that of another expert beyond the first 32,
    and padding that is no zero because of a bias or of beta, show.
    """
    return _content(source, source.distinct("ids", 36, 4, 36), 36, hidden=320, inner=192)
