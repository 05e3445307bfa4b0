"""Answers of runs: which stage's parameters answer which test set, and the answer files of all of them.

    runs/<name>/answers[-dev]/<stage whose parameters answered>/<Task>.jsonl      {question_id, prompt, text} a line

A cell of the accuracy matrix is one such file. With grouping many cells share a file: a parameter set that a stage
did not change is not asked again. Any number of processes answer, each the questions about its own share of the
pictures:

    python -m torch.distributed.run --nproc-per-node 8 -m eval.predict --run NAME ...       (eval_all.sh does)

Each appends to <Task>.jsonl.part-<rank> after every batch, so that a killed evaluation goes on where it was, with
however many processes. A file is put together, every id in it once, when all parts are there.
"""

import argparse
import copy
import heapq
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import yaml
from tqdm import tqdm

from data.benchmark import open_benchmark
from eval.questions import Questions, run_questions
from eval.tasks import task_of
from llaca import ranks
from llaca.config import Recipe
from llaca.folders import handed_on
from llaca.methods import METHODS
from llaca.pool import Pool
from llaca.sections import StreamConfig
from llaca.stream import Stage, ordered, stages_of, write_atomically
from llava.adapters import load_adapter
from llava.backbones import load_base
from llava.generate import UnreadablePicture, answer_batches
from llava.greedy import Decoder
from llava.states import asked as asked_item
from llava.states import question_states

BASE = "base"  # stands for the base model, before any stage
CELLS = ("final", "diagonal", "triangle", "next", "full")
Row = tuple[str, dict[str, str]]  # (stage, {task: stage whose parameters answer it})


@dataclass
class EvaluatedRun:
    """A run folder as evaluation sees it: only stages that are DONE. `cells` is one of CELLS:

    final: the last row; diagonal: that and each task right after its own stage; triangle: every stage and the tasks
    trained so far; next: that and the task whose turn is next; full: every stage and every task, and the base model.
    `scoring` is one of eval.tasks.MODES.
    """

    folder: Path
    recipe: Recipe
    stages: list[Stage]
    split: str
    cells: str = "triangle"
    scoring: str = "official"

    @property
    def trains(self) -> bool:
        return METHODS[self.recipe.method.method].trains

    @property
    def complete(self) -> bool:
        """Whether every task of the stream has been trained (or nothing is to be trained)."""
        return not self.trains or sum(len(stage.tasks) for stage in self.stages) == len(self.tasks)

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

    @property
    def questions(self) -> Mapping[str, Questions]:
        """The questions of every task that this run answers, shared with the other runs that ask them."""
        return run_questions(self.recipe, self.split)

    def instructions(self, task: str) -> list[str]:
        """What chooses the parameters that answer a test set."""
        return self.questions[task].wordings(self.recipe.method.grouping)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the accuracy matrix as far as `cells` asks for them; with `full`, BASE's first."""
        if not self.trains:
            return [(BASE, dict.fromkeys(self.tasks, BASE))]
        rows, seen = [], []
        instructions = {task: self.instructions(task) for task in self.tasks}
        for stage in self.stages:
            seen += stage.tasks
            pool = Pool.from_json((stage.folder / "codebook.json").read_text(encoding="utf-8"))
            row, last = {}, stage is self.stages[-1]
            ahead = {"full": len(self.tasks), "next": len(seen) + 1}.get(self.cells, len(seen))
            for task in self.tasks[:ahead]:
                if self.cells in ("final", "diagonal") and not last and task not in stage.tasks:
                    continue
                if self.cells == "final" and not last:
                    continue
                if METHODS[self.recipe.method.method].route:
                    row[task] = stage.name
                    continue
                row[task], matched = pool.holder_for(instructions[task], task)
                if not matched and task in seen and ranks.first():
                    print(f"{self.name}, {stage.name}: {task} matches no group; the nearest, {row[task]}, answers")
            rows.append((stage.name, row))
        return [(BASE, dict.fromkeys(self.tasks, BASE)), *rows] if self.cells == "full" else rows

    def answer_limit(self, task: str) -> int:
        """Tokens of an answer at most: as many as the benchmark says, fewer where the recipe does."""
        stream = self.recipe.stream
        own = task_of(stream.data_root, task).spec.max_new_tokens
        return min(own, stream.max_new_tokens or own)

    def answer_file(self, holder: str, task: str) -> Path:
        """Where the answers to `task` with the parameters of stage `holder` are."""
        return self.answers / holder / f"{task}.jsonl"

    def missing(self) -> list[tuple[str, str]]:
        """(stage whose parameters answer, task) of the answer files that the rows need and that are not there."""
        wanted = dict.fromkeys((holder, task) for _, row in self.rows for task, holder in row.items())
        return [cell for cell in wanted if not self.answer_file(*cell).is_file()]


