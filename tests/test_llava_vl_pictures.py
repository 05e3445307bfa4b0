"""Pictures of any size: how many tokens they take, from their headers; what is too long, swapped, or comes back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_llava_vl import folders, pictures, samples_of  # noqa: F401
from vl_bases import make_vl

from data.columns import Texts, question_columns, training_columns
from data.preprocess import look
from data.records import DataError, Question, Sample
from data.sizes import picture_sizes
from llava.backbone import BaseOptions
from llava.backbones import load_base, open_backbone
from llava.check import Reader
from llava.dataset import InstructionDataset
from llava.generate import UnreadablePicture, answer_batches, encode_questions
from llava.greedy import Decoder


def test_sizes_come_from_headers_and_bounds_from_the_recipe(folders, pictures, tmp_path):  # noqa: F811
    """Number of tokens without pixels, within the bounds; the stock processor makes as many patches."""
    backbone = open_backbone(folders["qwen2_5_vl"], BaseOptions(min_pixels=16 * 16, max_pixels=24 * 24))
    names = [str(path) for path in pictures]
    counts = backbone.picture_tokens(Path(), names)
    assert counts.tolist() == [len(backbone.picture(path)["pixel_values"]) // 4 for path in pictures]
    assert counts.min() >= 4 and counts.max() <= 9
    assert open_backbone(folders["qwen2_5_vl"]).digest != backbone.digest
    for least, most in ((0, 63), (100, 99), (1, 0)):
        with pytest.raises(ValueError, match=r"min_pixels .* and max_pixels"):
            open_backbone(folders["qwen2_5_vl"], BaseOptions(least, most))
    turned = Image.open(pictures[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # shown upright it would be 24 x 40
    turned.save(tmp_path / "turned.png", exif=exif)
    plain = open_backbone(folders["qwen2_5_vl"])
    assert picture_sizes(tmp_path, ["turned.png", "absent.png"]).tolist() == [[40, 24], [0, 0]]
    assert plain.picture(tmp_path / "turned.png")["image_grid_thw"].tolist() == [1, 6, 10]
    assert plain.picture_tokens(tmp_path, ["turned.png", "absent.png"]).tolist() == [15, 1]


def test_tiles_come_from_headers_and_bounds_from_the_recipe(folders, pictures, tmp_path):  # noqa: F811
    """InternVL's: the grid nearest in shape, and the whole picture where there are several tiles."""
    names = [str(path) for path in pictures]
    for least, most, wanted in (
        (0, 0, [7, 7, 1, 7, 3]),
        (0, 4 * 256, [3, 3, 1, 5, 3]),
        (0, 256, [1] * 5),
        (600, 1024, None),
    ):
        backbone = open_backbone(folders["internvl"], BaseOptions(least, most))
        tiles = [len(backbone.picture(path)["pixel_values"]) for path in pictures]
        assert backbone.picture_tokens(tmp_path, [*names, "absent.png"]).tolist() == [*(4 * n for n in tiles), 1]
        assert tiles == wanted if wanted else set(tiles) <= {4, 5}
    for least, most in ((0, 255), (600, 512), (7 * 256, 0)):
        with pytest.raises(ValueError, match=r"a tile takes 256 pixels"):
            open_backbone(folders["internvl"], BaseOptions(least, most))


def test_an_internvl_of_another_language_model_is_refused(tmp_path):
    folder = make_vl(tmp_path / "base", "internvl")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"model_type": "qwen2"', '"model_type": "llama"'))
    with pytest.raises(ValueError, match=r"the language model is llama; take an InternVL .* qwen2, qwen3"):
        open_backbone(folder)


def test_sizes_of_a_column_are_kept_until_pictures_are_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LLACA_CACHE", str(tmp_path / "cache"))
    names = Texts.of([f"{number}.png" for number in range(3)])
    for number in range(3):
        Image.new("RGB", (8 + number, 9)).save(tmp_path / f"{number}.png")
    assert picture_sizes(tmp_path, names).tolist() == [[8, 9], [9, 9], [10, 9]]
    Image.new("RGB", (70, 9)).save(tmp_path / "1.png")
    assert picture_sizes(tmp_path, names)[1].tolist() == [9, 9], "kept"
    samples = [Sample(0, "s", (("<image>\nq", "a"),), "1.png", 2)]
    columns = training_columns(samples, "last line", None)
    look([columns], tmp_path)
    assert picture_sizes(tmp_path, names)[1].tolist() == [70, 9]


