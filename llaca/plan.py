"""What a recipe will take, before it takes it: `python -m llaca.plan --recipe R --gpus N --gpu-memory G`.

    [--tokens T]   length of the longest records, pictures included (default: the recipe's max_length)
    [--json FILE]  the same numbers, in bytes

The model is built on the meta device from the base's config.json, so no weights are needed. For every engine the bytes
of one GPU at the peak of a step:

    base         the frozen weights in their dtype, or quantized
    adapters     what trains; under ZeRO in the engine's dtype
    gradients    of what trains
    buffers      the buckets in which DDP and DeepSpeed reduce gradients, and what ZeRO 3 holds whole at once
    optimizer    AdamW's two moments and, under ZeRO, float32 masters
    average      the moving average and what its rule remembers
    activations  what autograd keeps of one micro-batch: counted by running one layer on the meta device

The last columns are the peak while the base is loaded and what trains is attached, before the engine is prepared:

    loading      of one GPU: the weights that it keeps, a tensor on its way, and what trains, whole and float32
    in host      a process's share of the host then: the shards of an offload, the start of what trains, and the tensors
                 that are being read. Pages of the files are not in it: all processes of a machine share them

Not counted: what the CUDA context and fragmentation take, a GB or so, and what the compared methods hold of their own:
one float32 copy of what trains (two: EWC), in Model Tailor and PGP up to 4 GB of energies between stages, in PGP the
protected directions (up to 28 GB at 7B), in A-GEM the activations of four records without checkpointing.

Answers are given by a process a GPU, each with the base and a copy that has the adapter merged; the last line of the
plan says how many questions of so many tokens fit in beside them.
"""

import argparse
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.benchmark import train_file
from llaca.beta import settings_of
from llaca.config import Recipe, load_recipe
from llaca.ema import BLOCK, kept_of_the_past, kernels_of
from llaca.methods import METHODS, method_of
from llava.adapters import is_connector, trainable_parameters
from llava.backbone import Backbone
from llava.backbones import NF4_BLOCK, blank_model
from llava.greedy import question_bytes

ENGINES = ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 3 offload")
GB = 1e9
# DeepSpeed's defaults, in elements; scripts/zero*.json leave them alone.
REDUCE_BUCKET, PREFETCH_BUCKET, LIVE_PARAMETERS = 5e8, 5e7, 1e9
READERS = 4  # tensors that transformers reads at once


class Bytes(NamedTuple):
    """Of one GPU; `host` is a process's share of what lies in the host's memory."""

    base: float
    adapters: float
    gradients: float
    buffers: float
    optimizer: float
    average: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the GPU."""
        return sum(self[:-1])


class Loading(NamedTuple):
    """Peak bytes of one GPU and of a process in the host's memory until the engine is prepared."""

    gpu: float
    host: float


class Blank(NamedTuple):
    """A recipe's model with what its method trains, on the meta device, and its backbone, which has no processor."""

    model: torch.nn.Module
    backbone: Backbone


def blank_of(recipe: Recipe) -> Blank:
    """Return the model of the base's config.json.

    Raises FileNotFoundError without it, ValueError for what the method cannot follow.
    """
    method = method_of(recipe)
    model, backbone = blank_model(recipe.model.base, getattr(torch, recipe.model.dtype), recipe.model.options)
    with torch.device("meta"):
        return Blank(method.attach(model, backbone, recipe.model), backbone)


def counts(model: torch.nn.Module) -> dict[str, int]:
    """How much trains: tensors, and values in LoRA and connector."""
    trained = trainable_parameters(model)
    connector = sum(p.numel() for name, p in trained.items() if is_connector(name))
    return {"tensors": len(trained), "lora": sum(p.numel() for p in trained.values()) - connector,
            "connector": connector}  # fmt: skip


def base_bytes(blank: Blank, quantization: str) -> float:
    """The frozen weights. bitsandbytes keeps a float32 scale for every row (8bit) or for every 64 values (nf4); double
    quantization makes that scale one byte, with a float32 for 256 of them."""
    scale = {"nf4": 4 / NF4_BLOCK, "nf4-double": (1 + 4 / 256) / NF4_BLOCK}
    total = 0.0
    for name, parameter in blank.model.named_parameters():
        if parameter.requires_grad:
            continue
        linear = re.fullmatch(rf"(?:{blank.backbone.lora_targets})(\.base_layer)?\.weight", name)
        if quantization == "none" or not linear:
            total += parameter.nbytes
        elif quantization == "8bit":
            total += parameter.numel() + 4 * parameter.shape[0]
        else:
            total += parameter.numel() * (0.5 + scale[quantization])
    return total