@lru_cache(maxsize=32)
def _share(asked: Questions, rank: int, world: int) -> list[int]:
    return share_of(asked.shown, rank, world)


def open_run(folder: Path, split: str = "test", cells: str = "triangle") -> EvaluatedRun:
    """Reads a run folder; of its stages those that are DONE. Raises FileNotFoundError where there is no run."""
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{folder}: no recipe.yaml, so no run; train one with train_continual.sh")
    recipe = Recipe.from_flat(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    method = METHODS[recipe.method.method]
    stages = [stage for stage in stages_of(recipe, method.joint, folder) if stage.done] if method.trains else []
    return EvaluatedRun(folder, recipe, stages, split, cells)


@dataclass
class RetainedRun(EvaluatedRun):
    """A run as it answers another benchmark's test sets, which no stage trains: the base and every stage, each of them
    by the parameters that the first INSTRUCTIONS of their instructions choose."""

    INSTRUCTIONS: ClassVar[int] = 20

    @property
    def answers(self) -> Path:
        return self.folder / "answers-retained"

    def instructions(self, task: str) -> list[str]:
        return super().instructions(task)[: self.INSTRUCTIONS]


def retained(run: EvaluatedRun, root: str | None = None) -> RetainedRun | None:
    """The run on the benchmark `root`, without it on what its recipe calls `retained`; None where there is none, or
    nothing is trained. Raises FileNotFoundError if that is no folder."""
    root = root or run.recipe.run.retained
    if not root or not run.trains:
        return None
    if not Path(root).is_dir():
        raise FileNotFoundError(f"retained: {root} is no folder: make it, or name another with --retained")
    stream = StreamConfig(data_root=root, tasks=list(open_benchmark(root).tasks))
    return RetainedRun(run.folder, replace(run.recipe, stream=stream), run.stages, "test", "full")


class Answerer:
    """The base model, the features of the test pictures and the tokens of the questions, for runs that share them."""

    def __init__(self, run: EvaluatedRun):
        config = run.recipe.model
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, config.dtype)
        self.key = self.key_of(run)
        self.base, self.backbone = load_base(
            config.base, dtype, config.attention, config.quantization, device, config.options
        )
        if config.reuse_vision_features:
            lists = [asked.pictures for asked in run.questions.values()]
            self.backbone.use_features(self.base, self.backbone.vision_features(self.base, lists))

    @staticmethod
    def key_of(run: EvaluatedRun) -> str:
        """Runs with the same key can share an Answerer."""
        return json.dumps([asdict(run.recipe.model), asdict(run.recipe.stream), run.split])

    def model(self, run: EvaluatedRun, holder: str) -> torch.nn.Module:
        """The base, or a copy of it with a stage's adapter, merged where that can be done."""
        if holder == BASE:
            return self.base
        config = run.recipe.model
        method = METHODS[run.recipe.method.method](run.recipe.settings)
        model = method.attach(copy.deepcopy(self.base), self.backbone, replace(config, lora_dropout=0.0))
        load_adapter(model, run.folder / "stages" / holder / "adapter")
        return model.merge_and_unload() if method.mergeable and config.quantization == "none" else model

    def item(self, asked: Questions, number: int) -> dict[str, torch.Tensor]:
        """A question as `question_states` takes it. Raises OSError naming file and record of a picture that cannot be
        opened."""
        path = asked.picture(number)
        try:
            picture = None if path is None else self.backbone.picture(path)
        except OSError as error:
            raise OSError(f"{asked.name(number)}: {error}") from error
        return asked_item(self.backbone, asked.ids(number), picture)

    def routed(self, run: EvaluatedRun, holder: str, task: str, todo: list[int]) -> dict[str, list[int]]:
        """Whose parameters answer these questions: stage -> their numbers. `holder`, unless the method routes them
        among its stages up to that one."""
        if not METHODS[run.recipe.method.method].route or holder == BASE:
            return {holder: todo}
        asked = run.questions[task]
        names = self.routes(run, holder, (self.item(asked, number) for number in todo))
        chosen = defaultdict(list)
        for number, name in zip(todo, names, strict=True):
            chosen[name].append(number)
        return dict(chosen)

    def routes(self, run: EvaluatedRun, holder: str, items: Iterable[dict[str, torch.Tensor]]) -> list[str]:
        """The stage, of those up to `holder`, whose parameters answer each question, by a method that routes."""
        method = METHODS[run.recipe.method.method](run.recipe.settings)
        names = [stage.name for stage in run.stages]
        names = names[: names.index(holder) + 1]
        memories = [handed_on(method, run.folder / "stages" / name) for name in names]
        states = question_states(self.base.eval(), self.backbone, items)
        return [names[place] for place in method.route(states, memories)]


