"""The documentation's build: `python -m sphinx -W docs site`."""

import dataclasses
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
smartquotes = False  # -- is two hyphens in a command


def setup(app):
    """Docstrings and help texts are plain text, with code in backticks or indented: nothing else is markup."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(Notebook)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", rows_as_meant, priority=600)  # after it
    app.connect("autodoc-process-signature", readable_signature)
    for event in ("process-description", "process-options", "process-arguments"):
        app.connect(f"sphinx-click-{event}", plain_help)


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
    lines[:] = [re.sub(r"(: [A-Z])\.$", r"\1\\.", line) for line in lines]  # "num_experts: E." is no list
    escape(lines, range(len(lines)) if what != "module" else set(range(len(lines))).difference(code))
    if what == "module":
        for n in reversed(code):
            if n > 1 and not lines[n - 1] and lines[n - 2][:1] not in ("", " "):
                lines[n:n] = ["::", ""]


def rows_as_meant(app, what, name, obj, options, lines):
    """Types are those of the annotations: what napoleon takes for one before a colon belongs to the sentence."""
    for n, line in reversed(list(enumerate(lines))):
        kind, text = next(
            (k, line.removeprefix(k)) for k in (":rtype: ", ":type: ", "") if line.startswith(k)
        )
        if kind:
            del lines[n]
            start = next(
                i for i, earlier in enumerate(lines) if earlier.startswith(":returns: ") or kind == ":type: "
            )
            marker = ":returns: " if kind == ":rtype: " else ""
            lines[start] = f"{marker}{text}: {lines[start].removeprefix(marker)}"
        elif several := re.match(r":(param|ivar) [^:]*, [^:]*:", line):  # several names with one description
            lines[n] = several[0].replace(", ", ",") + line[several.end() :]


def readable_signature(app, what, name, obj, options, signature, return_annotation):
    """Functions that are defaults by their names, and what a field's factory makes."""
    if signature is None:
        return None
    made = iter(
        [
            repr(f.default_factory())
            for f in dataclasses.fields(obj)
            if f.default_factory is not dataclasses.MISSING
        ]
        if dataclasses.is_dataclass(obj)
        else []
    )
    signature = re.sub(r"<function (\w+)[^>]*>", r"\1", signature)
    return re.sub(r"<factory>", lambda match: next(made, "..."), signature), return_annotation


def plain_help(app, context, lines):
    """Lines that help leaves as they are, such as examples, are code."""
    kept = [line.startswith("| ") for line in lines]
    escape(lines, [n for n in range(len(lines)) if not kept[n]])
    for n in reversed(range(len(lines))):
        if kept[n]:
            lines[n] = f"    {lines[n][2:]}"
            if not n or not kept[n - 1]:
                lines[n:n] = ["", "::", ""]


def escape(lines, which):
    for n in which:
        parts = lines[n].split("`")  # every second one is code
        parts[::2] = [re.sub(r"[*|]", r"\\\g<0>", part) for part in parts[::2]]
        lines[n] = "`".join(parts)
