"""A benchmark's boxes in a base model's own coordinates: `python -m llava.boxes --root DIR --base DIR --out DIR`.

CoIN writes a box as fractions of the picture padded to a square, which is what LLaVA sees. Qwen2.5-VL was trained on
pixels of the picture as it sees it, resized (arXiv 2502.13923), and Qwen3-VL on thousandths of the picture's sides
(arXiv 2511.21631). The new folder has the tasks that are scored as boxes with theirs rewritten, in questions, answers
and references, and links to everything else. An intersection over union is the same in all of them, but for rounding.

Its benchmark.yaml says under `boxes` for which base they are written: no other base is trained on it or asked.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.benchmark import Benchmark, open_benchmark
from data.boxes import NUMBER, Box, exact_box
from data.records import read_list
from data.sizes import picture_sizes
from llava.backbone import Backbone, BaseOptions
from llava.backbones import open_backbone

BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({NUMBER})"] * 4) + r"\s*\]")
SCORINGS = ("grounding", "box")
PICTURES = "pictures"  # the image root in the new folder
Frame = tuple[int, int]


def in_frame(box: Box, size: tuple[int, int], frame: Frame) -> tuple[int, ...]:
    """Return a box (x1, y1, x2, y2), in fractions of a picture of `size` (width, height) padded to a square, in a frame
    of so many units along width and height, rounded. Raises ValueError for one that leaves the square."""
    if not all(0 <= side <= 1 for side in box):
        raise ValueError(f"[{', '.join(map(str, box))}] is not in fractions of the padded square; correct it")
    longer, found = max(size), []
    for axis, side in zip((0, 1, 0, 1), box, strict=True):
        pixels = side * longer - (longer - size[axis]) / 2
        found.append(round(min(max(pixels / size[axis], 0.0), 1.0) * frame[axis]))
    return tuple(found)


def rewritten(text: str, size: tuple[int, int], frame: Frame) -> str:
    """Return a text with each of its boxes put into a frame. Raises ValueError as `in_frame` does."""

    def one(found: re.Match) -> str:
        return f"[{', '.join(map(str, in_frame(tuple(map(float, found.groups())), size, frame)))}]"

    return BOX.sub(one, text)


def rewrite(record: dict[str, Any], size: tuple[int, int], frame: Frame) -> dict[str, Any]:
    """Return a training or test record with its boxes, and those of its reference, put into a frame."""

    def change(text: str) -> str:
        return rewritten(text, size, frame)

    new = dict(record)
    if "conversations" in new:
        new["conversations"] = [{**turn, "value": change(turn["value"])} for turn in new["conversations"]]
    if "text" in new:
        new["text"] = change(new["text"])
    if "answer_bbox" in new:
        if (box := exact_box(new["answer_bbox"])) is None:
            raise ValueError(f"answer_bbox '{new['answer_bbox']}' is not [x1, y1, x2, y2]; correct the record")
        sides = ", ".join(map(str, in_frame(box, size, frame)))
        new |= {"answer_bbox": f"[{sides}]", "box_frame": list(frame)}
    return new


def rewrite_file(source: Path, target: Path, images: Path, frame_of: Callable[[int, int], Frame]) -> int:
    """Write a file of records anew; return how many there are. Raises ValueError naming file and record for boxes
    without a picture that can be opened, or that leave it."""
    records = read_list(source)
    if strange := [number for number, record in enumerate(records) if not isinstance(record, dict)]:
        raise ValueError(f"{source}, record {strange[0]} is no object; correct the file")
    names = sorted({str(record["image"]) for record in records if "image" in record})
    sizes = dict(zip(names, picture_sizes(images, names).tolist(), strict=True))
    found = []
    for number, record in enumerate(records):
        where = f"{source}, record {number} (id {record.get('id', record.get('question_id'))!r})"
        if not BOX.search(json.dumps(record)) and "answer_bbox" not in record:
            found.append(record)
            continue
        width, height = sizes.get(str(record.get("image")), (0, 0))
        if not width:
            raise ValueError(f"{where} has a box and no picture that can be opened; `python -m data.check` says more")
        try:
            found.append(rewrite(record, (width, height), frame_of(width, height)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} does not follow the schema; `python -m data.check` says more") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(found)


def write(benchmark: Benchmark, backbone: Backbone, out: Path) -> list[str]:
    """Write the new folder, whole or not at all; return what was done, line by line.

    Raises ValueError for a base without coordinates of its own, a benchmark that is written for a base already, or as
    `rewrite_file` does, FileExistsError if `out` is there.
    """
    if backbone.boxes is None:
        raise ValueError("this base model has no coordinates of its own: take the benchmark as it is")
    if benchmark.boxes:
        raise ValueError(f"{benchmark.file}: its boxes are written for {benchmark.boxes} already; take the original")
    if out.exists():
        raise FileExistsError(f"{out} is there; move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    try:
        told = _fill(partial, benchmark, backbone)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.chmod(0o755)
    partial.rename(out)
    return told


def _fill(partial: Path, benchmark: Benchmark, backbone: Backbone) -> list[str]:
    content, told = yaml.safe_load(benchmark.file.read_text(encoding="utf-8")), []
    content |= {"name": benchmark.name, "images": PICTURES, "boxes": backbone.boxes, "instructions": {}}
    (partial / PICTURES).symlink_to(benchmark.image_root.resolve())
    for which, folder in benchmark.instructions.items():
        if not (benchmark.root / folder).is_dir():
            continue
        content["instructions"][which] = which
        (partial / which).mkdir()
        for task, spec in benchmark.tasks.items():
            try:
                source = benchmark.folder(which, task)
            except FileNotFoundError:
                continue
            target = partial / which / source.name
            if spec.scoring not in SCORINGS:
                target.symlink_to(source.resolve())
                continue
            target.mkdir()
            for file in sorted(source.glob("*.json")):
                count = rewrite_file(file, target / file.name, benchmark.image_root, backbone.box_frame)
                told.append(f"{which}/{source.name}/{file.name}: {count} records")
    (partial / "benchmark.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return told


def check_boxes(benchmark: Benchmark, backbone: Backbone) -> None:
    """Raise ValueError for a benchmark whose boxes are written for another base, or for other bounds of pixels."""
    if benchmark.boxes and benchmark.boxes != backbone.boxes:
        raise ValueError(
            f"{benchmark.file}: its boxes are written for {benchmark.boxes}; this base knows "
            f"{backbone.boxes or 'none'}. Take the same base with the same min_pixels and max_pixels, or write the "
            "benchmark anew with llava.boxes"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m llava.boxes", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--base", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--out", type=Path, required=True, help="the new folder, for data_root")
    parser.add_argument("--min-pixels", type=int, default=0, help="as in the recipe")
    parser.add_argument("--max-pixels", type=int, default=0, help="as in the recipe")
    options = parser.parse_args(arguments)
    try:
        backbone = open_backbone(options.base, BaseOptions(options.min_pixels, options.max_pixels))
        print("\n".join(write(open_benchmark(options.root), backbone, options.out)))
    except (ValueError, OSError) as error:
        sys.exit(f"llava.boxes: {error}")


if __name__ == "__main__":
    main()
