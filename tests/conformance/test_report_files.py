"""Reports: the command in them, on stdout, read again, compared."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance import CaseResult, Options, Report, memory, run
from mxfp4ref.conformance.cli.report_files import ReportFiles
from mxfp4ref.conformance.comparison import Difference
from mxfp4ref.conformance.diagnosis import ULP_BINS, Diagnosis, Finding
from mxfp4ref.conformance.goldens_used import GoldensUsed, goldens_used
from mxfp4ref.conformance.kernels import loading
from mxfp4ref.conformance.reports.again import command, conform_arguments, selection_arguments
from mxfp4ref.conformance.reports.html_report import to_html
from mxfp4ref.conformance.reports.report import _predicted, to_json, to_junit
from mxfp4ref.conformance.reports.report_comparison import compare_reports
from mxfp4ref.conformance.reports.report_reading import read_report
from mxfp4ref.conformance.reports.report_text import headline, to_text
from mxfp4ref.goldens import Goldens, open_goldens

SMALL = "finalize/slot_order"
GOLDENS = open_goldens()


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def result_of(case: str, status: str = "equal", **more: Any) -> CaseResult:
    elements = 4 if status in ("equal", "within bounds") else 0
    return CaseResult(case, "moe", "why", status, **{"elements": elements, **more})


def written(path: Path, *results: CaseResult, mode: str = "exact", **more: Any) -> Path:
    path.write_text(to_json(Report("kernel", mode, results, **more)))
    return path


def test_the_command_to_run_a_case_again_is_whole() -> None:
    kernel = "plain:my folder/it's.py:f"
    options = Options(
        mode="bounded", storage="bf16", confidence=0.999999, timeout=5, repeat=False, all_tactics=True
    )
    arguments = conform_arguments(kernel, options, "cuda:1", False, Goldens(GOLDENS.root))
    report = Report(kernel, "bounded", (result_of(SMALL, "differs"),), arguments=arguments)
    line = command(report, report.results[0])
    assert shlex.split(line)[:3] == ["mxfp4ref", "conform", kernel]
    with commands.make_context("mxfp4ref", shlex.split(line)[1:]) as context:
        chosen = commands.commands["conform"].make_context(
            "conform", [*context._protected_args, *context.args][1:]
        )
    given = {
        name: chosen.params[name] for name in ("kernel", "device", "mode", "storage", "confidence", "timeout")
    }
    assert given == {
        "kernel": kernel,
        "device": "cuda:1",
        "mode": "bounded",
        "storage": "bf16",
        "confidence": 0.999999,
        "timeout": 5,
    }
    assert (chosen.params["no_repeat"], chosen.params["isolate"], chosen.params["all_tactics"]) == (
        True,
        False,
        True,
    )
    for text in (to_text(report), to_junit(report)):
        assert f"again: {line}" in text.replace("&quot;", '"').replace("&apos;", "'")
    assert "KERNEL" not in to_html(report)


def test_other_goldens_are_in_the_command(tmp_path: Path) -> None:
    other = Goldens(GOLDENS.root)
    other.root = tmp_path
    assert conform_arguments("oracle", Options(), None, None, other) == ("oracle", "--goldens", str(tmp_path))
    assert conform_arguments("oracle", Options(), None, None, GOLDENS) == ("oracle",)


def test_a_function_has_a_line_of_python() -> None:
    report = Report("my_kernel", "exact", ())
    assert command(report, result_of(SMALL)) == f"run(my_kernel, [open_goldens().load('{SMALL}')])"


def test_a_report_on_stdout_is_alone_there() -> None:
    result = invoke(
        "conform", "defect:last_slot_dropped", "--case", SMALL, "--diagnosis", "none", "--json", "-"
    )
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    none = dict.fromkeys(("passed", "passed_over", "skipped", "not_run"), 0)
    assert found["cases"] == {"chosen": 1, "ran": 1, "failed": 1, **none}
    assert found["goldens"]["sha256"] == GOLDENS.sha256
    assert found["arguments"] == ["defect:last_slot_dropped", "--diagnosis", "none", "--case", SMALL]
    assert f"{SMALL}: differs in" in result.stderr
    both = invoke("conform", "oracle", "--case", SMALL, "--json", "-", "--junit", "-")
    assert both.exit_code == 2
    assert "- for one at most" in both.stderr


def test_an_interrupted_run_writes_its_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4ref.conformance import suite

    original = suite.compare_case

    def interrupted_at_the_second(kernel: Any, case: Any, *arguments: Any) -> Any:
        if case.id != SMALL:
            raise KeyboardInterrupt
        return original(kernel, case, *arguments)

    monkeypatch.setattr(suite, "compare_case", interrupted_at_the_second)
    files = [x for kind in ("json", "junit", "html") for x in (f"--{kind}", tmp_path / f"r.{kind}")]
    result = invoke("conform", "oracle", "--case", SMALL, "--case", "sizes/eight_slots", *files)
    assert result.exit_code == 130
    assert result.output.splitlines()[-2:] == [
        f"oracle: interrupted, no verdict; 0 of 1 case failed, of the goldens' {open_goldens().of}.",
        f"1 case was not run; to run all: mxfp4ref conform oracle --case {SMALL} --case sizes/eight_slots",
    ]
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["ok"], found["interrupted"], found["left"]) == (False, True, 1)
    assert 'errors="1"' in (tmp_path / "r.junit").read_text()
    assert "interrupted, no verdict" in (tmp_path / "r.html").read_text()
    assert "conforms" not in (tmp_path / "r.html").read_text().replace("does not conform", "")


def test_last_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = written(tmp_path / "a.json", result_of(SMALL, "differs"), result_of("gemm/ordinary"), left=3)
    compare = ("conform", "oracle", "--diagnosis", "none", "--last-failed")
    result = invoke(*compare, earlier)
    assert result.exit_code == 0
    assert "in the one case that ran" in result.output
    assert "3 more cases were not run then" in result.output
    monkeypatch.setattr(memory, "free", lambda: 1 << 20)
    monkeypatch.setattr(loading, "is_stand_in", lambda spec: False)
    assert "models/" not in invoke(*compare, earlier).output  # which is not of what was asked for
    large = written(tmp_path / "large.json", result_of("models/deepseek_v4_flash", "differs"))
    refused = invoke(*compare, large)
    assert (refused.exit_code, "_flash is left out: it may need" in refused.output) == (2, True)
    monkeypatch.undo()
    for wrong, message in (
        (written(tmp_path / "b.json", result_of("gemm/ordinary")), "nothing to run"),
        (written(tmp_path / "c.json", result_of("gemm/of_old", "differs")), "are not in"),
    ):
        refused = invoke(*compare, wrong)
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
    assert invoke(*compare, earlier, "--case", "gemm/*").exit_code == 2
    replaced = invoke(*compare, earlier, "--json", earlier)
    assert (replaced.exit_code, "expected another file than the input" in replaced.output) == (2, True)


def test_last_failed_of_another_run_says_so(tmp_path: Path) -> None:
    """Of another kernel, mode or goldens: the failures are those of something else."""
    failing = result_of(SMALL, "differs")
    used = goldens_used(GOLDENS)
    for more, said in (
        ({"arguments": ("other.py:f",), "goldens": used}, "is of kernel other.py:f, not oracle\n"),
        (
            {"arguments": ("oracle",), "goldens": replace(used, sha256="1" * 64)},
            f"is of goldens {'1' * 64}, not ",
        ),
        ({"mode": "bounded"}, "is of kernel kernel, not oracle; mode bounded, not exact\n"),
        ({"arguments": ("oracle",), "goldens": used}, ""),
    ):
        path = written(tmp_path / "a.json", failing, **more)
        result = invoke("conform", "oracle", "--diagnosis", "none", "--last-failed", path)
        assert result.exit_code == 0
        assert said in result.stderr
        assert bool(said) == bool(result.stderr)


def test_numbers_of_cases_are_not_negative(tmp_path: Path) -> None:
    for more in (
        {"left": -3},
        {"goldens": replace(goldens_used(GOLDENS), cases=-1)},
        {"goldens": replace(goldens_used(GOLDENS), of=-1)},
    ):
        with pytest.raises(ValueError, match="expected 0 or more, got -"):
            read_report(written(tmp_path / "a.json", result_of(SMALL), **more))
    for name in ("elements", "differing"):
        with pytest.raises(ValueError, match=rf"report.results\[0\].{name}: expected 0 or more, got -1"):
            read_report(written(tmp_path / "a.json", replace(result_of(SMALL), **{name: -1})))


def test_numbers_of_a_case_do_not_contradict_its_status(tmp_path: Path) -> None:
    one = replace(result_of(SMALL), elements=4)
    for changes, said in (
        ({"differing": 3}, "has differing=3 with status equal"),
        ({"outside": 3}, "has outside=3 with status equal"),
        ({"status": "differs", "differing": 5}, "has differing=5 with status differs and elements=4"),
        (
            {"status": "within bounds", "differing": 4, "outside": 1},
            "has outside=1 with status within bounds",
        ),
    ):
        with pytest.raises(ValueError, match=f"report.results: '{SMALL}' {said}"):
            read_report(written(tmp_path / "a.json", replace(one, **changes)))
    read_report(written(tmp_path / "a.json", replace(one, status="within bounds", differing=4)))


def test_what_was_not_run_is_told_with_the_line_that_runs_it() -> None:
    selection = selection_arguments(["gemm", "--maxfail"], Path("a.json"), 1, 3)
    report = Report(
        *("k", "exact", (result_of(SMALL, "differs"),)),
        **{"left": 7, "date": "today", "arguments": ("k.py:f",), "selection": selection},
    )
    line = "mxfp4ref conform k.py:f --case gemm --case --maxfail --last-failed a.json --jobs 3"
    stopped = f"Judged from the one case that failed; without -x, 7 other cases may tell more: {line}"
    assert to_text(report).split("\n")[-1] == stopped
    assert stopped in to_html(report)
    found = replace(report, finding=Finding(("fc1",), "all is twice as large", True))
    assert "\nIn this one case every wrong bit is predicted by this: all is twice" in to_text(found)
    assert "\nEvery wrong bit is predicted by this: all is twice" in to_text(replace(found, left=0))
    of_python = to_text(replace(report, arguments=(), selection=()))
    assert of_python.endswith("from the one case that failed; 7 other cases not run may tell more.")
    interrupted = replace(report, interrupted=True)
    assert to_text(interrupted).endswith(f"\n7 cases were not run; to run all: {line}")
    none = replace(interrupted, results=(), left=9, unable=2)
    assert (
        none.verdict
        == f"k: interrupted before any case was run: no verdict. 7 cases were not run; to run all: {line}"
    )
    some = to_text(replace(report, unable=3))
    assert "without -x, 4 other cases may tell more" in some
    assert "cases: 8 = 1 failed + 4 not run + 3 not run, of other kinds" in some
    assert "may tell more" not in to_text(replace(found, unable=7))  # and the verdict is on all that there is
    assert "\nEvery wrong bit is predicted by this: all is twice" in to_text(replace(found, unable=7))
    for whole in (replace(report, left=0), replace(report, results=(result_of(SMALL),), interrupted=True)):
        assert "may tell more" not in to_text(whole)


def test_a_case_that_was_passed_over_is_told_wherever_failing_ones_are_counted() -> None:
    """`-x` ended neither at it nor without it; all counts add up to the goldens' cases."""
    over, wrong = result_of("a/over", "differs", within_bounds=True), result_of("a/wrong", "differs")
    used = GoldensUsed("goldens", "f", "0" * 64, 9)
    report = Report(
        *("k", "exact", (result_of("a/right"), over, wrong, result_of("a/not", "skipped"))),
        **{"left": 3, "date": "today", "goldens": used, "selection": ("--maxfail", "1")},
    )
    text = to_text(report)
    assert "k does not conform: 2 of 3 cases fail (1 of them passed over, within bounds), of the" in text
    assert "\na            1 passed, 2 FAILED (1 passed over, within bounds), 1 skipped\n" in f"\n{text}"
    counts = (
        "9 = 1 passed + 1 failed + 1 failed within bounds, passed over + 1 skipped + 3 not run + 2 not chosen"
    )
    assert f"\ncases: {counts}" in text
    html = to_html(report)
    assert counts in html
    assert "✗ 2 failed (1 passed over, within bounds),</span>" in html
    assert "</span>," not in html
    assert command(replace(report, arguments=("k",))) == "mxfp4ref conform k -x"
    ten = replace(report, arguments=("k",), selection=("--maxfail", "10"))
    assert "without --maxfail, 3 other cases may tell more: mxfp4ref conform k" in ten.verdict
    cases = json.loads(to_json(report))["cases"]
    assert cases == {
        "chosen": 7,
        "ran": 3,
        "passed": 1,
        "failed": 2,
        "passed_over": 1,
        "skipped": 1,
        "not_run": 3,
    }
    assert "passed over" not in to_text(replace(report, selection=()))  # where no limit was


