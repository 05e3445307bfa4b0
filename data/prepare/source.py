"""What the readers of the eight official releases share: files, records, answers, and a count of what is unusable."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.jsonfile import field
from data.progress import progress
from data.references import annotator_answers


@dataclass(frozen=True)
class Record:
    """A picture and what is asked about it, before an instruction is put to it.

    id: of the question, or in training of the picture. image: path below cl_dataset, None only in ScienceQA.
    turns: questions with their answers. extras: what an evaluated record holds beside its one question.
    """

    id: str | int
    image: str | None
    turns: list[tuple[str, str]]
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass
class Source:
    """An official release in `folder`, its pictures below `image_root`.

    synsets: ImageNet's file of chosen classes. left_out: how many questions cannot be used, by reason.
    notes: what else the user should know.
    """

    folder: Path
    image_root: Path
    synsets: Path | None = None
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: list[str] = dataclasses.field(default_factory=list)

    def path(self, name: str) -> Path:
        """An official file; FileNotFoundError naming it if it is not there."""
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; --source must be the folder of the unpacked release")
        return path

    def json(self, name: str, kind: type, drop: Collection[str] = ()) -> Any:
        """A JSON file whose top level is a non-empty `kind` (list or dict); ValueError naming the file otherwise.

        Keys in `drop` are thrown away at every level while parsing: the large files do not fit in memory with them.
        """
        path = self.path(name)
        tqdm.write(f"reading {path}", file=sys.stderr)
        hook = (lambda entry: {key: entry[key] for key in entry if key not in drop}) if drop else None
        try:
            content = json.loads(path.read_bytes(), object_hook=hook)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); it is broken or cut short, get it again") from error
        if not isinstance(content, kind) or not content:
            raise ValueError(
                f"{path}: expected a JSON {kind.__name__} with at least one entry; is it the official file?"
            )
        return content

    def entries(
        self, name: str, kind: type, at: str = "", drop: Collection[str] = ()
    ) -> Iterator[tuple[str, str | int, Any]]:
        """(where, key, entry) of a JSON file's entries: `kind` dict gives their keys, list their positions.

        `at`: the top-level key they stand under. `where` names file and entry for messages.
        """
        path = self.folder / name
        entries = field(self.json(name, dict, drop), at, kind, str(path)) if at else self.json(name, kind, drop)
        pairs = entries.items() if kind is dict else enumerate(entries)
        for key, entry in progress(pairs, desc=name, total=len(entries), leave=False, delay=3, unit="record"):
            yield f"{path}, record {key}", key, entry

    def answered(self, question: str, answer: str) -> bool:
        """Whether there are a question and an answer; if not, the question is counted as left out."""
        if question and answer:
            return True
        self.left_out["without an answer" if question else "without a question text"] += 1
        return False


def text(entry: Mapping[str, Any], key: str, where: str) -> str:
    """`entry[key]`, which must be a string, without space around it."""
    return field(entry, key, str, where).strip()


def annotators(entry: Mapping[str, Any], where: str) -> list[str]:
    """The texts of `answers: [{answer, ...}, ...]` of VQAv2 and VizWiz; ValueError if they are not ten."""
    texts = [field(given, "answer", str, where) for given in field(entry, "answers", list, where)]
    return list(annotator_answers({"answers": texts}, where))


def most_frequent(answers: Iterable[str]) -> str:
    """The most frequent answer, the first of equals; blank ones do not count, '' if there is no other."""
    counts = Counter(answer.strip() for answer in answers if answer.strip())
    return counts.most_common(1)[0][0] if counts else ""


def by_picture(records: Iterable[Record], prefix: str = "") -> list[Record]:
    """One record for all turns of a picture, in order of first appearance; id: `prefix` and the picture's name."""
    pictures: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        pictures.setdefault(record.image, []).extend(record.turns)
    return [Record(prefix + Path(image).stem, image, turns) for image, turns in pictures.items()]
