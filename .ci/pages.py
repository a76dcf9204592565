"""What the site has besides the files of docs/: README, CHANGELOG, the reference, MathML.

The reference has a page for each folder of adamx/, with each module that defines a public name: its
docstring, which has the formula and the source, and the public names. Which these are is read off
the imports in adamx/__init__.py.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TITLES = {  # of the pages of the reference, in their order; others follow under their folder's name
    "optimizers": "Optimizers",
    "transforms": "Concepts",
    "wrappers": "Around an optimizer",
    "storage": "Storage",
    "": "The step and the state",
    "inspect": "Inspection",
    "interop": "Other libraries",
    "core": "The algebra",
}
HAT = '<mo stretchy="false">&#x002C6;</mo>'


def reference() -> dict[str, str]:
    """Return the pages of the reference: Markdown by path."""
    names: dict[str, dict[str, list[str]]] = {folder: {} for folder in TITLES}
    for node in ast.parse((ROOT / "adamx/__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            if public := [alias.name for alias in node.names if not alias.asname]:
                folder = ".".join(node.module.split(".")[1:-1])
                names.setdefault(folder, {}).setdefault(node.module, []).extend(public)
    pages = {}
    for folder, modules in names.items():
        package = ROOT / "adamx" / folder.replace(".", "/") / "__init__.py"
        opening = (ast.get_docstring(ast.parse(package.read_text())) or "").split("\n\n")[0]
        text = [f"# {TITLES.get(folder, folder)}", opening if folder else "In `adamx` itself."]
        for module, public in modules.items():
            text.append(f"::: {module}\n    options:\n      members: [{', '.join(public)}]")
        pages[f"reference/{folder or 'adamx'}.md"] = "\n\n".join(text) + "\n"
    return pages


def pages() -> dict[str, str]:
    """Return the pages that are no files of docs/: Markdown by path."""
    return {
        "index.md": (ROOT / "README.md").read_text().replace("](docs/", "]("),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        **reference(),
    }


# ------------------------------------------------------------------------ what MkDocs calls


def on_config(config: Any) -> None:
    """Put the pages of the reference where the navigation has its place."""
    for section in config.nav:
        if "Reference" in section:
            section["Reference"] = list(reference())


def on_files(files: Any, config: Any) -> None:
    """Add the pages that are no files of docs/."""
    from mkdocs.structure.files import File  # the tests read the functions above without MkDocs

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    style = Path(__file__).with_name("site.css")
    files.append(File.generated(config, "assets/site.css", abs_src_path=str(style)))


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers draw without a script; keep intervals on one line."""
    from latex2mathml.converter import convert

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match["open"] == "[" else "inline"
        # latex2mathml makes a table of `split`, and one line of `aligned`, which is the same
        tex = html.unescape(match["tex"]).replace("{aligned}", "{split}")
        math = convert(tex, display=display)
        # a hat is an accent, and not the circumflex of ASCII, which sinks into its letter
        math = math.replace("<mo>&#x0005E;</mo></mover>", f"{HAT}</mover>")
        return f'<div class="equation">{math}</div>' if display == "block" else math

    pattern = r'<(div|span) class="arithmatex">\\(?P<open>[\[(])(?P<tex>.*?)\\[\])]</\1>'
    content = re.sub(pattern, mathml, content, flags=re.DOTALL)
    return re.sub(r"(?<=\[)(-?[\d.]+), (?=-?[\d.]+\]</td>)", r"\1,&nbsp;", content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Say which language a page is in."""
    if page.file.src_uri.startswith("zh/"):
        return output.replace('<html lang="en"', '<html lang="zh"')
    return output