@pytest.mark.parametrize(
    ("defects", "exact", "cases", "predicted"),
    [
        ((), False, None, 0),
        ((), False, (2, 3), 2),
        ((), True, None, 3),
        ((), True, (2, 3), 2),
        (("d",), False, None, 3),
    ],
)
def test_what_a_finding_predicts_says_of_how_much_in_json(
    defects: tuple[str, ...], exact: bool, cases: tuple[int, int] | None, predicted: int
) -> None:
    """A reader took `exact`, and `defects`, for the verdict on all cases."""
    results = tuple(result_of(f"a/{n}", "differs") for n in range(3))
    report = Report("k", "exact", results, defects, finding=Finding(("fc1",), "so", exact, cases))
    written = json.loads(to_json(replace(report, defects=())) if defects else to_json(report))
    assert not {"exact", "defects"} & {*written, *written["finding"]}
    found = _predicted(report)
    assert found == {"every_wrong_bit_of": predicted, "failing_cases": 3, "named_defects_of_all": [*defects]}
    assert defects or written["finding"]["predicts"] == found


def test_the_same_message_is_told_once() -> None:
    cases = [replace(result_of(SMALL, "refused"), case=f"a/{n}", message="no such layout") for n in range(4)]
    lines = to_text(Report("k", "exact", tuple(cases))).split("\n")
    assert "    2 refused as a/0: a/2, a/3" in lines


