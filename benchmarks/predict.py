"""How fast questions are answered, against batches of whole prompts through stock `generate`: the ratio of both, twice.

    python -m benchmarks.predict [--rounds 3] [--pictures 8] [--test-samples 100]

    six questions a picture, one a picture   a random model of LLaVA-1.5's shape, smaller: 576 tokens of a picture of
                                             336 x 336 pixels, answers of at most ten tokens
    CoIN-mini                                checkpoints/tiny-llava with a LoRA trained on a few records, all eight test
                                             sets, one question a picture, vision features cached beforehand

    batches     whole prompts sorted by length, padded on the left, each with its picture; a batch goes on until its
                last answer ends
    by picture  what eval_all.sh does: llava.generate.answer_batches

Both take turns, `--rounds` times; told are the least processor seconds of each, which other work on the machine leaves
alone, and the median of the rounds' ratios. Models are loaded before. Exits with 1 if an answer differs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from data.mini.build import build, is_built
from eval.predict import Answerer
from eval.runs import open_run
from llaca.config import load_recipe
from llaca.train import run
from llava.backbones import open_backbone
from llava.backbones.llava15 import Llava15
from llava.generate import answer_batches, encode_questions
from llava.greedy import Decoder

BATCH = 64
MINI = "checkpoints/tiny-llava"


class Asked(NamedTuple):
    """Questions, ready to be answered."""

    decoder: Decoder
    ids: list[list[int]]
    images: list[Path | None]


@torch.no_grad()
def whole_prompts(asked: Asked) -> list[str]:
    """The answers of stock `generate` to batches of whole prompts."""
    model, backbone, limit = asked.decoder.model, asked.decoder.backbone, asked.decoder.max_new_tokens
    tokenizer = backbone.tokenizer
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=backbone.silent,
    )
    answers = [""] * len(asked.ids)
    order = sorted(range(len(asked.ids)), key=lambda number: len(asked.ids[number]), reverse=True)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        rows, width = [asked.ids[number] for number in chosen], len(asked.ids[chosen[0]])
        batch = {
            "input_ids": torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        }
        paths = [asked.images[number] for number in chosen if asked.images[number]]
        batch |= backbone.stack([backbone.picture(path) for path in paths]) if paths else {}
        output = model.generate(**batch, generation_config=settings)
        for number, text in zip(chosen, tokenizer.batch_decode(output[:, width:], True), strict=True):
            answers[number] = text.strip()
    return answers


def by_picture(asked: Asked) -> list[str]:
    """The answers as eval_all.sh makes them."""
    answers = [""] * len(asked.ids)
    for numbers, texts in answer_batches(*asked, BATCH):
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = text
    return answers


def larger_model(width: int = 512, layers: int = 8) -> tuple[torch.nn.Module, Llava15]:
    """A random model with LLaVA-1.5's 576 tokens a picture. One answer token in seven is the end of text."""
    tiny = open_backbone(MINI)
    tokenizer = tiny.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=width // 64, initializer_range=0.1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width // 4, intermediate_size=width, num_hidden_layers=layers * 3 // 4,
        num_attention_heads=width // 256, image_size=336, patch_size=14, initializer_factor=2.0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tiny.placeholder,
        image_seq_length=576,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    pixels = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = LlavaProcessor(pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1)  # fmt: skip
    return model, Llava15(config, processor)


def larger_questions(folder: Path, pictures: int, each: int) -> Asked:
    """`each` questions about each of so many random photographs of 640 x 480 pixels."""
    model, backbone = larger_model()
    draw, paths = np.random.default_rng(0), []
    for number in range(pictures):
        coarse = Image.fromarray(draw.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        paths.append(folder / f"{each}-{number}.jpg")
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(paths[-1])
    words = ["red", "left", "bird", "house", "tree", "above", "small", "two", "blue", "dog"]
    things = [" ".join(draw.choice(words, draw.integers(2, 8))) for _ in range(pictures * each)]
    manner = "Answer the question using a single word or phrase."
    prompts = [f"<image>\nIs the {thing} in the picture?\n{manner}" for thing in things]
    images = [path for path in paths for _ in range(each)]
    return Asked(Decoder(model, backbone, 10), encode_questions(backbone, prompts, images), images)


def mini_questions(folder: Path, test_samples: int) -> list[Asked]:
    """The first questions of the eight test sets."""
    if not is_built(Path("data/coin_mini")):
        build(Path("data/coin_mini"))
    line = ["--method", "lora", "--tasks", "GQA", "--max-train-samples", "400", "--max-test-samples", str(test_samples)]
    trained = open_run(run(load_recipe([*line, "--runs-dir", str(folder), "--run", "r"])))
    trained.recipe.stream.tasks = load_recipe(["--method", "lora"]).stream.tasks
    answerer = Answerer(trained)
    model = answerer.model(trained, trained.stages[0].name)
    sets = []
    for task in trained.tasks:
        asked = trained.questions[task]
        ids, images = ([of(number) for number in range(len(asked))] for of in (asked.ids, asked.picture))
        sets.append(Asked(Decoder(model, answerer.backbone, trained.answer_limit(task)), ids, images))
    return sets


def compare(name: str, asked: list[Asked], rounds: int) -> bool:
    """Print seconds and ratio; return whether all answers are equal."""
    seconds = {whole_prompts: [], by_picture: []}
    for turn in range(rounds):
        told = {}
        for way in list(seconds)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            told[way] = [way(part) for part in asked]
            seconds[way].append(time.process_time() - start)
    old, new = told.values()
    total = sum(len(part.ids) for part in asked)
    pairs = [(one, other) for left, right in zip(old, new, strict=True) for one, other in zip(left, right, strict=True)]
    equal = sum(one == other for one, other in pairs)
    length = statistics.mean(len(row) for part in asked for row in part.ids)
    kinds = len({one for one, _ in pairs})
    print(f"{name}: {total} questions of {length:.0f} tokens, {kinds} different answers, {equal} equal both ways")
    for label, way in (("batches", whole_prompts), ("by picture", by_picture)):
        least = min(seconds[way])
        print(f"    {label:12s}{least:8.2f} s{total / least:8.1f} answers a second")
    ratios = [slow / fast for slow, fast in zip(seconds[whole_prompts], seconds[by_picture], strict=True)]
    print(f"    ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    return equal == total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=8, help="that six questions are asked about")
    parser.add_argument("--test-samples", type=int, default=100, help="of each of CoIN-mini's test sets")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        same = compare("six questions a picture", [larger_questions(folder, options.pictures, 6)], options.rounds)
        same &= compare("one question a picture", [larger_questions(folder, 3 * options.pictures, 1)], options.rounds)
        same &= compare("CoIN-mini", mini_questions(folder, options.test_samples), options.rounds)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
