"""What the dynamic average costs at the shapes of LLaVA-7B's LoRA: 452 tensors, 340.8 million values, float32.

    python -m benchmarks.ema [--average eq45] [--repeats 3] [--layers 32]
    python -m benchmarks.ema --step            the overhead of LLaCA over LoRA in the recipe of CoIN-mini, in percent

The first compares, on this machine and with the threads that OMP_NUM_THREADS allows (about 12 GB of memory):

    ours    one step of llaca.ema.DynamicAverage
    naive   a loop over the tensors with deep copies of weight and gradient and the norms brought to the host one by
            one, which is how the released code goes about it
    floor   a pass that does nothing but read and write the bytes that a step has to: theta, theta*, g and what the rule
            keeps of the past read and the latter written for the norms, theta and theta* read and theta* written once
            beta is known
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llaca.beta import settings_of
from llaca.config import load_recipe
from llaca.ema import DynamicAverage, kept_of_the_past
from llaca.launch import prepare_data
from llaca.train import run


def shapes(layers: int, rank: int = 128) -> list[tuple[int, ...]]:
    """LoRA A and B of the seven linears of each layer, and the projector."""
    hidden, inner, vision = 4096, 11008, 1024
    linears = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    lora = [shape for taken, given in linears for shape in ((rank, taken), (given, rank))]
    return lora * layers + [(hidden, vision), (hidden,), (hidden, hidden), (hidden,)]


def naive_step(star: list, theta: list, g: list, past: dict) -> None:
    """The released formula, tensor by tensor."""
    for i, (average, weight, gradient) in enumerate(zip(star, theta, g, strict=True)):
        now, slope = copy.deepcopy(weight), copy.deepcopy(gradient)
        if i in past:
            change = torch.norm(slope - past[i], p=1).item()
            gap = torch.norm(now - average, p=1).item()
            alpha = 2 * (1 + torch.norm(slope, p=1).item()) / (gap * change)
            alpha = alpha if 0 < alpha < 1 else 0.01
            star[i] = average * (1 - alpha) + now * alpha
        past[i] = slope


def seconds(step: Callable[[], None], between: Callable[[], None], repeats: int) -> float:
    """The fastest of `repeats` calls, after one that warms up; `between` them is not timed."""
    step()
    found = []
    for _ in range(repeats):
        between()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return min(found)


def compare(average: str, layers: int, repeats: int) -> dict[str, float]:
    """Seconds a step by name; prints the table."""
    sizes = shapes(layers)
    theta = [torch.randn(shape) for shape in sizes]
    g = [torch.randn(shape) for shape in sizes]
    total = sum(t.numel() for t in theta)
    print(f"{len(sizes)} tensors, {total / 1e6:.1f} million values, {torch.get_num_threads()} threads")
    ours = DynamicAverage([str(i) for i in range(len(sizes))], theta, average)

    def train():
        torch._foreach_add_(theta, 0.01)
        torch._foreach_mul_(g, 0.9)

    train()
    found = {"ours": seconds(lambda: ours.step(theta, g), train, repeats)}
    star = list(ours.averages().values())
    ours = None  # frees its memory of the past
    past: dict[int, torch.Tensor] = {}
    found["naive"] = seconds(lambda: naive_step(star, theta, g, past), train, repeats)
    past.clear()

    kept = len(kept_of_the_past(settings_of(average, {})["variant"]))

    def floor():  # addcmul reads three and writes one, copy reads and writes one
        torch._foreach_addcmul_(star, theta, g, value=1e-9)
        for _ in range(1 + kept):
            torch._foreach_copy_(star, theta)

    found["floor"] = seconds(floor, train, repeats)
    moved = (6 + 2 * kept) * 4 * total
    for name, value in found.items():
        print(f"{name:6s}{value:8.3f} s a step   {value / found['ours']:6.2f} x ours   {moved / value / 1e9:6.1f} GB/s")
    return found


def step_overhead(repeats: int) -> float:
    """Percent by which an average lengthens a step of CoIN-mini's recipe, LLaCA and LoRA in turns; prints it."""
    prepare_data(load_recipe([]))
    times: dict[str, list[float]] = {"lora": [], "llaca": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for method, found in times.items():
                line = ["--method", method, "--tasks", "GQA", "VQAv2", "--max-train-samples", "800", "--epochs", "1"]
                stages = run(load_recipe([*line, "--runs-dir", folder, "--run", f"{method}{turn}"])) / "stages"
                story = json.loads((stages / "02-VQAv2" / "stage.json").read_text())
                found.append(1000 * story["seconds"] / story["steps"])
    lora, llaca = (statistics.median(found) for found in times.values())
    print(f"LoRA {lora:.1f} ms a step, LLaCA {llaca:.1f} ms: {100 * (llaca / lora - 1):+.1f} % (medians of {repeats})")
    return 100 * (llaca / lora - 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--average", default="eq45")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {"overhead": step_overhead(args.repeats)} if args.step else compare(args.average, args.layers, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
