"""Runs the cells of docs/tutorial.ipynb and writes what each prints into it; none of it is typed in."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from pathlib import Path
from typing import Any

from mxfp4ref._files import write_file

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, of which only what they print is kept."""
    notebook, namespace = copy.deepcopy(notebook), {"__name__": "tutorial"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        text = printed.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    return notebook


def read() -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return notebook


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    write_file(NOTEBOOK, json.dumps(executed(read()), indent=1, ensure_ascii=False) + "\n")
