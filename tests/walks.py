"""A descent for the tests of the average: weights and gradients of every step."""

import torch

from llaca.ema import DynamicAverage

NAMES = ["layers.0.lora_A", "layers.0.lora_B", "projector.bias", "scale"]
SHAPES = [(4, 8), (6, 5), (7,), (1,)]
STEPS = 20


def walk(seed=0, steps=STEPS, dtype=torch.float32, loss_scale=1.0, units=1.0):
    """A noisy descent on a quadratic: theta and gradients, both [steps + 1][n]; gradients[0] is not used."""
    rng = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(s, generator=rng, dtype=torch.float64) for s in SHAPES]

    thetas, gradients, target = [draw()], [[torch.zeros(s) for s in SHAPES]], draw()
    for _ in range(steps):
        noise = draw()
        gradients.append([0.5 * (p - q) + 0.3 * e for p, q, e in zip(thetas[-1], target, noise, strict=True)])
        thetas.append([p - 0.05 * g for p, g in zip(thetas[-1], gradients[-1], strict=True)])
    return (
        [[(p * units).to(dtype) for p in row] for row in thetas],
        [[(g * loss_scale / units).to(dtype) for g in row] for row in gradients],
    )


def run(thetas, gradients, variant, steps=None, names=NAMES, **settings):
    average = DynamicAverage(names, thetas[0], variant, **settings)
    for t in steps or range(1, len(thetas)):
        average.step(thetas[t], gradients[t])
    return average
