"""What an expert-parallel rank served: of other experts or another rank, with its own ids and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfp4ref.checkpoint import CheckpointLayer, ReadOptions, layer_call, open_layer, run_layer
from mxfp4ref.checkpoint.layer import ExpertsInFiles
from mxfp4ref.engine.held_experts import other_experts, whose_output
from mxfp4ref.engine.served import Served, ServedOptions, check_served
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import usual
from tests.helpers.checkpoints import make_checkpoint, write_config

EXPERTS, MINE = 12, range(8, 12)  # of rank 2 of 3
BY_NAME = sorted(range(EXPERTS), key=str)
IDS, WEIGHTS = "token_selected_experts", "token_final_scales"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.helpers.checkpoints.EXPERTS", EXPERTS)
        for kind, name in (("deepseek_v4", "n_routed_experts"), ("gpt_oss", "num_local_experts")):
            make_checkpoint(root / kind, kind)
            write_config(root / kind, kind, **{name: EXPERTS})
    return root


def hidden(layer: CheckpointLayer) -> dict[str, Tensor]:
    values = torch.randn(24, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    return {"hidden": (values / 16).to(torch.bfloat16)}


def opened(root: Path, experts: Sequence[int] | None = MINE, kind: str = "deepseek_v4") -> CheckpointLayer:
    options = ReadOptions(experts=None if experts is None else [*experts])
    return open_layer(root / kind, 1, options=options)


def held(
    root: Path, others: Sequence[int], part: str = "", kind: str = "deepseek_v4", mine: Sequence[int] = MINE
) -> tuple[CheckpointLayer, MoeCall, Tensor]:
    """A rank's layer, its call, and the output of a rank that has tensors of these experts instead of its own."""
    layer = opened(root, None if len(mine) == EXPERTS else mine, kind)
    call = layer_call(layer, hidden(layer))
    loaded = opened(root, None, kind).experts
    assert isinstance(loaded, ExpertsInFiles)
    theirs = loaded.select(torch.tensor(others))
    names = [name for name in vars(theirs) if name.startswith(part) and getattr(theirs, name) is not None]
    experts = replace(call.experts, **{name: getattr(theirs, name) for name in names})
    return layer, call, forward(replace(call, experts=experts))


def checked(layer: CheckpointLayer, served: dict[str, Tensor], **how: object) -> Served:
    return check_served(layer, hidden(layer), served, ServedOptions(**{"diagnosis": "quick"} | how))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("others", "part", "kind", "says"),
    usual.first(
        2,
        [
            (
                BY_NAME[8:],
                "",
                "deepseek_v4",
                "this rank's experts 8 to 11 are the checkpoint's 6 to 9, those of ranks 1 to 2: as names of experts "
                "sorted as strings, 10 before 2, deal them out",
            ),
            (
                range(4, 8),
                "",
                "deepseek_v4",
                "this rank's experts 8 to 11 are the checkpoint's 4 to 7, those of rank 1",
            ),
            ([8, 2, 10, 11], "", "gpt_oss", "this rank's expert 9 is the checkpoint's 2, those of rank 0"),
            (
                range(4),
                "fc2",
                "deepseek_v4",
                "the fc2 weights and fc2 scales of this rank's experts 8 to 11 are those of the checkpoint's 0 to 3, "
                "those of rank 0",
            ),
            (
                range(4),
                "fc2_biases",  # no token has expert 8
                "gpt_oss",
                "the fc2 biases of this rank's experts 9 to 11 are those of the checkpoint's 1 to 3, those of rank 0",
            ),
            (
                [8, 8, 10, 10],
                "fc1_scales",
                "gpt_oss",
                "the fc1 scales of this rank's expert 9 are those of the checkpoint's 8, expert 11 are those of the "
                "checkpoint's 10, those of rank 2",
            ),
        ],
    ),
)
def test_a_rank_that_holds_other_experts(
    root: Path, others: Sequence[int], part: str, kind: str, says: str
) -> None:
    layer, call, output = held(root, others, part, kind)
    assert other_experts(layer, call, output) == f"{says}; every bit of the output is right for these"
    found = checked(layer, {"rank_output": output[:, : layer.hidden_size].contiguous()})
    assert found.verdict.startswith(f"the output is wrong: {says}; every bit")


def test_a_whole_layer_with_a_part_of_its_experts(root: Path) -> None:
    layer, call, output = held(root, [e % 8 for e in range(EXPERTS)], mine=range(EXPERTS))
    said = other_experts(layer, call, output)
    assert said == "experts 8 to 11 are the checkpoint's 0 to 3; every bit of the output is right for these"


def test_only_the_experts_that_are_needed_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, call, output = held(root, range(4))
    read: set[int] = set()
    select = ExpertsInFiles.select

    def counted(self: ExpertsInFiles, index: Tensor) -> object:
        read.update(self.ids[i] for i in index.tolist())
        return select(self, index)

    monkeypatch.setattr(ExpertsInFiles, "select", counted)
    assert other_experts(layer, call, output)
    assert len(read) < EXPERTS
    assert set(range(4)) <= read


@pytest.mark.slow
def test_another_mistake_is_no_other_experts(root: Path) -> None:
    layer, call, output = held(root, MINE)
    for wrong in (output * 1.5, output.roll(1, 0)):
        assert other_experts(layer, call, wrong) == ""
        assert whose_output(layer, hidden(layer), wrong, None, Ranks()) == ""
    _, _, other = held(root, range(4))
    other.view(torch.int16)[:, :32] ^= 1  # more is wrong than that
    assert other_experts(layer, call, other) == ""