def activation_bytes(recipe: Recipe, blank: Blank, records: int, tokens: int) -> float:
    """What autograd keeps of a micro-batch at its peak: with gradient checkpointing the inputs of all layers and all of
    one layer, without it all of all layers; and the connector's share."""
    model, backbone = blank
    dtype, weights = getattr(torch, recipe.model.dtype), {p.untyped_storage()._cdata for p in model.parameters()}
    model.train()
    with saved_tensors(weights) as of_layer:
        layers, hidden = backbone.run_layer(model, records, tokens, dtype)
    with saved_tensors(weights) as of_connector:
        backbone.connect(model, records, tokens, dtype)
    square = (tokens, tokens)  # attention weights: sdpa's kernels do not keep them, its fallback on meta does
    keeps_square = recipe.model.attention == "eager"
    layer = sum(t.nbytes for t in of_layer if keeps_square or t.shape[-2:] != square)
    kept = layers * hidden.nbytes + layer if recipe.model.gradient_checkpointing else layers * layer
    return kept + sum(t.nbytes for t in of_connector)


@contextmanager
def saved_tensors(weights: set[int]):
    """Collects the tensors that autograd saves, each storage once, without the weights."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            seen.setdefault(storage, tensor)
        return tensor

    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.extend(seen.values())


def answering_bytes(recipe: Recipe, blank: Blank, tokens: int) -> tuple[float, float]:
    """What a process that answers holds: the models, and what a question of a batch takes, the only one about its
    picture."""
    question = question_bytes(blank.model.config.get_text_config(), getattr(torch, recipe.model.dtype).itemsize, tokens)
    return 2 * base_bytes(blank, recipe.model.quantization), question


def average_bytes(recipe: Recipe, trained: float) -> float:
    """Per value, float32: the average and what the method's rule remembers, or the copies that the method keeps."""
    if (rule := getattr(recipe.settings, "average", None)) is None:
        return 4 * trained * METHODS[recipe.method.method].copies
    return 4 * trained * (1 + len(kept_of_the_past(settings_of(rule, {})["variant"])))


def plan(recipe: Recipe, gpus: int, tokens: int, device: str = "cuda") -> dict[str, Bytes]:
    """Engine -> bytes of one of `gpus` GPUs at the largest micro-batch of the stream, in records of `tokens` tokens.

    `device`: cuda, or cpu, which has no bfloat16 engine and smaller blocks.
    """
    blank = blank_of(recipe)
    trained = sum(p.numel() for p in trainable_parameters(blank.model).values())
    base = base_bytes(blank, recipe.model.quantization)
    records = max(recipe.for_stage((task,), gpus).batch_size for task in recipe.stream.tasks)
    activations = activation_bytes(recipe, blank, records, tokens)
    width = 2 if recipe.model.dtype == "bfloat16" and device == "cuda" else 4  # of what trains, inside DeepSpeed
    share, average = trained / gpus, average_bytes(recipe, trained)
    scratch = 3 * 4 * BLOCK[kernels_of(device)] if average else 0
    whole = average + min(scratch, 12 * trained)
    part = average / gpus + min(scratch, 12 * share)
    live = width * min(LIVE_PARAMETERS, base / width)
    adapters, bucket, buckets = width * trained, width * REDUCE_BUCKET, 4 * trained * (gpus > 1)
    found = {
        "DDP": Bytes(base, 4 * trained, 4 * trained, buckets, 8 * trained, whole, activations),
        "ZeRO 1": Bytes(base, adapters, adapters + 4 * share, 4 * REDUCE_BUCKET, 12 * share, part, activations),
        "ZeRO 2": Bytes(base, adapters, 4 * share, bucket, 12 * share, part, activations),
        "ZeRO 3": Bytes(base / gpus, width * share, (width + 4) * share, bucket + live, 12 * share, part, activations),
    }
    moved = found["ZeRO 3"]
    host = moved.total - moved.buffers - activations
    found["ZeRO 3 offload"] = Bytes(0, 0, 0, moved.buffers, 0, 0, activations, host)
    if recipe.model.quantization != "none":
        return {"DDP": found["DDP"]}
    return found