def answer_share(runs: Sequence[EvaluatedRun], rank: int, world: int, batch_size: int | None = None) -> None:
    """Answers what is missing of one of `world` shares, into parts of the answer files. A share is the questions about
    some of the pictures.

    `batch_size` as in `llava.generate.answer_batches`. Raises OSError naming file and record of a picture that cannot
    be opened, when the other answers of its batch are written.
    """
    runs = sorted(runs, key=Answerer.key_of)  # those that share questions and a base, one after the other
    total = sum(len(_todo(run, *cell, rank, world)) for run in runs for cell in run.missing())
    answerer, model, loaded = None, None, None
    name = f"answers (process 1 of {world})" if world > 1 else "answers"
    with tqdm(total=total, desc=name, unit="answer", disable=rank > 0) as bar:
        for run in runs:
            for holder, task in sorted(run.missing(), key=lambda cell: cell[0]):
                todo = _todo(run, holder, task, rank, world)
                if not todo:
                    continue
                if answerer is None or answerer.key != Answerer.key_of(run):
                    answerer, model, loaded = None, None, None  # what is not needed goes before what is needed comes
                    answerer = Answerer(run)
                limit = run.answer_limit(task)
                part = run.answer_file(holder, task).with_name(f"{task}.jsonl.part-{rank}")
                for stage, numbers in answerer.routed(run, holder, task, todo).items():
                    if loaded != (run.name, stage):
                        model = None  # at most the base and one copy
                        model, loaded = answerer.model(run, stage), (run.name, stage)
                    for answered in _append(
                        part, run.questions[task], numbers, Decoder(model, answerer.backbone, limit), batch_size
                    ):
                        bar.update(answered)


def _todo(run: EvaluatedRun, holder: str, task: str, rank: int, world: int) -> list[int]:
    """The numbers of the questions in a share that have no answer in any part."""
    asked = run.questions[task]
    done = {str(row["question_id"]) for _, rows in _parts(run.answer_file(holder, task)) for row in rows}
    own = _share(asked, rank, world)
    return [number for number in own if str(asked.question_id(number)) not in done]


def share_of(images: Sequence[Hashable | None], rank: int, world: int) -> list[int]:
    """The numbers of the questions that one of `world` processes answers, of questions about these pictures.

    Questions about a picture stay together; those with most go, one after the other, to whoever has fewest questions.
    """
    groups = defaultdict(list)
    for number, image in enumerate(images):
        groups[number if image is None else image].append(number)
    loads, own = [(0, process) for process in range(world)], []
    for group in sorted(groups.values(), key=len, reverse=True):
        load, process = loads[0]
        heapq.heapreplace(loads, (load + len(group), process))
        if process == rank:
            own += group
    return sorted(own)


