"""The package's metadata that depends on where the repository is: URLs, and links in the README.

    ADAMX_REPOSITORY=https://github.com/who/adamx .ci/build

Without that variable, as in `pip install .`, there are no URLs and the links stay as they are.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!\w+:|#)([^)\s]+)\)")


class Metadata(MetadataHookInterface):
    """Fills in what pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`, and `urls` where the repository's address is known."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if home := os.environ.get("ADAMX_REPOSITORY", "").rstrip("/"):
            tree = f"v{metadata['version']}"
            metadata["urls"] = {
                "Repository": home,
                "Documentation": f"{home}/tree/{tree}/docs",
                "Changelog": f"{home}/blob/{tree}/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }

            def absolute(found: re.Match[str]) -> str:
                mark, label, path = found.groups()
                return f"{mark}{label}({home}/{'raw' if mark else 'blob'}/{tree}/{path})"

            text = LINK.sub(absolute, text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