def test_a_picture_that_comes_back_has_its_size(tmp_path, monkeypatch):
    """A folder that was away for a while, as one on a network, leaves no sizes of nothing behind."""
    monkeypatch.setenv("LLACA_CACHE", str(tmp_path / "cache"))
    names = Texts.of(["a.png", "b.png"])
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    assert picture_sizes(tmp_path, names).tolist() == [[0, 0], [8, 9]]
    Image.new("RGB", (10, 9)).save(tmp_path / "a.png")
    assert picture_sizes(tmp_path, names).tolist() == [[10, 9], [8, 9]]


def test_a_picture_that_was_swapped_is_named(folders, pictures, tmp_path):  # noqa: F811
    """In training by its record, in evaluation by its question."""
    Image.open(pictures[0]).save(tmp_path / "a.png")
    sample = Sample(0, "s0", (("<image>\nWhat?", "dog"),), str(tmp_path / "a.png"), 4)
    model, backbone = load_base(folders["qwen3_vl"])
    dataset = InstructionDataset.of_samples([sample], backbone, 512)
    ids = encode_questions(backbone, ["<image>\nWhat?"], [tmp_path / "a.png"])
    Image.open(pictures[2]).save(tmp_path / "a.png")
    with pytest.raises(OSError, match=r"record 0 \(id 's0'\): .*a\.png takes 4 tokens and took 15"):
        dataset[0]
    with pytest.raises(UnreadablePicture, match=r"a\.png takes 4 tokens and took 15"):
        list(answer_batches(Decoder(model, backbone, 3), ids, [tmp_path / "a.png"]))


def test_a_picture_that_the_base_cannot_take_is_named_by_the_check(folders, tmp_path):  # noqa: F811
    """Longer than 200 times its width. In a run that goes on unchecked its record is left out."""
    Image.new("RGB", (1, 201)).save(tmp_path / "line.png")
    Image.new("RGB", (1, 200)).save(tmp_path / "limit.png")
    backbone = open_backbone(folders["qwen2_5_vl"])
    samples = [Sample(n, f"s{n}", (("<image>\nq?", "a"),), name, 2) for n, name in enumerate(("line.png", "limit.png"))]
    columns = training_columns(samples, "last line", backbone.vocabulary)
    [problem] = Reader(backbone, {"T": 512}).problems("T", columns, np.arange(2), tmp_path)
    assert problem.record == 0 and problem.kind == "picture" and "more than 200 times as long" in problem.text
    asked = [Question(n, n, "q?\nSay it.", "q?", name) for n, name in enumerate(("limit.png", "line.png"))]
    tested = question_columns(asked, "last line", backbone.vocabulary)
    [problem] = Reader(backbone, {"T": 512}).problems("T", tested, np.arange(2), tmp_path)
    assert problem.record == 1 and "line.png: one side is more than 200 times" in problem.text
    dataset = InstructionDataset(columns, backbone, 512, tmp_path)
    assert [dataset.name(n) for n in range(len(dataset))] == ["record 1 (id 's1')"] and len(dataset.dropped) == 1
    assert len(dataset[0]["pixel_values"]) // 4 == backbone.picture_tokens(tmp_path, ["limit.png"])[0]
    with pytest.raises(OSError, match=r"line\.png cannot be used"):
        backbone.picture(tmp_path / "line.png")


def test_a_maximum_length_inside_the_picture_is_refused_and_one_behind_it_is_not(folders, pictures):  # noqa: F811
    backbone = open_backbone(folders["qwen3_vl"])
    [sample] = samples_of(pictures)[:1]
    whole = InstructionDataset.of_samples([sample], backbone, 512)[0]["input_ids"]
    last = whole.tolist().index(backbone.tokenizer.convert_tokens_to_ids("<|vision_end|>"))
    with pytest.raises(DataError, match="cuts the picture"):
        InstructionDataset.of_samples([sample], backbone, last - 1)
    with pytest.raises(DataError, match="no part of an answer"):
        InstructionDataset.of_samples([sample], backbone, last + 1)
    cut = InstructionDataset.of_samples([sample], backbone, len(whole) - 1)
    assert cut[0]["input_ids"].tolist() == whole[:-1].tolist()