def _append(
    part: Path, asked: Questions, todo: Sequence[int], decoder: Decoder, batch_size: int | None
) -> Iterator[int]:
    """Answer the questions of these numbers and append their lines to a part; yield how many more are answered. Raises
    OSError as `answer_share` does."""
    ids, pictures = [asked.ids(number) for number in todo], [asked.picture(number) for number in todo]
    part.parent.mkdir(parents=True, exist_ok=True)
    _cut_to_whole_lines(part)
    with part.open("a", encoding="utf-8") as out:
        try:
            for numbers, texts in answer_batches(decoder, ids, pictures, batch_size):
                out.writelines(_line(asked, todo[n], text) for n, text in zip(numbers, texts, strict=True))
                out.flush()
                yield len(numbers)
        except UnreadablePicture as error:
            raise OSError(f"{asked.name(todo[error.number])}: {error}; what is answered is kept") from error


def _line(asked: Questions, number: int, text: str) -> str:
    row = {"question_id": asked.question_id(number), "prompt": asked.text(number), "text": text}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parts(file: Path) -> Iterator[tuple[Path, list[dict]]]:
    """The rows of every part of an answer file; the unfinished last line of a killed process is none."""
    for part in sorted(file.parent.glob(f"{file.name}.part-*")):
        content = part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        yield part, [json.loads(line) for line in whole.split(b"\n")[:-1]]


def _cut_to_whole_lines(part: Path) -> None:
    if part.is_file():
        content = part.read_bytes()
        os.truncate(part, content.rfind(b"\n") + 1)


def merge_parts(runs: Sequence[EvaluatedRun]) -> None:
    """Puts the missing answer files together, in the order of the questions.

    Raises ValueError if a question has no answer in the parts, or two: nothing is written or removed then.
    """
    for run in runs:
        for holder, task in run.missing():
            file, asked = run.answer_file(holder, task), run.questions[task]
            parts = dict(_parts(file))
            rows = {str(row["question_id"]): row for rows in parts.values() for row in rows}
            counts = Counter(str(row["question_id"]) for rows in parts.values() for row in rows)
            doubled = [key for key, count in counts.items() if count > 1]
            ids = [str(asked.question_id(i)) for i in range(len(asked))]
            absent, strange = [key for key in ids if key not in rows], sorted(rows.keys() - set(ids))
            if doubled or absent or strange:
                raise ValueError(
                    f"{file}: of {len(ids)} questions {len(absent)} have no answer ({', '.join(absent[:3])}), "
                    f"{len(doubled)} have two ({', '.join(doubled[:3])}), {len(strange)} are unknown "
                    f"({', '.join(strange[:3])}); evaluate again, or remove {file.name}.part-*"
                )
            ordered_rows = (json.dumps(rows[key], ensure_ascii=False) + "\n" for key in ids)
            write_atomically(file, "".join(ordered_rows))
            for part in parts:
                part.unlink()


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what is answered."""
    parser.add_argument("--run", nargs="+", default=[], help="names of runs; without: every folder with a recipe")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument("--cells", choices=CELLS, default="triangle", help="of the accuracy matrix")
    batch = "questions answered at once by one process; default: what the GPU's free memory holds, without a GPU 64"
    parser.add_argument("--batch-size", type=int, help=batch)
    parser.add_argument(
        "--retained", metavar="DIR", help="measure what stays of the base on this benchmark; default: the recipe's"
    )


def chosen_runs(options: argparse.Namespace) -> list[EvaluatedRun]:
    """The runs that the flags name. Raises FileNotFoundError if there is none."""
    names = options.run or sorted(p.parent.name for p in options.runs_dir.glob("*/recipe.yaml"))
    if not names:
        raise FileNotFoundError(f"{options.runs_dir}: no runs; train one with: bash train_continual.sh")
    return [open_run(options.runs_dir / name, options.split, options.cells) for name in names]


def main() -> None:
    """Command line of one process of several: answers its share; the first puts the files together."""
    parser = argparse.ArgumentParser(prog="python -m eval.predict", description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--only-retained", action="store_true", help="that alone")
    options = parser.parse_args()
    ranks.start(patience=timedelta(days=2))  # who is done waits for the slowest
    try:
        runs = chosen_runs(options)
        if options.only_retained:
            runs = [kept for run in runs if (kept := retained(run, options.retained))]
        answer_share(runs, ranks.rank(), ranks.count(), options.batch_size)
        ranks.wait()
        if ranks.first():
            merge_parts(runs)
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"eval.predict: {error}\n(LLACA_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
