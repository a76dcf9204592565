"""The code as the site reads it: docstrings are no Markdown, and concepts are dataclasses."""

from __future__ import annotations

import re
from typing import Any

import griffe


class AsItIs(griffe.Extension):
    """Change what was read of adamx, before Markdown is made of it."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Say of the concepts that they are dataclasses, for the signatures and the defaults."""
        for module in pkg.modules.values():
            if module.is_alias:
                continue
            self.on_package(pkg=module)
            for kind in module.classes.values():
                if not kind.is_alias and any(base.name == "Transformation" for base in kind.mro()):
                    name = griffe.ExprName("dataclasses.dataclass")
                    kind.decorators.append(griffe.Decorator(name, lineno=None, endlineno=None))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one module, class or function."""
        if not obj.docstring:
            return
        # the parser knows the plural only
        obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
        for section in obj.docstring.parsed:  # kept: the templates read the same sections
            if section.kind is griffe.DocstringSectionKind.text:
                section.value = literal(section.value)
            elif section.kind is griffe.DocstringSectionKind.examples:
                section.value = [
                    (kind, literal(text) if kind is griffe.DocstringSectionKind.text else text)
                    for kind, text in section.value
                ]
            else:
                items = section.value if isinstance(section.value, list) else [section.value]
                for item in items:
                    item.description = literal(described(item.description))


def literal(text: str) -> str:
    r"""Escape what makes a quotation or a heading of a line that begins with a sign.

    Code stays as it is: what is indented by four, and what stands between fences.

    Example:
        >>> literal(">= 0, or\n# of steps\n\n    > code")
        '\\>= 0, or\n\\# of steps\n\n    > code'
    """
    lines = text.split("\n")
    fenced = False
    for i, line in enumerate(lines):
        if re.match(r" *(```|~~~)", line):
            fenced = not fenced
        elif not fenced:
            lines[i] = re.sub(r"^( {0,3})(?=[>#])", r"\1\\", line)
    return "\n".join(lines)


def described(text: str) -> str:
    r"""Escape what makes a list of a description that begins with a sign or a number.

    Example:
        >>> described("- 1 or + 1"), described("1. for Adam"), described("-1 or 1.5")
        ('\\- 1 or + 1', '1\\. for Adam', '-1 or 1.5')
    """
    return re.sub(r"^( *)(\d*)(?=[-+*.] )", r"\1\2\\", text)
