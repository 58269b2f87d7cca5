"""The documentation's build: `python -m sphinx -W docs site`."""

import json
import re

from myst_parser.parsers.sphinx_ import MystParser

from mxfp4ref import __version__ as release

project = "mxfp4ref"
author = copyright = "the mxfp4ref authors"
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"mxfp4ref {release}"
html_copy_source = False
default_role = "code"


def setup(app):
    """Docstrings and help texts are plain text, with code in backticks or indented: nothing else is markup."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(Notebook)
    app.connect("autodoc-process-docstring", plain_docstring)
    for event in ("process-description", "process-options", "process-arguments"):
        app.connect(f"sphinx-click-{event}", lambda app, context, lines: escape(lines, range(len(lines))))


class Notebook(MystParser):
    """A notebook as a page: its text, its code, and what the cells printed."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
            parts += [
                f"```text\n{''.join(output['text']).rstrip()}\n```" for output in cell.get("outputs", ())
            ]
        super().parse("\n\n".join(parts), document)


def plain_docstring(app, what, name, obj, options, lines):
    code = [n for n, line in enumerate(lines) if line.startswith("    ")]
    escape(lines, set(range(len(lines))).difference(code))
    if what == "module":
        for n in reversed(code):
            if n > 1 and not lines[n - 1] and lines[n - 2][:1] not in ("", " "):
                lines[n:n] = ["::", ""]
    for n, line in enumerate(lines):  # several names with one description
        if several := re.match(r":(param|ivar) [^:]*, [^:]*:", line):
            lines[n] = several[0].replace(", ", ",") + line[several.end() :]


def escape(lines, which):
    for n in which:
        parts = lines[n].split("`")  # every second one is code
        parts[::2] = [re.sub(r"[*|]", r"\\\g<0>", part) for part in parts[::2]]
        lines[n] = "`".join(parts)
