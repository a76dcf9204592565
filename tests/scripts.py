"""The scripts of the examples, imported, and the pictures that they draw."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from matplotlib import image

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    """Import an example by its path: the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def is_a_picture(path: Path) -> bool:
    """Say whether the file is an image of some size on which something is drawn."""
    pixels = image.imread(path)
    return min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05
