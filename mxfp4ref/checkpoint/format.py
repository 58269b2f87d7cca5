"""What a checkpoint format is: names of tensors, how experts are stored, and what the models' own code fixes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["ROUTER", "CheckpointFormat", "ExpertTensor", "Found", "RowOrder", "Storage", "check_sizes"]

ROUTER = ("router_weight", "router_bias", "image_bias", "tid2eid")
_NUMBER = "(?:0|[1-9][0-9]{0,5})"
_EMPTY: Mapping[str, Any] = MappingProxyType({})


class RowOrder(NamedTuple):
    """How a tensor that has gate and up together orders its rows `[E, 2I, ...]`."""

    to_halves: Callable[[Tensor], Tensor]
    """From that order to [up; gate]."""
    from_halves: Callable[[Tensor], Tensor]


class ExpertTensor(NamedTuple):
    """What the name of a tensor says: the prefix of its layer, the layer ("mtp.0" of a draft head), and the "
    "expert."""

    prefix: str
    layer: int | str
    expert: int | None


class Found(NamedTuple):
    """The experts that a layer has in a checkpoint.

    Attributes:
        ids: their numbers, ascending.
        hidden_size, intermediate_size: H and I.
        dtypes: of their weights and scales, which all of them have.
    """

    ids: Sequence[int]
    hidden_size: int
    intermediate_size: int
    dtypes: tuple[torch.dtype, torch.dtype | None]


@dataclass(frozen=True)
class Storage:
    """How experts lie in tensors.

    Attributes:
        find: from a format, shards and a layer's prefix to what is there, without reading it. Raises a
            CheckpointError if the first of the tensors is missing or no MXFP4 weight.
        load: from a format, shards, prefix, what was found, the ids of some of these and a rule of `quantize` (None:
            as stored) to the experts, which have neither padding nor SwiGLU parameters. Raises a CheckpointError if a
            tensor is missing, unreadable or of another dtype or shape than the others call for.
        dump: from a format and such experts to their tensors, by the ends of their names. Raises a ValueError if the
            format has no place for them.
        quantized: whether the weights are MXFP4.
    """

    find: Callable[[CheckpointFormat, Shards, str], Found]
    load: Callable[[CheckpointFormat, Shards, str, Found, Sequence[int], ScaleRule | None], Experts]
    dump: Callable[[CheckpointFormat, Experts], dict[str, Tensor]]
    quantized: bool = True


@dataclass(frozen=True, eq=False)
class CheckpointFormat:
    """How a family of checkpoints stores its mixture-of-experts layers.

    Attributes:
        name: as in `CheckpointLayer.format`.
        stores: in a few words, for people.
        prefixes: what the names of a layer's tensors begin with, as "layers.{layer}.ffn."; with "{draft}" instead for
            layers of a draft head, which are called "mtp.0", "mtp.1", ...
        storage: how the experts lie in tensors.
        names: what follows the prefix in the names of the tensors, by role, with "{expert}" for an expert's number;
            the roles are those of the storage and of `ROUTER`.
        shared: after the prefix, what the names of the shared expert's tensors begin with; "" if there is none.
        carried: likewise of tensors that a layer may have and whose values change nothing here.
        router: a key of `PRESETS` where the models' code fixes it, so that config.json has no say; else None.
        defaults: what the models' code fixes of the router, by role of `HONOURED`, if config.json does not say it.
        dtypes: of weights and scales where they are tensors for each expert.
        rows: the order of fc1's rows, None where gate and up are tensors of their own.
        alpha, beta: SwiGLU parameters that the models' code fixes, None where it has none.
        needs_limit: whether the models have a SwiGLU limit, so that config.json has to say which.
        no_limit: the value of the limit in config.json that means none.
    """

    name: str
    stores: str
    prefixes: tuple[str, ...]
    storage: Storage
    names: Mapping[str, str]
    shared: str = ""
    carried: tuple[str, ...] = ()
    router: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.uint8, torch.uint8)
    rows: RowOrder | None = None
    alpha: float | None = None
    beta: float | None = None
    needs_limit: bool = False
    no_limit: float | None = 0.0

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """The names of the experts' tensors, in groups: the prefix, and every number."""
        experts = [name for role, name in self.names.items() if role not in ROUTER]
        return re.compile(f"(?P<prefix>{_any(self.prefixes)})(?:{_any(experts)})")

    def match(self, name: str) -> ExpertTensor | None:
        """What the name of a tensor says, if it is one of an expert in this format."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        numbers = {
            key.rstrip("0123456789"): int(n) for key, n in match.groupdict().items() if n and key != "prefix"
        }
        layer: int | str = numbers["layer"] if "layer" in numbers else f"mtp.{numbers['draft']}"
        return ExpertTensor(match["prefix"], layer, numbers.get("expert"))

    def experts_of(self, shards: Shards, prefix: str) -> dict[int, list[str]]:
        """The names of the experts' tensors below a prefix, by expert; all under 0 if experts share their tensors."""
        found: dict[int, list[str]] = {}
        for name in shards.files:
            if name.startswith(prefix) and (tensor := self.match(name)) and tensor.prefix == prefix:
                found.setdefault(tensor.expert or 0, []).append(name)
        return dict(sorted(found.items()))

    @cached_property
    def _kept(self) -> re.Pattern[str]:
        return re.compile(_any([name for name in (self.shared, *self.carried) if name] or ["\0"]))

    def keeps(self, name: str) -> bool:
        """Whether a tensor is carried along, by what follows the prefix in its name."""
        return self._kept.match(name) is not None

    def refuse_others(self, shards: Shards, prefix: str) -> None:
        """Raise CheckpointError if a layer has tensors that nothing here has a use for: none is dropped."""
        router = {prefix + self.names[role] for role in ROUTER if role in self.names}
        others = [
            name
            for name in shards.files
            if name.startswith(prefix)
            and name not in router
            and not self.keeps(name.removeprefix(prefix))
            and not self.match(name)
        ]
        if others:
            raise CheckpointError(
                f"{shards.label(min(others))}: expected no such tensor in the format {self.name}, {len(others)} "
                f"unknown below {prefix}; a name map may list what is to be carried along"
            )


def check_sizes(label: str, num_experts: int, hidden: int, inner: int) -> None:
    """Raise CheckpointError unless there are experts, and their sizes are whole groups."""
    if num_experts == 0 or not (hidden and inner) or hidden % GROUP_SIZE or inner % GROUP_SIZE:
        raise CheckpointError(
            f"{label}: expected experts whose H and I are multiples of {GROUP_SIZE}, got {num_experts} with "
            f"H={hidden}, I={inner}"
        )


def _any(templates: Sequence[str]) -> str:
    """A regular expression of names with numbers in braces, each number a group of its own."""
    count = itertools.count()
    return "|".join(
        re.sub(
            r"\\\{(layer|draft|expert)\\\}",
            lambda m: f"(?P<{m[1]}{next(count)}>{_NUMBER})",
            re.escape(template),
        )
        for template in templates
    )
