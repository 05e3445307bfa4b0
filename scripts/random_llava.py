"""What scripts/gpu_parts.py works with: LLaVA of any size with random weights and random records, and a clock."""

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, TrainerCallback

from llaca.config import CONFIGS, Recipe, load_recipe
from llava.backbones import open_backbone
from llava.backbones.llava15 import Llava15
from llava.conversation import IGNORE

ROOT = Path(__file__).parents[1]
TINY = ROOT / "checkpoints" / "tiny-llava"


class Size(NamedTuple):
    """What is run: `tokens` of a record, its picture included; `batch` records a step."""

    base: Path
    recipe: list[str]
    dtype: torch.dtype
    batch: int
    tokens: int
    steps: int
    pictures: int
    layers: int  # of the parts that do not need all


SIZES = {
    "7b": Size(ROOT / "checkpoints/llava-7b-pretrain", ["--recipe", str(CONFIGS / "coin_llava7b.yaml")],
               torch.bfloat16, 16, 700, 7, 16, 4),
    "tiny": Size(TINY, ["--dtype", "float32", "--lora-rank", "16"], torch.float32, 2, 80, 4, 2, 2),
}  # fmt: skip


class Context(NamedTuple):
    """Of one part's process."""

    device: torch.device
    name: str
    size: Size
    work: Path

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def recipe(self, *more: str, method: str = "llaca") -> Recipe:
        """The recipe of this size with `batch` records a step."""
        batch = ["--batch-size", str(self.size.batch), "--global-batch-size", str(self.size.batch)]
        rule = ["--average", "eq45"] if method == "llaca" else []
        line = [*self.size.recipe, "--base", str(self.size.base), *batch, "--method", method, *rule, *more]
        return load_recipe(line)


def random_model(config: LlavaConfig, dtype: torch.dtype, device: torch.device) -> LlavaForConditionalGeneration:
    """The model of a configuration with normally distributed weights, each made where it will be."""
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(config)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=dtype, device=device)
                norm = "norm" in type(module).__name__.lower()
                made = made.fill_(float(name == "weight")) if norm else made.normal_(0, 0.02, generator=generator)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    return model.to(device).train()


def configuration(base: Path, layers: int | None = None) -> LlavaConfig:
    """That of a base, with the shipped base's placeholder, and with fewer layers of the language model if `layers` says
    so."""
    config = LlavaConfig.from_pretrained(base)
    config.image_token_index = LlavaConfig.from_pretrained(TINY).image_token_id
    if layers:
        config.text_config.num_hidden_layers = layers
    return config


class Records(torch.utils.data.Dataset):
    """`count` random records of `tokens` tokens, each with a random picture, eight tokens supervised."""

    def __init__(self, backbone: Llava15, count: int, tokens: int):
        self.backbone, config = backbone, backbone.config
        generator = torch.Generator().manual_seed(1)
        pictures, side = int(backbone.picture_tokens(Path(), [""])[0]), config.vision_config.image_size
        self.items = []
        for _ in range(count):
            ids = torch.randint(3, 259, (tokens,), generator=generator)
            ids[1 : 1 + pictures] = config.image_token_id
            labels = torch.full_like(ids, IGNORE)
            labels[-8:] = ids[-8:]
            pixels = torch.randn(3, side, side, generator=generator)
            self.items.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
        self.modality_lengths = [tokens] * count

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


class Clock(TrainerCallback):
    """Seconds of every step, the device's work included."""

    def __init__(self, context: Context):
        self.context, self.seconds = context, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.context.wait()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.context.wait()
        self.seconds.append(time.perf_counter() - self.start)

    @property
    def typical(self) -> float:
        return statistics.median(self.seconds[2:])  # the first ones warm up


def train(context: Context, model, recipe: Recipe, records: Records, steps: int, folder: Path, **settings):
    """Trains by the recipe's method; returns the method, its MethodCallback and the clock."""
    from llaca.callbacks import MethodCallback
    from llaca.methods import method_of
    from llava.adapters import adapter_state
    from llava.trainer import LlavaTrainer, training_arguments

    arguments = training_arguments(
        folder,
        **{
            "per_device_train_batch_size": recipe.train.batch_size,
            "max_steps": steps,
            "learning_rate": recipe.train.learning_rate,
            "bf16": recipe.model.dtype == "bfloat16",
            "activation_checkpointing": recipe.model.gradient_checkpointing,
            "tf32": context.cuda or None,
            "use_cpu": not context.cuda,
            "disable_tqdm": True,
            "seed": 0,
            **settings,
        },
    )
    start = adapter_state(model) if settings.get("deepspeed") else None
    method, clock = method_of(recipe), Clock(context)
    trainer = LlavaTrainer(model, arguments, records, recipe.train.projector_learning_rate, "local", method)
    trainer.add_callback(clock)
    callback = MethodCallback(method, True, steps, start, "clipped")
    callback.attach(trainer)
    trainer.train()
    return method, callback, clock


def backbone_of(config: LlavaConfig) -> Llava15:
    """That of a `configuration`, with the shipped base's words."""
    tiny, side = open_backbone(TINY), config.vision_config.image_size
    pictures = tiny.processor.image_processor
    pictures.size, pictures.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    return Llava15(config, tiny.processor)


def asked(context: Context, config: LlavaConfig):
    """A backbone for these sizes, four questions, and the paths of as many pictures as there are answers."""
    from PIL import Image

    backbone, side = backbone_of(config), config.vision_config.image_size
    paths = []
    for number in range(4 * context.size.pictures):
        path = context.work / f"{number}.png"
        colour = (37 * (number // 4) % 256, 90, 200)  # four files of one picture
        Image.new("RGB", (side, side - 20), colour).save(path)
        paths.append(path)
    asks = ("What is it?", "Which colour has it?", "How many are there?", "Is it a bird?")
    return backbone, [f"<image>\n{ask}" for ask in asks] * context.size.pictures, paths
