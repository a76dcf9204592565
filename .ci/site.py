"""Read the built site and say what is wrong with it.

    mkdocs build --strict -f .ci/mkdocs.yml -d SITE && python .ci/site.py SITE

The reference says what the docstrings say, sign for sign; links and anchors lead somewhere; nothing
is loaded from elsewhere; the search knows a name; equations have room and hats. How it looks is for
a browser and eyes.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import griffe

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(r"\s*(https?:)?//")
LOADED = {"src", "srcset", "data", "poster", "background", "xlink:href"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """What of one page is looked at."""

    def __init__(self, path: Path) -> None:
        """Read the page."""
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []  # to follow, and to load from this site
        self.foreign: list[str] = []  # loaded from elsewhere
        self.quotations = 0
        self.bare_equations = 0
        self.described: list[str] = []  # the descriptions of the arguments and their like
        self.signed: set[str] = set()  # the names that have a signature
        self.last = ""  # the id of the last name of the reference
        self.words: list[str] = []
        self.open: list[tuple[str, str]] = []
        self.text = path.read_text()
        self.feed(self.text)
        self.text_only = plain("".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag has, and that it is open."""
        values = {name: value or "" for name, value in attrs}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        for name, value in values.items():
            loaded = name in LOADED or (tag == "link" and name == "href")
            if (loaded and ELSEWHERE.match(value)) or (name == "style" and imports(value)):
                self.foreign.append(f"{tag} {name}={value}")
            elif (loaded and name != "srcset") or name == "href":
                self.links.append(value)
        inside = [kind for _, kind in self.open]
        self.quotations += tag == "blockquote"
        self.bare_equations += values.get("display") == "block" and "equation" not in inside
        if values.get("id", "").startswith("adamx."):
            self.last = values["id"]
        if "doc-signature" in values.get("class", ""):
            self.signed.add(self.last)
        if "doc-md-description" in values.get("class", ""):
            self.described.append("")
        if tag not in VOID:
            self.open.append((tag, values.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        """Close the tag, and what was left open in it."""
        while tag in [name for name, _ in self.open]:
            if self.open.pop()[0] == tag:
                break

    def handle_data(self, data: str) -> None:
        """Take the text."""
        if self.open and self.open[-1][0] == "style" and imports(data):
            self.foreign.append(data.strip())
        self.words.append(data)
        if any("doc-md-description" in kind for _, kind in self.open):
            self.described[-1] += data


def imports(css: str) -> list[str]:
    """Return what a style loads from elsewhere."""
    return re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^"')\s]*""", css)


def plain(text: str) -> str:
    """Return the words of Markdown's or HTML's text: without code's marks, emphasis and breaks."""
    text = re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", text.replace("`", "").replace("\xa0", " "))
    text = re.sub(r"(?<![\w*])(\*\*?)([^\s*](?:[^*]*[^\s*])?)\1(?![\w*])", r"\2", text)
    return " ".join(text.split())


def faults_of_docstrings(name: str, page: Page, package: griffe.Module) -> Iterator[str]:
    """Compare a page of the reference with the docstrings in adamx/."""
    if page.quotations:
        yield f"{name}: {page.quotations} block quotations"
    there = collections.Counter(plain(text) for text in page.described)
    seen = 0
    for path in sorted(id for id in page.ids if id.startswith("adamx.")):
        try:
            found = package[path.removeprefix("adamx.")]
        except KeyError:
            continue
        concept = found.is_class and any(base.name == "Transformation" for base in found.mro())
        if (concept or found.is_function) and path not in page.signed:
            yield f"{name}: {path}: no signature"
        docstring = found.docstring
        for section in docstring.parse("google") if docstring else []:
            if section.kind is griffe.DocstringSectionKind.text:
                for block in section.value.split("\n\n"):
                    if not block.startswith("    ") and plain(block) not in page.text_only:
                        yield f"{name}: {path}: not as written: {plain(block)}"
            elif isinstance(section.value, list) and hasattr(section.value[0], "description"):
                for item in section.value:
                    seen += 1
                    text = plain(item.description)
                    there[text] -= 1
                    if there[text] < 0:
                        yield f"{name}: {path}: not as written, or not there: {text}"
    if not seen:
        yield f"{name}: no docstring with arguments was found for it"


def faults(site: Path) -> Iterator[str]:
    """Go through the site."""
    pages = {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob("*.html"))}
    styles = {p.relative_to(site).as_posix(): p.read_text() for p in sorted(site.rglob("*.css"))}
    package = griffe.load("adamx", search_paths=[ROOT], allow_inspection=False)
    assert isinstance(package, griffe.Module)

    def dead(page: str, link: str) -> bool:
        path, anchor = urldefrag(urljoin(f"https://site/{page}", link))
        if not path.startswith("https://site/"):
            return False
        target = unquote(path.removeprefix("https://site/"))
        if not target or target.endswith("/"):
            target += "index.html"
        lost = anchor and target in pages and unquote(anchor) not in pages[target].ids
        return bool(lost) or not (site / target).is_file()

    for name, page in pages.items():
        yield from (f"{name}: loads from elsewhere: {what}" for what in page.foreign)
        # the theme's script would load these two from elsewhere
        if re.search(r'class="mermaid|data-md-component="source"', page.text):
            yield f"{name}: has a diagram or a repository, which the theme loads from elsewhere"
        yield from (f"{name}: dead: {link}" for link in page.links if dead(name, link))
        if page.bare_equations:
            yield f"{name}: {page.bare_equations} equations outside of class=equation"
        if "&#x0005E;</mo></mover>" in page.text:
            yield f"{name}: the circumflex of ASCII as a hat"
        if 'linebreak="newline"' in page.text:
            yield f"{name}: rows of an equation on one line"
        if name.startswith("reference/"):
            yield from faults_of_docstrings(name, page, package)

    for name, text in styles.items():
        yield from (f"{name}: loads from elsewhere: {what}" for what in imports(text))
    style = styles.get("assets/site.css", "")
    for selector, room in (
        (r"\.equation", r"margin: *(\d*\.)?\d*[1-9]"),
        (r"\.equation mtd", r"padding: *(\d*\.)?\d*[1-9]"),  # the rows of an aligned block
    ):
        rule = re.search(rf"^{selector} *{{([^}}]*)}}", style, re.MULTILINE)
        if not (rule and re.search(room, rule[1])):
            yield f"assets/site.css: no room between equations: {selector}"
    if unstyled := [name for name, page in pages.items() if "assets/site.css" not in page.text]:
        yield f"without assets/site.css: {unstyled}"

    index = json.loads((site / "search/search_index.json").read_text())["docs"]
    yield from (f"search: dead: {e['location']}" for e in index if dead("", e["location"]))
    if not any("bias_correction" in entry["title"] for entry in index):
        yield "search: bias_correction is no title"
    said = [e for e in index if e["location"].startswith("reference/")]
    if not any("&gt;= 0" in entry["text"] or ">= 0" in entry["text"] for entry in said):
        yield "search: no >= 0 in the reference"


if __name__ == "__main__":
    found = list(faults(Path(sys.argv[1])))
    print("\n".join(found) or "the site is as it should be")
    sys.exit(bool(found))
