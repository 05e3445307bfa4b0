"""How a task's answers are read and scored, by the name under `scoring` in a benchmark's description."""

from pathlib import Path

from data.benchmark import COIN, Benchmark, open_benchmark
from data.references import files_of
from eval.tasks.base import MODES, OpenQuestionTask, Task
from eval.tasks.caption import Caption
from eval.tasks.choice import MultipleChoice
from eval.tasks.exact import ExactText
from eval.tasks.gqa import GQA
from eval.tasks.grounding import Grounding
from eval.tasks.imagenet import ImageNet
from eval.tasks.mllm_dcl import MLLMDCL
from eval.tasks.ocrvqa import OCRVQA
from eval.tasks.rouge import RougeL
from eval.tasks.scienceqa import ScienceQA
from eval.tasks.textvqa import TextVQA
from eval.tasks.vizwiz import VizWiz
from eval.tasks.vqav2 import VQAv2

SCORING: dict[str, type[Task]] = {
    "scienceqa": ScienceQA,
    "textvqa": TextVQA,
    "imagenet": ImageNet,
    "gqa": GQA,
    "vizwiz": VizWiz,
    "grounding": Grounding,
    "vqav2": VQAv2,
    "ocrvqa": OCRVQA,
    # for benchmarks of one's own
    "open": OpenQuestionTask,
    "choice": MultipleChoice,
    "box": Grounding,
    "rouge": RougeL,
    "exact": ExactText,
    "caption": Caption,
    "mllm_dcl": MLLMDCL,
}


def task_of(root: Path | str | Benchmark, name: str) -> Task:
    """A task of the benchmark in `root`, by its name or its folder's. Raises ValueError for an unknown one."""
    return SCORING[files_of(root, name).spec.scoring](open_benchmark(root).task(name))


_COIN = open_benchmark(".", COIN)
TASKS: dict[str, Task] = {name: task_of(_COIN, name) for name in _COIN.tasks}  # CoIN's own

__all__ = ["MODES", "SCORING", "TASKS", "Task", "task_of"]
