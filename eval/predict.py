"""Answers of a run: which stage's parameters answer which test set, and the answer files of all of them.

    runs/<name>/answers[-dev]/<stage whose parameters answered>/<Task>.jsonl      {question_id, prompt, text} a line

A cell of the accuracy matrix is one such file. With grouping many cells share a file: a parameter set that a stage
did not change is not asked again. A file is written whole or not at all; what exists is not computed again.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from data.layout import image_root
from eval.tasks import TASKS
from llaca.config import Recipe
from llaca.grouping import instruction_of
from llaca.methods import METHODS
from llaca.pool import Pool
from llaca.stream import Stage, ordered, stages_of, write_atomically
from llava.dataset import Question, load_questions
from llava.features import cache_features, use_features
from llava.generate import generate_answers
from llava.model import attach_lora, load_adapter, load_base

BASE = "base"  # stands for a stage where the base model itself answers


@dataclass
class Run:
    """A run folder as evaluation sees it: only stages that are DONE."""

    folder: Path
    recipe: Recipe
    stages: list[Stage]
    split: str

    @property
    def complete(self) -> bool:
        """Whether every task of the stream has been trained (or nothing is to be trained)."""
        trained = sum(len(stage.tasks) for stage in self.stages)
        return not METHODS[self.recipe.method.method].trains or trained == len(self.tasks)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tasks(self) -> list[str]:
        """The columns of the matrix: the tasks in training order."""
        return ordered(self.recipe.stream.tasks, self.recipe.stream.order)

    @property
    def answers(self) -> Path:
        return self.folder / ("answers" if self.split == "test" else f"answers-{self.split}")

    def questions(self, task: str) -> list[Question]:
        """The questions of a task that this run answers."""
        stream = self.recipe.stream
        path = TASKS[task].question_file(stream.data_root, stream.instructions, self.split)
        return load_questions(path, image_root(stream.data_root))[: stream.max_test_samples or None]


def open_run(folder: Path, split: str = "test") -> Run:
    """Reads a run folder; of its stages those that are DONE. Raises FileNotFoundError where there is no run."""
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{folder}: no recipe.yaml, so no run; train one with train_continual.sh")
    recipe = Recipe.from_flat(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    method = METHODS[recipe.method.method]
    stages = [stage for stage in stages_of(recipe, method.joint, folder) if stage.done] if method.trains else []
    return Run(folder, recipe, stages, split)


def matrix_rows(run: Run, questions: dict[str, list[Question]]) -> list[tuple[str, dict[str, str]]]:
    """The rows of the accuracy matrix: (stage, {task: stage whose parameters answer it}) of every seen task."""
    if not METHODS[run.recipe.method.method].trains:
        return [(BASE, dict.fromkeys(run.tasks, BASE))]
    rows, seen = [], []
    for stage in run.stages:
        seen += stage.tasks
        pool = Pool.from_json((stage.folder / "codebook.json").read_text(encoding="utf-8"))
        row = {}
        for task in seen:
            wordings = sorted({instruction_of(task, q.text) for q in questions[task]})
            row[task], matched = pool.holder_for(wordings)
            if not matched:
                print(f"{run.name}, {stage.name}: {task} matches no group; the nearest, {row[task]}, answers")
        rows.append((stage.name, row))
    return rows


def missing_cells(run: Run) -> list[tuple[str, str]]:
    """(stage whose parameters answer, task) of the answer files that the matrix needs and that are not there."""
    rows = matrix_rows(run, {task: run.questions(task) for task in run.tasks})
    wanted = dict.fromkeys((holder, task) for _, row in rows for task, holder in row.items())
    return [cell for cell in wanted if not answer_file(run, *cell).is_file()]


def predict(run: Run, batch_size: int = 64) -> list[tuple[str, dict[str, str]]]:
    """Fills the run's answer files and returns `matrix_rows`."""
    questions = {task: run.questions(task) for task in run.tasks}
    rows = matrix_rows(run, questions)
    missing = missing_cells(run)
    if not missing:
        return rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_config = run.recipe.model
    dtype = getattr(torch, model_config.dtype)
    base, processor = load_base(model_config.base, dtype, model_config.attention, model_config.quantization, device)
    features = None
    if model_config.reuse_vision_features:
        paths = [q.image for asked in questions.values() for q in asked if q.image]  # all: the same batches every time
        features = cache_features(base, processor.image_processor, paths)
        use_features(base)
    with tqdm(total=sum(len(questions[task]) for _, task in missing), desc=run.name, unit="answer") as bar:
        for holder in dict.fromkeys(holder for holder, _ in missing):
            model = base if holder == BASE else merged(base, run, holder)
            for task in (task for h, task in missing if h == holder):
                asked = questions[task]
                texts = generate_answers(
                    model,
                    processor,
                    [q.text for q in asked],
                    [q.image for q in asked],
                    run.recipe.stream.max_new_tokens or TASKS[task].max_new_tokens,
                    batch_size,
                    features,
                )
                save_answers(answer_file(run, holder, task), asked, texts)
                bar.update(len(asked))
    return rows


def answer_file(run: Run, holder: str, task: str) -> Path:
    """Where the answers to `task` with the parameters of stage `holder` are."""
    return run.answers / holder / f"{task}.jsonl"


def merged(base: torch.nn.Module, run: Run, holder: str) -> torch.nn.Module:
    """A copy of the base with a stage's LoRA merged into it, unless it is quantized, and its projector in place."""
    config = run.recipe.model
    model = attach_lora(copy.deepcopy(base), config.lora_rank, config.lora_alpha, 0.0)
    load_adapter(model, run.folder / "stages" / holder / "adapter")
    return model.merge_and_unload() if config.quantization == "none" else model


def save_answers(path: Path, questions: list[Question], texts: list[str]) -> None:
    """Writes one answer file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question_id": q.question_id, "prompt": q.record["text"], "text": text}
        for q, text in zip(questions, texts, strict=True)
    ]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