@pytest.mark.parametrize(
    ("kernel", "hint"),
    [
        ("k.py:f", " all by name; plain:k.py:f is called f(x, ids, scales, w1, s1, w2, s2, **parameters)."),
        ("logical:k.py:f", " all by name; plain:k.py:f is called f(x, ids,"),
        ("plain:k.py:f", " s2, **parameters); k.py:f is called with flashinfer's arguments by name."),
        ("stage:routing:k.py:f", "All are alike: raised: KeyError: 'x'."),
    ],
)
def test_where_all_raise_the_same_the_form_of_the_call_is_told(kernel: str, hint: str) -> None:
    """Which no signature tells of one that takes all, `(*arguments, **named)`."""
    cases = [result_of(name, "raised", message="KeyError: 'x'") for name in ("a/b", "a/c")]
    assert hint in Report(kernel, "exact", tuple(cases)).verdict
    other = (*cases, result_of("a/d"))
    assert Report(kernel, "exact", other).verdict.endswith(" a/b: raised: KeyError: 'x'.")


def test_a_long_message_ends_where_a_part_of_it_does() -> None:
    message = f"expected {'x ' * 60}; got {'y ' * 59}y, which is {'z ' * 60}"
    report = Report("k", "exact", (replace(result_of(SMALL, "raised"), message=message),))
    assert report.verdict.endswith("y y ... (all of it stands above).")


