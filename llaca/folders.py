"""The folder of a stage: what it was begun from, what makes it durable, how it gets its name.

    stages/02-X.partial/   origin.json, written first; trainer/ with the checkpoints; what the stage makes; DONE
    stages/02-X/           the same folder once DONE is in it; trainer/ goes last

So whatever moment a kill hits, a start finds one of these: no folder, and trains; a partial one whose origin.json says
what the stage is begun from now, and goes on in it; one that says otherwise, or nothing, whose checkpoints were made
from parameters that are no more, and removes it; one with DONE, and gives it its name; a stage that is done.

A process that is killed loses nothing that it has written. A machine that loses its power does, and may keep a file's
or a folder's new name and lose what is in it: so contents are forced to the disk before the name that vouches for them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from data.progress import say
from llaca.methods.base import Method
from llaca.pool import Choice
from llaca.stream import Stage
from llava.adapters import WEIGHTS, load_adapter
from llava.dataset import InstructionDataset

DONE, ORIGIN, TRAINER = "DONE", "origin.json", "trainer"
MEMORY = "method.pt"  # what a method hands on beside the weights
AGAIN = "or remove {0}/DONE, and DONE of every stage after it, and train them again"
RESULTS = ("matrix.csv", "matrix_full.csv", "metrics.json", "scores.json")  # of all stages together; the last goes last


def partial_of(stage: Stage) -> Path:
    """Where the stage is while it is under way."""
    return stage.folder.with_name(stage.folder.name + ".partial")


def origin_of(stage: Stage, choice: Choice, method: Method, datasets: Mapping[str, InstructionDataset]) -> dict:
    """All that a stage is made from beside what the run's recipe.yaml freezes: the parameters and the memory that it
    starts from, by their checksums, and its records; where the method takes earlier ones along, those too."""
    names = list(datasets)
    names = names[: names.index(stage.task) + 1] if type(method).extend is not Method.extend else [stage.task]
    records = hashlib.sha256()
    for name in names:
        records.update(datasets[name].digest().encode())
    handed = {} if choice.start is None else handed_sums(stage.folder.parent / choice.start)
    return {
        "start": choice.start,
        "parameters": handed.get("parameters"),
        "memory": handed.get("memory") if choice.matched else None,
        "records": records.hexdigest(),
    }


def handed_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of what a stage that is done hands on: as stage.json tells, or of the files themselves."""
    told = folder / "stage.json"
    sums = json.loads(told.read_text(encoding="utf-8")).get("handed_on") if told.is_file() else None
    return sums or checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the adapter in a stage's folder and of the method's memory, where there is one."""
    sums = {}
    for name, path in (("parameters", folder / "adapter" / WEIGHTS), ("memory", folder / MEMORY)):
        if path.is_file():
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def begin(run: Path, stage: Stage, origin: dict) -> None:
    """Makes the stage's partial folder ready to be trained in, or the stage done where a kill came just before that.

    Raises ValueError if a checkpoint was made of other records: whether they come back, only the user knows.
    """
    partial = partial_of(stage)
    if partial.is_dir() and (began := began_from(partial)) != origin:
        if began == {**origin, "records": began.get("records")} and list(partial.glob(f"{TRAINER}/*/COMPLETE")):
            raise ValueError(
                f"{partial} was trained on other records than {stage.task} has now (--unchecked leaves out those that "
                "cannot be used): put their files back, or delete that folder to train the stage anew"
            )
        why = "it was begun from other parameters than there are now" if began else "it does not say what it began from"
        say(f"{partial}: removed, {why}; the stage starts anew")
        shutil.rmtree(partial)
    if (partial / DONE).is_file():
        publish(stage)
        return
    if stage.folder.exists():  # its DONE was taken away, to train it again
        shutil.rmtree(stage.folder)
    forget_answers(run, stage.name)
    partial.mkdir(parents=True, exist_ok=True)
    write_durably(partial / ORIGIN, json.dumps(origin, indent=1) + "\n")


def began_from(partial: Path) -> dict:
    """What a partial folder was begun from; empty if it does not say."""
    path = partial / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def forget_answers(run: Path, stage: str) -> None:
    """Removes answers and scores with the parameters of a stage that is trained again, and the results they are in."""
    for folder in [*run.glob(f"answers*/{stage}"), *run.glob(f"**/scores/{stage}")]:
        shutil.rmtree(folder)
    for scores in list(run.glob(f"**/{RESULTS[-1]}")):
        if f'"{stage}"' in scores.read_text(encoding="utf-8"):
            for name in RESULTS:
                (scores.parent / name).unlink(missing_ok=True)


def publish(stage: Stage) -> None:
    """Gives a partial folder with DONE in it the stage's name."""
    if stage.folder.exists():  # without DONE
        shutil.rmtree(stage.folder)
    partial_of(stage).rename(stage.folder)
    sync(stage.folder.parent)
    tidy(stage)


def tidy(stage: Stage) -> None:
    """Removes the checkpoints of a stage that is done."""
    shutil.rmtree(stage.folder / TRAINER, ignore_errors=True)


def seal(stage: Stage) -> None:
    """Makes what is in the partial folder durable, then DONE, then its name."""
    partial = partial_of(stage)
    sync_tree(partial, leave_out=TRAINER)
    write_durably(partial / DONE, "")
    publish(stage)


def handed_on(method: Method, stage: Path) -> dict:
    """The method's memory of an earlier stage. Raises FileNotFoundError or ValueError, with the remedy, if the stage's
    folder has lost it."""
    if not method.hands_on:
        return {}
    path, needed = stage / MEMORY, f"what {type(method).__name__} has to know of earlier tasks"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {needed}. Copy it to the run, {AGAIN.format(stage)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises for half a file; what it advises then is no remedy
        raise ValueError(
            f"{path} was cut short or damaged: {needed}. Copy it to the run again, {AGAIN.format(stage)}"
        ) from error


def load_start(model: torch.nn.Module, stage: Path) -> None:
    """Loads the parameters that a stage handed on. Raises ValueError with the remedy."""
    try:
        load_adapter(model, stage / "adapter")
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}. The next stage starts from it: copy it again, {AGAIN.format(stage)}") from error


def write_durably(path: Path, text: str) -> None:
    """Writes a text file so that it is whole, on the disk, or absent."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Forces a file or a folder's list of names to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder: Path, leave_out: str | None = None) -> None:
    """Forces all that is in a folder to the disk, names last."""
    for path in folder.iterdir():
        if path.name == leave_out:
            continue
        if path.is_dir():
            sync_tree(path)
        elif path.is_file():
            sync(path)
    sync(folder)
