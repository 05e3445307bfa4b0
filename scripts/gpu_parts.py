"""The parts of scripts/gpu_check.py, each in a process of its own.

Models have random weights, made where they are used; records are random tokens around random pictures.

machine      the GPU, its driver, the versions, what torch says of TF32 and of its attention kernels
step         a training step of LoRA and of LLaCA with gradient checkpointing: time, peak memory, the plan's prediction
step-plain   the same without gradient checkpointing, at the largest batch that the plan gives room
average      the average of a step here against the same on the CPU; its time at the recipe's shapes
engine-NAME  some steps of LLaCA on tiny-llava under one engine, world size 1
agreement    what those engines handed on, against one process
answers      answers a second, four questions about a picture and one about each of as many pictures
nf4          a base quantised by bitsandbytes: how far its logits are off, step time, memory
attention    sdpa and flash attention against eager: logits and time
"""

import gc
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from llaca.beta import VARIANTS
from llaca.config import Recipe
from llaca.ema import DynamicAverage
from llava.backbones.llava15 import Llava15
from scripts.random_llava import (
    ROOT,
    SIZES,
    TINY,
    Context,
    Records,
    asked,
    backbone_of,
    configuration,
    random_model,
    train,
)

ZERO = ROOT / "scripts"
AGREE = 1e-4  # relative, in float32 without TF32
ENGINES = 1e-3  # Adam divides by gradients that are next to nothing here, and by their rounding
PLAN = 0.15
SECANT = 1e-3  # it divides by small differences


class Part(NamedTuple):
    """What a part found, and its checks: name -> (value, limit)."""

    found: dict
    checks: dict[str, tuple[float, float]]


def held(context: Context) -> int:
    """Bytes that this process has held at most: on its GPU since the last reset, without one in memory."""
    if context.cuda:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(context: Context) -> Part:
    """What the machine is and what torch may use of it."""
    from llaca.stream import environment
    from llava.trainer import training_arguments

    facts = {"name": "cpu", "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "driver": None}
    tf32 = {"as_started": torch.backends.cuda.matmul.allow_tf32, "in_training": None}
    if context.cuda:
        about = torch.cuda.get_device_properties(0)
        facts |= {"name": about.name, "memory_bytes": about.total_memory, "capability": [about.major, about.minor]}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=False)
        facts["driver"] = told.stdout.strip() or told.stderr.strip()
        training_arguments(context.work / "tf32", tf32=True)
        tf32["in_training"] = torch.backends.cuda.matmul.allow_tf32
    kernels = {
        name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math")
    }
    quiet = ("command", "started")
    versions = {key: value for key, value in environment().items() if key not in quiet}
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return Part({**facts, "tf32": tf32, "sdpa_kernels": kernels, "versions": versions}, {})


def step(context: Context, *more: str) -> Part:
    """Step times with gradient checkpointing, or as the recipe fields `more` say."""
    from llaca import ranks
    from llava.adapters import attach_lora

    ranks.start()
    size = context.size
    more = more or ("--gradient-checkpointing", "true")
    recipe = context.recipe(*more)
    model = random_model(configuration(size.base), size.dtype, context.device)
    return timed(
        context, attach_lora(model, Llava15, recipe.model.lora_rank, recipe.model.lora_alpha, 0.05), recipe, more
    )


def timed(context: Context, model, recipe: Recipe, more: tuple[str, ...]) -> Part:
    """Step times of LoRA and LLaCA, and LLaCA's memory beside the plan's."""
    from llaca.plan import plan

    size, clocks = context.size, {}
    planned = plan(recipe, 1, size.tokens, context.device.type)["DDP"].total
    records = Records(backbone_of(configuration(size.base)), recipe.train.batch_size * size.steps, size.tokens)
    for method in ("lora", "llaca"):
        gc.collect()
        if context.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        own = context.recipe(*more, method=method)
        # Nothing of LoRA's training may stay alive beside LLaCA's.
        clocks[method] = train(context, model, own, records, size.steps, context.work / method)[2]
    measured, seconds = held(context), {name: clock.typical for name, clock in clocks.items()}
    found = {f"{name}_seconds": value for name, value in seconds.items()}
    found |= {"ratio": seconds["llaca"] / seconds["lora"], "records": recipe.train.batch_size, "tokens": size.tokens,
              "planned_bytes": planned, "measured_bytes": measured}  # fmt: skip
    # On a CPU the libraries are in it.
    return Part(found, {"plan": (abs(planned / measured - 1), PLAN)} if context.cuda else {})


def step_plain(context: Context) -> Part:
    """Step times without gradient checkpointing, where the plan says that they fit."""
    from llaca.plan import plan

    room = 0.85 * (torch.cuda.get_device_properties(0).total_memory if context.cuda else 1e12)
    for batch in (16, 8, 4, 2, 1):
        batch = min(batch, context.size.batch)
        more = ("--batch-size", str(batch), "--global-batch-size", str(batch), "--gradient-checkpointing", "false")
        if plan(context.recipe(*more), 1, context.size.tokens, context.device.type)["DDP"].total < room:
            return step(context, *more)
    return Part({"fits": False}, {})