def loading(recipe: Recipe, gpus: int) -> dict[str, Loading]:
    """Engine -> the peak while the base is loaded on one of `gpus` GPUs (llava/backbones/, llaca/engines/)."""
    blank = blank_of(recipe)
    trained = 4 * sum(p.numel() for p in trainable_parameters(blank.model).values())
    base = base_bytes(blank, recipe.model.quantization)
    largest = max(p.nbytes for p in blank.model.parameters() if not p.requires_grad)
    passing = 2 * largest  # gathered, and joined from the ranks' parts
    if recipe.model.reuse_vision_features:  # whole while it computes the features
        passing = max(passing, sum(p.nbytes for p in blank.backbone.vision(blank.model).parameters()))
    reading = READERS * largest
    whole = Loading(base + trained + (reading if recipe.model.quantization != "none" else 0), trained + reading)
    sharded = base / gpus
    found = dict.fromkeys(ENGINES[:3], whole)
    found["ZeRO 3"] = Loading(sharded + trained + passing, trained)
    found["ZeRO 3 offload"] = Loading(trained + passing, sharded + trained)
    return {"DDP": whole} if recipe.model.quantization != "none" else found


def stages(recipe: Recipe, gpus: int) -> list[dict]:
    """Batches of every task and, where its training file is there, its records and steps."""
    rows = []
    for task in recipe.stream.tasks:
        settings = recipe.for_stage((task,), gpus)
        row = {"task": task, "micro_batch": settings.batch_size, "accumulation": settings.gradient_accumulation}
        row["global_batch"] = settings.batch_size * settings.gradient_accumulation * gpus
        try:
            records = len(
                json.loads(train_file(recipe.stream.data_root, recipe.stream.instructions, task).read_bytes())
            )
            records = min(records, recipe.stream.max_train_samples or records)
            row |= {"records": records, "steps": settings.steps(records, gpus)}
        except FileNotFoundError:
            row |= {"records": None, "steps": None}
        rows.append(row)
    return rows


def show(recipe: Recipe, gpus: int, memory: float, tokens: int) -> dict:
    """Prints the plan and returns it, in bytes."""
    blank = blank_of(recipe)
    size, engines, tasks = counts(blank.model), plan(recipe, gpus, tokens), stages(recipe, gpus)
    starts = loading(recipe, gpus)
    print(
        f"{recipe.model.base} with LoRA of rank {recipe.model.lora_rank}: {size['tensors']} tensors train, "
        f"{size['lora']:,} values in LoRA and {size['connector']:,} in the connector\n"
    )
    print(f"GB on each of {gpus} GPUs, records of {tokens} tokens, micro-batches of at most "
          f"{max(row['micro_batch'] for row in tasks)}")  # fmt: skip
    names = [name for name in Bytes._fields if name != "host"]
    titles = [*names, "total", "host", "loading", "in host", f"in {memory:g} GB"]
    print(f"{'':15s}" + "".join(f"{title:>12s}" for title in titles))
    for engine, parts in engines.items():
        line = [*(getattr(parts, name) for name in [*names, "total", "host"]), *starts[engine]]
        fits = "fits" if max(parts.total, starts[engine].gpu) < memory * GB else "too much"
        print(f"{engine:15s}" + "".join(f"{value / GB:12.2f}" for value in line) + f"{fits:>12s}")
    print(f"\n{'task':12s}{'records':>10s}{'a step':>8s}{'a GPU at once':>15s}{'accumulated':>13s}{'steps':>8s}")
    for row in tasks:
        records, made = ("?" if row[key] is None else f"{row[key]:,}" for key in ("records", "steps"))
        print(f"{row['task']:12s}{records:>10s}{row['global_batch']:8d}{row['micro_batch']:15d}{row['accumulation']:13d}"
              f"{made:>8s}")  # fmt: skip
    if any(row["records"] is None for row in tasks):
        print(f"?: no training file below {recipe.stream.data_root}")
    models, question = answering_bytes(recipe, blank, tokens)
    fit = max(0, int((memory * GB - models) // question))
    print(
        f"\nAnswers: {models / GB:.1f} GB of models, {question / GB:.2f} GB a question of {tokens} tokens: at most "
        f"{fit} at once (eval_all.sh and reproduce.sh choose by the memory that is free, or take --batch-size and "
        "--eval-batch-size)"
    )
    return {"counts": size, "stages": tasks, "answers": {"models": models, "question": question},
            "loading": {name: parts._asdict() for name, parts in starts.items()},
            "engines": {name: parts._asdict() | {"total": parts.total} for name, parts in engines.items()}}  # fmt: skip


def main() -> None:
    """Command line: the flags above, and any field of a recipe."""
    parser = argparse.ArgumentParser(prog="llaca.plan", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU, in GB")
    parser.add_argument("--tokens", type=int, help="of the longest records; default: the recipe's max_length")
    parser.add_argument("--json", type=Path)
    own, rest = parser.parse_known_args()
    try:
        recipe = load_recipe(rest)
        found = show(recipe, own.gpus, own.gpu_memory, own.tokens or recipe.train.max_length)
    except (ValueError, OSError) as error:
        sys.exit(f"llaca.plan: {error}")
    if own.json:
        own.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
