"""Pre-trains checkpoints/tiny-llava from scratch on the visual world of CoIN-mini (see scripts/pretrain_tiny.sh).

Three phases. First the CLIP vision tower alone: every patch is asked for the name, the colour and the box of the thing
that covers it (`PatchProbe`, thrown away at the end). Then the whole LLaVA on captions and conversations of
`data.mini.corpus`, with the patch loss as a side loss. At last the same at half the learning rate, with words to repeat
mixed in, so that every token of the vocabulary can be said. Fresh samples at every step.
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from data.mini import corpus
from data.mini.tasks import TASKS
from data.mini.world import AUTHORS, COLORS, GENRES, GLYPHS, GRID, SHAPES, SIDE, SIGNS, TITLES, Scene, draw
from llava.backbones.llava15 import PLACEHOLDER, SYSTEM, VICUNA
from llava.conversation import Vocabulary, encode

PATCH, TOKENS = 8, (SIDE // 8) ** 2
NAMES = [
    "",
    *GLYPHS,
    *(f"{c} {s}" for s in SHAPES for c in COLORS),
    *GENRES,
    *(f"{w}!" for w in SIGNS),
    *TITLES,
    *AUTHORS,
]
NAME_ID = {name: i for i, name in enumerate(NAMES)}
COLOR_ID = {color: i + 1 for i, color in enumerate(COLORS)}
CELLS = SIDE // GRID + 1


def train_tokenizer(instructions: Path, samples: int = 20_000) -> LlamaTokenizer:
    """A Llama tokenizer with byte fallback. Every word of the world, of the questions and of the instructions is one
    piece; a number or an option letter is one piece whatever precedes it; the system prompt of the conversation is
    one piece, so that a picture and a question are some 70 tokens."""
    rng, texts = random.Random(0), []
    for _ in range(samples):
        texts += [text for turn in corpus.conversation(rng, 9)[1] + corpus.text_only(rng) for text in turn]
    for task in TASKS.values():
        texts += [text for _ in range(samples // 10) for turn in task(rng).turns for text in turn]
    words = json.loads(instructions.read_text())["instructions"]
    texts += [text for sets in words.values() for lines in sets.values() for text in lines] * 50
    texts = [f"{text}\n{text}" for text in texts] + ["USER: \nUSER: ASSISTANT: "] * 50
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex(r"\d\.\d\d|[.,:;?!()\[\]\n]|\d|▁(?=\d|[A-E]\b)|\b[A-E]\b"), "isolated"),
        ]
    )
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, min_frequency=10, show_progress=False))
    state = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [p for p in sorted(state["vocab"], key=state["vocab"].get) if p not in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=[tuple(m) for m in state["merges"]],
        pad_token="<unk>",
        model_max_length=512,
        padding_side="right",
        add_bos_token=True,
        extra_special_tokens={"image_token": PLACEHOLDER},
    )
    tokenizer.add_tokens([AddedToken(SYSTEM, normalized=False)])
    return tokenizer


def build_processor(tokenizer: LlamaTokenizer) -> LlavaProcessor:
    """Pad to square with the CLIP mean colour, 48 pixels, CLIP normalisation: as LLaVA-1.5, only smaller."""
    images = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_center_crop=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: LlamaTokenizer) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 of about 2.6 M parameters with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model


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
        """features: [n, 36, width]; targets: [n, 36, 6] (name, colour, four corners; -100 where there is none)."""
        logits = [self.name(features), self.color(features), *self.box(features).split(CELLS, -1)]
        losses = [
            nn.functional.cross_entropy(row.float().flatten(0, 1), targets[..., i].flatten(), ignore_index=-100)
            for i, row in enumerate(logits)
        ]
        return losses[0] + losses[1] + 0.5 * sum(losses[2:])


def patch_targets(scene: Scene) -> torch.Tensor:
    """[36, 6]: what covers each patch of the padded square: name, colour and box corners in grid units."""
    dx, dy = (SIDE - scene.size[0]) // 2, (SIDE - scene.size[1]) // 2
    best = [(15, 0, 0, -100, -100, -100, -100)] * TOKENS
    for thing in [] if scene.unclear else scene.things:
        x1, y1, x2, y2 = thing.box[0] + dx, thing.box[1] + dy, thing.box[2] + dx, thing.box[3] + dy
        name = f"{thing.name}!" if thing.kind == "sign" else thing.phrase if thing.kind == "shape" else thing.name
        color = COLOR_ID[thing.color] if thing.color else 0
        corners = [(v + GRID // 2) // GRID for v in (x1, y1, x2, y2)]
        for row in range(y1 // PATCH, math.ceil(y2 / PATCH)):
            for column in range(x1 // PATCH, math.ceil(x2 / PATCH)):
                left, top = column * PATCH, row * PATCH
                overlap = (min(x2, left + PATCH) - max(x1, left)) * (min(y2, top + PATCH) - max(y1, top))
                if overlap > best[row * (SIDE // PATCH) + column][0]:
                    best[row * (SIDE // PATCH) + column] = (overlap, NAME_ID[name], color, *corners)
    return torch.tensor([b[1:] for b in best])


class Batches:
    """Endless random batches of one rank."""

    def __init__(self, processor: LlavaProcessor, seed: int):
        self.processor, self.rng = processor, random.Random(seed)
        self.vocabulary = Vocabulary.of(processor.tokenizer, VICUNA)
        mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
        self.fill = tuple(int(255 * m) for m in mean)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def pixels(self, scenes: list[Scene]) -> torch.Tensor:
        """[n, 3, 48, 48]: what the processor gives (pictures are 48 pixels long already: padding and normalising)."""
        canvas = torch.empty(len(scenes), SIDE, SIDE, 3, dtype=torch.uint8)
        canvas[:] = torch.tensor(self.fill, dtype=torch.uint8)
        for row, scene in zip(canvas, scenes, strict=True):
            width, height = scene.size
            picture = torch.frombuffer(bytearray(draw(scene).tobytes()), dtype=torch.uint8).view(height, width, 3)
            x, y = (SIDE - width) // 2, (SIDE - height) // 2
            row[y : y + height, x : x + width] = picture
        return (canvas.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def vision(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = [corpus.scene(self.rng)[1] for _ in range(size)]
        return self.pixels(scenes), torch.stack([patch_targets(s) for s in scenes])

    def encode(self, turns: list[corpus.Turn]) -> tuple[list[int], list[int]]:
        encoded = encode(self.vocabulary, turns, TOKENS, 512)
        return encoded.input_ids, encoded.labels

    def conversations(self, size: int, text_share: float, echo: bool) -> tuple[dict, torch.Tensor]:
        """A batch for the whole model, pictures first, and the patch targets of its pictures."""
        texts = round(size * text_share)
        with_picture = [corpus.conversation(self.rng) for _ in range(size - texts)]
        for _, turns in with_picture:
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        rows = [self.encode(turns) for _, turns in with_picture]
        talk = [corpus.echo if echo and i % 2 else corpus.text_only for i in range(texts)]
        rows += [self.encode(say(self.rng)) for say in talk]
        length = max(len(ids) for ids, _ in rows)
        inputs = {
            "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "pixel_values": self.pixels([scene for scene, _ in with_picture]),
        }
        return inputs, torch.stack([patch_targets(scene) for scene, _ in with_picture])


class Pretraining(nn.Module):
    """The model and its probe as one module, so that one backward reaches both."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model, self.probe = model, PatchProbe(model.config.vision_config.hidden_size)

    def forward(self, inputs: dict, targets: torch.Tensor, side: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(total loss, language loss); with `side` None only the vision tower is trained."""
        tower = self.model.model.vision_tower
        captured = []
        handle = tower.register_forward_hook(lambda _, __, output: captured.append(output.hidden_states[-1]))
        if "input_ids" in inputs:
            language = self.model(**inputs).loss
        else:
            tower(inputs["pixel_values"], output_hidden_states=True)
            language = torch.zeros(())
        handle.remove()
        patches = self.probe(captured[0][:, 1:], targets)
        return language + side * patches, torch.stack([language.detach(), patches.detach()])


def run_phase(name: str, module: Pretraining, batches: Batches, args) -> None:
    """Trains one of PHASES with linear warm-up and cosine decay, and saves the model into `args.out`."""
    phase = PHASES[name]
    for part in (module.model.model.language_model, module.model.model.multi_modal_projector, module.model.lm_head):
        part.requires_grad_(name != "vision")
    wrapped = DistributedDataParallel(module) if args.world > 1 else module
    groups = [{"params": [], "peak": phase.lr}, {"params": [], "peak": phase.vision_lr}]
    for parameter_name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups["vision_tower" in parameter_name]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    steps, start, recent = getattr(args, f"{name}_steps"), time.time(), None
    for step in range(1, steps + 1):
        scale = min(1.0, step / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        if name == "vision":
            pixels, targets = batches.vision(phase.batch)
            inputs = {"pixel_values": pixels}
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
    parser.add_argument("--out", type=Path, default=Path("checkpoints/tiny-llava"))
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
    if args.start_from:
        processor = LlavaProcessor.from_pretrained(args.start_from, backend="pil")
        model = LlavaForConditionalGeneration.from_pretrained(args.start_from, dtype=torch.float32)
        model.set_attn_implementation("eager")
    else:
        if args.rank == 0:
            build_processor(train_tokenizer(args.instructions)).save_pretrained(args.out)
        if args.world > 1:
            dist.barrier()
        processor = LlavaProcessor.from_pretrained(args.out, backend="pil")
        model = build_model(processor.tokenizer)
    if args.rank == 0:
        processor.save_pretrained(args.out)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {len(processor.tokenizer)} tokens", flush=True)
    model.model.vision_tower.post_layernorm.requires_grad_(False)  # not on the path to the patch features
    module = Pretraining(model.train())
    for number, name in enumerate(PHASES):
        if name == "finish" or not args.start_from:
            seed = 1_000_003 * (args.seed + 1) + 1_009 * number + args.rank
            run_phase(name, module, Batches(processor, seed), args)
    if args.rank == 0:
        model.half().save_pretrained(args.out)
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
