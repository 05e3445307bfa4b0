"""ImageNet: LOC_synset_mapping.txt names the classes; pictures in ImageNet_withlabel/{train/<synset>,val}/*.JPEG.

The validation pictures lie in folders val/<synset>/, or all in val/ with LOC_val_solution.csv to say their classes.
`--synsets FILE` (one synset a line) chooses classes; CoIN has 101. A class is called by its first name in the mapping.
The instruction is the whole prompt. The records go through the classes in turn, so that the first of them are of all.
"""

import csv
from collections import Counter
from pathlib import Path

from data.prepare.source import Record, Source
from data.prepare.splits import in_turn
from data.progress import progress

ANNOTATIONS = ()
FOLDER = "ImageNet_withlabel"
MAPPING, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, validation) records of the chosen classes. Raises FileNotFoundError for a class without pictures."""
    names = _names(source)
    for name, count in Counter(name.lower() for name in names.values()).items():
        if count > 1:
            source.notes.append(f"{count} classes are called '{name}': the answer does not tell them apart")
    validation = source.image_root / FOLDER / "val"
    synsets = progress(names, desc="list pictures", leave=False, delay=3, unit="class")
    train = in_turn(_listed(source, "train", synset) for synset in synsets)
    if any((validation / synset).is_dir() for synset in names):
        evaluated = in_turn(_listed(source, "val", synset) for synset in names)
    else:
        evaluated = _solution(source, names)
    return [_record(names, *found) for found in train], [_record(names, *found) for found in evaluated]


def _record(names: dict[str, str], image: str, synset: str) -> Record:
    return Record(Path(image).stem, image, [("", names[synset])], {"answer": names[synset]})


def _names(source: Source) -> dict[str, str]:
    """The first name of every chosen class, by synset; ValueError for an unknown synset."""
    path = source.path(MAPPING)
    pairs = (line.partition(" ")[::2] for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    names = {synset: described.split(",")[0].strip() for synset, described in pairs}
    if nameless := [synset for synset, name in names.items() if not name]:
        raise ValueError(f"{path}, synset {nameless[0]}: has no name; a line is 'n01440764 tench, Tinca tinca'")
    if source.synsets is None:
        return names
    if not source.synsets.is_file():
        raise FileNotFoundError(f"{source.synsets}: no such file; --synsets must be a file with one synset a line")
    chosen = source.synsets.read_text(encoding="utf-8").split()
    if unknown := [synset for synset in chosen if synset not in names]:
        raise ValueError(f"{source.synsets}, synset {unknown[0]}: is not in {path}; write one synset a line")
    return {synset: names[synset] for synset in chosen}


def _listed(source: Source, split: str, synset: str) -> list[tuple[str, str]]:
    """(image, synset) of the pictures in a class's folder, by name."""
    folder = source.image_root / FOLDER / split / synset
    pictures = sorted(path.name for path in folder.glob("*.JPEG"))
    if not pictures:
        raise FileNotFoundError(f"{folder}: no *.JPEG in it; unpack the class there or choose others by --synsets")
    return [(f"{FOLDER}/{split}/{synset}/{name}", synset) for name in pictures]


def _solution(source: Source, names: dict[str, str]) -> list[tuple[str, str]]:
    """(image, synset) of the pictures whose class is chosen, as the CSV lists them: ImageId, "<synset> <box> ..."."""
    path, found = source.path(SOLUTION), []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            image_id, labels = row.get("ImageId"), (row.get("PredictionString") or "").split()
            if not image_id or not labels:
                raise ValueError(f"{path}, line {number}: ImageId or PredictionString is missing; get the file again")
            if labels[0] in names:
                found.append((f"{FOLDER}/val/{image_id}.JPEG", labels[0]))
    return found
