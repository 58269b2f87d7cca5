"""What a run says while it takes long, and what it leaves behind when it is ended from outside."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance import heartbeat, memory, suite
from mxfp4ref.conformance.cli import progress, report_files, shared
from mxfp4ref.conformance.cli.selecting import in_advance, too_large
from mxfp4ref.conformance.pace import Pace
from mxfp4ref.conformance.results import CaseResult
from mxfp4ref.goldens import open_goldens

FIRST, SECOND = "finalize/slot_order", "sizes/eight_slots"
TWO = ("--case", FIRST, "--case", SECOND, "--diagnosis", "none")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def test_a_sign_of_life_comes_in_silence_only() -> None:
    heard: list[str] = []
    one = threading.Event()

    def say(words: str) -> None:
        heard.append(words)
        one.set()

    with heartbeat.heartbeat(say, 0.001) as now:
        assert not one.wait(0.05)  # there is nothing to say
        now("1 of 2")
        assert one.wait(30)
    assert heard[0] == "[  0 s] 1 of 2"
    with heartbeat.heartbeat(heard.append, 1e6) as now:
        heard.clear()
        now("2 of 2")
    assert heard == []


def before_each_case(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    original = suite.compare_case

    def acting(kernel: Any, case: Any, *arguments: Any) -> Any:
        act(case.id)
        return original(kernel, case, *arguments)

    monkeypatch.setattr(suite, "compare_case", acting)


def test_a_slow_case_is_named_where_no_bar_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    said = threading.Event()
    told: list[str] = []

    def echo(words: str, **_: Any) -> None:
        if SECOND in words:
            told.append(words)
            said.set()

    monkeypatch.setattr(heartbeat, "SILENCE", 0.001)
    monkeypatch.setattr(progress, "echo", echo)
    before_each_case(monkeypatch, lambda case: None if case == FIRST else waited(said))
    assert invoke("conform", "oracle", *TWO).exit_code == 0
    rate = r"(, about \d+ s more)?"
    assert re.fullmatch(rf"\[ *\d+ s\] 1 of 2 done{rate}; 0 failed; now {SECOND}(, for \d+ s)?", told[0])


def waited(said: threading.Event) -> None:
    assert said.wait(30)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a heartbeat would say."""
    words: list[str] = []
    monkeypatch.setattr(progress, "heartbeat", lambda say: nullcontext(lambda what: words.append(what())))
    return words


def test_a_part_is_not_done_before_it_ends(told: list[str]) -> None:
    with progress.progress(before=True) as step:
        step("experts 0 to 3", 1)
        step("now the diagnosis", 0)
    assert told[1:] == ["0 of 1 done; now experts 0 to 3", "now the diagnosis"]


def test_what_is_not_run_takes_no_time(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 90))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.case_progress([FIRST, SECOND], 1) as advance:
        advance(CaseResult(FIRST, "moe", "", "differs"))
    assert told[-1] == "1 of 2 done; 1 failed; now the diagnosis of all together, a minute or two at most"


def test_what_a_kernel_cannot_run_is_not_waited_for(told: list[str]) -> None:
    others = ("--case", "layout/swap_halves", "--case", "layout/interleave_*", "--diagnosis", "none")
    assert invoke("conform", "torch-bf16", "--case", FIRST, *others).exit_code == 0
    assert [words[:11] for words in told] == ["0 of 1 done", "1 of 1 done"]


def test_the_seconds_of_a_command_are_those_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.Interruption, "seconds", 77.0)
    assert "seconds: 77.0 in all; " in invoke("conform", "oracle", "--case", FIRST).output


def test_the_last_line_is_not_the_end(told: list[str]) -> None:
    with progress.progress(lines=True) as step:
        step("call 1", 2)
        step("call 2", 2)
    assert told[-2:] == ["1 of 2 done", "2 of 2 done; now the end of the run"]


def test_a_quick_run_says_nothing_on_the_way() -> None:
    assert invoke("conform", "oracle", *TWO).stderr == ""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("swallowed", [False, True])