def test_some_failures_of_each_kind_are_told_in_full() -> None:
    def failing(name: str, sentence: str = "", status: str = "differs") -> CaseResult:
        first = Difference((0, 0), "0x0000", "0x0001", "0", "9e-41", 1)
        none = torch.zeros(1, 1, dtype=torch.uint8)
        ulps = tuple((top, 0) for top in ULP_BINS)
        found = Diagnosis("output", first, (), (), "", (), ulps, none, Finding(("fc1",), sentence))
        return result_of(f"suite/{name}", status, diagnosis=found if status == "differs" else None)

    alike = [failing(str(n), "rows of fc1") for n in range(8)]
    results = (
        *alike,
        failing("other", "rows of fc2"),
        failing("unknown"),
        failing("crash", status="crashed"),
    )
    interrupted = Report("k", "exact", results, left=7, interrupted=True)
    undone = "7 cases were not run and what fails was not diagnosed together."
    assert to_text(interrupted).endswith(f"\n{undone}")
    text = to_text(Report("k", "exact", results))
    told = [one.split("\n")[0].split(":")[0].removeprefix("suite/") for one in text.split("\n\n")[1:-2]]
    assert told == ["0", "1", "other", "unknown", "crash"]
    last = text.split("\n\n")[-2].split("\n")
    assert last[0] == "6 other failing cases; -v and reports in files tell all of each:"
    assert last[1:] == [f"    suite/{n}: differs" for n in range(2, 8)]
    assert "other failing" not in to_text(Report("k", "exact", results), verbose=True)
    many = Report("k", "exact", tuple(failing(str(n), f"row {n}") for n in range(20)))
    suite = "    suite: 15 differ: 5, 6, 7, ..."
    assert (
        f"\n15 other failing cases by suite; -v and reports in files tell all of each:\n{suite}\n"
        in to_text(many)
    )
    within = [replace(one, case="b/c", within_bounds=True) for one in alike[:3]]
    several = (*results, *map(replace, alike), *within)
    text = to_text(Report("k", "exact", several))
    assert "\n    suite: 14 differ: 2, 3, 4, ...; all: rows of fc1\n" in text
    assert "\n    b: 3 differ, 3 within bounds: c, c, c; all: rows of fc1\n" in text
    written_many = json.loads(to_json(many))
    found = written_many["results"][19]["diagnosis"]["finding"]
    assert (found["sentence"], found["predicts"]) == ("row 19", {"every_wrong_bit_of_this_output": False})
    assert "row 19" in to_html(many)


