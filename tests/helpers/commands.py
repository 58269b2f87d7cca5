"""The `mxfp4ref` command, run by this process as a shell would start it."""

from __future__ import annotations

import signal
import sys

import pytest

from mxfp4ref.__main__ import main

__all__ = ["exit_code"]


def exit_code(*arguments: object) -> object:
    """With which the command ends; Ctrl-C, which it ignores from then on, is heard again."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mxfp4ref", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
    signal.signal(signal.SIGINT, before)
    return done.value.code
