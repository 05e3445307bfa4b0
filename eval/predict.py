"""Answers of runs: the answer files that eval/runs.py asks for, {question_id, prompt, text} a line.

Any number of processes answer, each the questions about its own share of the pictures:

    python -m torch.distributed.run --nproc-per-node 8 -m eval.predict --run NAME ...       (eval_all.sh does)

Each appends to <Task>.jsonl.part-<rank> after every batch, so that a killed evaluation goes on where it was, with
however many processes. A file is put together, every id in it once, when all parts are there.
"""

import argparse
import copy
import gc
import heapq
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch

from data.progress import progress
from eval.questions import Questions
from eval.runs import BASE, EvaluatedRun, arguments, chosen_runs, retained
from llaca import ranks
from llaca.folders import handed_on
from llaca.methods import METHODS
from llaca.stream import write_atomically
from llava.adapters import load_adapter
from llava.backbones import load_base
from llava.generate import UnreadablePicture, answer_batches
from llava.greedy import Decoder
from llava.states import asked as asked_item
from llava.states import question_states


@lru_cache(maxsize=32)
def _share(asked: Questions, rank: int, world: int) -> list[int]:
    return share_of(asked.shown, rank, world)


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
    with progress(total=total, desc=name, unit="answer", disable=rank > 0) as bar:
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


def main() -> None:
    """Command line of one process of several: answers its share; the first puts the files together."""
    parser = argparse.ArgumentParser(prog="python -m eval.predict", description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--only-retained", action="store_true", help="that alone")
    options = parser.parse_args()
    gc.freeze()  # else the process looks at what the imports left, when it ends, for a second
    ranks.start(patience=timedelta(days=2))  # who is done waits for the slowest
    try:
        runs = chosen_runs(options)
        if options.only_retained:
            runs = [kept for run in runs if (kept := retained(run, options.retained))]
        answer_share(runs, ranks.rank(), ranks.count(), options.batch_size)
        ranks.wait()
        if ranks.first():
            merge_parts(runs)
        ranks.leave()
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"eval.predict: {error}\n(LLACA_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