def test_what_ends_a_run_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, swallowed: bool
) -> None:
    """Wherever it hits, and whatever answers it there: no verdict is given."""

    def act(case: str) -> None:
        if case == SECOND:
            with suppress(*[KeyboardInterrupt] * swallowed):
                signal.raise_signal(number)

    before_each_case(monkeypatch, act)
    files = ("--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    result = invoke("conform", "defect:last_slot_dropped", *TWO, *files)
    assert result.exit_code == code
    assert "interrupted, no verdict" in " ".join(result.stdout.splitlines()[-2:])
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True
    html = (tmp_path / "r.html").read_text()
    assert "<title>defect:last_slot_dropped: interrupted, no verdict</title>" in html
    assert "does not conform" not in html


def test_an_interruption_after_the_last_case_costs_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = report_files.ReportFiles.write_after

    def interrupted(*arguments: Any, **named: Any) -> bool:
        signal.raise_signal(signal.SIGINT)
        return written(*arguments, **named)

    monkeypatch.setattr(report_files.ReportFiles, "write_after", interrupted)
    result = invoke("conform", "oracle", *TWO, "--json", tmp_path / "r.json")
    assert result.exit_code == 130
    assert "oracle conforms" in result.stdout.splitlines()[-1]
    assert "the verdict holds" in result.stderr
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is True


@pytest.mark.parametrize(
    ("spec", "device", "gib", "left"),
    [
        ("plain:k.py:f", None, 13, ["deepseek_v4_flash", "deepseek_v4_pro"]),
        ("plain:k.py:f", "cuda", 13, ["deepseek_v4_pro"]),
        ("k.py:f", None, 1000, []),
        ("oracle", None, 1, []),
    ],
)
def test_layers_that_may_not_fit_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spec: str,
    device: str | None,
    gib: int,
    left: list[str],
) -> None:
    monkeypatch.setattr(memory, "free", lambda: gib << 30)
    goldens = open_goldens()
    names = [FIRST, *goldens.names("models")]
    large = too_large(goldens, names, spec, device)
    assert [f"models/{name}" for name in left] == list(large)
    assert all("GiB are free" in why for why in large.values())
    assert capsys.readouterr().err == "", "which is told once the kernel is loaded"


def test_skipped_cases_say_nothing_of_how_long_others_take(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: moments[-1]))

    def says_how_long(names: list[str], *statuses: Any) -> list[bool]:
        told.clear()
        with progress.case_progress(names) as advance:
            for case, status in zip(names, statuses, strict=False):
                moments.append(moments[-1] + 20)
                advance(CaseResult(case, "moe", "", status))
        return [" s more" in words for words in told]

    eight = [f"a/{n}" for n in range(8)]
    assert says_how_long(eight, "equal", "skipped", "equal") == [False, False, False, False]
    assert says_how_long(eight[:4], "equal", "equal", "equal") == [False, False, True, True]


def test_layers_of_whole_size_take_most_of_the_time() -> None:
    small = [f"gemm/{n}" for n in range(8)]
    sizes = {**dict.fromkeys(small, 1 << 20), "models/a": 4 << 30, "models/b": 1 << 30}
    pace = Pace([*small, *list(sizes)[-2:]], sizes)
    assert 20 < pace.left < 40
    assert pace.largest == "models/a"
    (line,) = in_advance(pace, "-k 'not models'", None)
    assert line == (
        "10 cases take about 30 s, most of it for models/a; -k 'not models' leaves out layers of whole size"
    )
    for name in small:
        pace.done(name, 1.0)
    before = pace.left
    pace.done("models/b", 0.0, ran=False)
    assert pace.left < before
    pace.done("models/a", 100.0)
    assert pace.left == 0
    assert in_advance(Pace(small, sizes), "", 1) == []


def test_the_diagnosis_of_all_together_says_what_it_is_at(told: list[str]) -> None:
    with progress.case_progress([FIRST]) as advance:
        advance(CaseResult(FIRST, "moe", "", "differs"))
        with heartbeat.at_work(f"{SECOND} (1 of 4)", lambda: 30.5):
            heartbeat.trying("ids")
        heartbeat.trying("nothing that is told")
    assert (
        told[-1]
        == f"1 of 1 done, about 30 s more; 1 failed; now all together: {SECOND} (1 of 4), trying: ids"
    )


def test_a_bar_says_how_long_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(progress, "animated", lambda: True)
    monkeypatch.setattr(progress, "console", lambda: Console(stderr=True, force_terminal=True, no_color=True))
    with progress.progress(first="now gemm/ordinary", total=9, left=99.5):
        pass
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", capsys.readouterr().err)
    assert "0/9 0:00 of 1:39 now gemm/ordinary" in shown


def test_an_estimate_waits_for_ground_and_is_dropped_when_it_was_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = [0.0]
    heard: list[Callable[[], str]] = []
    monkeypatch.setattr(progress, "heartbeat", lambda say: nullcontext(heard.append))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: moments[-1]))
    words = []
    with progress.progress(total=4) as step:
        for n, moment in enumerate((300.0, 340.0), 1):  # of which the first was for what is compiled
            moments.append(moment)
            step(f"call {n}", 4)
            words.append(heard[-1]())
        for moment in (350.0, 415.0, 430.0):
            moments.append(moment)
            words.append(heard[-1]())
    assert words == [
        "1 of 4 done; call 1",
        "2 of 4 done, about 80 s more; call 2",
        "2 of 4 done, about 70 s more; call 2",
        "2 of 4 done, about 5 s more; call 2",
        "2 of 4 done; call 2",
    ]
