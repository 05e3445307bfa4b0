"""Inputs that failed once: small benchmarks, each with one fault, and what the check and a run make of them today."""

import json
import random
import re
import zlib

import numpy as np
import pytest
import yaml
from PIL import Image

from data.benchmark import open_benchmark
from data.check import check, check_benchmark
from data.pictures import load_image
from data.records import DataError
from llaca.config import load_recipe
from llaca.train import run
from llava.check import reader_of

QUESTION = "<image>\nWhat colour is it?\nAnswer with a word."


def record(number=0, question=QUESTION, answer="red", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "conversations": turns, "image": "a.png", **more}


def asked(number=0, **more):
    text = QUESTION.removeprefix("<image>\n")
    return {"question_id": str(number), "text": text, "answer": "red", "image": "a.png", **more}


@pytest.fixture
def bench(tmp_path):
    """Writes a benchmark of one task: train and test files as lists or as bytes, and its description."""

    def write(train=None, test=None, spec=None, **description):
        root = tmp_path / "bench"
        (root / "T").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(root / "a.png")
        for name, content in (("train", train), ("test", test)):
            if content is None:
                content = [(record if name == "train" else asked)(n) for n in range(6 if name == "train" else 4)]
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            (root / "T" / f"{name}.json").write_bytes(content)
        content = {"name": "x", "tasks": {"T": {"scoring": "open", "max_new_tokens": 4, **(spec or {})}}, **description}
        (root / "benchmark.yaml").write_text(yaml.safe_dump(content))
        return root

    return write


def problems(root, split="train", reader=None):
    """(number of the record, kind, text) of a file's problems."""
    report = check(open_benchmark(root), "original", ["T"], reader)
    return next(file.problems for file in report.files if file.split == split)


def train(root, base, *more, method="lora"):
    line = ["--data-root", str(root), "--base", str(base), "--lora_rank", "2", "--method", method, "--run", "r"]
    return run(load_recipe([*line, "--runs-dir", str(root / "runs"), *more]))


WHOLE = json.dumps([record(n, answer="rouge") for n in range(6)])
LINES = "\n".join(json.dumps(record(n)) for n in range(6)) + "\n"


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + WHOLE.encode(), LINES.encode()], ids=["byte-order mark", "lines"]
)
def test_a_byte_order_mark_and_json_lines_are_read(bench, content):
    root = bench(train=content)
    assert not problems(root)
    assert check(open_benchmark(root), "original").files[0].records == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (WHOLE.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (WHOLE.replace("rouge", "红色").encode("gbk"), "not UTF-8 text from line 1 on; save it as UTF-8"),
        (b"<!DOCTYPE html><html></html>", "web page.*download"),
        (WHOLE.encode()[:-40], "it ends there, so it may be cut short; correct that line"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "not JSON"),
        (b'{"a": 1}', "not a list of records"),
        (b"[]", "empty one"),
    ],
)
def test_what_a_file_is_instead_is_said_with_the_remedy(bench, content, words):
    for split in ("train", "test"):
        root = bench(**{split: content})
        found = problems(root, split)
        assert found[0].kind == "unreadable file" and re.search(words, found[0].text), found


