"""An `Example:` of a docstring is an example: the site's parser knows the plural only."""

from __future__ import annotations

from typing import Any

import griffe


class Plural(griffe.Extension):
    """Write `Examples:` over what stands under `Example:`, while the site is built."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one module, class or function."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
