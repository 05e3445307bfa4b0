"""Grounding: the box of a described region, in fractions of the padded square or in a base model's own coordinates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from data.answers import Region
from data.boxes import NUMBER, Box, exact_box, finite_box
from data.references import BoxFiles
from eval.tasks.base import Task

_LOOSE_BOX = re.compile(r"(?<![\w.])" + r"[\s,;]+".join([f"({NUMBER})"] * 4))
_LONE_NUMBER = re.compile(rf"(?<![\w.]){NUMBER}")
IOU_THRESHOLD = 0.5


class Grounding(BoxFiles, Task):
    """Right if the intersection over union with the reference is greater than 0.5."""

    def official(self, text: str, reference: Region) -> float:
        return overlaps(exact_box(text), exact_box(reference.answer))

    def legacy(self, text: str, reference: Region) -> float:
        if reference.frame != (1.0, 1.0):  # of which the released evaluator knows nothing
            return self.official(text, reference)
        box, right = legacy_box(text), exact_box(reference.answer)
        return overlaps(box and in_pixels(box, reference), in_pixels(right, reference))

    def lenient(self, text: str, reference: Region) -> float:
        return overlaps(loose_box(text), exact_box(reference.answer))

    def has_form(self, text: str, reference: Region) -> bool:
        box = exact_box(text)
        bracketed = text.strip().startswith("[") and text.strip().endswith("]")
        ends = (*reference.frame, *reference.frame)
        return bracketed and box is not None and all(0 <= side <= end for side, end in zip(box, ends, strict=True))

    def can_be_constant(self, answer: str) -> bool:
        return exact_box(answer) is not None

    def best_constant(self, answers: Sequence[str]) -> str:
        """The coordinate-wise median box of the answers that are one (region captions, for example, are none)."""
        boxes = [box for answer in answers if (box := exact_box(answer)) is not None]
        return "[" + ", ".join(f"{median(side):.4f}" for side in zip(*boxes, strict=True)) + "]"


def legacy_box(text: str) -> Box | None:
    """The released evaluator's reading: brackets removed, and then once more the first and last character,
    so that the last digit of y2 is lost."""
    try:
        sides = tuple(float(side) for side in text.replace("[", "").replace("]", "")[1:-1].split(","))
    except ValueError:
        return None
    return sides if len(sides) == 4 else None


def loose_box(text: str) -> Box | None:
    """The first four numbers in a row anywhere in the text, or four lone numbers in it; None otherwise."""
    if found := _LOOSE_BOX.search(text):
        return finite_box(found.groups())
    numbers = _LONE_NUMBER.findall(text)
    return finite_box(numbers) if len(numbers) == 4 else None


def in_pixels(box: Box, reference: Region) -> Box:
    """A box in fractions of the padded square, in pixels of the picture; of other coordinates, some multiple."""
    return tuple(side * reference.side for side in box)


def overlaps(box: Box | None, right: Box) -> float:
    """1.0 if the intersection over union of two boxes (one unit, any) is above 0.5, else 0.0."""
    return float(box is not None and intersection_over_union(box, right) > IOU_THRESHOLD)


def intersection_over_union(a: Box, b: Box) -> float:
    """IoU of two boxes (x1, y1, x2, y2); 0 where the union is not positive (degenerate boxes)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0
