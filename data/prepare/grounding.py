"""Grounding: RefCOCO, RefCOCO+ (UNC splits) and RefCOCOg (UMD split); pictures in COCO2014/train2014/.

    refcoco/{refs(unc).p,instances.json}  refcoco+/{refs(unc).p,instances.json}  refcocog/{refs(umd).p,instances.json}

Training: within each of the three, one record for all expressions of a picture (55,885). Test: one record an expression
of testA, testB and RefCOCOg's test (30,969). Both sums of the published split sizes are CoIN's numbers.

A box is [x1, y1, x2, y2] in fractions of the picture padded to a square, two decimals: from pixels, |W - H| / 2 is
added on the shorter axis and all is divided by max(W, H). `origin_answer_bbox` is the box in fractions of W and H.
A box without area is no answer. Pictures of a test split of one release may be in the training split of another.
"""

from collections.abc import Iterator
from itertools import chain

from data.jsonfile import field
from data.prepare.plain_pickle import load_plain
from data.prepare.source import Record, Source, by_picture, text
from data.progress import progress

ANNOTATIONS = ()
RELEASES = {
    "refcoco": ("refs(unc).p", ("testA", "testB")),
    "refcoco+": ("refs(unc).p", ("testA", "testB")),
    "refcocog": ("refs(umd).p", ("test",)),
}

Size = tuple[int, int]
Box = tuple[float, float, float, float]


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, test) records. Raises ValueError for refs that lack one of the splits above."""
    train, test = [], []
    for release, (refs, test_splits) in RELEASES.items():
        records: dict[str, list[Record]] = {split: [] for split in ("train", *test_splits)}
        for split, record in _expressions(source, release, refs, tuple(records)):
            records[split].append(record)
        if empty := [split for split, found in records.items() if not found]:
            raise ValueError(f"{source.folder / release / refs}: nothing of split {empty[0]}; is it the official file?")
        train += by_picture(records.pop("train"), prefix=f"{release}-")
        test += chain.from_iterable(records.values())
    return train, test


def _expressions(source: Source, release: str, refs: str, splits: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    """(split, record) of the expressions of `splits`; ValueError if instances.json lacks a picture or region."""
    images, boxes = _instances(source, release)
    path = source.path(f"{release}/{refs}")
    for position, ref in enumerate(progress(load_plain(path), desc=release, leave=False, delay=3, unit="region")):
        where = f"{path}, record {position}"
        split, sentences = field(ref, "split", str, where), field(ref, "sentences", list, where)
        if split not in splits:
            continue
        ann_id, image_id = field(ref, "ann_id", int, where), field(ref, "image_id", int, where)
        if ann_id not in boxes or image_id not in images:
            missing = f"image_id {image_id}" if image_id not in images else f"ann_id {ann_id}"
            raise ValueError(f"{where}: {missing} is not in {release}/instances.json; take both of one release")
        (name, size), (x, y, width, height) = images[image_id], boxes[ann_id]
        corners = (x, y, x + width, y + height)
        answer = box_text(in_square(corners, size)) if width > 0 and height > 0 else ""
        extras = {
            "answer_bbox": answer,
            "origin_answer_bbox": box_text(tuple(value / size[axis % 2] for axis, value in enumerate(corners))),
            "size": list(size),
        }
        for sentence in sentences:
            expression = " ".join(text(sentence, "sent", where).split())
            record_id = f"{release}-{field(sentence, 'sent_id', int, where)}"
            if source.answered(expression, answer):
                yield split, Record(record_id, f"COCO2014/train2014/{name}", [(expression, answer)], extras)


def in_square(box: Box, size: Size) -> Box:
    """A box in pixels of a (width, height) picture, in fractions of the picture padded to a square."""
    side = max(size)
    return tuple((value + (side - size[axis % 2]) / 2) / side for axis, value in enumerate(box))


def box_text(box: Box) -> str:
    """'[0.25, 0.33, 0.58, 0.67]'."""
    return "[" + ", ".join(f"{side:.2f}" for side in box) + "]"


def _instances(source: Source, release: str) -> tuple[dict[int, tuple[str, Size]], dict[int, Box]]:
    """(file name, size) by image id and [x, y, width, height] by annotation id, in pixels."""
    name = f"{release}/instances.json"
    content, path = source.json(name, dict, drop={"segmentation"}), source.folder / name
    images, boxes = {}, {}
    for position, entry in enumerate(field(content, "images", list, str(path))):
        where = f"{path}, image {position}"
        size = field(entry, "width", int, where), field(entry, "height", int, where)
        if min(size) < 1:
            raise ValueError(f"{where}: width {size[0]} and height {size[1]} must be positive; correct the record")
        images[field(entry, "id", int, where)] = text(entry, "file_name", where), size
    for position, entry in enumerate(field(content, "annotations", list, str(path))):
        where = f"{path}, annotation {position}"
        box = field(entry, "bbox", list, where)
        if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            raise ValueError(f"{where}: bbox {box} is not [x, y, width, height]; correct the record")
        boxes[field(entry, "id", int, where)] = tuple(box)
    return images, boxes