@pytest.mark.parametrize(
    ("experts", "ranks", "says"),
    [
        (range(4), Ranks(), "experts 0 to 3 (--ep-size 3 --ep-rank 0)"),
        (range(2, 12, 3), Ranks(), "--ep-size 3 --ep-rank 2 --expert-placement round_robin)"),
        (None, Ranks(), "all experts (--ep-size 1)"),
        (MINE, Ranks(tp_size=2, tp_rank=0), "experts 8 to 11 (--ep-size 3 --ep-rank 2 --tp-rank 0)"),
    ],
)
def test_another_rank_s_output(root: Path, experts: Sequence[int] | None, ranks: Ranks, says: str) -> None:
    """Of whatever K tiles."""
    other = opened(root, experts)
    kernel = Sm90Kernel.of_tiles((256, 128))
    output = forward(replace(layer_call(other, hidden(other), ranks=ranks), kernel=kernel))
    asked = replace(ranks, tp_rank=1) if ranks.tp_size > 1 else ranks
    found = checked(opened(root), {"rank_output": output}, ranks=asked)
    assert found.verdict.startswith("the output is wrong: it is the output of "), found
    assert says in found.verdict
    assert found.verdict.endswith("every bit of the output is right for these")
    everything = checked(opened(root, None), {"output": output}, ranks=Ranks(ep_size=3))
    assert (says in everything.verdict) == (ranks.tp_size == 1), everything


def own_slots(root: Path) -> tuple[CheckpointLayer, dict[str, Tensor], Tensor]:
    """A rank's layer, what a right server saves, and which slots are the rank's."""
    layer = opened(root)
    result = run_layer(layer, hidden(layer))
    served = {name: result[name] for name in (IDS, WEIGHTS, "rank_output")}
    mine = torch.isin(served[IDS], torch.tensor(MINE))
    assert {1, 2} <= set(mine.sum(1).tolist())
    return layer, served, mine


@pytest.mark.parametrize("zero", usual.first(1, [False, True]))
def test_weights_normalised_over_the_rank_s_own_slots(root: Path, zero: bool) -> None:
    layer, served, mine = own_slots(root)
    weights = served[WEIGHTS]
    own = (weights * mine).sum(1, keepdim=True)
    weights = torch.where(own > 0, weights / own * 1.5, weights) * (mine if zero else 1)
    call = replace(layer_call(layer, hidden(layer)), token_final_scales=weights)
    found = checked(layer, {IDS: served[IDS], WEIGHTS: weights, "rank_output": forward(call)})
    rule = "weights are normalised over the slots of this rank's experts instead of all of a token's"
    assert found.verdict.startswith(f"the router is wrong: ids are right; {rule}"), found
    assert ("those of other ranks' slots are 0" in found.verdict) == zero
    assert found.verdict.endswith("the output is right for its ids and weights")
    assert not any("as bf16 ones are" in line for line in found.lines)
    if zero:  # which the output does not show
        alone = checked(layer, {"rank_output": forward(call)}, diagnosis="full")
        assert "normalised over this rank's slots instead of all of a token's" in alone.verdict
        assert "computed and added" not in alone.verdict


@pytest.mark.slow
def test_weights_of_other_ranks_may_be_zero(root: Path) -> None:
    layer, served, mine = own_slots(root)
    found = checked(layer, served | {WEIGHTS: served[WEIGHTS] * mine})
    assert found.ok, found
    assert any("weights of other ranks' slots are 0" in line for line in found.lines)
    weights = served[WEIGHTS] * mine
    weights[mine] *= torch.linspace(0.5, 1, int(mine.sum()))
    others = served[WEIGHTS] * torch.where(mine, 1, torch.rand(mine.shape))
    for wrong in (weights, others):
        found = checked(layer, served | {WEIGHTS: wrong}, diagnosis="none")
        assert found.verdict.startswith("the router is wrong: ids are right, and weights are others"), found


@pytest.mark.parametrize("others", [-1, len(MINE)])
def test_local_ids_in_the_file(root: Path, others: int) -> None:
    """The output is right for the experts that they mean; where it is not, they are taken as they are."""
    layer, served, mine = own_slots(root)
    local = torch.where(mine, served[IDS] - MINE.start, others)
    found = checked(layer, served | {IDS: local})
    assert found.ok, found
    numbers = f"0 to 3 for its experts 8 to 11, {others} for those of other ranks"
    assert found.verdict.endswith(
        f"in every bit; only the ids in the file are the rank's local ones: {numbers}"
    )
    wrong = checked(layer, served | {IDS: local, "rank_output": -served["rank_output"]})
    assert (wrong.ok, "only the ids" in wrong.verdict) == (False, False)


@pytest.mark.slow
def test_what_is_known_is_told_before_the_diagnosis(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, served, _ = own_slots(root)
    told: list[str] = []
    before: list[str] = []

    def diagnosed(*arguments: object, **named: object) -> None:
        before.extend(told)
        raise ValueError("of the kit")

    monkeypatch.setattr("mxfp4ref.engine.served.diagnose", diagnosed)
    found = checked(
        layer,
        served | {"rank_output": -served["rank_output"], WEIGHTS: served[WEIGHTS] * 2},
        tell=told.append,
    )
    assert [line.partition(":")[0] for line in before] == [
        *(IDS, WEIGHTS, "the router is wrong", "rank_output, for the ids and weights in the file"),
    ]
    assert tuple(told) == found.lines
