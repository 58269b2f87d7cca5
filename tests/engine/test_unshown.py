"""What a right output does not show: said alike of recorded calls and of a checkpoint's layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import ReadOptions, layer_call, open_layer
from mxfp4ref.engine.describing import zeros_words
from mxfp4ref.engine.unshown import shown, shown_by_layer, unshown
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from tests.helpers import layers
from tests.helpers.checkpoints import DEEPSEEK_H, make_checkpoint

EXPERTS = layers.random_experts(1, biases=True, parameters=("swiglu_limit",))
CALL = layers.random_call(1, EXPERTS)


def with_experts(**changes: object) -> MoeCall:
    return replace(CALL, experts=replace(EXPERTS, **changes))


def test_a_call_that_shows_all() -> None:
    low = with_experts(swiglu_limit=torch.full((EXPERTS.num_experts,), 0.01))
    assert shown(low) == dict.fromkeys(("weights", "experts", "fc1_biases", "fc2_biases", "limit"), True)
    assert unshown([shown(low)]) == []


ONE_EXPERT = replace(
    CALL, token_selected_experts=torch.tensor([[0, -1]] * len(CALL.input), dtype=torch.int32)
)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("limit", with_experts(swiglu_limit=torch.full((EXPERTS.num_experts,), 1e30))),
        ("weights", replace(CALL, token_final_scales=torch.ones_like(CALL.token_final_scales))),
        ("experts", ONE_EXPERT),
        ("fc1_biases", with_experts(fc1_biases=torch.zeros_like(EXPERTS.fc1_biases))),
        ("fc2_biases", with_experts(fc2_biases=torch.zeros_like(EXPERTS.fc2_biases))),
    ],
)
def test_what_a_call_does_not_show(name: str, call: MoeCall) -> None:
    low = replace(call.experts, swiglu_limit=torch.full((EXPERTS.num_experts,), 0.01))
    call = call if name == "limit" else replace(call, experts=low)
    found = shown(call)
    assert [one for one, seen in found.items() if not seen] == [name]
    assert len(unshown([found])) == 1
    assert unshown([found, {name: True}]) == []
    assert name not in shown(call, [name])


def test_without_a_slot_nothing_is_said_of_limits() -> None:
    none = replace(CALL, token_selected_experts=torch.full_like(CALL.token_selected_experts, -1))
    assert shown(none) == {}


def test_ids_that_look_local() -> None:
    """-1 to 3 on the third of four ranks of four experts, as an engine gives that maps ids by itself."""
    ids = torch.tensor([[-1, 3], [0, 2]], dtype=torch.int32)
    call = replace(CALL.select(slice(2)), token_selected_experts=ids, ep_size=4, ep_rank=2, strict=False)
    words = zeros_words(call)
    assert words.startswith(
        "no id lies in 8 to 11, which the rank owns; they are -1 to 3: are these local ids"
    )
    others = replace(call, token_selected_experts=ids + 12)
    assert "local" not in zeros_words(others)
    assert "local" not in zeros_words(replace(call, ep_rank=0))


@pytest.mark.parametrize("experts", [None, [2, 3]])
def test_a_layer_whose_input_reaches_no_limit(tmp_path: Path, experts: list[int] | None) -> None:
    """The layer's command says it with and without what was served, and not of an input that reaches the limit."""
    make_checkpoint(tmp_path / "model", "deepseek_v4")
    hidden = torch.randn(8, DEEPSEEK_H, generator=torch.Generator().manual_seed(1))
    given = {"hidden": (hidden / 16).to(torch.bfloat16)}
    save_file(given, tmp_path / "x")
    command = ["layer", "--checkpoint", tmp_path / "model", "--layer", "1", "--input", tmp_path / "x"]
    command += ["--experts", "2-3"] if experts else []
    for limit, reached in ((1e4, False), (1e-4, True)):
        layer = open_layer(tmp_path / "model", 1, limit=limit, options=ReadOptions(experts=experts))
        call = layer_call(layer, given)
        found = shown_by_layer(layer, given)
        assert found == shown(call)
        assert found["limit"] is reached
        name = "rank_output" if experts else "routed_output"
        save_file({name: forward(call)}, tmp_path / "served")
        for options in ([], ["--served", tmp_path / "served"]):
            result = CliRunner().invoke(commands, [*map(str, (*command, "--limit", limit, *options))])
            assert result.exit_code == 0, result.output
            assert ("reaches swiglu_limit: this does not show" in result.output) is not reached