def average(context: Context) -> Part:
    """The average at the model's shapes: the time of a step, and the GPU's half of the arithmetic against the CPU's."""
    from benchmarks.ema import shapes

    generator = torch.Generator().manual_seed(2)
    sizes = [(128, 4096), (11008, 16), (77,), (1, 3), (512, 513)]
    start = [torch.randn(shape, generator=generator) for shape in sizes]
    moves = [[0.01 * torch.randn(shape, generator=generator) for shape in sizes] for _ in range(6)]
    found, checks = {}, {}
    for rule in VARIANTS:
        results = []
        for device in (torch.device("cpu"), context.device):
            theta = [tensor.to(device, copy=True) for tensor in start]
            star = DynamicAverage([str(n) for n in range(len(sizes))], theta, rule)
            for number, move in enumerate(moves):
                gradients = [100 * (1 + number % 3) * tensor.to(device) for tensor in move]
                torch._foreach_sub_(theta, gradients, alpha=0.01)
                star.step(theta, gradients)
            betas = torch.from_numpy(star.drain_trace().beta)
            results.append((betas, [tensor.cpu() for tensor in star.averages().values()]))
        (betas, averages), (here, mine) = results
        found[rule] = {"beta": float((here - betas).abs().max()), "beta_median": float(betas.median())}
        apart = max(float((a - b).norm() / a.norm()) for a, b in zip(averages, mine, strict=True))
        checks[f"average of {rule}"] = (apart, SECANT if rule == "secant" else AGREE)
    shape = shapes(32) if context.name == "7b" else shapes(1, 8)[:-4]
    theta = [torch.randn(size, device=context.device) for size in shape]
    star = DynamicAverage([str(n) for n in range(len(shape))], theta, "eq45")
    seconds = []
    for _ in range(5):
        context.wait()
        begin = time.perf_counter()
        star.step(theta, theta)
        context.wait()
        seconds.append(time.perf_counter() - begin)
    values = sum(tensor.numel() for tensor in theta)
    return Part({"rules": found, "seconds_a_step": min(seconds[1:]), "tensors": len(shape), "values": values}, checks)


