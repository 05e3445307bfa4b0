"""What the methods are compared with: no training, everything at once, parameters for every task, smaller steps."""

from typing import ClassVar

from llaca.methods.base import Method


class ZeroShot(Method):
    """The base model as it is."""

    trains = False


class LoRA(Method):
    """Sequential LoRA: each task starts from the last one's weights, nothing is protected."""


class MultiTask(Method):
    """LoRA on all tasks in one stage, for as many passes over the data as the stream makes."""

    joint = True


class LoraPerTask(Method):
    """A fresh LoRA for every task, and test sets that are told which task they are of: nothing can be forgotten."""

    oracle = True
    changes: ClassVar = {"new_group_start": "fresh"}


class LoraStable(Method):
    """Sequential LoRA by a recipe for stable fine-tuning: small steps, warm-up over a tenth, three times as long.

    That of Mosbach et al. (arXiv 2006.04884); AdamW corrects its bias anyway. Is what is lost lost to bad optimisation?
    """

    changes: ClassVar = {"learning_rate": 2e-5, "projector_learning_rate": 2e-6, "warmup_ratio": 0.1, "epochs": 3.0}


class LoraLowLr(Method):
    """Sequential LoRA at a tenth of the learning rates: is an average more than smaller steps?"""

    changes: ClassVar = {"learning_rate": 2e-5, "projector_learning_rate": 2e-6}
