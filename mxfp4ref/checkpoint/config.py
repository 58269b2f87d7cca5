"""What config.json says of a model, flat or nested: every key is honoured, refused, or known not to matter.

The keys of a nested text model (`text_config`) count beside those of the file itself. A key that nobody here knows
and whose name sounds of experts, routing or activations is refused: it may change the result.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxfp4ref._validate import check_float, did_you_mean, shown
from mxfp4ref.checkpoint.gguf_file import metadata
from mxfp4ref.checkpoint.quantization import not_mxfp4
from mxfp4ref.checkpoint.shards import GGUF, CheckpointError, read_json
from mxfp4ref.routing.models import DEEPSEEK_V3, DEEPSEEK_V4, MIXTRAL, Preset
from mxfp4ref.sm90.activation import SITU, SWIGLU

__all__ = ["ACTIVATION_NAMES", "HONOURED", "NOT_MATTERING", "OPTIONS", "Config", "read_config", "router_of"]

# The keys that are read, by what they say. Of several names for one thing all that are there must agree.
HONOURED: dict[str, tuple[str, ...]] = {
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "draft_experts": ("dspark_n_routed_experts",),  # of the layers mtp.N
    "hidden_size": ("hidden_size",),
    "expert_hidden_size": ("routed_expert_hidden_size",),  # where experts have a space of their own
    "intermediate_size": ("moe_intermediate_size",),
    "dense_intermediate_size": ("intermediate_size",),  # the experts', if there is no other
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "experts_per_token"),
    "draft_top_k": ("dspark_num_experts_per_tok",),
    "alpha": ("swiglu_alpha",),
    "beta": ("swiglu_beta",),
    "limit": ("swiglu_limit",),
    "situ_beta": ("activation_situ_beta",),
    "situ_linear_beta": ("activation_situ_linear_beta",),
    "activation": ("hidden_act", "hidden_activation"),
    "routed_scaling_factor": ("routed_scaling_factor",),
    "score": ("scoring_func", "moe_router_activation_func"),
    "normalize": ("norm_topk_prob", "moe_renormalize"),
    "grouped": ("use_grouped_topk",),
    "n_group": ("n_group", "num_expert_group"),
    "topk_group": ("topk_group",),
    "method": ("topk_method",),
    "temperature": ("gate_temp",),
    "shared_experts": ("n_shared_experts", "num_shared_experts"),
    "hash_layers": ("num_hash_layers",),
    "layer_types": ("mlp_layer_types",),
    "expert_dtype": ("expert_dtype",),
    "quantization": ("quantization_config",),
    "model_type": ("model_type",),
}
# Names that sound as if they mattered and do not, by reason; regular expressions of whole names.
NOT_MATTERING: dict[str, tuple[str, ...]] = {
    "attention, embeddings and what else lies beside the experts": (
        "(attn|attention|index|candidate|compress|mla|rope|linear|kv|qk|q|o|v|hc|engram|vision|image|mm|vt)_.*",
        "layer_group_size",
    ),
    "training only": (
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "router_jitter_noise",
        "output_router_logits",
        "aux_loss_alpha",
    ),
    "which layers have experts, which the tensors say": (
        "first_k_dense_replace",
        "moe_layer_freq",
        "decoder_sparse_step",
        "interleave_moe_layer_step",
    ),
    "sizes that the tensors say": ("(moe_)?shared_expert_intermediate_size",),
    "how text is generated": ("temperature", "top_k"),
    "how an engine shares out the work": ("ep_size", "moe_ep_size", "moe_tp_size", "experts_implementation"),
    "parts of what another key is refused for": (
        "latent_moe_use_norm",  # routed_expert_hidden_size
        "dspark_.*",  # the draft's own head
    ),
}
# The options of the command `layer` that give what a config.json lacks; for the others there is --set.
OPTIONS = {
    "top_k": "--top-k",
    "routed_scaling_factor": "--routed-scaling-factor",
    "alpha": "--alpha",
    "beta": "--beta",
    "limit": "--limit",
}
_NESTED = ("text_config", "language_config", "llm_config")
ACTIVATION_NAMES = {"silu": SWIGLU, "swiglu": SWIGLU, "situ": SITU}
_SUSPICIOUS = re.compile(
    r"expert|moe|rout|gat(e|ing)|scor|top_?k|swiglu|glu_|(^|_)act(iv|_|$)|clamp|limit|(^|_)temp(erature|_|$)|group"
    r"|renorm|norm(alize)?_(topk|prob|weight)|sigmoid|softmax|correction|capacity|drop_tok|on_input"
)
_SCORES = {"sqrtsoftplus": DEEPSEEK_V4, "sigmoid": DEEPSEEK_V3, "softmax": MIXTRAL}
# What a model's own code fixes, so that its config.json does not say it.
_SOFTMAX: dict[str, Any] = {"score": "softmax"}
_NORMALIZED = _SOFTMAX | {"normalize": True}
_FIXED = {
    "glm4_moe": {"score": "sigmoid", "method": "noaux_tc"},
    "qwen2_moe": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "qwen3_vl_moe_text": _NORMALIZED,
    "qwen3_5_moe_text": _NORMALIZED,
    "mixtral": _NORMALIZED,
    # By the names of GGUF, which has no keys for them either
    "qwen3moe": _NORMALIZED,
    "qwen3next": _NORMALIZED,
    "qwen3vlmoe": _NORMALIZED,
    "qwen35moe": _NORMALIZED,
}
_KNOWN = frozenset(key for keys in HONOURED.values() for key in keys)
_IGNORED = re.compile("|".join(f"(?:{name})" for names in NOT_MATTERING.values() for name in names))


@dataclass(frozen=True)
class Config:
    """The keys of a model, those of a nested text model among them.

    Attributes:
        values: what is not null, by key.
        where: the file, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def get(self, role: str, kind: type = float) -> Any:
        """The value of a role of `HONOURED` as an int, float, bool, str or whatever it is (`object`); None if not
        there.

        Raises:
            CheckpointError: another type, no finite float32 number, or two of the role's keys that disagree.
        """
        found = {key: self.values[key] for key in HONOURED[role] if key in self.values}
        if not found:
            return None
        (key, value), *others = found.items()
        for other, another in others:
            if another != value:
                raise self.error(
                    f"expected one value for {key} and {other}, got {shown(value)} and {shown(another)}"
                )
        if kind is float:
            try:
                return check_float(key, value)
            except (TypeError, ValueError) as error:
                raise self.error(str(error)) from None
        if kind is not object and type(value) is not kind:
            raise self.error(f"{key}: expected {kind.__name__}, got {shown(value)}")
        if kind is int and not 0 <= value < 1 << 31:
            raise self.error(f"{key}: expected an int from 0 to {(1 << 31) - 1}, got {shown(value)}")
        return value

    @property
    def fixed(self) -> Mapping[str, Any]:
        """What the code of the model's type fixes of the router, by role."""
        return _FIXED.get(str(self.values.get("model_type")), {})

    def key(self, role: str) -> str:
        """The name by which the file has a role, or could have it."""
        return next((key for key in HONOURED[role] if key in self.values), " or ".join(HONOURED[role]))

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")

    def missing(self, role: str, how: str) -> CheckpointError:
        """What to raise if a role has no value and needs one; `how` says how else it can be given."""
        option = OPTIONS.get(role, f"--set {HONOURED[role][0]}=VALUE")
        return self.error(f"expected {' or '.join(HONOURED[role])}, or {how} ({option} on the command line)")

    def refuse_unknown(self) -> None:
        """Raise CheckpointError if a key may change the result and nobody here knows how."""
        for key, value in self.values.items():
            if key in _KNOWN or not _SUSPICIOUS.search(key) or _IGNORED.fullmatch(key):
                continue
            raise self.error(
                f"{key}={shown(value)}: expected keys whose effect is known, and this one may change the result; "
                f"config={{{key!r}: None}} (--set {key}=null on the command line) goes on without it"
                f"{did_you_mean(key, _KNOWN)}"
            )

    def check_layer(self, layer: int | str, *, hashed: bool, biased: bool, shared: bool) -> None:
        """Raise CheckpointError unless a layer has a table, a correction bias and shared experts as the file says."""
        count, types = self.get("hash_layers", int), self.get("layer_types", list)
        if isinstance(layer, int):
            if count is not None and hashed != (layer < count):
                raise self.error(
                    f"{self.key('hash_layers')}={count}: expected {'a' if layer < count else 'no'} table tid2eid in "
                    f"layer {layer}"
                )
            if types is not None and layer < len(types) and hashed != (types[layer] == "hash_moe"):
                raise self.error(
                    f"{self.key('layer_types')}: expected {'no' if hashed else 'a'} table tid2eid in layer {layer}, "
                    f"which is {shown(types[layer])}"
                )
        method = self.get("method", str) or self.fixed.get("method")
        if not hashed and method == ("greedy" if biased else "noaux_tc"):
            raise self.error(
                f"{self.key('method')}={method}: expected {'no' if biased else 'a'} correction "
                f"bias in layer {layer}"
            )
        n_group = self.get("n_group", int) or 1
        limited = self.get("grouped", bool) is not False and method != "greedy"
        if limited and not hashed and not biased and (self.get("topk_group", int) or 1) < n_group:
            raise self.error(
                f"{self.key('n_group')}={n_group}: expected a correction bias in layer {layer}: without one "
                f"a group's score is its best expert's, which is not modelled"
            )
        wanted = self.get("shared_experts", int)
        if wanted is not None and bool(wanted) != shared:
            raise self.error(
                f"{self.key('shared_experts')}={wanted}: expected {'tensors' if wanted else 'no tensors'} of shared "
                f"experts in layer {layer}"
            )

    def check_scheme(self) -> None:
        """Raise CheckpointError if the file says that the experts are not MXFP4, or names an unknown activation."""
        activation = self.get("activation", str)
        if activation not in (None, *ACTIVATION_NAMES):
            raise self.error(
                f"{self.key('activation')}={shown(activation)}: expected {' or '.join(ACTIVATION_NAMES)}; "
                f"config={{'{self.key('activation')}': 'silu'}} (--set on the command line) reads the weights"
            )
        scheme = self.get("quantization", dict) or {}
        for dtype in (self.get("expert_dtype", str), scheme.get("expert_dtype")):
            if dtype not in (None, "fp4", "mxfp4"):
                raise self.error(f"expert_dtype: expected 'fp4', got {shown(dtype)}")
        if wrong := not_mxfp4(scheme):
            raise self.error(f"quantization_config.{wrong}")


