"""Boxes in a base model's own coordinates: by hand, against what the model sees, and a whole benchmark."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from vl_bases import make_vl

from data.answers import Region
from data.benchmark import open_benchmark
from data.boxes import exact_box
from data.check import check
from eval.tasks import task_of
from eval.tasks.grounding import intersection_over_union
from llava.backbone import BaseOptions
from llava.backbones import open_backbone
from llava.boxes import check_boxes, in_frame, main, rewritten


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {kind: make_vl(tmp_path_factory.mktemp(kind), kind) for kind in ("qwen2_5_vl", "qwen3_vl", "internvl")}


def test_boxes_by_hand():
    """A wide picture of 200 x 100 is padded above and below by 50; a tall one left and right."""
    assert in_frame((0.25, 0.25, 0.5, 0.75), (200, 100), (200, 100)) == (50, 0, 100, 100)
    assert in_frame((0.25, 0.5, 1.0, 0.7), (200, 100), (1000, 1000)) == (250, 500, 1000, 900)
    assert in_frame((0.25, 0.1, 0.5, 0.9), (100, 200), (28, 56)) == (0, 6, 14, 50)
    assert in_frame((0.0, 0.2, 0.3, 0.3), (100, 200), (1000, 1000)) == (0, 200, 100, 300), "what is padding is the edge"
    text = "Is it [0.25,0.5, 1, .7] or [0.1, 0.2, 0.3]?"
    assert rewritten(text, (200, 100), (1000, 1000)) == "Is it [250, 500, 1000, 900] or [0.1, 0.2, 0.3]?"
    with pytest.raises(ValueError, match=r"\[0.5, 0.2, 40.0, 50.0\] is not in fractions"):
        rewritten("[0.5, 0.2, 40, 50]", (200, 100), (1000, 1000))


def test_overlaps_are_the_same_in_every_frame():
    rng = random.Random(0)
    for _ in range(300):
        size, frame = (rng.randint(60, 700), rng.randint(60, 700)), (rng.randint(4000, 9000), rng.randint(4000, 9000))
        longer, boxes = max(size), []
        for _ in range(2):
            xs, ys = (
                sorted(rng.uniform((longer - side) / 2, (longer + side) / 2) / longer for _ in "ab") for side in size
            )
            boxes.append((xs[0], ys[0], xs[1], ys[1]))
        own = [in_frame(box, size, frame) for box in boxes]
        assert intersection_over_union(*own) == pytest.approx(intersection_over_union(*boxes), abs=0.05)


def test_the_frame_is_what_the_model_sees(bases, tmp_path):
    """Qwen2.5-VL: the patches that its processor makes, 4 pixels each; the bounds of pixels are part of it."""
    for size in ((40, 24), (24, 40), (200, 30), (5, 9)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        for options in (BaseOptions(), BaseOptions(max_pixels=256)):
            backbone = open_backbone(bases["qwen2_5_vl"], options)
            _, rows, columns = backbone.picture(tmp_path / "a.png")["image_grid_thw"].tolist()
            assert backbone.box_frame(*size) == (4 * columns, 4 * rows)
    assert open_backbone(bases["qwen3_vl"]).box_frame(40, 24) == (1000, 1000)


def make_root(root: Path) -> Path:
    """Two tasks, one of boxes, with pictures of two shapes."""
    for name, size in (("wide", (200, 100)), ("tall", (100, 200))):
        (root / "photos").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / "photos" / f"{name}.png")
    (root / "benchmark.yaml").write_text(
        "name: B\nimages: photos\n"
        "tasks:\n  Boxes: {scoring: box, instruction: before colon}\n  Names: {scoring: open}\n"
    )
    train = [{"id": "1", "image": "wide.png", "conversations": [
        {"from": "human", "value": "<image>\nGive the box: dog"}, {"from": "gpt", "value": "[0.25, 0.5, 1.0, 0.7]"},
        {"from": "human", "value": "What is at [0.25, 0.25, 0.5, 0.75]?"},
        {"from": "gpt", "value": "a cat"}]}]  # fmt: skip
    test = [{"question_id": 7, "image": "tall.png", "text": "Give the box: cat", "answer_bbox": "[0.25, 0.1, 0.5, 0.9]",
             "size": [100, 200]}]  # fmt: skip
    named = [{"question_id": 1, "image": "tall.png", "text": "Who?\nSay it.", "answer": "cat"}]
    whole = {"id": "2", "image": "tall.png", "conversations": [{"from": "human", "value": "<image>\nWho?\nSay it."},
                                                                {"from": "gpt", "value": "cat"}]}  # fmt: skip
    for task, records in (("Boxes", (train, test)), ("Names", ([whole], named))):
        (root / task).mkdir()
        for split, content in zip(("train", "test"), records, strict=True):
            (root / task / f"{split}.json").write_text(json.dumps(content))
    return root


def test_a_benchmark_is_written_for_a_base_and_for_no_other(bases, tmp_path, capsys):
    root = make_root(tmp_path / "root")
    main(["--root", str(root), "--base", str(bases["qwen3_vl"]), "--out", str(tmp_path / "own")])
    assert "original/Boxes/train.json: 1 records" in capsys.readouterr().out
    made = open_benchmark(tmp_path / "own")
    assert check(made, "original").ok and list(made.tasks) == ["Boxes", "Names"]
    said = json.loads((tmp_path / "own/original/Boxes/train.json").read_text())[0]["conversations"]
    assert [turn["value"] for turn in said] == [
        "<image>\nGive the box: dog", "[250, 500, 1000, 900]", "What is at [250, 0, 500, 1000]?", "a cat"
    ]  # fmt: skip
    task = task_of(tmp_path / "own", "Boxes")
    reference = task.load_references(tmp_path / "own")["7"]
    assert reference == Region("[0, 100, 500, 900]", 200, (1000, 1000)) and exact_box(reference.answer)
    assert task.official("[10, 100, 520, 900]", reference) == 1.0 and task.has_form("[10, 100, 520, 900]", reference)
    assert task.legacy("[10, 100, 520, 900]", reference) == 1.0, "its reading of fractions would lose a digit"
    assert task.official("[0.0, 0.1, 0.5, 0.9]", reference) == 0.0 and not task.has_form("[0, 0, 1001, 5]", reference)
    check_boxes(made, open_backbone(bases["qwen3_vl"]))
    for other in ("qwen2_5_vl", "internvl"):
        with pytest.raises(ValueError, match=r"its boxes are written for qwen3_vl.* write the benchmark anew"):
            check_boxes(made, open_backbone(bases[other]))
    with pytest.raises(SystemExit, match="written for qwen3_vl: thousandths of the sides already"):
        main(["--root", str(tmp_path / "own"), "--base", str(bases["qwen3_vl"]), "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="no coordinates of its own"):
        main(["--root", str(root), "--base", str(bases["internvl"]), "--out", str(tmp_path / "x")])
    line = ["--root", str(root), "--base", str(bases["qwen2_5_vl"]), "--out", str(tmp_path / "pixels")]
    main([*line, "--max-pixels", "1024"])
    pixels = open_benchmark(tmp_path / "pixels")
    check_boxes(pixels, open_backbone(bases["qwen2_5_vl"], BaseOptions(max_pixels=1024)))
    with pytest.raises(ValueError, match="same min_pixels and max_pixels"):
        check_boxes(pixels, open_backbone(bases["qwen2_5_vl"]))


def test_what_cannot_be_rewritten_is_named_and_nothing_is_there(bases, tmp_path):
    root = make_root(tmp_path / "root")
    line = ["--root", str(root), "--base", str(bases["qwen3_vl"]), "--out", str(tmp_path / "own")]
    (root / "photos/wide.png").unlink()
    with pytest.raises(
        SystemExit, match=r"train.json, record 0 \(id '1'\) has a box and no picture that can be opened"
    ):
        main(line)
    Image.new("RGB", (200, 100)).save(root / "photos/wide.png")
    test = root / "Boxes/test.json"
    whole = test.read_text()
    test.write_text(whole.replace("[0.25, 0.1, 0.5, 0.9]", "0.25, 0.1, 0.5, 0.9"))
    main([*line[:-1], str(tmp_path / "bare")])
    assert (
        json.loads((tmp_path / "bare/original/Boxes/test.json").read_text())[0]["answer_bbox"] == "[0, 100, 500, 900]"
    )
    test.write_text(whole.replace("[0.25, 0.1, 0.5, 0.9]", "[0.25, 0.1]"))
    with pytest.raises(SystemExit, match=r"record 0 \(id 7\): answer_bbox '\[0.25, 0.1\]' is not"):
        main(line)
    test.write_text(whole.replace("[0.25, 0.1, 0.5, 0.9]", "[25, 10, 50, 90]"))
    with pytest.raises(
        SystemExit, match=r"test.json, record 0 \(id 7\): \[25.0, 10.0, 50.0, 90.0\] is not in fractions"
    ):
        main(line)
    assert not list(tmp_path.glob("own*"))
