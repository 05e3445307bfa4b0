"""Pre-trains a tiny base model from scratch on generated texts and pictures (see scripts/pretrain_tiny.sh).

A family that sees learns from the visual world of CoIN-mini (scripts/tiny_seeing.py), T5 from the dialogues of
Dialog-mini (scripts/tiny_t5.py), in phases, with fresh samples at every step.
"""

import argparse
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scripts import small_seeing, tiny_seeing, tiny_t5
from scripts.small_family import START, SmallLlava
from scripts.tiny_families import FAMILIES

COURSES = {family: tiny_seeing for family in FAMILIES} | {"t5": tiny_t5, "small": small_seeing}
ALL = FAMILIES | {"t5": tiny_t5.TinyT5, "small": SmallLlava}
EVERY = 500  # steps, after which what is trained so far is kept


@dataclass
class Progress:
    """How far a pre-training has come: kept in a file every `EVERY` steps, so that the same command goes on there.

    What every phase leaves as it is (the family's `frozen`) is not kept again.
    """

    file: Path
    told: dict  # what has to be the same when it goes on
    family: object
    phase: int = 0
    step: int = 0

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep module and optimizer, whole or not at all."""
        weights = {k: v for k, v in module.state_dict().items() if not k.startswith(self.family.frozen)}
        state = {"told": self.told, "phase": self.phase, "step": self.step, "weights": weights}
        draft = self.file.with_suffix(".draft")
        torch.save(state | {"optimizer": optimizer.state_dict()}, draft)
        draft.replace(self.file)

    def load(self) -> dict | None:
        """What was kept. Raises ValueError if it was kept by another command."""
        if not self.file.is_file():
            return None
        state = torch.load(self.file, weights_only=True)
        if state["told"] != self.told:
            raise ValueError(
                f"{self.file} was begun with {state['told']}, not with {self.told}: remove it to begin anew"
            )
        self.phase, self.step = state["phase"], state["step"]
        return state


@dataclass
class Pretraining:
    """One process of a pre-training: what it trains, on which batches, by the command line `args`."""

    args: argparse.Namespace
    module: nn.Module
    batches: object
    progress: Progress

    def run_phase(self, name: str, steps: int, optimizer_state: dict | None) -> None:
        """Train a phase of the course with linear warm-up and cosine decay, from the step that `progress` tells.

        Every step draws from a seed of its own, so that a phase that goes on continues as one long run would.
        """
        args, module, progress = self.args, self.module, self.progress
        phase, seeing = COURSES[args.family].PHASES[name], module.begin(name)
        wrapped = DistributedDataParallel(module, forward_sync_buffers=False) if args.world > 1 else module
        optimizer = self.optimizer(phase, seeing)
        if optimizer_state:
            optimizer.load_state_dict(optimizer_state)
        start, first, recent = time.time(), progress.step, None
        for step in range(first + 1, steps + 1):
            scale = min(1.0, step / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            self.batches.rng.seed(f"{args.seed} {name} {step} {args.rank}")
            batch = self.batches.draw(name)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss, parts = wrapped(*batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            recent = parts if recent is None else 0.98 * recent + 0.02 * parts
            progress.step = step
            if args.rank == 0 and step % 100 == 0:
                seconds = time.time() - start
                print(
                    f"{name} {step}/{steps} language {recent[0]:.4f} patches {recent[1]:.4f} "
                    f"{(step - first) * phase.batch * args.world / seconds:.0f} samples/s, "
                    f"{seconds / (step - first) * (steps - step) / 60:.0f} min left",
                    flush=True,
                )
            if args.rank == 0 and (step % EVERY == 0 or step == steps):
                progress.save(module, optimizer)

    def optimizer(self, phase, seeing: set[int]) -> torch.optim.Optimizer:
        """AdamW of what the phase trains; what sees has a rate of its own."""
        groups = [{"params": [], "peak": phase.lr}, {"params": [], "peak": phase.vision_lr}]
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                groups[id(parameter) in seeing]["params"].append(parameter)
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)


def main() -> None:
    """Command line. A call that was broken off goes on when it is typed again; a model that is made stays."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    courses = "; ".join(f"of {family} {', '.join(course.PHASES)}" for family, course in COURSES.items())
    parser.add_argument("--family", choices=list(ALL), default="llava", help="of the base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, default=Path("data/instructions.json"))
    parser.add_argument("--phases", nargs="+", help=f"only these: {courses}")
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
    if (args.out / "model.safetensors").is_file() and not (args.out / "progress.pt").is_file():
        if args.rank == 0:
            print(f"{args.out}: already there; remove it to make it anew")
        return
    try:
        family = ALL[args.family](args.start_from or args.out)
    except FileNotFoundError as error:
        sys.exit(f"scripts.pretrain_tiny: {error}")
    told = {"family": args.family, "seed": args.seed, "phases": names, "steps": steps, "processes": args.world}
    told |= {"start_from": str(args.start_from), "bf16": args.bf16}
    progress = Progress(args.out / "progress.pt", told, family)
    try:
        state = progress.load()
    except ValueError as error:
        sys.exit(f"scripts.pretrain_tiny: {error}")
    if args.rank == 0 and not args.start_from and state is None:
        family.write(args.instructions)
    if args.world > 1:
        dist.barrier()
    family.read()
    model = family.load(args.start_from) if args.start_from else family.model()
    if args.rank == 0:
        if args.start_from:
            unmade = shutil.ignore_patterns("*.safetensors")  # a model in the folder would count as made
            shutil.copytree(args.start_from, args.out, ignore=unmade, dirs_exist_ok=True)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {len(family.tokenizer)} tokens", flush=True)
    course = COURSES[args.family]
    module = course.Pretraining(model.train(), family)
    if state:
        module.load_state_dict(state["weights"], strict=False)
        print(f"goes on in phase {names[progress.phase]} after step {progress.step}", flush=True)
    training = Pretraining(args, module, course.Batches(family), progress)
    for number in range(progress.phase, len(names)):
        training.run_phase(names[number], steps[number], state and state["optimizer"])
        progress.phase, progress.step, state = number + 1, 0, None
    if args.rank == 0:
        family.finished(model).save_pretrained(args.out)
        progress.file.unlink()
        shutil.rmtree(args.out / START, ignore_errors=True)
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
