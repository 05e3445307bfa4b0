"""The two ends of the scale: no training at all, and training on everything at once."""

from llaca.methods.base import Method


class ZeroShot(Method):
    """The base model as it is."""

    trains = False


class MultiTask(Method):
    """LoRA on all tasks in one stage, for as many passes over the data as the stream makes."""

    joint = True
