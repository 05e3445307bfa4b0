"""Turn an official release into CoIN's JSON, for those who cannot get CoIN's own files.

Pictures are not copied: they must lie under DATA_ROOT/cl_dataset/ as CoIN has them (each data/prepare/<task>.py says
where). CoIN's own files may hold the records in another order; its 101 classes of ImageNet are given by --synsets.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from data.benchmark import COIN, INSTRUCTION_SETS, open_benchmark
from data.jsonfile import one_of
from data.prepare import gqa, grounding, imagenet, ocrvqa, scienceqa, textvqa, vizwiz, vqav2
from data.prepare.source import Record, Source
from data.prepare.write import Choices, write_task
from data.progress import progress

READERS: dict[str, ModuleType] = {  # each: read(source) -> (training, evaluated records), ANNOTATIONS to copy
    "ScienceQA": scienceqa,
    "TextVQA": textvqa,
    "ImageNet": imagenet,
    "GQA": gqa,
    "VizWiz": vizwiz,
    "Grounding": grounding,
    "VQAv2": vqav2,
    "OCR-VQA": ocrvqa,
}


def prepare(task: str, folder: Path | str, root: Path | str, choices: Choices | None = None) -> list[str]:
    """Write one task's files from the official release in `folder`; returns what was done, line by line.

    Raises ValueError for a broken file or record, FileNotFoundError for a file or picture that is not there
    (`skip_missing` leaves the records of missing pictures out), FileExistsError before it would overwrite.
    """
    reader, choices = READERS[one_of(task, READERS, "task")], choices or Choices()
    for which in choices.instructions:
        one_of(which, INSTRUCTION_SETS, "instruction set")
    if choices.synsets is not None and task != "ImageNet":
        raise ValueError(f"--synsets chooses classes of ImageNet; leave it out for {task}")
    coin = open_benchmark(root, COIN)
    source = Source(Path(folder), coin.image_root, choices.synsets)
    records = [with_pictures(source, split, choices.skip_missing) for split in reader.read(source)]
    for split, name in zip(records, ("training", "evaluated"), strict=True):
        if not split:
            raise ValueError(f"{source.folder}: no usable {name} records of {task}; is the release complete?")
        doubled = [record_id for record_id, count in Counter(str(record.id) for record in split).items() if count > 1]
        if doubled:
            raise ValueError(f"{source.folder}: {name} record {doubled[0]} of {task} occurs twice; remove one")
    annotations = [source.path(name) for name in reader.ANNOTATIONS]
    train, evaluated = records
    paths = write_task(coin, task, (train, evaluated), choices, annotations)
    known = coin.tasks[task].records
    turns = sum(len(record.turns) for record in train)
    return [
        f"{task}: {_counted(train, known.get('train'))} training records, {turns} questions in them",
        f"{task}: {_counted(evaluated, known.get('test'))} evaluated questions",
        *(f"{task}: questions left out {reason}: {count}" for reason, count in source.left_out.items()),
        *(f"{task}: {note}" for note in source.notes),
        *(f"{path}" for path in paths),
    ]


def _counted(records: Sequence[Record], known: int | None) -> str:
    """Their number, beside the one of CoIN's own file where that is known."""
    return f"{len(records)}" if known is None else f"{len(records)} (CoIN: {known})"


def with_pictures(source: Source, records: Sequence[Record], skip_missing: bool) -> list[Record]:
    """The records whose pictures are there. Raises FileNotFoundError for a missing one, or counts it as left out."""
    images = dict.fromkeys(record.image for record in records if record.image)
    bar = progress(images, desc="find pictures", leave=False, delay=3, unit="picture")
    missing = {image for image in bar if not (source.image_root / image).is_file()}
    without = [record for record in records if record.image in missing]
    if without and not skip_missing:
        raise FileNotFoundError(
            f"{source.image_root / without[0].image}: no such picture (record {without[0].id}); {len(missing)} of "
            f"{len(images)} are missing: lay them there, or pass --skip-missing to leave their records out"
        )
    if without:
        source.left_out["without their picture"] += sum(len(record.turns) for record in without)
    return [record for record in records if record.image not in missing]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; a wrong input ends with its message."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=READERS, required=True)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the official files, unpacked")
    parser.add_argument("--root", type=Path, required=True, metavar="DATA_ROOT", help="cl_dataset/ and Instructions*/")
    parser.add_argument("--instructions", nargs="+", choices=INSTRUCTION_SETS, default=INSTRUCTION_SETS)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of a wording for each record in 10type")
    parser.add_argument("--synsets", type=Path, metavar="FILE", help="ImageNet: classes to take, one synset a line")
    parser.add_argument("--skip-missing", action="store_true", help="leave out records whose picture is not there")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there with other content")
    options = parser.parse_args(arguments)
    try:
        choices = Choices(**{name: getattr(options, name) for name in Choices._fields})
        report = prepare(options.task, options.source, options.root, choices)
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.prepare: {error}") from error
    print("\n".join(report))


if __name__ == "__main__":
    main()