def test_what_changed_between_two_reports(tmp_path: Path) -> None:
    differs = {"elements": 1000, "differing": 12}
    old = written(
        tmp_path / "old.json",
        *(result_of("a/fails_now"), result_of("a/passes_now", "differs", **differs)),
        *(result_of("a/other", "differs", **differs), result_of("a/same"), result_of("a/skipped_now")),
        *(result_of("a/gone"), result_of("a/failed_and_gone", "raised", message="RuntimeError: no")),
        environment={"torch": "2.12"},
    )
    new = written(
        tmp_path / "new.json",
        *(result_of("a/fails_now", "differs", **differs), result_of("a/passes_now")),
        *(result_of("a/other", "crashed", message="SIGSEGV"), result_of("a/same")),
        *(result_of("a/skipped_now", "skipped"), result_of("a/new"), result_of("a/new_fails", "raised")),
        environment={"torch": "2.13"},
    )
    changes = compare_reports(read_report(old), read_report(new))
    assert changes.conditions == ("other torch: 2.12; now 2.13",)
    assert changes.failing == ("a/fails_now: differs in 12 of 1,000 elements",)
    assert changes.lost == ("a/skipped_now: skipped",)
    assert changes.first_failing == ("a/new_fails: raised",)
    assert changes.passing == ("a/passes_now: equal",)
    assert changes.changed == ("a/other: differs in 12 of 1,000 elements; now crashed; SIGSEGV",)
    assert changes.not_run == ("a/gone: it was equal", "a/failed_and_gone: it was raised; RuntimeError: no")
    assert changes.only_new == ("a/new: equal",)
    assert (changes.worse, changes.alike) == (2, 1)
    result = invoke("compare", old, new)
    assert result.exit_code == 1
    assert result.output.startswith("other torch: 2.12; now 2.13\nnewly failing (1):\n  a/fails_now: differs")
    counts = (
        "cases: 9 = 1 newly failing + 1 passed, and skipped now + 1 failing, and not run before + 1 newly passing"
        " + 1 another result, neither better nor worse + 2 in the old report only, not run now"
        " + 1 in the new report only + 1 as they were; 7 in the old report, 7 in the new, 5 in both"
    )
    assert result.output.endswith(f"{counts}\n2 cases got worse, 1 is as it was, 2 were not run\n")
    alike = [result_of(f"a/{n}", "raised", message="no key 'x'") for n in range(3)]
    passed = written(tmp_path / "passed.json", *(result_of(f"a/{n}") for n in range(3)))
    changes = compare_reports(read_report(passed), read_report(written(tmp_path / "raised.json", *alike)))
    assert changes.failing == ("a/0: raised; no key 'x'", "a/1: raised; as a/0", "a/2: raised; as a/0")
    again = tmp_path / "again.json"
    again.write_bytes(old.read_bytes())
    same = invoke("compare", old, again)
    assert (same.exit_code, same.output) == (0, "no case got worse, 7 are as they were\n")


def test_what_is_compared_of_mode_bounded_is_what_lies_outside(tmp_path: Path) -> None:
    good = written(tmp_path / "good.json", result_of("a/b"))
    numbers = {"elements": 4224, "differing": 1918, "outside": 1906}
    bad = written(tmp_path / "bad.json", result_of("a/b", "outside bounds", **numbers), left=1)
    changes = compare_reports(read_report(good), read_report(bad))
    assert changes.failing == ("a/b: outside bounds in 1,906 of 4,224 elements (1,918 differ)",)
    assert changes.conditions == ("the new run stopped when enough had failed: 1 case was not run",)