def engine(context: Context, name: str) -> Part:
    """A few steps under one engine with the average on; what it hands on goes into a file."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from llaca import ranks
    from llava.adapters import attach_lora

    zero = "none" if name in ("one", "ddp") else name
    if name != "one":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ["TORCHELASTIC_RUN_ID"] = "gpu_check"  # as under torchrun
    ranks.start(zero)
    found, config = {}, configuration(TINY)
    for dtype in ("float32", "bfloat16") if context.cuda and name != "0" else ("float32",):
        own = context._replace(size=SIZES["tiny"])
        recipe = own.recipe("--dtype", dtype, "--learning-rate", "1e-3", "--gradient-checkpointing", "false")
        torch.manual_seed(0)
        model = attach_lora(random_model(config, getattr(torch, dtype), context.device), Llava15, 16, 32, 0.0)
        records, more = Records(backbone_of(config), 12, own.size.tokens), {"lr_scheduler_type": "constant"}
        more |= {"tf32": False} if context.cuda else {}
        more |= {"deepspeed": str(ZERO / f"zero{zero}.json")} if zero != "none" else {}
        folder = context.work / f"engine-{name}-{dtype}"
        folder.mkdir()
        method, tap, _ = train(own, model, recipe, records, 6, folder, **more)
        handed, report = method.after_task(tap.layout.shards(), folder)
        trained = tap.layout.gather(tap.layout.shards().parameters)
        torch.save({"averages": tap.layout.gather(handed), "weights": trained}, folder / "handed.pt")
        found[dtype] = {"engine": tap.layout.engine} | {
            key: report[key] for key in ("beta_median", "beta_fallback_share")
        }
        unset_hf_deepspeed_config()
    return Part(found, {})


def agreement(context: Context) -> Part:
    """How far apart the engines are in what they hand on."""
    found, checks = {}, {}
    for path in sorted(context.work.glob("engine-*/handed.pt")):
        name, dtype = path.parent.name.removeprefix("engine-").rsplit("-", 1)
        reference = context.work / f"engine-one-{dtype}" / "handed.pt"
        if path == reference:
            continue
        ours, theirs = (torch.load(p, weights_only=True) for p in (path, reference))
        for kind, wanted in theirs.items():
            apart = max(float((ours[kind][key] - t).norm() / t.norm().clamp(min=1e-6)) for key, t in wanted.items())
            found[f"{name} {dtype} {kind}"] = apart
            if dtype == "float32":
                checks[f"{kind} of {name}"] = (apart, ENGINES)
    if not found:
        raise ValueError("no engine has handed on anything to compare")
    return Part(found, checks)


def answers(context: Context) -> Part:
    """Answers a second, by picture and one question at a time."""
    from llava.generate import generate_answers
    from llava.greedy import Decoder

    config = configuration(context.size.base)
    backbone, questions, paths = asked(context, config)
    model = random_model(config, context.size.dtype, context.device).eval()
    shared, found, said = [paths[n - n % 4] for n in range(len(paths))], {}, {}
    for name, images in (("warm", paths[:4]), ("by_picture", shared), ("one_by_one", paths)):
        context.wait()
        start = time.perf_counter()
        said[name] = generate_answers(Decoder(model, backbone, 16), questions[: len(images)], images, 32)
        context.wait()
        found[name] = len(images) / (time.perf_counter() - start)
    same = sum(a == b for a, b in zip(said["by_picture"], said["one_by_one"], strict=True))
    told = {f"{name}_answers_a_second": found[name] for name in ("by_picture", "one_by_one")}
    checks = {} if context.size.dtype == torch.bfloat16 else {"answers that differ": (float(len(paths) - same), 0.0)}
    return Part({**told, "questions": len(paths), "same_answers": same}, checks)


def inputs(context: Context, config) -> dict[str, torch.Tensor]:
    """Two records for a forward pass."""
    items = Records(backbone_of(config), 2, context.size.tokens).items
    return {
        "input_ids": torch.stack([item["input_ids"] for item in items]).to(context.device),
        "pixel_values": torch.stack([item["pixel_values"] for item in items]).to(context.device, context.size.dtype),
    }


def nf4(context: Context) -> Part:
    """Steps on an NF4 base: their time and memory."""
    from llaca import ranks
    from llava.adapters import attach_lora
    from llava.backbones import load_base

    ranks.start()
    size = context.size
    config = configuration(size.base, size.layers)
    processor = backbone_of(config).processor
    text = config.text_config
    text.vocab_size = len(processor.tokenizer)
    if text.hidden_size % 64:  # bitsandbytes takes multiples of 64
        text.hidden_size, text.intermediate_size, text.num_attention_heads, text.head_dim = 128, 256, 4, 32
        text.num_key_value_heads = 4
    folder = context.work / "base"
    plain = random_model(config, size.dtype, context.device).eval()
    plain.save_pretrained(folder)
    processor.save_pretrained(folder)
    given = inputs(context, config)
    with torch.no_grad():
        wanted = plain(**given).logits.float()
        del plain
        model, _ = load_base(folder, size.dtype, "sdpa", "nf4", context.device)
        apart = float((model.eval()(**given).logits.float() - wanted).norm() / wanted.norm())
    del wanted
    more = ("--base", str(folder), "--quantization", "nf4", "--gradient-checkpointing", "true")
    own = context._replace(size=size._replace(base=folder))
    recipe = own.recipe(*more)
    model = attach_lora(model, Llava15, recipe.model.lora_rank, recipe.model.lora_alpha, 0.05)
    part = timed(own, model, recipe, more)
    return Part({**part.found, "layers": size.layers, "logits_off": apart}, {**part.checks, "logits": (apart, 0.5)})


def attention(context: Context) -> Part:
    """Which implementations of attention run, and how far apart their logits are."""
    size = context.size
    config = configuration(size.base, size.layers)
    model = random_model(config, size.dtype, context.device).eval()
    given = inputs(context, config)
    found, logits, checks = {}, {}, {}
    for name in ("eager", "sdpa", "flash_attention_2"):
        try:
            model.set_attn_implementation(name)
            with torch.no_grad():
                model(**given)
                context.wait()
                start = time.perf_counter()
                logits[name] = model(**given).logits.float()
                context.wait()
        except (ImportError, RuntimeError, ValueError, OSError) as error:
            if name != "flash_attention_2":
                raise
            found[name] = {"available": False, "reason": str(error).splitlines()[0][:300]}
            continue
        apart = float((logits[name] - logits["eager"]).norm() / logits["eager"].norm())
        found[name] = {"available": True, "seconds": time.perf_counter() - start, "off_eager": apart}
        checks[f"logits of {name}"] = (apart, AGREE if size.dtype == torch.float32 else 0.05)
    return Part(found, checks)


WORK = {"machine": machine, "step": step, "step-plain": step_plain, "average": average, "agreement": agreement,
        "answers": answers, "nf4": nf4, "attention": attention}  # fmt: skip


def perform(part: str, device: str, size: str, work: Path, log: Path) -> None:
    """Run one part in this process, as a session of its own; `work` gets PART.json, `log` all that is printed."""
    os.setsid()
    with log.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    context = Context(where, size, SIZES[size], work)
    kind, _, name = part.partition("engine-")
    found = engine(context, name) if name else WORK[kind](context)
    checks = [
        {"name": name, "value": value, "limit": limit, "ok": value <= limit}
        for name, (value, limit) in found.checks.items()
    ]
    (work / f"{part}.json").write_text(json.dumps({"found": found.found, "checks": checks}))
