"""The activation of a checkpoint's experts and its parameters, from config.json or from the caller."""

from __future__ import annotations

import math

from mxfp4ref._validate import check_float
from mxfp4ref.checkpoint.config import ACTIVATION_NAMES, Config
from mxfp4ref.checkpoint.format import CheckpointFormat
from mxfp4ref.checkpoint.layer import Swiglu
from mxfp4ref.sm90.activation import SWIGLU

__all__ = ["activation_type", "checked", "parameters"]


def activation_type(config: Config) -> int:
    """The id of the activation that config.json names, of SwiGLU if it names none."""
    return ACTIVATION_NAMES.get(config.get("activation", str), SWIGLU)


def parameters(config: Config, format: CheckpointFormat, given: Swiglu) -> Swiglu:
    """What was given of the activation's parameters, else what config.json says, else the format's.

    Raises:
        CheckpointError: config.json lacks what is needed, or has no such number.
    """
    limit = given.limit
    if limit is None:
        limit = _limit(config, format.no_limit)
        if limit is None and format.needs_limit:
            raise config.missing("limit", "an argument limit")
        if limit is not None and limit <= 0:
            raise config.error(f"{config.key('limit')}: expected a positive number, got {limit}")

    def first(role: str, default: float | None) -> float | None:
        value = getattr(given, role)
        value = config.get(role, float) if value is None else value
        return default if value is None else float(value)

    return Swiglu(
        first("alpha", format.alpha),
        first("beta", format.beta),
        None if limit in (None, math.inf) else limit,
        **_situ(config),
    )


def checked(name: str, value: float | None) -> float | None:
    """A parameter that is given, as it is.

    Raises:
        TypeError, ValueError: it is no finite float32 number, or a limit not above 0; a limit may be Inf.
    """
    if value is None or (name == "limit" and value == math.inf):
        return value
    check_float(name, value)
    if name == "limit" and value <= 0:
        raise ValueError(f"{name}: expected a positive float32 number, got {value}")
    return value


def _limit(config: Config, no_limit: float | None) -> float | None:
    """The limit of config.json, Inf where it means none; None if the file has none."""
    limit = config.get("limit", float)
    return math.inf if limit is not None and limit == no_limit else limit


def _situ(config: Config) -> dict[str, float | None]:
    """The parameters of Situ, which a model that has it must have."""
    found = {role: config.get(role, float) for role in ("situ_beta", "situ_linear_beta")}
    for role, value in found.items():
        if value is None and config.get("activation", str) == "situ":
            raise config.missing(role, "another activation")
    return found
