"""Two stages of the 7B recipe on this machine, two optimizer steps each, on randomly initialised weights.

    bash scripts/dryrun_7b.sh [--quantization nf4] [--size 7b] [--work DIR] [--out FILE]

The true sizes all through: 32 layers of width 4096, 336-pixel pictures of 576 tokens, LoRA of rank 128, gradient
checkpointing, LLaCA with Eq. 45, whose average runs in the second stage. It writes a random Vicuna, CLIP and projector
in the original layout (14 GB), assembles them (another 14 GB, then the parts are removed), quantises while loading,
trains on records of CoIN-mini, and prints time and peak memory of each phase beside the plan's prediction.
Memory is what the process allocates (RssAnon); pages of files, which the system takes back at will, are not in it.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from data.mini.build import build, is_built
from llaca.config import CONFIGS, load_recipe
from llaca.plan import GB, plan
from llaca.records import load_stream
from llaca.train import run
from llava.backbones import open_backbone
from llava.backbones.llava15 import padding_processor
from llava.dataset import InstructionDataset
from llava.original.base import read_base, split_base, write_base

ROOT = Path(__file__).parents[1]
PIECES = ROOT / "tests" / "golden" / "llava_original" / "vicuna-tiny"
TASKS = ("TextVQA", "GQA")  # of one group, so that the second stage averages
STEPS = 2


class Memory(threading.Thread):
    """Watches what this process allocates; `phase` closes one and opens the next."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.start_time, self.phases = 0.0, time.time(), {}
        self.start()

    def run(self):
        while True:
            self.peak = max(self.peak, allocated())
            time.sleep(0.05)

    def phase(self, name: str) -> None:
        now = time.time()
        self.phases[name] = {"seconds": now - self.start_time, "peak": self.peak}
        print(f"{name:34s}{now - self.start_time:9.0f} s{self.peak / GB:9.2f} GB at most", flush=True)
        self.peak, self.start_time = 0.0, now


def allocated() -> float:
    """Anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024.0 * int(line.split()[1])
    raise OSError("/proc/self/status tells no RssAnon; this needs Linux")


def write_parts(config: LlavaConfig, folder: Path) -> None:
    """Random weights as published: Vicuna in shards of four layers, CLIP, mm_projector.bin; bfloat16."""
    with torch.device("meta"):
        blank = LlavaForConditionalGeneration(config)
    language, vision, projector = split_base({name: t.bfloat16() for name, t in blank.state_dict().items()})
    for part in ("llm", "vision"):
        (folder / part).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def filled(state):
        return {name: random_like(name, t, generator) for name, t in state.items()}

    shards: dict[str, dict] = {}
    for name, tensor in language.items():
        layer = int(name.split(".")[2]) // 4 if ".layers." in name else -1
        shards.setdefault(f"model-{layer + 1:05d}.safetensors", {})[name] = tensor
    for shard, state in shards.items():
        save_file(filled(state), folder / "llm" / shard)
    save_file(filled(vision), folder / "vision" / "model.safetensors")
    torch.save(filled(projector), folder / "mm_projector.bin")
    text, tower = config.text_config, config.vision_config
    text.vocab_size -= 1
    text.save_pretrained(folder / "llm")
    CLIPVisionConfig.from_dict(tower.to_dict()).save_pretrained(folder / "vision")
    size = tower.image_size
    crop = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    padding_processor(crop).save_pretrained(folder / "vision")
    write_tokenizer(folder / "llm", text.vocab_size)


def random_like(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm's weight, else small and normally distributed."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, 0.02, generator=generator)


def write_tokenizer(folder: Path, size: int) -> None:
    """The tests' small sentencepiece model with pieces that no text has up to `size`."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((PIECES / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), size):
        model.pieces.add(piece=f"\u2581unused{number}", score=-float(number))
    model.trainer_spec.vocab_size = size
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    shutil.copy(PIECES / "tokenizer_config.json", folder)


def longest(recipe, base: Path) -> int:
    """Tokens of the longest record that is trained on, its picture included."""
    backbone, limit = open_backbone(base), recipe.train.max_length
    own = [
        InstructionDataset(records.prepared.columns, backbone, limit, rows=records.rows)
        for records in load_stream(recipe).values()
    ]
    if cut := [problem.text for dataset in own for problem in dataset.dropped]:
        raise SystemExit(f"dryrun_7b: {len(cut)} records are too long, the first: {cut[0]}")
    return max(dataset.length(number) for dataset in own for number in range(len(dataset)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["7b", "13b"], default="7b")
    parser.add_argument("--quantization", choices=["none", "8bit", "nf4", "nf4-double"], default="nf4")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "dryrun")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    base, parts = args.work / f"llava-{args.size}-random", args.work / "parts"
    data = ROOT / "data" / "coin_mini"
    if not is_built(data):
        build(data)
    memory = Memory()
    before = allocated()
    if not (base / "config.json").is_file():
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(parts, ignore_errors=True)
        write_parts(LlavaConfig.from_pretrained(ROOT / "checkpoints" / f"llava-{args.size}-pretrain"), parts)
        memory.phase("write random parts")
        write_base(read_base(parts / "llm", parts / "vision", parts / "mm_projector.bin"), base)
        shutil.rmtree(parts)
        memory.phase("assemble")
    line = ["--recipe", str(CONFIGS / f"coin_llava{args.size}.yaml"), "--method", "llaca", "--base", str(base)]
    line += ["--data-root", str(data), "--tasks", *TASKS, "--max-train-samples", str(STEPS), "--batch-size", "1"]
    line += ["--global-batch-size", "1", "--quantization", args.quantization, "--logging-steps", "1"]
    recipe = load_recipe([*line, "--runs-dir", str(args.work), "--run", f"dryrun-{args.size}-{args.quantization}"])
    shutil.rmtree(args.work / recipe.run.run, ignore_errors=True)
    tokens = longest(recipe, base)
    folder = run(recipe)
    memory.phase("load, quantise, train 2 x 2 steps")
    stages = [json.loads((path / "stage.json").read_text()) for path in sorted((folder / "stages").iterdir())]
    for stage in stages:
        print(f"{stage['stage']}: {stage['steps']} steps in {stage['seconds']:.0f} s, averaged: {stage['averaged']}")
    parts = plan(recipe, 1, tokens, "cpu")["DDP"]
    measured = memory.phases["load, quantise, train 2 x 2 steps"]["peak"] - before
    error = parts.total / measured - 1
    print("plan: " + ", ".join(f"{name} {value / GB:.2f}" for name, value in parts._asdict().items()) + " GB")
    print(
        f"records of at most {tokens} tokens: planned {parts.total / GB:.2f} GB, measured {measured / GB:.2f} GB above "
        f"the {before / GB:.2f} GB of the libraries: {100 * error:+.1f} %"
    )
    if args.out:
        facts = {"tokens": tokens, "planned": parts._asdict() | {"total": parts.total}, "measured": measured,
                 "error": error, "phases": memory.phases, "stages": stages, "threads": torch.get_num_threads(),
                 "cores": os.cpu_count()}  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(abs(error) > 0.15)


if __name__ == "__main__":
    main()
