"""The `mxfp4ref` command, its subcommands a file for each subject."""

from __future__ import annotations

import io
import sys

import click

from mxfp4ref.conformance.cli.conform import conform
from mxfp4ref.conformance.cli.defects import defects, explain
from mxfp4ref.conformance.cli.goldens import export, regenerate, show, verify
from mxfp4ref.conformance.cli.shared import WIDTH
from mxfp4ref.conformance.cli.tensors import compare, layer

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
    mxfp4ref show gemm/ordinary                  what is in a golden case, and why
    mxfp4ref explain limit_ignored               what a named defect does, and where it was seen

    Exit codes: 0 conforms, equal or done; 1 does not; 2 wrong usage, or something is missing.
    """


for _command in (conform, verify, regenerate, export, show, compare, layer, defects, explain):
    commands.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a character that the terminal's encoding lacks is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    commands(prog_name="mxfp4ref")
