# Optax has no py.typed, so that `pyright --verifytypes adamx` takes all that derives from its types
# for unknown. This says what adamx needs of them; .ci/run puts it beside Optax for that one check.
from collections.abc import Callable
from typing import Any, NamedTuple

class GradientTransformation(NamedTuple):
    init: Callable[[Any], Any]
    update: Callable[..., Any]

class GradientTransformationExtraArgs(GradientTransformation): ...
class MultiSteps: ...

def __getattr__(name: str) -> Any: ...