def read_config(root: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The config.json of a checkpoint, or what a GGUF file has in its place; empty if there is neither.

    Args:
        root: the checkpoint's folder, or its only file.
        changes: keys that go before the file's; None takes a key away.

    Raises:
        CheckpointError: it cannot be read, is no JSON object, or a nested model contradicts it.
    """
    where = "config.json"
    path = (root if root.is_dir() else root.parent) / where
    ggufs = [root] if root.suffix == GGUF else sorted(root.glob(f"*{GGUF}"))
    values: dict[str, Any] = {}
    if os.path.lexists(path):
        values = read_json(path)
    elif (
        ggufs
    ):  # a vision tower's may be among them, and of a model in several files only the first says anything
        found = ((file.name, metadata(file)) for file in ggufs)
        where, values = next(
            (f for f in found if "n_routed_experts" in f[1]), (ggufs[0].name, metadata(ggufs[0]))
        )
    for name in _NESTED:
        nested = values.pop(name, None)
        if nested is None:
            continue
        if not isinstance(nested, dict):
            raise CheckpointError(f"{where}: {name}: expected an object, got {shown(nested)}")
        if deeper := sorted(nested.keys() & set(_NESTED)):
            raise CheckpointError(f"{where}: {name}: expected no further {deeper[0]} in it")
        for key in sorted(_KNOWN.difference(HONOURED["model_type"]) & nested.keys() & values.keys()):
            if None not in (nested[key], values[key]) and nested[key] != values[key]:
                raise CheckpointError(
                    f"{where}: {key}: expected one value, got {shown(values[key])} and, in {name}, "
                    f"{shown(nested[key])}"
                )
        values |= {key: value for key, value in nested.items() if value is not None}
    for name in sorted(set(_NESTED).intersection(changes or {})):
        raise CheckpointError(f"{name}: expected its keys by themselves, they go before the nested ones too")
    for name, value in (changes or {}).items():
        if value is not None and name not in _KNOWN and name not in values:
            hint = did_you_mean(name, _KNOWN)
            raise CheckpointError(f"{name}: expected a key that is read, or that is in {where}{hint}")
    values |= changes or {}
    return Config({key: value for key, value in values.items() if value is not None}, where)


def router_of(config: Config, defaults: Mapping[str, Any]) -> Preset | None:
    """The router that config.json describes, without top_k and factor; None if it does not say all of it.

    Args:
        config: the model's.
        defaults: by role, what the code of all models of a format fixes.

    Raises:
        CheckpointError: a router that is not modelled.
    """
    fixed = {**defaults, **config.fixed}

    def setting(role: str, kind: type) -> Any:
        value = config.get(role, kind)
        return fixed.get(role) if value is None else value

    score, normalize = setting("score", str), setting("normalize", bool)
    if score is None or normalize is None:
        return None
    if score not in _SCORES:
        raise config.error(f"{config.key('score')}: expected one of {', '.join(_SCORES)}, got {shown(score)}")
    n_group, topk_group = setting("n_group", int) or 1, setting("topk_group", int) or 1
    method = setting("method", str)
    if method not in (None, "noaux_tc", "greedy"):
        raise config.error(f"{config.key('method')}: expected noaux_tc or greedy, got {shown(method)}")
    if method == "greedy" or setting("grouped", bool) is False:
        n_group = topk_group = 1
    temperature = setting("temperature", float)
    if temperature is not None and temperature <= 0:
        raise config.error(f"{config.key('temperature')}: expected a positive number, got {temperature}")
    return replace(
        _SCORES[score],
        normalize="sum" if normalize else "none",
        n_group=n_group,
        topk_group=topk_group,
        temperature=1.0 if temperature is None else temperature,
    )
