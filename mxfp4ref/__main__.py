"""The `mxfp4ref` command, also as `python -m mxfp4ref`: the commands of all rooms in one group."""

from __future__ import annotations

import io
import sys

import click

from mxfp4ref.conformance.cli import COMMANDS as CONFORMANCE
from mxfp4ref.conformance.cli import supervised
from mxfp4ref.conformance.cli.shared import WIDTH
from mxfp4ref.engine.cli import COMMANDS as ENGINE

__all__ = ["commands", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH})
@click.version_option(package_name="mxfp4ref")
def commands() -> None:
    """Bit-exact reference of the SM90 W4A16 MXFP4 mixture-of-experts kernel.

    \b
    mxfp4ref conform oracle                      see what success looks like, no GPU needed
    mxfp4ref conform defect:limit_ignored        see what a diagnosis looks like
    mxfp4ref conform flashinfer                  the installed flashinfer, on this machine's GPU
    mxfp4ref conform mypackage.moe:fused_moe     your kernel, with flashinfer's signature
    mxfp4ref replay flashinfer_dumps             calls that a running server recorded
    mxfp4ref checkpoint DeepSeek-V4-Flash        what is in a checkpoint, and what would be refused
    mxfp4ref show gemm/ordinary                  what is in a golden case, and why
    mxfp4ref explain limit_ignored               what a named defect does, and where it was seen

    Exit codes: 0 conforms, equal or done; 1 does not; 2 wrong usage, or something is missing.
    """


for _command in (*CONFORMANCE, *ENGINE):
    commands.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that its encoding lacks is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    if "--no-isolate" in sys.argv:
        supervised.main(commands)
    commands(prog_name="mxfp4ref")


if __name__ == "__main__":
    main()