def test_ids_of_training_records_are_used_by_nothing(bench, tiny_base):
    same = [record(0) for _ in range(3)]
    mixed = [record(3), {key: value for key, value in record().items() if key != "id"}, record(None, id=None)]
    root = bench(train=same + mixed)
    assert not problems(root) and (train(root, tiny_base) / "stages/01-T/DONE").is_file()


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("split", "spoilt", "words"),
    [
        ("train", record(3, question=f"<image>\nWhat {HALF}?"), r"question 1 holds \\ud83d, half of a character"),
        ("train", record(3, answer=f"red {HALF}"), "answer 1 holds"),
        ("train", record(3, image=f"{HALF}.png"), "image holds"),
        ("test", asked(3, text=f"What {HALF}?"), "the record holds"),
        ("test", asked(3, answer=HALF), "the record holds"),
    ],
)
def test_half_a_character_is_a_problem_of_its_record(bench, split, spoilt, words):
    whole = record if split == "train" else asked
    [(number, kind, text)] = problems(bench(**{split: [whole(0), spoilt, whole(2)]}), split)
    assert (number, kind) == (1, "broken character") and re.search(words, text) and "'3'" in text


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("data:image/png;base64," + "A" * 600, "is the picture itself, not its path; save it"),
        ("/9j/" + "A" * 60_000, "is the picture itself, not its path; save it"),
        ("B" * 400 + ".png", "cannot be the name of a file"),
        ("a\0.png", "cannot be the name of a file"),
        ("", "give a path relative"),
    ],
)
def test_a_picture_in_place_of_its_path_is_named_in_short(bench, image, words):
    root = bench(train=[record(0), record(1, image=image), record(2, image="gone.png")])
    first, second = problems(root)
    assert first.record == 1 and re.search(words, first.text) and len(first.text) < 400
    assert second.record == 2 and second.kind == "missing image", "the check goes on"


def test_pictures_of_16_bits_keep_their_shades(bench):
    root = bench(train=[record(0, image="deep.png"), record(1, image="deep.tif"), record(2, image="float.tif")])
    shades = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(shades).save(root / name)
        seen = np.asarray(load_image(root / name))
        assert np.array_equal(seen, np.repeat((shades // 257).astype(np.uint8)[..., None], 3, axis=2))
    Image.fromarray(shades.astype(np.float32)).save(root / "float.tif")
    [(number, kind, text)] = problems(root)
    assert (number, kind) == (2, "unreadable image") and "32 bits, whose range nobody states" in text


def test_a_picture_whose_pixels_do_not_decode_is_found_before_training(bench, tiny_base):
    """The checksums of a PNG can be right though its pixels are not."""
    root = bench(train=[record(0), record(1, image="b.png"), record(2, image="c.jpg")])
    content = bytearray((root / "a.png").read_bytes())
    at = content.index(b"IDAT")
    length = int.from_bytes(content[at - 4 : at], "big")
    data = b"\x00" * length
    crc = zlib.crc32(b"IDAT" + data).to_bytes(4, "big")
    content[at + 4 : at + 8 + length] = data + crc
    (root / "b.png").write_bytes(content)
    Image.effect_noise((64, 64), 50).save(root / "c.jpg")
    jpeg = (root / "c.jpg").read_bytes()
    (root / "c.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    assert [(p.record, p.kind) for p in problems(root)] == [(1, "unreadable image"), (2, "unreadable image")]
    with pytest.raises(DataError, match=r"(?s)b\.png.*c\.jpg"):
        train(root, tiny_base)
    folder = train(root, tiny_base, "--unchecked", "true", "--run", "unchecked")
    story = json.loads((folder / "stages/01-T/stage.json").read_text())
    assert (story["samples"], story["dropped_records"]) == (1, 2)


def test_a_record_that_is_too_long_is_found_by_the_check_and_left_out_of_an_unchecked_run(bench, tiny_base):
    long = record(1, question="<image>\n" + "What colour is it? " * 200)
    root = bench(train=[record(0), long, record(2)])
    [problem] = problems(root, reader=reader_of(tiny_base, {"T": 512}, False))
    assert (problem.record, problem.kind) == (1, "too long") and "raise max_length or shorten" in problem.text
    with pytest.raises(ValueError, match=r"(?s)record 1 \(id '1'\): the maximum length.*Nothing was trained"):
        check_benchmark(root, "original", ["T"], reader=reader_of(tiny_base, {"T": 512}, False))
    with pytest.raises(DataError, match=r"T/train\.json: 1 problem.*\n  record 1 \(id '1'\): the maximum length"):
        train(root, tiny_base, "--max_length", "512")
    folder = train(root, tiny_base, "--max_length", "512", "--unchecked", "true", "--run", "unchecked")
    story = json.loads((folder / "stages/01-T/stage.json").read_text())
    assert (story["samples"], story["dropped_records"]) == (2, 1)


def test_a_question_that_is_a_picture_alone_is_trained_where_nothing_groups(bench, tiny_base):
    root = bench(train=[record(n, question="<image>", answer="a red square") for n in range(4)])
    assert (train(root, tiny_base) / "stages/01-T/DONE").is_file()
    with pytest.raises(DataError, match=r"T/train\.json: 4 problem.*\n  record 0 .*no instruction \(last line\)"):
        train(root, tiny_base, "--run", "grouped", method="llaca")
    found = problems(root, reader=reader_of(tiny_base, {"T": 512}, True))
    assert [p.kind for p in found] == ["no instruction"] * 4


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"images": None}, "images must be a text; it is empty"),
        ({"images": ["a"]}, "images must be a text"),
        ({"instructions": {"original": None}}, "instructions: original must be a text; it is empty"),
        ({"spec": {"records": 6}}, "task T: records must be a mapping of splits to whole numbers"),
        ({"spec": {"max_new_tokens": "8"}}, "task T: max_new_tokens must be a whole number; it is '8'"),
        ({"spec": {"max_new_tokens": True}}, "must be a whole number; it is True"),
        ({"spec": {"folders": "T"}}, "task T: folders must be a list of texts"),
        ({"spec": {"test": None}}, "task T: test must be a text; it is empty"),
        ({"streams": {"s": "T"}}, "streams: s must be a list of texts"),
        ({"streams": ["T"]}, "streams must be a mapping"),
        ({"name": None}, "name must be a text; it is empty"),
    ],
)
def test_a_description_of_the_wrong_types_is_refused_in_one_sentence(bench, description, words):
    root = bench(**description)
    with pytest.raises(ValueError, match=words) as error:
        open_benchmark(root)
    assert str(error.value).startswith(f"{root / 'benchmark.yaml'}: ") and "\n" not in str(error.value)


