"""Which bits depend on a token's company: none of the oracle's but where they should, those of kernels that do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from mxfp4ref.__main__ import commands
from mxfp4ref.engine.autotune import token_bucket
from mxfp4ref.engine.invariance import Invariance, invariance
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import autotune_caches, layers, recorded
from tests.helpers.drop_in import CALL, DENSE_CALL, arguments_of
from tests.helpers.forward_calls import underflowing_call
from tests.helpers.kernels_under_test import good

MIRRORED = open_goldens().load("gemm/mirrored_hidden_1536").call()
TILE_256 = (4, 116)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def changes(found: Invariance) -> dict[str, int]:
    return {variant.name: variant.differing for variant in found.variants}


def by_batch_size(call: MoeCall) -> Tensor:
    """The oracle with another tile where there are few tokens."""
    pair = (128, 128) if call.num_tokens > 1 else (256, 128)
    return forward(replace(call, kernel=Sm90Kernel.of_tiles(pair)))


def test_the_oracle_does_not_depend_on_the_batch() -> None:
    found = invariance(CALL)
    assert found.ok
    names = ["alone", "in reverse", "behind as many others"]
    assert [changes(found)[name] for name in names] == [0, 0, 0]
    ranks = [variant for variant in found.variants if variant.ranks]
    assert [variant.name for variant in ranks] == ["expert parallel, 2 ranks"]
    assert ranks[0].differing
    assert "each of which rounds to bf16" in ranks[0].why
    assert found.tactics == (("128x128", 0), ("256x128", 0))
    assert "no bit depends on the batch; all pairs of K tiles give the same bits" in found.verdict


def test_a_tile_that_depends_on_the_batch_size_is_named() -> None:
    found = invariance(MIRRORED, by_batch_size)
    assert not found.ok
    assert changes(found)["alone"]
    assert changes(found)["in reverse"] == 0
    alone = found.variants[0]
    assert alone.why == "another tactic: K tiles 256x128 here, 128x128 in the call"
    assert alone.first is not None
    want = forward(MIRRORED)
    assert alone.first.expected_value == f"{float(want[alone.first.index]):.9g}"
    assert [name for name, count in found.tactics if not count] == ["128x128"]
    assert "K tiles 128x128 give the same bits, 256x128, 512x128 others" in found.verdict


def test_the_position_in_an_n_tile_is_named() -> None:
    found = invariance(underflowing_call(9, kernel=Sm90Kernel.of_tiles((256, 128))))
    assert changes(found)["in reverse"]
    assert "position in its N tile" in found.variants[1].why


def test_a_kernel_that_itself_depends_on_the_batch() -> None:
    found = invariance(CALL, lambda call: forward(call) * (1 + 2.0**-6 * (call.num_tokens > 7)))
    assert changes(found)["behind as many others"]
    assert changes(found)["alone"] == 0
    assert "this kernel itself" in found.variants[2].why


def test_tensor_parallel_ranks_and_calls_of_a_rank() -> None:
    experts = layers.random_experts(3, inner=256)
    call = layers.random_call(3, experts)
    assert "tensor parallel, 2 ranks" in changes(invariance(call))
    part = replace(call, experts=experts.slice(0, 2), ep_size=2)
    assert len(changes(invariance(part))) == 3


def test_bf16_weights_and_no_tokens() -> None:
    assert invariance(DENSE_CALL, ranks=()).tactics == ()
    assert invariance(layers.random_call(1, CALL.experts, tokens=0), ranks=()).ok
    with pytest.raises(TypeError, match="call: expected MoeCall"):
        invariance(3)  # type: ignore[arg-type]


def varying(**arguments: Any) -> Any:
    """A kernel whose tile depends on the batch size."""
    pair = (128, 128) if len(arguments["input"]) > 1 else (512, 128)
    return good(**arguments, kernel=Sm90Kernel.of_tiles(pair))


def test_an_installed_package_has_a_case_too(builtin_root: Path) -> None:
    result = invoke("invariance", "oracle", "--goldens", builtin_root)
    assert result.exit_code == 0
    assert "oracle, gemm/wide_exponents: no bit depends on the batch" in result.output


@pytest.mark.usefixtures("copied_processes")
def test_kernels_by_name() -> None:
    result = invoke("invariance", "tests.helpers.kernels_under_test:good")
    assert result.exit_code == 0, result.output
    assert "no bit depends on the batch" in result.output
    case = "gemm/mirrored_hidden_1536"
    result = invoke("invariance", "tests.engine.test_invariance:varying", "--case", case)
    assert result.exit_code == 1
    assert "why: another tactic: K tiles 512x128 here, 128x128 in the call" in result.output
    assert "first: at [" in result.output


def test_recorded_calls_with_the_tactics_of_the_autotuner(tmp_path: Path) -> None:
    call = replace(MIRRORED, experts=layers.to_sm90(MIRRORED.experts))
    recorded.write_call(tmp_path / "calls", call, forward(call))
    recorded.write_call(tmp_path / "calls", call, None, number=2)
    assert invoke("invariance", tmp_path / "calls", "--ranks", "4").exit_code == 0
    tactics = {
        1: TILE_256,
        token_bucket(call.num_tokens): (0, 116),
        token_bucket(2 * call.num_tokens): (0, 116),
    }
    cache = autotune_caches.write_json(tmp_path / "cache.json", arguments_of(call), tactics)
    result = invoke("invariance", tmp_path / "calls", "--autotune-cache", cache)
    assert result.exit_code == 1, result.output
    assert "process1/call0001: bits depend on the batch: alone" in result.output
    assert "another tactic: K tiles 256x128 here, 128x128 in the call" in result.output


def test_rows_that_are_not_written_are_not_compared() -> None:
    ids = torch.full_like(CALL.token_selected_experts, CALL.experts.num_experts)
    ids[1] = CALL.token_selected_experts[1]
    call = replace(CALL, token_selected_experts=ids, ep_size=2, enable_alltoall=True, strict=False)
    hidden = CALL.experts.hidden_size
    assert [v.elements for v in invariance(call).variants] == [hidden] * 3
    none = replace(call, token_selected_experts=torch.full_like(ids, ids[0, 0].item()))
    assert invariance(none).verdict == "there are no tokens, which tells nothing"


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "expected package.module:function"),
        (["oracle", "--case", "no/such"], "no such case"),
        (["oracle", "--case", "layout/swap_halves"], "expected a case of kind moe"),
        (["stage:finalize:tests.helpers.kernels_under_test:good"], "expected one that runs whole calls"),
        (["tests.engine.test_invariance:broken"], "raised on "),
        (
            ["tests.helpers.hostile_kernels:wrong_second_time"],
            "unstable on 4 tokens: a second run on the same",
        ),
        (["tests.helpers.hostile_kernels:exits"], "ended without a result: exit code 0"),
        (["{empty}"], "nothing to compute"),
        (["{no_tokens}"], "call0001: there are no tokens, which tells nothing"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], words: str) -> None:
    places = {"empty": tmp_path / "empty", "no_tokens": tmp_path / "calls"}
    places["empty"].mkdir()
    call = CALL.select(torch.arange(0))
    recorded.write_call(
        places["no_tokens"], replace(call, experts=layers.to_sm90(call.experts)), forward(call)
    )
    result = invoke("invariance", *(a.format(**places) for a in arguments))
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def broken(**arguments: Any) -> Any:
    raise RuntimeError("out of memory")


def test_damaged_recordings_are_left_out_and_told(tmp_path: Path) -> None:
    path = recorded.write_call(tmp_path, replace(CALL, experts=layers.to_sm90(CALL.experts)), torch.zeros(1))
    assert invoke("invariance", tmp_path).exit_code == 0  # the output is not needed
    (path / "metadata.jsonl").write_text("{")
    result = invoke("invariance", tmp_path)
    assert result.exit_code == 2
    assert "left out: metadata.jsonl" in result.output
