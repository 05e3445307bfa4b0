"""The eight CoIN tasks in the paper's training order: how each is asked, read and scored."""

from eval.tasks.base import MODES, Task
from eval.tasks.gqa import GQA
from eval.tasks.grounding import Grounding
from eval.tasks.imagenet import ImageNet
from eval.tasks.ocrvqa import OCRVQA
from eval.tasks.scienceqa import ScienceQA
from eval.tasks.textvqa import TextVQA
from eval.tasks.vizwiz import VizWiz
from eval.tasks.vqav2 import VQAv2

TASKS: dict[str, Task] = {
    "ScienceQA": ScienceQA(),
    "TextVQA": TextVQA(),
    "ImageNet": ImageNet(),
    "GQA": GQA(),
    "VizWiz": VizWiz(),
    "Grounding": Grounding(),
    "VQAv2": VQAv2(),
    "OCR-VQA": OCRVQA(),
}

__all__ = ["MODES", "TASKS", "Task"]
