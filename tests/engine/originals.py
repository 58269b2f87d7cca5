"""`originals.toml` as records, and the arguments that an engine makes of a checkpoint by what stands there."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref.formats import humming
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import Generation, generation_named
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.formats.layout import (
    fold_scales_sm90,
    interleave_weights_sm90,
    interleaved_to_halves,
    swap_gate_up,
)
from mxfp4ref.formats.resize import resize_experts
from tests.helpers import layers


@dataclass(frozen=True)
class Shard:
    """How an engine shares out I; see originals.toml."""

    rule: str
    rows: list[dict[str, Any]]

    def columns(self, intermediate: int, tp_size: int, tp_rank: int) -> slice:
        """The columns of the unpadded I that a rank has."""
        blocks = -(-intermediate // 32 // tp_size)
        width = {"whole blocks": 32 * blocks, "equal": intermediate // tp_size}[self.rule]
        return slice(tp_rank * width, min((tp_rank + 1) * width, intermediate))


@dataclass(frozen=True, kw_only=True)
class Original:
    """An engine, a release and a family of checkpoints; see originals.toml."""

    name: str
    read: list[str]
    checkpoint: str
    call: str
    layout: str
    rows: str
    hidden: int
    intermediate: int
    scale_of_hidden_padding: int
    fc1_scales: str
    fc2_scales: str
    fc1_residuals: str | None = None
    fc2_residuals: str | None = None
    fc2_act_scale: str | None = None
    biases: bool
    tp_beside_ep: bool
    shard: str
    flashinfer: str | None = None
    weight_layout: str | None = None
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    padding_id: int | None = None
    activation_type: int = 3
    missing: str | None = None

    @property
    def generation(self) -> Generation:
        return generation_named(self.layout)

    @property
    def fp8(self) -> bool:
        """Whether the call has FP8 activations (W4A8)."""
        return self.fc1_residuals is not None

    def padded(self, hidden: int, intermediate: int, tp_size: int) -> tuple[int, int]:
        """H and I as the kernel of a rank sees them."""
        return round_up(hidden, self.hidden), round_up(intermediate // tp_size, self.intermediate)


_DATA = tomllib.loads(Path(__file__).with_name("originals.toml").read_text(encoding="utf-8"))
ORIGINALS = [Original(**record) for record in _DATA["original"]]
CALLS: dict[str, dict[str, Any]] = _DATA["call"]
SHARDS = {name: Shard(**record) for name, record in _DATA["shard"].items()}


class Rank(NamedTuple):
    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0


@dataclass(frozen=True)
class Layer:
    """Experts in the order of their checkpoint.

    `fc1_...` are gpt-oss's rows gate0, up0, gate1, ... or DeepSeek-V4's w1 (gate) and w3 (up), one above the other.
    """

    checkpoint: str
    hidden: int
    intermediate: int
    fc1_weights: Tensor
    fc1_scales: Tensor
    fc2_weights: Tensor
    fc2_scales: Tensor
    fc1_biases: Tensor | None
    fc2_biases: Tensor | None
    num_experts: int = field(init=False, default=4)

    @classmethod
    def random(cls, checkpoint: str) -> Layer:
        # gpt-oss's 2880 columns are 90 blocks, these 960 are 30: shared out as unevenly.
        hidden, intermediate = {"gpt_oss": (96, 960), "deepseek_v4": (512, 1024)}[checkpoint]
        made = layers.random_experts(
            5, num_experts=4, hidden=hidden, inner=intermediate, biases=checkpoint == "gpt_oss"
        )
        names = ("fc1_weights", "fc1_scales", "fc2_weights", "fc2_scales", "fc1_biases", "fc2_biases")
        return cls(checkpoint, hidden, intermediate, *(getattr(made, name) for name in names))

    def logical(self, experts: slice, columns: slice) -> Experts:
        """Some experts and columns of I, rows [up; gate], not padded: by plain indices, not by our layouts."""
        rows = torch.arange(2 * self.intermediate).reshape(
            (-1, 2) if self.checkpoint == "gpt_oss" else (2, -1)
        )
        gate, up = rows.unbind(1 if self.checkpoint == "gpt_oss" else 0)
        chosen = torch.cat((up[columns], gate[columns]))
        return Experts(
            self.fc1_weights[experts, chosen],
            self.fc1_scales[experts, chosen],
            self.fc2_weights[experts, :, columns.start // 2 : columns.stop // 2].contiguous(),
            self.fc2_scales[experts, :, columns.start // 32 : columns.stop // 32].contiguous(),
            None if self.fc1_biases is None else self.fc1_biases[experts, chosen],
            None if self.fc2_biases is None else self.fc2_biases[experts],
        )


class Tokens(NamedTuple):
    """What the model in front of the layer gives: `[M, H] bf16`, `[M, k] int64` and `[M, k] float32`."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def random_tokens(layer: Layer, padding_id: int | None) -> Tokens:
    """Five tokens; with a padding id the last one is there only to fill a batch."""
    rng = np.random.default_rng(6)
    ids = torch.from_numpy(np.stack([rng.permutation(layer.num_experts)[:2] for _ in range(5)]))
    if padding_id is not None:
        ids[-1] = padding_id
    weights = torch.from_numpy(rng.uniform(0.05, 1.5, (5, 2)).astype(np.float32))
    return Tokens(layers.random_bf16(rng, 5, layer.hidden), ids, weights)


def expert_range(layer: Layer, rank: Rank) -> slice:
    count = layer.num_experts // rank.ep_size
    return slice(rank.ep_rank * count, (rank.ep_rank + 1) * count)


