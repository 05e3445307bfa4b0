"""A run: its recipe, its folder, its stages, its pool of parameters, and the walk along the stream."""

import gc
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data.benchmark import open_benchmark
from data.checksums import checksum
from data.progress import progress
from llaca import hosts, ranks
from llaca.adapted import AdaptedModel, load_adapted
from llaca.config import Recipe
from llaca.folders import begin, checksums, origin_of, partial_of, seal, tidy
from llaca.grouping import THRESHOLDS, Codebook
from llaca.methods import method_of
from llaca.pool import Choice, Pool
from llaca.records import load_stream, stage_datasets, stage_wordings
from llaca.sections import TrainConfig
from llaca.stage import StageTraining
from llaca.stream import (
    Stage,
    check_order,
    environment,
    frozen,
    reserved,
    run_folder,
    stages_of,
    write_atomically,
)
from llaca.tracking import Tracker, tell_again, tracker_of
from llava.dataset import InstructionDataset

TOLD = ("seconds", "samples", "peak_memory_bytes")  # to the tracker, of a stage


class Run:
    """A recipe's run. Every process of it makes one; `train` trains what is not done.

    recipe, method, folder; stages: in the order of the stream; records: by task. While it trains, adapted: the model,
    datasets: every stage's own, by task, and tracker: where else its figures go.
    """

    adapted: AdaptedModel | None = None
    tracker: Tracker
    made: int  # optimizer steps of the stages that are done
    datasets: dict[str, InstructionDataset]

    def __init__(self, recipe: Recipe):
        """Join the other processes and read the records; nothing is written.

        Raises DataError for a broken record and ValueError or FileNotFoundError for a recipe that cannot be followed.
        """
        self.recipe, self.method, self.folder = recipe, method_of(recipe), run_folder(recipe)
        ranks.start(recipe.engine.zero)
        hosts.start_alike(recipe)
        environment()  # of all ranks
        self.records = load_stream(recipe)
        self.stages = stages_of(recipe, self.method.joint, self.folder)

    def settings(self, stage: Stage) -> TrainConfig:
        """The training section of a stage on these processes."""
        return self.recipe.for_stage(stage.tasks, ranks.count())

    def steps(self, stage: Stage) -> int:
        """Optimizer steps on the stage's own records."""
        return self.settings(stage).steps(len(self.datasets[stage.task]), ranks.count())

    def train(self) -> Path:
        """Train the stages that are not done; return the run's folder.

        Raises, before anything is trained, DataError and ValueError for what the recipe cannot train, BlockingIOError
        where another process trains this run.
        """
        with ExitStack() as held:
            freeze = hosts.together(
                lambda: held.enter_context(reserved(self.recipe)) if ranks.first() else lambda: self.folder
            )
            if not self.method.trains:
                return hosts.together(freeze)
            check_order(self.stages)
            for stage in self.stages if ranks.first() else ():
                if stage.done:
                    tidy(stage)
            if not all(self._done()):
                self._walk(freeze, held)
        return self.folder

    def _done(self) -> list[bool]:
        """Which stages are done, as the first process sees it: another host may not see at once what was written."""
        return ranks.same([stage.done for stage in self.stages])

    def _walk(self, freeze: Callable[[], Path], held: ExitStack) -> None:
        """Walk the stream, past the stages that are done; call `freeze` when nothing can refuse the run any more. What
        `held` holds ends with the run."""
        wordings = stage_wordings(self.recipe, self.stages, self.records)
        self.adapted = load_adapted(self.recipe, self.records, self.method)
        features = self.adapted.features
        self.datasets = stage_datasets(self.recipe, self.stages, self.records, self.adapted.backbone)
        pool, total = self._empty_pool(), sum(map(self.steps, self.stages))
        hosts.together(freeze)
        self.tracker, self.made = tracker_of(self.recipe, self.folder) if ranks.first() else Tracker(), 0
        held.callback(self.tracker.finish)
        line = int(os.environ.get("LLACA_BAR", 0))  # of the terminal, where several runs share it
        name = self.recipe.run.run
        with progress(total=total, desc=name, unit="step", position=line, disable=not ranks.first()) as bar:
            for stage, done in zip(self.stages, self._done(), strict=True):
                if done:
                    pool = Pool.from_json((stage.folder / "codebook.json").read_text(encoding="utf-8"))
                    tell_again(self.tracker, stage, stage.folder / "train_log.jsonl", self.made)
                    bar.update(self._count(json.loads((stage.folder / "stage.json").read_text(encoding="utf-8"))))
                    continue
                choice = pool.choose(wordings[stage.name])
                hosts.together(partial(self._begin, stage, choice))
                if ranks.same(stage.done):  # it was whole and lacked its name
                    pool.put(choice, wordings[stage.name], stage.task, stage.name)
                    bar.update(self.steps(stage))
                    continue
                if self.adapted is None:
                    self.adapted = load_adapted(self.recipe, self.records, self.method, features)
                around = environment()
                report = StageTraining(self, stage, choice).train(bar)
                pool.put(choice, wordings[stage.name], stage.task, stage.name)
                if ranks.first():
                    self._finish(stage, report | {"environment": around} | self._went_in(stage), pool)
                self._count(report)
                ranks.wait()
                if self.recipe.engine.zero != "none":
                    self._let_go()

    def _count(self, report: dict) -> int:
        """Counts the optimizer steps of a stage that is done; returns them."""
        self.made += report["steps"]
        return report["steps"]

    def _empty_pool(self) -> Pool:
        settings = self.recipe.method
        threshold = settings.similarity_threshold
        if threshold is None:
            threshold = THRESHOLDS[self.recipe.stream.instructions]
        codebook = Codebook(threshold, settings.group_similarity)
        return Pool(settings.grouping, codebook, settings.new_group_start, self.method.oracle)

    def _begin(self, stage: Stage, choice: Choice) -> None:
        if ranks.first():
            begin(self.folder, stage, origin_of(stage, choice, self.method, self.datasets))

    def _went_in(self, stage: Stage) -> dict:
        """How the stage's records were shared, and the checksums of the files that it was trained from."""
        settings, inputs, tasks = self.settings(stage), frozen(self.folder)["inputs"], self.recipe.stream.tasks
        benchmark = open_benchmark(self.recipe.stream.data_root).file
        own = {name: told for name, told in inputs.items() if name not in tasks or name in stage.tasks}
        dropped = sum(self.records[task].dropped for task in stage.tasks) + len(self.datasets[stage.task].dropped)
        return {
            "dropped_records": dropped,
            "processes": ranks.count(),
            "micro_batch": settings.batch_size,
            "accumulation": settings.gradient_accumulation,
            "global_batch": settings.batch_size * settings.gradient_accumulation * ranks.count(),
            "inputs": own | {benchmark.name: checksum(benchmark)},
        }

    def _finish(self, stage: Stage, report: dict, pool: Pool) -> None:
        """Write what is left, and give the stage's folder its name, with DONE in it, when it is whole."""
        partial = partial_of(stage)
        report = report | {"handed_on": checksums(partial)}
        write_atomically(partial / "stage.json", json.dumps(report, indent=1) + "\n")
        write_atomically(partial / "codebook.json", pool.to_json())
        self.tracker.tell(self.made + report["steps"], {f"stages/{stage.name}/{key}": report[key] for key in TOLD})
        seal(stage)

    def _let_go(self) -> None:
        """Forget a model that DeepSpeed has sharded, cast and hooked: the next stage takes a new one, and a GPU may not
        have room for both."""
        self.adapted = None
        del self.method.stage
        unset_hf_deepspeed_config()
        gc.collect()
        torch.cuda.empty_cache()