def test_reports_that_are_compared_are_reports(tmp_path: Path) -> None:
    """A byte order mark, as shells write it, makes none something else; other JSON is no damaged tensor file."""
    plain = written(tmp_path / "plain.json", result_of("a/b"))
    for encoding in ("utf-8-sig", "utf-16"):
        marked = tmp_path / f"{encoding}.json"
        marked.write_text(plain.read_text(), encoding=encoding)
        result = invoke("compare", plain, marked)
        assert (result.exit_code, result.output) == (0, "no case got worse, 1 is as it was\n")
    other = tmp_path / "other.json"
    for text in ("[]", "\0", "9" * 5000):
        other.write_text(text)
        result = invoke("compare", other, plain)
        assert result.exit_code == 2
        assert "other.json: " in result.output
        assert "safetensors" not in result.output
    failed = json.loads(plain.read_text())
    wrong = {"stages": [], "sentence": "", "exact": True, "hypotheses": [5]}
    failed["results"][0] |= {"ok": False, "status": "differs", "diagnosis": {"finding": wrong}}
    other.write_text(json.dumps(failed))
    result = invoke("compare", plain, other)
    assert (result.exit_code, "finding.hypotheses[0]: expected str, got 5" in result.output) == (2, True)
    result = invoke("conform", "oracle", "--case", SMALL, "--json", "")
    assert (result.exit_code, result.output) == (2, "Error: cannot write .: it is a folder\n")


def test_nothing_that_ran_is_not_as_it_was(tmp_path: Path) -> None:
    """Cases that both have were skipped, or had no elements: neither says anything of the kernel."""
    skipped, empty = result_of("a/x", "skipped"), result_of("a/x", elements=0)
    passed, other = result_of("a/y"), result_of("a/z")
    for one in (skipped, empty):
        old, new = (
            written(tmp_path / f"{name}.json", one, more) for name, more in (("a", passed), ("b", other))
        )
        result = invoke("compare", old, new)
        assert result.exit_code == 2
        assert "expected a case that ran in" in result.output
        lost = invoke("compare", written(tmp_path / "a.json", result_of("a/x")), new)
        assert lost.exit_code == 1
        assert ("a/x: skipped" if one is skipped else "a/x: equal, of no elements") in lost.output
    assert invoke("compare", new, written(tmp_path / "a.json", empty)).exit_code == 2


def test_what_changed_as_json(tmp_path: Path) -> None:
    """A file beside the text, or alone on stdout; of tensors as of reports."""
    old, new, changes = (tmp_path / name for name in ("old.json", "new.json", "changes.json"))
    for path, kernel in ((old, "oracle"), (new, "defect:bf16_finalize")):
        invoke("conform", kernel, "--case", "finalize/slot_order", "--diagnosis", "none", "--json", str(path))
    result = invoke("compare", str(old), str(new), "--json", str(changes))
    assert result.exit_code == 1
    written = json.loads(changes.read_text())
    assert written["cases"] == {"old": 1, "new": 1, "both": 1, "either": 1}
    assert (written["kind"], written["ok"], written["worse"], written["alike"]) == ("reports", False, 1, 0)
    assert written["failing"][0].startswith("finalize/slot_order: differs in ")
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3), "y": torch.zeros(2)}, one)
    save_file({"x": torch.tensor([0.0, 1.0, 0.0])}, other)
    result = invoke("compare", str(one), str(other), "--json", "-")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["kind"], found["ok"]) == (1, "tensors", False)
    assert [(row["name"], row["equal"], row.get("differing")) for row in found["tensors"]] == [
        ("x", False, 1),
        ("y", False, None),
    ]
    assert found["tensors"][0]["message"] in result.stderr
    refused = invoke("compare", str(old), str(new), "--json", str(old))
    assert refused.exit_code == 2
    assert "expected another file than the input" in refused.output
    unknown = invoke("compare", str(old), str(new), "--junit", "x.xml")
    assert unknown.exit_code == 2
    assert "No such option '--junit'. There are --help, --json" in unknown.output


def test_a_report_of_some_cases_is_not_worse(tmp_path: Path) -> None:
    whole = written(
        tmp_path / "whole.json",
        *(result_of("a/same"), result_of("a/failed", "differs", elements=2, differing=1)),
        result_of("a/skipped", "skipped", message="one does not run cases of kind layout"),
    )
    some = written(tmp_path / "some.json", result_of("a/failed"))
    assert invoke("compare", whole, some).exit_code == 0
    assert invoke("compare", some, whole).exit_code == 1  # a/failed passed and fails
    other = written(
        tmp_path / "other.json",
        result_of("a/same"),
        result_of("a/skipped", "skipped", message="two does not run cases of kind layout"),
    )
    assert compare_reports(read_report(whole), read_report(other)).alike == 2


