"""What a shell completes: commands and options, cases, suites, kernels and defects, all without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.findings.finding import STAGES
from mxfp4ref.conformance.source import defect_names, functions_in
from mxfp4ref.goldens import open_goldens

__all__ = ["cases", "completion", "defect_globs", "explained", "globs", "kernels"]

_KERNELS = (
    "oracle",
    "torch-bf16",
    "flashinfer",
    "flashinfer-w4a8",
    "defect:",
    "logical:",
    "plain:",
    "stage:",
)
# Names of files that are no more than that in a command line, where a shell puts them as they are.
_PLAIN = re.compile(r"[\w@%+=,./-]+")


@add_completion_class
class _Bash(BashComplete):
    """As click's, for words with colons: bash takes them for several, and replaces only the last."""

    source_template = """\
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} cut= completion type value
    local word=${line##* }
    [[ $COMP_WORDBREAKS == *:* && $word == *:* ]] && cut=${word%%:*}:
    while IFS= read -r completion; do
        IFS=, read -r type value <<< "$completion"
        if [[ $type == dir ]]; then
            compopt -o dirnames
        elif [[ $type == file ]]; then
            compopt -o default
        elif [[ $type == plain ]]; then
            [[ $value == *: ]] && compopt -o nospace
            COMPREPLY+=("${value#"$cut"}")
        fi
    done < <(COMP_LINE=$line %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)[1:]
        return (words[:-1], words[-1]) if words and not line[-1].isspace() else (words, "")


@command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a SHELL complete commands, options, cases, suites, kernels and defects.

    \b
    eval "$(mxfp4ref completion bash)"           # in ~/.bashrc; bash 4.4 or newer
    eval "$(mxfp4ref completion zsh)"            # in ~/.zshrc, after compinit
    mxfp4ref completion fish | source            # in ~/.config/fish/config.fish

    Exit codes: 0 printed, 2 another shell.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "mxfp4ref", "_MXFP4REF_COMPLETE").source(), nl=False)


def cases(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The golden cases."""
    return _starting(_cases(context), incomplete)


def globs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Suites, and the cases of one that has been typed."""
    names = _cases(context)
    if "/" in incomplete:
        return _starting([f"{incomplete.partition('/')[0]}/*", *names], incomplete)
    suites = dict.fromkeys(name.partition("/")[0] for name in names)
    found = _starting(suites, incomplete)
    return found if len(found) > 1 else [*found, *_starting(names, incomplete)]


def kernels(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What names a kernel: those of this package, and functions in Python files."""
    head, colon, rest = incomplete.partition(":")
    if colon and head == "defect":
        return [f"defect:{name}" for name in _starting(defect_names(), rest)]
    if colon and head == "stage":
        from mxfp4ref.goldens.store import KINDS

        kind, colon, path = rest.partition(":")
        if not colon:
            return [f"stage:{name}:" for name in _starting(KINDS, kind) if name != "moe"]
        return [f"stage:{kind}:{found}" for found in _functions(path)]
    if colon and head in ("logical", "plain"):
        return [f"{head}:{found}" for found in _functions(rest)]
    return [*_starting(_KERNELS, incomplete), *_functions(incomplete)]


def explained(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What can be explained: the named defects, the families and the stages."""
    before = "".join(f"{word} " for word in context.params.get("words") or ())  # "K" of "K groups"
    return [name.removeprefix(before) for name in _starting(_explainable(), before + incomplete)]


def defect_globs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What `defects` lists: the named defects, families and stages, those of one word."""
    return [name for name in _starting(_explainable(), incomplete) if " " not in name]


def _explainable() -> Iterable[str]:
    from mxfp4ref.conformance.families import FAMILIES

    return dict.fromkeys((*defect_names(), *FAMILIES, *STAGES))


def _cases(context: click.Context) -> list[str]:
    with suppress(ValueError, OSError):  # none here, or damaged: the command says so
        return open_goldens(context.params.get("root")).names()
    return []


def _functions(incomplete: str) -> list[str]:
    """Python files, and the functions of one: `adapter.py:fused_moe`."""
    path, colon, name = incomplete.partition(":")
    if colon:
        functions = functions_in(Path(path)) if path.endswith(".py") else None
        return [f"{path}:{function}" for function in _starting(functions or (), name)]
    with suppress(OSError, ValueError):
        folder = Path(path).parent if path[-1:] != "/" else Path(path)
        found = [str(file) for file in sorted(folder.glob("*.py")) if _PLAIN.fullmatch(str(file))]
        return [f"{file}:" for file in _starting(found, path.removeprefix("./"))]
    return []


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
