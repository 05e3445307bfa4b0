"""Pre-trains a tiny base model from scratch on generated texts and pictures (see scripts/pretrain_tiny.sh).

A family that sees learns from the visual world of CoIN-mini (scripts/tiny_seeing.py), T5 from the dialogues of
Dialog-mini (scripts/tiny_t5.py), in phases, with fresh samples at every step.
"""

import argparse
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scripts import tiny_seeing, tiny_t5
from scripts.tiny_families import FAMILIES

COURSES = {family: tiny_seeing for family in FAMILIES} | {"t5": tiny_t5}
ALL = FAMILIES | {"t5": tiny_t5.TinyT5}


def run_phase(name: str, module: nn.Module, batches, steps: int, args) -> None:
    """Trains a phase of the course with linear warm-up and cosine decay, and saves the model into `args.out`."""
    phase, seeing = COURSES[args.family].PHASES[name], module.begin(name)
    wrapped = DistributedDataParallel(module) if args.world > 1 else module
    groups = [{"params": [], "peak": phase.lr}, {"params": [], "peak": phase.vision_lr}]
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in seeing]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    start, recent = time.time(), None
    for step in range(1, steps + 1):
        scale = min(1.0, step / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        batch = batches.draw(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, parts = wrapped(*batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        recent = parts if recent is None else 0.98 * recent + 0.02 * parts
        if args.rank == 0 and step % 100 == 0:
            seconds = time.time() - start
            print(
                f"{name} {step}/{steps} language {recent[0]:.4f} patches {recent[1]:.4f} "
                f"{step * phase.batch * args.world / seconds:.0f} samples/s, "
                f"{seconds / step * (steps - step) / 60:.0f} min left",
                flush=True,
            )
        if args.rank == 0 and (step % 1000 == 0 or step == steps):
            module.model.save_pretrained(args.out)


def main() -> None:
    """Command line; every phase draws from a seed of its own, so later phases alone continue as one long run would."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--family", choices=list(ALL), default="llava", help="the model_type of config.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, default=Path("data/instructions.json"))
    parser.add_argument("--phases", nargs="+", help="only these: vision, whole, finish; of t5 denoise, first")
    parser.add_argument("--steps", type=int, nargs="+", help="of each of the phases")
    parser.add_argument("--start-from", type=Path, help="a model after the phases before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="for CPUs without AVX512-BF16")
    args = parser.parse_args()
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.world > 1:
        dist.init_process_group("gloo")
    phases = COURSES[args.family].PHASES
    names = args.phases or list(phases)
    if unknown := [name for name in names if name not in phases]:
        parser.error(f"{args.family} has no phase {unknown[0]}; it has {', '.join(phases)}")
    usual = getattr(ALL[args.family], "steps", {})
    steps = args.steps or [usual.get(name, phases[name].steps) for name in names]
    if len(steps) != len(names):
        parser.error(f"{len(names)} phases ({', '.join(names)}) take as many --steps")
    family = ALL[args.family](args.start_from or args.out)
    if args.rank == 0 and not args.start_from:
        family.write(args.instructions)
    if args.world > 1:
        dist.barrier()
    family.read()
    model = family.load(args.start_from) if args.start_from else family.model()
    if args.rank == 0:
        if args.start_from:
            shutil.copytree(args.start_from, args.out, dirs_exist_ok=True)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {len(family.tokenizer)} tokens", flush=True)
    course = COURSES[args.family]
    module = course.Pretraining(model.train(), family)
    for name, count in zip(names, steps, strict=True):
        seed = 1_000_003 * (args.seed + 1) + 1_009 * list(phases).index(name) + args.rank
        run_phase(name, module, course.Batches(family, seed), count, args)
    if args.rank == 0:
        model.half().save_pretrained(args.out)
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
