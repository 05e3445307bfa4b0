"""How fast test sets are answered, against one question at a time with the same model, data and settings.

    python -m scripts.bench_predict [--questions 100] [--processes 2]

Trains a LoRA on a few records of CoIN-mini, then answers the first questions of all eight test sets:

    one at a time   batch of one, LoRA beside the weights, every picture through the vision tower: as the released code
    batches         what eval_all.sh does in one process: batches by length, LoRA merged, features of pictures kept
    processes       the same in several processes, each with its share

Model and data are loaded, and in the last two the features computed, before the clock starts. Exits with 1 if an answer
differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.mini.build import build, is_built
from eval.predict import Answerer, Run, open_run
from llaca.config import load_recipe
from llaca.train import run
from llava.generate import answer_batches, encode_questions, generate_answers
from llava.model import attach_lora, load_adapter, load_base

STAGE = "01-GQA"


def one_at_a_time(trained: Run) -> tuple[float, dict[str, list[str]]]:
    """Seconds, and the answers by task."""
    config = trained.recipe.model
    base, processor = load_base(config.base, attn_implementation=config.attention)
    model = attach_lora(base, config.lora_rank, config.lora_alpha, 0.0)
    load_adapter(model, trained.folder / "stages" / STAGE / "adapter")
    start, found = time.perf_counter(), {}
    for task, asked in trained.questions.items():
        texts, images = [q.text for q in asked], [q.image for q in asked]
        found[task] = generate_answers(model, processor, texts, images, trained.recipe.stream.max_new_tokens, 1)
    return time.perf_counter() - start, found


def in_batches(trained: Run, rank: int, world: int) -> tuple[float, dict[str, dict[int, str]]]:
    """Seconds of one process, and the answers of its share by task and number."""
    answerer = Answerer(trained)
    model = answerer.model(trained, STAGE)
    start, found = time.perf_counter(), {}
    for task, asked in trained.questions.items():
        share = range(rank, len(asked), world)
        texts, images = [asked[i].text for i in share], [asked[i].image for i in share]
        ids = encode_questions(answerer.base.config, answerer.processor.tokenizer, texts, images)
        settings = (trained.recipe.stream.max_new_tokens, 64, answerer.features)
        batches = answer_batches(model, answerer.processor, ids, images, *settings)
        found[task] = {share[n]: text for numbers, said in batches for n, text in zip(numbers, said, strict=True)}
    return time.perf_counter() - start, found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=100, help="of every test set")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, rank = options.worker
        print(json.dumps(in_batches(open_run(Path(folder)), int(rank), options.processes)))
        return
    data = Path("data/coin_mini")
    if not is_built(data):
        build(data)
    with tempfile.TemporaryDirectory() as folder:
        line = ["--method", "lora", "--tasks", "GQA", "--max-train-samples", "400", "--runs-dir", folder, "--run", "r"]
        trained = open_run(run(load_recipe([*line, "--max-test-samples", str(options.questions)])))
        trained.recipe.stream.tasks = load_recipe(["--method", "lora"]).stream.tasks
        total = sum(len(asked) for asked in trained.questions.values())
        (slow, single), (fast, batched) = one_at_a_time(trained), in_batches(trained, 0, 1)
        same = all(single[task][n] == text for task, texts in batched.items() for n, text in texts.items())
        recipe = trained.folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("tasks:\n- GQA\n", f"tasks: {json.dumps(trained.tasks)}\n"))
        workers = [
            subprocess.Popen([sys.executable, __file__, "--processes", str(options.processes), "--worker",
                              str(trained.folder), str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(options.processes)
        ]  # fmt: skip
        told = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    several = max(seconds for seconds, _ in told)
    same &= all(single[task][int(n)] == text for _, found in told for task, texts in found.items()
                for n, text in texts.items())  # fmt: skip
    print(f"{total} questions of eight test sets; equal answers: {'all' if same else 'NOT all'}")
    for name, seconds in (("one at a time", slow), ("batches", fast), (f"{options.processes} processes", several)):
        print(f"{name:14s}{seconds:8.1f} s{total / seconds:8.0f} answers/s{slow / seconds:7.1f} x")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
