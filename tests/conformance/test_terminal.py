"""The command's front door: quick help, terminals of any width, colours as asked for, options, completion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mxfp4ref.__main__ import commands
from mxfp4ref._choices import ACTIVATION_NAMES, ROUTER_NAMES
from mxfp4ref.conformance.cli import completing, terminal
from mxfp4ref.conformance.cli.shared import limited_jobs
from mxfp4ref.conformance.kernel_names import STAND_INS
from mxfp4ref.conformance.source import defect_names, written_defects
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import open_goldens
from mxfp4ref.routing import PRESETS
from mxfp4ref.sm90.activation import ACTIVATIONS

CHECKOUT = Path(__file__).parents[2]
NAME = "gemm/underflow_in_gemm1"


def test_names_without_torch_are_those_of_the_rooms() -> None:
    assert list(ROUTER_NAMES) == list(PRESETS)
    assert list(ACTIVATION_NAMES) == [a.name for a in ACTIVATIONS.values() if a.gated]
    assert defect_names() == sorted(DEFECTS)
    told = ("name", "summary", "seen_in", "kind", "target")
    written = [[getattr(one, field) for field in told] for one in written_defects().values()]
    assert written == [[getattr(one, field) for field in told] for one in DEFECTS.values()]
    assert {name.removesuffix("NAME") for name in STAND_INS} < set(completing._KERNELS)


_WITHOUT_TORCH = """\
import sys
from click.testing import CliRunner
from mxfp4ref.__main__ import commands

def run(*arguments, code=0, **environment):
    result = CliRunner().invoke(commands, arguments, prog_name="mxfp4ref", env=environment)
    assert result.exit_code == code and result.output.strip(), (arguments, environment, result.output)

def helps(command, *names):
    run(*names, "--help")
    for name, below in getattr(command, "commands", {}).items():
        helps(below, *names, name)

run("--version")
helps(commands)
for line in ("list", "show gemm/ordinary", "explain limit_ignored", "explain slots", "defects routing"):
    run(*line.split())
for line in ("list limit_ignord", "show gemm/ordinry", "explain limit_ignord", "defects limit_ignord"):
    run(*line.split(), code=2)
for line in ("", "conform defect:", "show ", "conform --case g", "layer --"):
    run(COMP_LINE=f"mxfp4ref {line}", _MXFP4REF_COMPLETE="bash_complete")
