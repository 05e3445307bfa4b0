"""Pre-trains a tiny base model from scratch on the visual world of CoIN-mini (see scripts/pretrain_tiny.sh).

Three phases. First the vision tower alone: every patch is asked for the name, the colour and the box of the thing that
covers it (`PatchProbe`, thrown away at the end). Then the whole model on captions and conversations of
`data.mini.corpus`, with the patch loss as a side loss. At last the same at half the learning rate, with words to repeat
mixed in, so that every token of the vocabulary can be said. Fresh samples at every step.
"""

import argparse
import math
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from data.mini import corpus
from data.mini.world import GRID, SIDE
from llava.conversation import Vocabulary, encode
from scripts.tiny_families import COLOR_ID, FAMILIES, NAMES, TinyLlava, TinyQwen25

CELLS = SIDE // GRID + 1
Family = TinyLlava | TinyQwen25


@dataclass(frozen=True)
class Phase:
    """`batch` samples a process and step; `side` weighs the patch loss; `text_share` of the samples have no picture."""

    lr: float
    vision_lr: float
    batch: int
    side: float
    text_share: float = 0.0
    echo: bool = False


PHASES = {
    "vision": Phase(lr=1e-3, vision_lr=1e-3, batch=32, side=1.0),
    "whole": Phase(lr=1e-3, vision_lr=2e-4, batch=16, side=0.2, text_share=0.2),
    "finish": Phase(lr=5e-4, vision_lr=1e-4, batch=16, side=0.2, text_share=0.3, echo=True),
}


class PatchProbe(nn.Module):
    """Linear read-outs of each patch's feature: name, colour, box corners on the grid, and the number of copies."""

    def __init__(self, width: int):
        super().__init__()
        self.name = nn.Linear(width, len(NAMES))
        self.color = nn.Linear(width, len(COLOR_ID) + 1)
        self.box = nn.Linear(width, 4 * CELLS)

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """features: [patches, width]; targets: [patches, 6] of scripts.tiny_families.patch_targets."""
        logits = [self.name(features), self.color(features), *self.box(features).split(CELLS, -1)]
        losses = [
            nn.functional.cross_entropy(row.float(), targets[:, i], ignore_index=-100) for i, row in enumerate(logits)
        ]
        return losses[0] + losses[1] + 0.5 * sum(losses[2:])


class Batches:
    """Endless random batches of one rank."""

    def __init__(self, family: Family, seed: int):
        self.family, self.rng = family, random.Random(seed)
        self.vocabulary = Vocabulary.of(family.tokenizer, family.template)

    def vision(self, size: int) -> tuple[dict, torch.Tensor]:
        """Pictures, and the targets of their patches."""
        scenes = [corpus.scene(self.rng)[1] for _ in range(size)]
        return self.family.pictures(scenes), self.family.targets(scenes)

    def encode(self, turns: list[corpus.Turn], tokens: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation whose picture takes so many tokens."""
        encoded = encode(self.vocabulary, turns, tokens, 512)
        return encoded.input_ids, encoded.labels

    def conversations(self, size: int, text_share: float, echo: bool) -> tuple[dict, torch.Tensor]:
        """A batch for the whole model, pictures first, and the patch targets of its pictures."""
        texts = round(size * text_share)
        with_picture = [corpus.conversation(self.rng) for _ in range(size - texts)]
        for _, turns in with_picture:
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        rows = [self.encode(turns, self.family.tokens(scene)) for scene, turns in with_picture]
        talk = [corpus.echo if echo and i % 2 else corpus.text_only for i in range(texts)]
        rows += [self.encode(say(self.rng), 0) for say in talk]
        length, pad = max(len(ids) for ids, _ in rows), self.family.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        scenes = [scene for scene, _ in with_picture]
        inputs = {
            "input_ids": ids,
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            **self.family.beside_ids(ids),
            **self.family.pictures(scenes),
        }
        return inputs, self.family.targets(scenes)


class Pretraining(nn.Module):
    """The model and its probe as one module, so that one backward reaches both."""

    def __init__(self, model: PreTrainedModel, family: Family):
        super().__init__()
        self.model, self.family, self.probe = model, family, PatchProbe(family.width)

    def forward(self, inputs: dict, targets: torch.Tensor, side: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(total loss, language loss and patch loss); without text only what sees is trained."""
        captured = []
        tower = self.family.tower(self.model)
        handle = tower.register_forward_hook(lambda _, __, output: captured.append(self.family.features(output)))
        if "input_ids" in inputs:
            language = self.model(**inputs).loss
        else:
            self.family.look(self.model, inputs)
            language = torch.zeros(())
        handle.remove()
        patches = self.probe(captured[0], targets)
        return language + side * patches, torch.stack([language.detach(), patches.detach()])


def run_phase(name: str, module: Pretraining, batches: Batches, args) -> None:
    """Trains one of PHASES with linear warm-up and cosine decay, and saves the model into `args.out`."""
    phase, seeing = PHASES[name], {id(p) for p in module.family.tower(module.model).parameters()}
    for parameter in module.model.parameters():
        if id(parameter) not in seeing:
            parameter.requires_grad_(name != "vision")
    wrapped = DistributedDataParallel(module) if args.world > 1 else module
    groups = [{"params": [], "peak": phase.lr}, {"params": [], "peak": phase.vision_lr}]
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in seeing]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    steps, start, recent = getattr(args, f"{name}_steps"), time.time(), None
    for step in range(1, steps + 1):
        scale = min(1.0, step / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        if name == "vision":
            inputs, targets = batches.vision(phase.batch)
        else:
            inputs, targets = batches.conversations(phase.batch, phase.text_share, phase.echo)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, parts = wrapped(inputs, targets, phase.side)
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
    """Command line; every phase draws from a seed of its own, so --start-from continues as one long run would."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--family", choices=list(FAMILIES), default="llava", help="the model_type of config.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, default=Path("data/instructions.json"))
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--whole-steps", type=int, default=6000)
    parser.add_argument("--finish-steps", type=int, default=3000)
    parser.add_argument("--start-from", type=Path, help="a model after the second phase: only finish it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="for CPUs without AVX512-BF16")
    args = parser.parse_args()
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.world > 1:
        dist.init_process_group("gloo")
    family = FAMILIES[args.family](args.start_from or args.out)
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
    module = Pretraining(model.train(), family)
    for number, name in enumerate(PHASES):
        if name == "finish" or not args.start_from:
            seed = 1_000_003 * (args.seed + 1) + 1_009 * number + args.rank
            run_phase(name, module, Batches(family, seed), args)
    if args.rank == 0:
        model.half().save_pretrained(args.out)
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
