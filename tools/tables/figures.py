"""Draw the pictures of the documentation: `docs/figures/*.svg`, from the package itself where they show data.

Each is one file for light and dark pages: it holds its own paper, and its colours follow the reader's scheme.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib as mpl

from mxfp4ref import forward
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.diagnosis import ulp_bins
from mxfp4ref.conformance.reports.html_report import environment
from mxfp4ref.conformance.reports.pictures import LEGEND, PAPER, darkened, mismatch_maps
from mxfp4ref.defects import get_defect
from mxfp4ref.goldens import open_goldens
from mxfp4ref.sm90.gemm.order import group_order

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, ACCENT, PALE, WARN, CUT = "#1f2933", "#2563a8", "#dbe7f3", "#c2571a", "#f3c6a8"
DARK = {
    INK: "#e7e8ee", ACCENT: "#7fb2f0", PALE: "#2b3d55", WARN: "#f0995c", CUT: "#7a4420", "#ffffff": "#14161b",
}  # fmt: skip
FAMOUS = {
    "limit_ignored": "parallel/sentinels_on_rank_3_of_4",
    "ep_sentinel_aliases": "parallel/sentinels_on_rank_3_of_4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parents[2] / "docs/figures")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    # No date, no random ids: the same picture is the same file. Text stays text.
    mpl.rcParams.update({"svg.hashsalt": "mxfp4ref", "svg.fonttype": "none", "font.family": "sans-serif"})
    mpl.rcParams.update({"text.color": INK})
    for name, draw in {
        "data_flow": data_flow,
        "group_order": draw_group_order,
        "tensor_core_step": tensor_core_step,
    }.items():
        figure = draw()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None}, facecolor="white")
        (folder / f"{name}.svg").write_text(in_both_schemes(drawn.getvalue()), encoding="utf-8")
        plt.close(figure)
    (folder / "mismatch_maps.svg").write_text(famous_maps(), encoding="utf-8")


def in_both_schemes(svg: str) -> str:
    """A picture with rules that give each of its colours another one on dark pages."""
    used = [(kind, light) for light in DARK for kind in ("fill", "stroke") if f"{kind}: {light}" in svg]
    rules = (f'[style*="{kind}: {light}"] {{ {kind}: {DARK[light]} !important }}' for kind, light in used)
    style = "<style>@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}</style>\n"
    head, defs, rest = svg.partition(" <defs>")
    return head + style + defs + rest


def data_flow() -> Figure:
    """The forward: what is computed, in which type, and where it is rounded."""
    figure, axes = _canvas(8.2, 7.2)
    steps = (
        (
            "GEMM1, a K group of 32 at a time",
            "two tensor-core steps, then acc = fma(t, scale, acc)",
            "float32  [rows, 2I]",
        ),
        ("round", "to nearest even", "bf16  [rows, 2I]  up | gate"),
        ("+ fc1 bias, clamp, SwiGLU", "FTZ; sigmoid from EX2 and RCP", "float32  [rows, I]"),
        ("round", "to nearest even", "bf16  [rows, I]"),
        ("GEMM2, a K group of 32 at a time", "as GEMM1", "float32  [rows, H]"),
        ("round", "to nearest even", "bf16  [rows, H]"),
        ("+ fc2 bias, sum over slots", "acc = fma(weight, y, acc), slots 0 .. k-1", "float32  [M, H]"),
        ("round", "to nearest even", "bf16  [M, H]  output"),
    )
    axes.set(xlim=(0, 10.4), ylim=(-0.75, len(steps) + 0.6))
    top = len(steps)
    axes.text(3.2, top + 0.15, "input bf16 [M, H], gathered by expert", ha="center", color=INK, fontsize=10)
    for i, (title, detail, result) in enumerate(steps):
        y = top - 1 - i
        rounding = title == "round"
        _box(
            axes, 1.0 if not rounding else 2.2, y, 4.4 if not rounding else 2.0, WARN if rounding else ACCENT
        )
        if rounding:
            axes.text(3.2, y + 0.3, f"{title} {detail}", ha="center", va="center", fontsize=8, color=WARN)
        else:
            axes.text(3.2, y + 0.41, title, ha="center", va="center", fontsize=10, weight="bold", color=INK)
            axes.text(3.2, y + 0.17, detail, ha="center", va="center", fontsize=8, color=INK)
        _arrow(axes, (3.2, y + 0.97), (3.2, y + 0.62))
        axes.text(5.7, y + 0.3, result, va="center", fontsize=9, color=INK, family="monospace")
    for y, text in ((top - 1, "E2M1 codes, UE8M0 scales"), (top - 5, "E2M1 codes, UE8M0 scales")):
        axes.text(8.2, y + 0.3, text, va="center", fontsize=8, color=ACCENT)
    axes.text(0.2, -0.5, "orange: the only roundings to bf16", fontsize=9, color=WARN)
    return figure


def draw_group_order() -> Figure:
    """When each K group is taken, for three tile sizes."""
    groups = 32
    figure, rows = plt.subplots(3, 1, figsize=(8.6, 3.9), layout="constrained")
    for axes, tile_k in zip(rows, (128, 256, 512), strict=True):
        order = group_order(groups, tile_k)
        for place, group in enumerate(order):
            moved = place != group
            axes.add_patch(
                Rectangle((place, 0), 1, 1, facecolor=WARN if moved else PALE, edgecolor="white", linewidth=1)
            )
            axes.text(
                place + 0.5, 0.5, str(group), ha="center", va="center", fontsize=8,
                color="white" if moved else INK,
            )  # fmt: skip
        for border in range(0, groups + 1, tile_k // 32):
            axes.plot((border, border), (-0.15, 1.15), color=INK, linewidth=1.5)
        axes.set(xlim=(-0.2, groups + 0.2), ylim=(-0.2, 1.2))
        axes.set_title(f"tile_k = {tile_k}", loc="left", fontsize=9)
        axes.axis("off")
    figure.suptitle("K = 1024: groups in the order in which they are accumulated", fontsize=10)
    return figure


def tensor_core_step() -> Figure:
    """Terms of one step on the grid of the largest exponent; what lies to the right of it is cut off."""
    figure, axes = _canvas(8.6, 3.6)
    terms = (
        ("c", 0, 24, 1),
        ("product 0", -2, 16, -1),
        ("product 1", -14, 16, 1),
        ("product 2", -21, 16, -1),
    )
    axes.set(xlim=(-9.5, 40), ylim=(-2.3, len(terms) + 1.2))
    edge = 26  # bits of weight 2^emax down to 2^(emax - 25)
    for i, (name, exponent, width, sign) in enumerate(terms):
        y = len(terms) - 1 - i
        axes.text(-1, y + 0.35, f"{'+' if sign > 0 else '−'} {name}", ha="right", va="center", fontsize=9)
        for bit in range(width):
            place = bit - exponent - (width == 16)  # a product's significand is in [1, 4)
            cut = place >= edge
            colour = CUT if cut else PALE
            axes.add_patch(Rectangle((place, y), 1, 0.7, facecolor=colour, edgecolor="white"))
            if cut:
                axes.plot((place + 0.15, place + 0.85), (y + 0.15, y + 0.55), color=WARN, linewidth=1)
    axes.plot((edge, edge), (-0.4, len(terms)), color=WARN, linewidth=1.5)
    axes.text(edge + 0.3, len(terms) + 0.3, "cut off, term by term, toward zero", color=WARN, fontsize=9)
    axes.text(0, len(terms) + 0.3, r"$2^{e_{max}}$", fontsize=10)
    axes.text(edge - 0.2, -0.9, r"$2^{e_{max}-25}$", fontsize=10, ha="right")
    axes.text(
        -9.3, -2.1, "What is left adds up exactly; the sum is cut off, not rounded, to float32.", fontsize=9
    )
    return figure


MAPS = """{% from "map.svg.j2" import dark_cells, draw %}
<svg xmlns="http://www.w3.org/2000/svg" width="840" height="{{ height + 76 }}" viewBox="0 0 840 {{ height + 76 }}">
<style>
{% include "map.css.j2" %}
text { font: 12px sans-serif; fill: var(--ink); }
</style>
{{ dark_cells(darkened) }}
<rect width="100%" height="100%" fill="var(--paper)"/>
{% for map, title in maps %}
<text x="{{ 420 * loop.index0 + 46 }}" y="18">{{ title }}</text>
{{ draw(map, title, 'x="%d" y="24" width="400" height="%d"' | format(420 * loop.index0, height) | safe) }}
{% endfor %}
{% for one in legend %}
<g transform="translate({{ 46 + 106 * loop.index0 }} {{ height + 44 }})">
<rect width="16" height="12" fill="var(--u{{ loop.index }})"/><text x="22" y="10">{{ one.label }}</text></g>
{% endfor %}
</svg>
"""


def famous_maps() -> str:
    """Where two famous defects change the output of a golden case, drawn as in the HTML report."""
    goldens = open_goldens()
    maps = []
    for name, case_name in FAMOUS.items():
        call = goldens.load(case_name).call()
        wrong, right = get_defect(name).run(call), forward(call)
        mask = differing(wrong, right)
        maps.append(
            (
                mismatch_maps(ulp_bins(wrong, right, mask), call.token_selected_experts)[0],
                f"{name}: {mask.float().mean():.0%} differ",
            )
        )
    height = int(maps[0][0].top + maps[0][0].height + 34)
    colours = {"legend": LEGEND, "paper": PAPER, "darkened": darkened()}
    return environment().from_string(MAPS).render(maps=maps, height=height, **colours)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), width, 0.6, boxstyle=style, facecolor="white", edgecolor=colour))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1})


if __name__ == "__main__":
    main()