def test_the_command_of_a_run_has_its_selection(tmp_path: Path) -> None:
    chosen = ("--case", SMALL, "--case", "gemm/ordin*")
    invoke("conform", "oracle", *chosen, "-x", "--diagnosis", "none", "--json", tmp_path / "r.json")
    arguments = json.loads((tmp_path / "r.json").read_text())["arguments"]
    assert arguments == ["oracle", "--diagnosis", "none", *chosen, "--maxfail", "1"]
    every = ("--case", "gemm/*")
    without = invoke(
        "conform",
        "oracle",
        *every,
        "--exclude",
        "gemm/[!o]*",
        "--exclude",
        "layout",
        "--json",
        tmp_path / "s.json",
    )
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["arguments"] == ["oracle", *every, "--exclude", "gemm/[!o]*", "--exclude", "layout"]
    assert {r["case"].split("/")[1][0] for r in found["results"]} == {"o"}, without.output
    none = invoke("conform", "oracle", "--case", "gemm/ordinary", "--exclude", "gemm")
    assert (none.exit_code, none.output) == (2, "Error: --exclude: none of the chosen cases is left\n")
    assert selection_arguments((), Path("a.json"), None, 4) == ("--last-failed", "a.json", "--jobs", "4")
    report = Report("oracle", "exact", (result_of(SMALL),), arguments=("oracle",), selection=chosen)
    assert command(report) == f"mxfp4ref conform oracle --case {SMALL} --case 'gemm/ordin*'"
    one = command(report, report.results[0])
    assert one == f"mxfp4ref conform oracle --case {SMALL} --dump reproducers"


def test_how_many_lie_outside_their_bounds_comes_first() -> None:
    result = result_of("a/b", "outside bounds", elements=4096, differing=1513, outside=1)
    assert headline(result) == "a/b: outside bounds in 1 of 4,096 elements (1,513 differ)"


def test_a_report_in_words_and_its_repr() -> None:
    report = run("defect:bf16_finalize", [GOLDENS.load(SMALL)], Options(diagnosis="quick"))
    assert str(report) == to_text(report)
    assert "tensor(" not in repr(report) + repr(report.results[0]) + str(report.results[0].diagnosis)
    assert "\n" not in repr(report)
    assert repr(report).startswith(
        "Report(kernel='defect:bf16_finalize', mode='exact', results=(CaseResult(case="
    )


def test_reports_that_cannot_be_compared(tmp_path: Path) -> None:
    good = written(tmp_path / "good.json", result_of(SMALL))
    of_0_1 = json.loads(good.read_text())
    for name in ("interrupted", "goldens", "date", "arguments", "cases", "verdict_seconds"):
        del of_0_1[name]
    (tmp_path / "old.json").write_text(json.dumps(of_0_1 | {"format": "mxfp4ref-report-1"}))
    shown = invoke("compare", tmp_path / "old.json", good)
    assert shown.exit_code == 0, shown.output
    (tmp_path / "later.json").write_text(json.dumps(of_0_1 | {"format": "mxfp4ref-report-9"}))
    (tmp_path / "broken.json").write_text(json.dumps({"format": "mxfp4ref-report-1", "results": [1]}))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "page.html").write_text("<!DOCTYPE html>")
    torch.save(torch.ones(2), tmp_path / "saved.pt")
    save_file({"output": torch.ones(2)}, tmp_path / "x.safetensors")
    for other, message in (
        ("later.json", "report.format: expected one of 'mxfp4ref-report-1', 'mxfp4ref-report-2', got"),
        ("broken.json", "broken.json: report.results[0]: expected an object"),
        ("other.json", "got other JSON (report: expected the key 'format', got [])"),
        ("page.html", "got an HTML page"),
        ("saved.pt", f"expected a report as conform --json writes it, as {good} is, got what torch or numpy"),
        ("x.safetensors", f"expected a report as conform --json writes it, as {good} is, got tensors"),
    ):
        refused = invoke("compare", good, tmp_path / other)
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
    refused = invoke("compare", tmp_path / "x.safetensors", tmp_path / "saved.pt")
    assert "expected a safetensors file, or two reports" in refused.output
    assert "safetensors.torch.save_file(" in refused.output