print(sorted({"torch", "numpy", "numba", "rich"} & set(sys.modules)))
"""


def test_help_and_completion_import_nothing_that_takes_seconds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH], capture_output=True, text=True, check=False, cwd=CHECKOUT
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def walk(command: click.Command, *names: str) -> list[tuple[tuple[str, ...], click.Command]]:
    below = command.commands.items() if isinstance(command, click.Group) else ()
    return [(names, command), *(found for name, one in below for found in walk(one, *names, name))]


EVERY = walk(commands)


def test_every_help_has_an_example_and_exit_codes() -> None:
    for names, command in EVERY:
        help = command.help or ""
        assert f"    mxfp4ref {' '.join(names)}".rstrip() in f"    {help}" or len(names) == 0, names
        if not isinstance(command, click.Group):
            assert "\b\n" in help, names
            assert "Exit codes: " in help, names
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (names, option.name)
                given = option.get_default(click.Context(command))
                assert option.show_default or given is False or not isinstance(given, (int, float, str)), (
                    names
                )


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_help_fits_and_cuts_no_word(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(click.formatting, "FORCED_WIDTH", None)
    for names, command in EVERY:
        text = CliRunner().invoke(commands, [*names, "--help"]).output
        words = {word for line in text.split("\n") for word in line.split()}
        assert set((command.help or "").replace("\b", "").split()) <= words, names
        for line in text.split("\n"):  # only what is one word, one command or one piece of code is wider
            assert len(line) <= width or (width < 80 and terminal.wrapped(line, width) == line), (names, line)


@pytest.mark.parametrize("line", [
    f"{NAME}: 3 of 4,096 elements differ, the first of them at [0, 7], where 1.5 was expected",
    f"    again: mxfp4ref conform mypackage.moe:fused_moe --case {NAME} --device cuda",
    "    limit_ignored           the limit of SwiGLU is not applied, neither to the gate nor to up, in any expert",
    "write `mxfp4ref conform plain:adapter.py:fused_moe --device cuda` and then look at what it says of the weights",
])  # fmt: skip
@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_lines_are_wrapped_at_words(line: str, width: int) -> None:
    lines = terminal.wrapped(line, width).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(line.split())
    command = line[line.find("mxfp4ref") :].partition("`")[0] if "mxfp4ref" in line else NAME
    assert any(command in one for one in lines) or command not in line
    for one in lines:
        assert len(one) <= width or command in one
    indent = len(line) - len(line.lstrip())
    assert all(one.startswith(" " * (indent + 4)) for one in lines[1:])


def test_a_table_folds_at_words_and_becomes_lists_where_it_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(NAME, "moe", "what it is kept for in words", "one_defect, another_defect")] * 2
    for width in (40, 60, 80, 100, 200, None):
        monkeypatch.setattr(terminal, "columns", lambda width=width, err=False: width)
        terminal.echo_rows(("case", "kind", "kept for", "catches"), rows)
        text = capsys.readouterr().out
        assert text.count(NAME) == 2
        assert text.count("one_defect,") == 2
        assert all(width is None or len(line) <= width for line in text.split("\n"))
        assert not any(line != line.rstrip() for line in text.split("\n"))
    assert len(text.split("\n")) == 4  # whole lines in a pipe


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"TERM": "xterm"}, None),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, None),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        ({"CLICOLOR": "0"}, False),
        ({"CLICOLOR_FORCE": "1"}, True),
        ({"FORCE_COLOR": "0"}, None),
    ],
)
def test_colours(environment: dict[str, str], expected: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.use_colour() is expected
    on_a_terminal = CliRunner().invoke(commands, ["show", NAME], color=expected is None).output
    assert ("\x1b[" in on_a_terminal) == (expected is not False)


def test_options_given_twice_are_refused() -> None:
    def said(*arguments: str) -> str:
        result = CliRunner().invoke(commands, arguments)
        assert result.exit_code == 2
        return result.output

    assert "--device: expected once" in said("conform", "oracle", "--device", "cpu", "--device", "cpu")
    assert "-x and --maxfail: expected one" in said("conform", "oracle", "-x", "--maxfail", "2")
    assert "--goldens: expected once" in said("show", NAME, "--goldens", "a", "--goldens", "b")
    assert "isolate: expected once" in said("conform", "oracle", "--isolate", "--no-isolate")
    assert "--output: expected once" in said("record", "--output", "a", "script.py", "--output", "b")
    repeatable = {p.name for _, c in EVERY for p in c.params if isinstance(p, click.Option) and p.multiple}
    assert repeatable == {"patterns", "excluded", "changes", "layers", "only", "ranks", "cases"}


_COMPLETED = [
    ("conform defect:limit_ig", "limit_ignored"),  # bash replaces what follows the colon
    ("conform flashinfer-w", "flashinfer-w4a8"),
    (f"conform oracle --case {NAME[:-3]}", NAME),
    ("show routing/gpt_oss_bf16_t", "routing/gpt_oss_bf16_ties"),
    ("explain limit_ig", "limit_ignored"),
    ("layer --router gpt", "gpt_oss"),
    ("regenerate --on", "--only"),
    ("doct", "doctor"),
]


def test_bash_completes() -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    script = CliRunner().invoke(commands, ["completion", "bash"]).output
    function = 'mxfp4ref() { "$PYTHON" -m mxfp4ref "$@"; }; env() { "$@"; }\ncompopt() { :; }\n'
    function += "COMP_WORDBREAKS=$' \\t\\n\"\\'><=;|&(:'\n"
    tries = "".join(
        f'COMP_LINE="mxfp4ref {line}" COMP_POINT={len(line) + 9} COMPREPLY=()\n'
        '_mxfp4ref_completion mxfp4ref\necho "${COMPREPLY[*]}"\n'
        for line, _ in _COMPLETED[:2]
    )
    done = subprocess.run(
        [bash, "-c", script + function + tries],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.stdout.split("\n") == [*(word for _, word in _COMPLETED[:2]), ""], done.stderr


# In zsh what a completing function may call is there in a widget only: here it prints what it is given.
_ZSH = """
compdef() { :; }
compadd() { print -r -- ${(P)@[-1]}; }
_describe() { :; }
eval "$(mxfp4ref completion zsh)"
words=(%s) CURRENT=$#words
_mxfp4ref_completion
"""


@pytest.mark.parametrize(
    ("shell", "arguments", "script"),
    [
        ("zsh", ("-f", "-c"), _ZSH),
        ("fish", ("--no-config", "-c"), "mxfp4ref completion fish | source\ncomplete -C '%s'\n"),
    ],
)
def test_zsh_and_fish_complete(shell: str, arguments: tuple[str, ...], script: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell}")
    command = tmp_path / "mxfp4ref"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mxfp4ref "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)}
    for line, word in (
        ("conform defect:limit_ig", "defect:limit_ignored"),
        ("show routing/gpt_oss_bf16_t", "routing/gpt_oss_bf16_ties"),
    ):
        done = subprocess.run(
            [program, *arguments, script % f"mxfp4ref {line}"],
            **{"capture_output": True, "text": True, "check": False, "env": environment},
        )
        assert done.stdout.split() == [word], done.stderr


@pytest.mark.parametrize(("line", "word"), _COMPLETED)
def test_words_that_are_completed(line: str, word: str) -> None:
    environment = {"COMP_LINE": f"mxfp4ref {line}", "_MXFP4REF_COMPLETE": "bash_complete"}
    result = CliRunner().invoke(commands, [], prog_name="mxfp4ref", env=environment)
    assert f"plain,{line.split()[-1].partition(':')[0] + ':' if ':' in line else ''}{word}\n" in result.output


def test_every_case_and_suite_can_be_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = click.Context(commands.commands["show"])
    parameter = commands.commands["show"].params[0]
    goldens = open_goldens()
    assert completing.cases(context, parameter, "") == goldens.names()
    assert completing.globs(context, parameter, "") == goldens.suites
    assert completing.globs(context, parameter, "gemm/")[0] == "gemm/*"
    explain, listed = (click.Context(commands.commands[name]) for name in ("explain", "defects"))
    assert "K groups" in completing.explained(explain, parameter, "K")
    explain.params["words"] = ("K",)
    assert completing.explained(explain, parameter, "gr") == ["groups"]
    assert completing.defect_globs(listed, parameter, "limit_ign") == ["limit_ignored"]
    assert "K groups" not in completing.defect_globs(listed, parameter, "")
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(tmp_path))
    assert completing.cases(context, parameter, "") == []
    monkeypatch.chdir(tmp_path)
    Path("adapter.py").write_text("def fused_moe(): ...\n")
    assert completing.kernels(context, parameter, "plain:ad") == ["plain:adapter.py:"]
    assert completing.kernels(context, parameter, "adapter.py:") == ["adapter.py:fused_moe"]
    assert completing.kernels(context, parameter, "stage:gemm:adapter.py:f") == [
        "stage:gemm:adapter.py:fused_moe"
    ]


def test_no_name_of_a_file_becomes_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash puts what is completed into the line as it is; what a folder holds may be anything."""
    context, parameter = click.Context(commands.commands["conform"]), commands.commands["conform"].params[0]
    monkeypatch.chdir(tmp_path)
    for name in (b"a$(touch x).py", b"a`x`.py", b"a;x.py", b"a\nx.py", b"a\xff.py", b"a'x.py", b"a.py"):
        Path(os.fsdecode(name)).write_text("def f(): ...\n")
    assert completing.kernels(context, parameter, "a") == ["a.py:"]
    Path("deep.py").write_text("-" * 100_000 + "1")
    os.mkfifo("pipe.py")
    for name in ("deep.py:", "pipe.py:"):
        assert completing.kernels(context, parameter, name) == []


def test_no_more_jobs_than_cases_and_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [limited_jobs(jobs, 12) for jobs in (1, 8)] == [1, 8]
    assert capsys.readouterr().err == ""
    assert (limited_jobs(1000, 3), limited_jobs(1000, 12), limited_jobs(1000)) == (3, 8, 8)
    assert capsys.readouterr().err.splitlines() == [
        "--jobs: 1000 are more than there are cases: 3 are used",
        *["--jobs: 1000 are more than there are cores: 8 are used"] * 2,
    ]
