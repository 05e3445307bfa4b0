"""The ends of the scale: no training at all, training on everything at once, parameters for every task."""

from llaca.methods.base import Method


class ZeroShot(Method):
    """The base model as it is."""

    trains = False


class MultiTask(Method):
    """LoRA on all tasks in one stage, for as many passes over the data as the stream makes."""

    joint = True


class LoraPerTask(Method):
    """A fresh LoRA for every task, and test sets that are told which task they are of: nothing can be forgotten."""

    oracle = True