def test_thousands_of_instructions_are_noted(bench):
    root = bench(train=[record(n, question=f"<image>\nName thing {n}") for n in range(1_200)])
    [file, _] = check(open_benchmark(root), "original").files
    assert not file.problems and "1,200 different instructions in 1,200 records" in file.notes[0]


def test_of_a_thousand_corruptions_none_gets_through(bench, tiny_base):
    """Each corrupted record is named, by its number, and no whole one is."""
    rng, root = random.Random(0), bench()
    (root / "text.png").write_text("no picture")
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:-20])

    def turns(*values):
        return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]

    ways = [
        lambda r: r.update(image=rng.choice(["gone.png", "text.png", "cut.png", "../a.png", "/a.png", 7, "", "a\0b"])),
        lambda r: r.update(image="data:image/png;base64," + "A" * rng.randint(1, 9_000)),
        lambda r: r.update(conversations=rng.choice([None, [], "text", 5, turns("q"), turns("q", "a", "q"), [1, 2]])),
        lambda r: r.update(conversations=turns("q", "a", "q", "b")[1:3]),
        lambda r: r.update(conversations=turns(*rng.choice([(" ", "a"), ("q", "\n"), ("q", 5), ("q", None)]))),
        lambda r: r.update(conversations=turns("q", "<image>")),
        lambda r: r.update(conversations=turns("<image>q", "a", "<image>q", "a")),
        lambda r: r.update(conversations=turns(*rng.sample([f"q {HALF}", "a"], 2))),
        lambda r: r.update(conversations=turns("What? " * 900, "a")),
        lambda r: (r.pop("image"), r.update(conversations=turns("<image>q", "a"))),
        lambda r: r.pop("conversations"),
    ]
    records, corrupted = [record(number) for number in range(2_000)], set(rng.sample(range(2_000), 1_000))
    for number in corrupted:
        rng.choice(ways)(records[number])
    for number in rng.sample(sorted(corrupted), 50):
        records[number] = rng.choice([None, "text", 5, []])
    root = bench(train=records)
    found = problems(root, reader=reader_of(tiny_base, {"T": 512}, False))
    assert {problem.record for problem in found} == corrupted
    assert all(f"record {p.record}" in p.text and len(p.text) < 800 for p in found)