def test_reports_that_say_nothing_or_two_things(tmp_path: Path) -> None:
    """No verdict on what was not run, and nothing of a file passes for a line of the comparison."""
    good = written(tmp_path / "good.json", result_of(SMALL))
    empty = written(tmp_path / "empty.json")
    skipped = written(tmp_path / "skipped.json", result_of(SMALL, "skipped"))
    text = json.loads(good.read_text())
    text["results"][0] |= {"status": "differs"}
    (tmp_path / "edited.json").write_text(json.dumps(text))
    (tmp_path / "cut.json").write_bytes(good.read_bytes()[:-20])
    os.mkfifo(tmp_path / "pipe.json")
    for old, new, message in (
        (good, empty, "empty.json: expected a report in which a case ran, got none"),
        (good, skipped, "skipped.json: expected a report in which a case ran, got none"),
        (good, tmp_path / "edited.json", "has status 'differs' and ok True"),
        (
            good,
            tmp_path / "cut.json",
            "cut.json: expected a report, as conform --json writes it, got no JSON",
        ),
        (tmp_path / "pipe.json", good, "expected a regular file"),
    ):
        refused = invoke("compare", old, new)
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
    text["results"][0] |= {"ok": False, "case": "a\nno case got worse, 1 is as it was"}
    (tmp_path / "forged.json").write_text(json.dumps(text))
    shown = invoke("compare", good, tmp_path / "forged.json").output
    assert not [line for line in shown.splitlines() if line.startswith("no case got worse, 1 are")]


def test_stdout_is_kept_from_c_and_children(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ReportFiles({"json": Path("-")}).stdout_kept():
        print("python")
        os.write(1, b"C\n")
        ctypes.CDLL(None).puts(b"buffered")
    os.write(1, b"report")
    out, err = capfd.readouterr()
    assert out == "report"
    assert {"C", "buffered"} <= set(err.split())


def test_arguments_of_any_bytes_can_be_written() -> None:
    """A name of a file that is not UTF-8 reaches Python as lone surrogates."""
    name = b"k\xff\x1b.py".decode("utf-8", "surrogateescape")
    used = GoldensUsed(name, "format", "hash", 1)
    report = Report(
        name, "exact", (result_of(SMALL, "raised"),), goldens=used, date="now", arguments=(f"{name}:f",)
    )
    for render in (to_text, to_html, to_junit, to_json):
        text = render(report)
        text.encode()
        assert "\x1b" not in text


def test_seconds_include_all() -> None:
    result = result_of(SMALL).lasting(kernel=1, comparison=2, diagnosis=3)
    assert result.seconds == 6
    report = Report("k", "exact", (result,), seconds=20, date="now", verdict_seconds=10)
    assert "seconds: 20.0 in all; kernel 1.0, comparison 2.0, diagnosis 13.0, start and other 4.0" in to_text(
        report
    )
    assert replace(report, date="") != report


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_command_with_odd_names_is_what_a_shell_gives_back() -> None:
    names = (b"plain", b"a b", b"a\nb\xff \\ ' \" $x\x1b", "h\u00f6\u202e".encode())
    report = Report("kernel", "exact", (), arguments=tuple(os.fsdecode(name) for name in names))
    line = command(report)
    assert line.isprintable()
    given = subprocess.run(
        ["bash", "-c", f"mxfp4ref() {{ printf '%s\\0' \"$@\"; }}; {line}"], capture_output=True, check=True
    )
    assert given.stdout.split(b"\0")[1:-1] == list(names)
    assert command(Report("kernel", "exact", (), arguments=("\ud800",))).isprintable()


@pytest.mark.parametrize(
    ("content", "came"),
    [
        (b"", "an empty file"),
        (safetensors.torch.save({"output": torch.ones(2)}), "tensors (a safetensors file)"),
        (b"PK\3\4archive/data.pkl", "a zip archive, as torch.save and numpy.savez write it"),
        (pickle.dumps({}), "a pickle"),
        (b"\x93NUMPY", "a numpy array"),
        (b"GGUF\3", "a GGUF file"),
        (b"<testsuite/>", "an HTML or XML file"),
        (b'{"model_type": "gpt_oss"}', "other JSON (report: expected the key 'format', got ['model_type'])"),
        (b"[]", "other JSON (report: expected an object, got [])"),
    ],
)
def test_what_came_instead_of_a_report_is_told_by_its_content(
    tmp_path: Path, content: bytes, came: str
) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"report\.json: expected a report, as conform --json writes it, got "
    ) as error:
        read_report(tmp_path / "report.json")
    assert str(error.value).endswith(came)
