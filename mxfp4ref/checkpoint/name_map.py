"""A checkpoint's own names of tensors, in a small TOML file.

like = "weight_scale"                    # a format of `mxfp4ref checkpoint`'s list, which says how experts are stored
name = "mine"
prefixes = ["transformer.h.{layer}.moe."]
carried = ["aux_loss_stats."]            # what else lies there and changes nothing
[names]                                  # what follows the prefix; what is left out is as in `like`
gate_weights = "experts.{expert}.gate.qweight"
gate_scales = "experts.{expert}.gate.scales"
router_weight = "router.weight"
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from mxfp4ref._files import mismatch, read_file
from mxfp4ref._validate import did_you_mean, shown
from mxfp4ref.checkpoint.format import ROUTER, CheckpointFormat
from mxfp4ref.checkpoint.formats import FORMATS
from mxfp4ref.checkpoint.shards import CheckpointError

__all__ = ["read_name_map"]

_SHAPE = {
    "like": tuple(FORMATS),
    "name?": str,
    "prefixes?": [str],
    "shared?": str,
    "carried?": [str],
    "names?": {"*": str},
}


def read_name_map(path: str | Path) -> CheckpointFormat:
    """The format that a name map describes, to be given as `ReadOptions(format=...)` and to `write_layer`.

    Args:
        path: a TOML file with the key `like` and those fields of `CheckpointFormat` in which the checkpoint differs:
            name, prefixes, shared, carried, names.

    Raises:
        CheckpointError: it cannot be read, or has another shape.
    """
    path = Path(path)
    try:
        values: Any = tomllib.loads(read_file(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a TOML file, got {type(error).__name__}: {error}") from None
    known = [key.removesuffix("?") for key in _SHAPE]
    if unknown := sorted(values.keys() - set(known)):
        raise CheckpointError(
            f"{path}: expected the keys {', '.join(known)}, got {unknown[0]!r}{did_you_mean(unknown[0], known)}"
        )
    if wrong := mismatch(values, _SHAPE, str(path)):
        raise CheckpointError(wrong)
    like = FORMATS[values["like"]]
    names = values.get("names", {})
    for role, name in names.items():
        if role not in like.names and role not in ROUTER:
            hint = did_you_mean(role, (*like.names, *ROUTER))
            raise CheckpointError(
                f"{path}: names: expected roles among {', '.join(like.names)}, got {role!r}{hint}"
            )
        if ("{expert}" in name) != ("{expert}" in like.names.get(role, "")):
            wanted = "with" if "{expert}" in like.names.get(role, "") else "without"
            raise CheckpointError(
                f"{path}: names.{role}: expected a name {wanted} {{expert}}, got {shown(name)}"
            )
    roles: dict[str, str] = {}
    for role, name in {**like.names, **names}.items():
        if (other := roles.setdefault(name, role)) != role:
            raise CheckpointError(
                f"{path}: names: expected a name for each role, got {shown(name)} for {other} and {role}"
            )
    kept = {"shared": [values.get("shared", like.shared)], "carried": values.get("carried", like.carried)}
    for key, start in ((key, start) for key, starts in kept.items() for start in starts):
        if start and any(name.startswith(start) for name in roles):
            raise CheckpointError(
                f"{path}: {key}: expected the beginning of no role's name, got {shown(start)}"
            )
    prefixes = tuple(values.get("prefixes", like.prefixes))
    for prefix in prefixes:
        if [*re.findall(r"\{.*?\}", prefix)] not in (["{layer}"], ["{draft}"]):
            raise CheckpointError(
                f"{path}: prefixes: expected one of {{layer}} and {{draft}}, once, got {shown(prefix)}"
            )
    name = values.get("name", path.stem)
    if name in FORMATS:  # whose router and names would be taken for this one's
        raise CheckpointError(
            f"{path}: name: expected another name than that of a known format, got {shown(name)}"
        )
    return replace(
        like,
        name=name,
        stores=f"as {path.name} says",
        prefixes=prefixes,
        names={**like.names, **names},
        shared=values.get("shared", like.shared),
        carried=tuple(values.get("carried", like.carried)),
    )