def parameters(original: Original, count: int) -> dict[str, Tensor | None]:
    """alpha, beta and limit of so many experts."""
    values = {name: getattr(original, name) for name in ("alpha", "beta", "limit")}
    return {
        f"swiglu_{name}": None if value is None else torch.full((count,), value)
        for name, value in values.items()
    }


def prepared(original: Original, layer: Layer, rank: Rank) -> dict[str, Tensor | None]:
    """The weights of a rank by the names of `Experts`, brought by this package's layouts into the engine's form."""
    experts = expert_range(layer, rank)
    columns = SHARDS[original.shard].columns(layer.intermediate, rank.tp_size, rank.tp_rank)

    def rows(tensor: Tensor) -> Tensor:
        if original.rows == "gate; up":
            return swap_gate_up(
                tensor[experts].unflatten(1, (2, -1))[:, :, columns].flatten(1, 2).contiguous()
            )
        assert original.rows == "gate0, up0, gate1, ..."
        return interleaved_to_halves(tensor[experts, 2 * columns.start : 2 * columns.stop])

    def part(tensor: Tensor, values_a_byte: int) -> Tensor:
        return tensor[experts, :, columns.start // values_a_byte : columns.stop // values_a_byte].contiguous()

    loaded = Experts(
        rows(layer.fc1_weights),
        rows(layer.fc1_scales),
        part(layer.fc2_weights, 2),
        part(layer.fc2_scales, 32),
        None if layer.fc1_biases is None else rows(layer.fc1_biases),
        None if layer.fc2_biases is None else layer.fc2_biases[experts] * (rank.tp_rank == 0),
    )
    width = columns.stop - columns.start
    padded = resize_experts(loaded, *original.padded(layer.hidden, layer.intermediate, rank.tp_size))
    assert padded.fc1_scales is not None
    assert padded.fc2_scales is not None
    halves = padded.fc1_scales.unflatten(1, (2, -1))
    halves[:, :, :width, layer.hidden // 32 :] = original.scale_of_hidden_padding
    padded.fc2_scales[:, layer.hidden :, : width // 32] = original.scale_of_hidden_padding
    generation = original.generation
    if original.fp8:
        ready = HummingExperts.prepare(padded)
        assert ready.fc1_scales is not None
        assert ready.fc2_scales is not None
        return {
            "fc1_weights": humming.interleave(ready.fc1_weights),
            "fc2_weights": humming.interleave(ready.fc2_weights),
            "fc1_scales": _folded(ready.fc1_scales, generation, original.fc1_scales),
            "fc2_scales": _folded(ready.fc2_scales, generation, original.fc2_scales),
            "fc1_residuals": ready.fc1_residual,
            "fc2_residuals": ready.fc2_residual,
            "fc1_biases": ready.fc1_biases,
            "fc2_biases": ready.fc2_biases,
            **parameters(original, experts.stop - experts.start),
        }
    return {
        "fc1_weights": interleave_weights_sm90(padded.fc1_weights, generation),
        "fc2_weights": interleave_weights_sm90(padded.fc2_weights, generation),
        "fc1_scales": _folded(padded.fc1_scales, generation, original.fc1_scales),
        "fc2_scales": _folded(padded.fc2_scales, generation, original.fc2_scales),
        "fc1_biases": padded.fc1_biases,
        "fc2_biases": padded.fc2_biases,
        **parameters(original, experts.stop - experts.start),
    }


def arguments(original: Original, layer: Layer, tokens: Tokens, rank: Rank) -> dict[str, Any]:
    """The keyword arguments of a rank's call in the engine's order, each as originals.toml describes it."""
    weights = prepared(original, layer, rank)
    hidden, inner = original.padded(layer.hidden, layer.intermediate, rank.tp_size)
    x = F.pad(tokens.hidden_states, (0, hidden - layer.hidden))
    values: dict[str, Any] = {
        "input": x,
        "token_selected_experts": tokens.topk_ids.to(torch.int),
        "token_final_scales": tokens.topk_weights,
        "output": torch.full_like(x, torch.nan),  # what happens to be in the memory
        "fc1_expert_weights": weights["fc1_weights"],
        "fc2_expert_weights": weights["fc2_weights"],
        "fc1_expert_biases": weights["fc1_biases"],
        "fc2_expert_biases": weights["fc2_biases"],
        "fc2_act_scale": torch.tensor(1.0),
        **weights,
    }
    numbers = {
        **rank._asdict(),
        "M": len(x),
        "k": tokens.topk_ids.shape[1],
        "E": layer.num_experts // rank.ep_size,
        "H": hidden,
        "I": inner,
        "activation_type": original.activation_type,
        "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
    }

    def value(name: str, described: Any) -> Any:
        if isinstance(described, list):
            return [value(item, getattr(original, item)) for item in described]
        if not isinstance(described, str):
            return described
        if "[" not in described:
            names = numbers | {"bfloat16": torch.bfloat16}
            return eval(described, {"__builtins__": {}}, names)
        tensor = values[name]
        if tensor is not None:
            check_described(name, tensor, described, numbers)
        return tensor

    return {name: value(name, described) for name, described in CALLS[original.call].items()}


def check_described(name: str, tensor: Tensor, described: str, numbers: Mapping[str, Any]) -> None:
    """The tensor has the dtype and the shape of its description "dtype [shape]", and is contiguous."""
    dtype, _, dimensions = described.partition(" ")
    shape = eval(dimensions.replace("/", "//"), {"__builtins__": {}}, dict(numbers))
    assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape), name
    assert tensor.is_contiguous(), name


def round_up(size: int, multiple: int) -> int:
    return size + -size % multiple


def _folded(scales: Tensor, generation: Generation, described: str) -> Tensor:
    return fold_scales_sm90(scales, generation).view(getattr(torch, described.split()[0]))
