"""Boxes as texts: `[x1, y1, x2, y2]`."""

import re
from math import isfinite

Box = tuple[float, float, float, float]
NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"  # also 7.8125e-05, as JSON writes small numbers
_BOX = re.compile(r"\s*,\s*".join([f"({NUMBER})"] * 4))


def exact_box(text: str) -> Box | None:
    """Four comma-separated finite numbers and nothing else, in brackets or not; None otherwise."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    found = _BOX.fullmatch(text)
    return finite_box(found.groups()) if found else None


def finite_box(numbers: tuple[str, ...] | list[str]) -> Box | None:
    """The four numbers, unless one is too large for a float."""
    box = tuple(map(float, numbers))
    return box if all(map(isfinite, box)) else None
