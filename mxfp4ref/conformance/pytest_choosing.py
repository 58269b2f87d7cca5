"""Which golden cases the pytest plugin makes tests of: those of the goldens that the command line asks for."""

from __future__ import annotations

import fnmatch
from functools import cache
from typing import TYPE_CHECKING

import pytest

from mxfp4ref.conformance.pytest_verdict import SUITE

if TYPE_CHECKING:
    from mxfp4ref.goldens import Goldens

__all__ = ["chosen", "goldens_of", "names_of", "take_ids"]


def take_ids(config: pytest.Config) -> list[str] | None:
    """Take the tests of this plugin out of pytest's arguments, which are files to it; None if there were none."""
    own = [arg for arg in config.args if arg == SUITE or arg.startswith(f"{SUITE}::")]
    own = [arg for arg in own if not (config.invocation_params.dir / arg).exists()]
    if not own:
        return None
    config.args[:] = [arg for arg in config.args if arg not in own]
    return [arg.removeprefix(SUITE).removeprefix("::") for arg in own]


def names_of(config: pytest.Config) -> list[str]:
    """The cases of `--mxfp4-case`, by default all."""
    names = goldens_of(config).in_order_to_run()
    patterns = config.getoption("mxfp4_case")
    if not patterns:
        return names
    found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not found:
        raise pytest.UsageError(f"--mxfp4-case: {' '.join(patterns)} matches none of the {len(names)} cases")
    return found


def chosen(config: pytest.Config, ids: list[str] | None) -> tuple[list[str], list[str]]:
    """What is left out as too large, a line each, and the cases asked for by the names of their tests; "" is all."""
    from mxfp4ref._validate import did_you_mean
    from mxfp4ref.conformance.cli.selecting import too_large

    names = names_of(config)
    if ids is None or "" in ids:
        kernel, device = config.getoption("mxfp4_kernel"), config.getoption("mxfp4_device")
        large = {} if config.getoption("mxfp4_case") else too_large(goldens_of(config), names, kernel, device)
        told = [f"{SUITE}::{name} is left out: {why}; that name runs it" for name, why in large.items()]
        return told, [name for name in names if name not in large]
    for one in ids:
        if one not in names:
            among = " of --mxfp4-case" if config.getoption("mxfp4_case") else ""
            raise pytest.UsageError(
                f"{SUITE}::{one}: none of the {len(names)} cases{among} has that name{did_you_mean(one, names)}"
            )
    return [], [name for name in names if name in ids]


def goldens_of(config: pytest.Config) -> Goldens:
    return _open(config.getoption("mxfp4_goldens"))


@cache
def _open(root: str | None) -> Goldens:
    from mxfp4ref.goldens import GoldenError, open_goldens

    try:
        return open_goldens(root)
    except GoldenError as error:
        raise pytest.UsageError(str(error)) from error
