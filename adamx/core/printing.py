"""How a transformation prints: as the call that makes it, with all values."""

from __future__ import annotations

from typing import Any

from adamx.formula.values import value_text

_WIDTH = 88


def constructor_call(tx: Any) -> str:
    """Return the call that makes a concept: on one line if it fits, else one line per argument.

    Example:
        >>> import adamx
        >>> adamx.ema(0.9)
        ema(0.9)
        >>> adamx.adam(1e-3)
        chain(
            rms_scaling(
                chain(ema(0.9), bias_correction(0.9)),
                second_moment=chain(ema_of_squares(0.999), bias_correction(0.999)),
            ),
            scale_by_learning_rate(0.001),
        )
    """
    texts = [(name, value_text(value)) for name, value in tx.arguments()]
    parts = [f"{name}={text}" if name else text for name, text in texts]
    name = type(tx).__name__
    line = f"{name}({', '.join(parts)})"
    if len(line) <= _WIDTH and "\n" not in line:
        return line
    body = "".join(f"    {part},\n" for part in (p.replace("\n", "\n    ") for p in parts))
    return f"{name}(\n{body})"
