"""The methods by name. To add one: write its file, name it here, and give it a line in configs/methods/."""

from llaca.methods.average import MovingAverage
from llaca.methods.base import Method
from llaca.methods.reference import MultiTask, ZeroShot

METHODS: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "multi_task": MultiTask,
    "lora": Method,
    "fixed_ema": MovingAverage,
    "llaca": MovingAverage,
}
