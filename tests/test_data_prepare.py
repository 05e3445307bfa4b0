"""CoIN's JSON from official releases: tiny releases in the official schemas, and the records written out by hand."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from releases import RELEASES, TEST, TRAIN, draw, made, save

from data.prepare.__main__ import READERS, main, prepare
from data.prepare.plain_pickle import load_plain
from data.prepare.write import Choices
from data.records import instruction_of, load_questions, load_samples
from eval.score import QuestionSet, score_task
from eval.tasks import TASKS

REPOSITORY = Path(__file__).parents[1]
WORDINGS = json.loads((REPOSITORY / "data" / "instructions.json").read_text())["instructions"]
FOLDERS = {"original": "Instructions", "diverse": "Instructions_Diverse", "10type": "Instructions_10Type"}
PHRASE = "Answer the question using a single word or phrase"
ORIGINAL = {
    "ScienceQA": "Answer with the option's letter from the given choices directly",
    "ImageNet": "Answer the object in the image using a single word or phrase",
    "Grounding": "Please provide the bounding box coordinate of the region this sentence describes",
    **dict.fromkeys(("TextVQA", "GQA", "VizWiz", "VQAv2", "OCR-VQA"), PHRASE),
}
DIVERSE = ORIGINAL | {
    "TextVQA": "Capture the essence of your response in a single word or a concise phrase",
    "ImageNet": "Express the object in the image in a single word or a short, descriptive phrase",
    "GQA": "Respond to the question briefly, using only one word or a phrase",
    "VizWiz": "Provide a succinct response with a single word or phrase",
    "OCR-VQA": "Condense your answer for each question into a single word or concise phrase",
}


def instructed(records: list[dict], instruction: str) -> list[dict]:
    """The hand-written records with the instruction in its place."""
    return json.loads(json.dumps(records).replace("{}", instruction))


def run(task: str, source: Path, root: Path, **options) -> list[str]:
    if task == "ImageNet":
        options.setdefault("synsets", source / "synsets.txt")
    return prepare(task, source, root, Choices(**options))


def written(root: Path) -> dict[str, bytes]:
    """Every file below the instruction sets, by its path there."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("Instructions*/*/*"))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data root with all eight tasks."""
    folder = tmp_path_factory.mktemp("prepared")
    for task in RELEASES:
        run(task, *made(task, folder))
    return folder / "root"


def read(root: Path, which: str, task: str, split: str) -> list[dict]:
    evaluated = "val" if task in ("TextVQA", "VizWiz", "VQAv2") else "test"
    name = "train.json" if split == "train" else f"{evaluated}.json"
    return json.loads((root / FOLDERS[which] / task / name).read_text())


# --- records ---


def test_the_eight_tasks_have_readers():
    assert list(READERS) == list(TASKS) == list(RELEASES)


@pytest.mark.parametrize("task", RELEASES)
@pytest.mark.parametrize(("which", "wording"), [("original", ORIGINAL), ("diverse", DIVERSE)])
def test_records_are_those_written_by_hand(prepared, task, which, wording):
    assert read(prepared, which, task, "train") == instructed(TRAIN[task], wording[task])
    assert read(prepared, which, task, "test") == instructed(TEST[task], wording[task])


@pytest.mark.parametrize("task", RELEASES)
def test_10type_holds_the_same_records_in_drawn_wordings(prepared, task):
    for split, expected in (("train", TRAIN[task]), ("test", TEST[task])):
        rows = read(prepared, "10type", task, split)
        assert len(rows) == len(expected)
        for row, record in zip(rows, expected, strict=True):
            assert row in [instructed([record], wording)[0] for wording in WORDINGS[task]["10type"]]


def test_the_seed_draws_the_wordings_of_10type_and_nothing_else(tmp_path):
    source, root = made("GQA", tmp_path)
    outputs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        shutil.copytree(root, tmp_path / name)
        run("GQA", source, tmp_path / name, seed=seed)
        outputs.append(written(tmp_path / name))
    first, again, *others = outputs
    assert first == again
    changed = {path for other in others for path in first if other[path] != first[path]}
    assert changed and all(path.startswith("Instructions_10Type/") for path in changed)
    ids = [[row["question_id"] for row in json.loads(files["Instructions_10Type/GQA/test.json"])] for files in outputs]
    assert ids == [["201307251", "201640614"]] * 4


def test_a_wording_depends_on_seed_task_and_record_id_alone(prepared, tmp_path):
    """The same question keeps its wording when the records before it are gone."""
    source, alone = made("GQA", tmp_path)
    content = json.loads((source / "testdev_balanced_questions.json").read_text())
    save(source / "testdev_balanced_questions.json", {"201640614": content["201640614"]})
    run("GQA", source, alone)
    (record,) = read(alone, "10type", "GQA", "test")
    assert record == read(prepared, "10type", "GQA", "test")[1]
    drawn = "Respond to the question using just one word or a concise phrase"  # by seed 0
    assert record["text"] == f"Who is wearing the dress?\n{drawn}"


def test_only_the_wanted_sets_are_written(tmp_path):
    source, root = made("VizWiz", tmp_path)
    run("VizWiz", source, root, instructions=["diverse"])
    assert list(written(root)) == ["Instructions_Diverse/VizWiz/train.json", "Instructions_Diverse/VizWiz/val.json"]


# --- what reads them ---


@pytest.mark.parametrize("task", RELEASES)
@pytest.mark.parametrize("which", FOLDERS)
def test_the_loaders_take_them_and_right_answers_score_100(prepared, task, which):
    samples = load_samples(TASKS[task].train_file(prepared, which), prepared / "cl_dataset")
    assert [sample.id for sample in samples] == [record["id"] for record in TRAIN[task]]
    questions = load_questions(TASKS[task].question_file(prepared, which), prepared / "cl_dataset")
    assert [q.image is None for q in questions] == ["image" not in record for record in TEST[task]]
    key = "answer_bbox" if task == "Grounding" else "answer"
    rows = [{"question_id": record["question_id"], "text": record[key]} for record in TEST[task]]
    score = score_task(rows, QuestionSet(prepared, task, which))
    assert score.accuracy["official"] == 100 and score.missing == 0 and score.n == len(TEST[task])


@pytest.mark.parametrize("task", RELEASES)
def test_grouping_finds_the_instruction_in_every_prompt(prepared, task):
    for which, wordings in (
        ("original", [ORIGINAL[task]]),
        ("diverse", [DIVERSE[task]]),
        ("10type", WORDINGS[task]["10type"]),
    ):
        texts = [record["conversations"][0]["value"] for record in read(prepared, which, task, "train")]
        texts += [record["text"] for record in read(prepared, which, task, "test")]
        assert {instruction_of(text, TASKS[task].spec.instruction) for text in texts} <= set(wordings)


def test_the_annotations_that_scoring_reads_are_copied(prepared):
    names = {"problems.json": "ScienceQA", "pid_splits.json": "ScienceQA", "TextVQA_0.5.1_val.json": "TextVQA"}
    for name, task in {**names, "testdev_balanced_questions.json": "GQA"}.items():
        official = prepared.parent / "official" / task / name
        assert (prepared / "cl_dataset" / task / name).read_bytes() == official.read_bytes()
    assert not list(prepared.rglob("*.partial"))


# --- task by task ---


def test_textvqa_without_ocr_files_has_no_line_for_it_and_says_so(tmp_path):
    source, root = made("TextVQA", tmp_path)
    for split in ("train", "val"):
        (source / f"TextVQA_Rosetta_OCR_v0.2_{split}.json").unlink()
    report = run("TextVQA", source, root)
    assert read(root, "original", "TextVQA", "test")[1]["text"] == f"what does it say?\n{PHRASE}"
    assert any("no 'Reference OCR token' line" in line for line in report)


def test_imagenet_takes_all_classes_and_validation_folders(tmp_path):
    source, root = made("ImageNet", tmp_path)
    shutil.rmtree(root / "cl_dataset/ImageNet_withlabel/val")
    for number, synset in enumerate(("n01440764", "n01443537", "n02119789")):
        draw(root, f"ImageNet_withlabel/val/{synset}/val_{number}.JPEG")
    (source / "LOC_val_solution.csv").unlink()
    report = prepare("ImageNet", source, root)
    answers = [record["answer"] for record in read(root, "original", "ImageNet", "test")]
    assert answers == ["tench", "goldfish", "kit fox"]
    assert report[0].startswith("ImageNet: 4 (CoIN: ")


def test_imagenet_names_that_two_classes_share_are_reported(tmp_path):
    source, root = made("ImageNet", tmp_path)
    path = source / "LOC_synset_mapping.txt"
    path.write_text(path.read_text().replace("kit fox", "Tench"))
    assert any("2 classes are called 'tench'" in line for line in run("ImageNet", source, root))


# --- pickles ---


class Harmful:
    """Unpickled the usual way it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    source, root = made("Grounding", tmp_path)
    path = source / "refcoco+" / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"sentences": Harmful(tmp_path / "made by the pickle")}], protocol=protocol))
    with pytest.raises(ValueError, match=r"refcoco\+/refs\(unc\)\.p: not a pickle of plain .*it names .*\.mkdir"):
        run("Grounding", source, root)
    assert not (tmp_path / "made by the pickle").exists() and not written(root)


@pytest.mark.parametrize(
    "content", [pickle.dumps([OrderedDict(a=1)]), pickle.dumps([{"a": 1}])[:-3], b"", b"refs", pickle.dumps({"a": 1})]
)
def test_other_files_than_plain_lists_are_refused(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p: (not a pickle of plain|expected a list)"):
        load_plain(path)


def test_a_pickle_of_python_2_is_read(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'split'\np2\nS'testA'\np3\nsS'sent'\nVcaf\\u00e9\np4\nsS'ref_id'\nI7\nsa.")
    assert load_plain(path) == [{"split": "testA", "sent": "café", "ref_id": 7}]


# --- what is unusable, missing or broken ---


def test_questions_without_answer_or_text_are_counted(tmp_path):
    source, root = made("VQAv2", tmp_path)
    path = source / "v2_mscoco_train2014_annotations.json"
    path.write_text(path.read_text().replace('"multiple_choice_answer": "green"', '"multiple_choice_answer": " "'))
    path = source / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(path.read_text().replace("Is it?", ""))
    report = run("VQAv2", source, root)
    assert "VQAv2: questions left out without an answer: 1" in report
    assert "VQAv2: questions left out without a question text: 1" in report
    assert len(read(root, "original", "VQAv2", "train")[0]["conversations"]) == 2
    assert [record["question_id"] for record in read(root, "original", "VQAv2", "test")] == [42000]


def test_a_box_without_area_is_no_answer(tmp_path):
    source, root = made("Grounding", tmp_path)
    path = source / "refcoco" / "instances.json"
    path.write_text(path.read_text().replace("[0, 0, 100, 60]", "[0, 0, 0, 60]"))
    assert "Grounding: questions left out without an answer: 1" in run("Grounding", source, root)


@pytest.mark.parametrize(
    ("task", "name", "record"),
    [
        ("ScienceQA", "ScienceQA/images/test/3/image.png", "3"),
        ("TextVQA", "TextVQA/train_images/0098e9.jpg", "34603"),
        ("ImageNet", "ImageNet_withlabel/val/val_1.JPEG", "val_1"),
        ("GQA", "GQA/images/2370799.jpg", "2370799"),
        ("OCR-VQA", "OCR-VQA/images/1449407501.gif", "1449407501-0"),
    ],
)
def test_a_missing_picture_is_an_error_or_left_out(tmp_path, task, name, record):
    source, root = made(task, tmp_path)
    (root / "cl_dataset" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such picture \(record {record}\)"):
        run(task, source, root)
    assert not written(root)
    if task != "OCR-VQA":  # there it is the only book of the split
        lines = run(task, source, root, skip_missing=True)
        lost = 2 if task == "GQA" else 1
        assert f"{task}: questions left out without their picture: {lost}" in lines
        kept = read(root, "original", task, "train") + read(root, "original", task, "test")
        assert len(kept) == len(TRAIN[task]) + len(TEST[task]) - 1


def test_a_release_of_which_nothing_is_left_is_an_error(tmp_path):
    source, root = made("OCR-VQA", tmp_path)
    (root / "cl_dataset/OCR-VQA/images/1449407501.gif").unlink()
    with pytest.raises(ValueError, match="no usable evaluated records of OCR-VQA"):
        run("OCR-VQA", source, root, skip_missing=True)


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, files in RELEASES.items() for name in files])
def test_a_missing_file_is_named(tmp_path, task, name):
    source, root = made(task, tmp_path)
    (source / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        run(task, source, root)
    assert str(source / name) in str(error.value) and not written(root)


BROKEN = [  # task, file, what stands there, what is put in its place, what the message must hold
    ("ScienceQA", "problems.json", '"answer": 1, "hint": "Read', '"answer": 2, "hint": "Read', "record 2: answer 2 of"),
    ("ScienceQA", "problems.json", '"choices": ["sand", "rain"]', '"choices": ["sand", 4]', "record 2: choices must"),
    ("ScienceQA", "pid_splits.json", '"test": ["3"', '"test": ["33"', "record 33: '33' is missing"),
    ("ScienceQA", "pid_splits.json", '"test"', '"tset"', "pid_splits.json: 'test' is missing"),
    ("TextVQA", "TextVQA_0.5.1_val.json", '"question_id": 34603', '"question_id": "x"', "record 1: 'question_id'"),
    ("TextVQA", "TextVQA_0.5.1_val.json", '"question_id": 34603', '"question_id": 34602', "record 34602 of TextVQA"),
    ("TextVQA", "TextVQA_0.5.1_train.json", '["nous", ', "[", "record 0: 'answers' must hold 10"),
    ("TextVQA", "TextVQA_Rosetta_OCR_v0.2_train.json", "0054c9", "1154c9", "image_id 0054c9 is not in"),
    ("ImageNet", "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca", "n01440764", "n01440764: has no name"),
    ("ImageNet", "LOC_val_solution.csv", "val_2,n01443537 1 2 3 4 ", "val_2,", "line 3: ImageId or"),
    ("ImageNet", "synsets.txt", "n01440764", "n01440765", "synset n01440765: is not in"),
    ("GQA", "train_balanced_questions.json", '"imageId": "2370800"', '"imageId": 7', "record 04611: 'imageId'"),
    ("GQA", "testdev_balanced_questions.json", '"question": "Who', '"q": "Who', "record 201640614: 'question'"),
    ("GQA", "testdev_balanced_questions.json", "}", "", "not valid JSON"),
    ("VizWiz", "val.json", '{"answer": "black", "answer_confidence": "yes"}, ', "", "record 0: 'answers' must hold 10"),
    ("VizWiz", "train.json", '"image": "a.jpg"', '"image": null', "record 0: 'image'"),
    ("VizWiz", "train.json", "[", '{"data": [', "not valid JSON"),
    ("Grounding", "refcoco/instances.json", '"id": 12,', '"id": 99,', "record 1: ann_id 12 is not in refcoco/inst"),
    ("Grounding", "refcoco/instances.json", '"id": 2,', '"id": 3,', "record 1: image_id 2 is not in refcoco/inst"),
    ("Grounding", "refcocog/instances.json", "[20, 50, 40, 100]", "[20, 50, 40]", "annotation 1: bbox [20, 50, 40]"),
    ("Grounding", "refcocog/instances.json", '"width": 80', '"width": 0', "image 1: width 0 and height 200"),
    ("Grounding", "refcoco+/refs(unc).p", "testB", "testC", "refs(unc).p: nothing of split testB"),
    ("VQAv2", "v2_mscoco_val2014_annotations.json", "42001", "42009", "record 1: question_id 42001 has no annotation"),
    ("VQAv2", "v2_mscoco_val2014_annotations.json", '"annotations"', '"a"', "'annotations' is missing"),
    ("OCR-VQA", "dataset.json", '"split": 3', '"split": 4', "record 1449407501: split 4 is none of"),
    ("OCR-VQA", "dataset.json", '["Joe Day", ', "[", "record 1449407501: questions and answers"),
    ("OCR-VQA", "dataset.json", "52.gif", "52", "record 1449407501: the imageURL's file"),
]


@pytest.mark.parametrize(("task", "name", "old", "new", "message"), BROKEN)
def test_a_broken_record_is_named_and_nothing_written(tmp_path, task, name, old, new, message):
    source, root = made(task, tmp_path)
    content = (source / name).read_text()
    assert old in content
    (source / name).write_text(content.replace(old, new, 1) if name.endswith("json") else content.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(task, source, root)
    assert str(source) in str(error.value) and not written(root)


def test_unknown_names_are_refused(tmp_path):
    source, root = made("VizWiz", tmp_path)
    with pytest.raises(ValueError, match="task 'VizWis' is not known; choose one of ScienceQA, "):
        prepare("VizWis", source, root)
    with pytest.raises(ValueError, match="instruction set 'new' is not known"):
        prepare("VizWiz", source, root, Choices(["new"]))
    with pytest.raises(ValueError, match="--synsets chooses classes of ImageNet"):
        prepare("VizWiz", source, root, Choices(synsets=source / "train.json"))


# --- files that are there already ---


def test_other_content_is_not_overwritten_unless_told(tmp_path):
    source, root = made("GQA", tmp_path)
    mine = root / "Instructions" / "GQA" / "test.json"
    save(mine, ["mine"])
    with pytest.raises(FileExistsError, match=r"Instructions/GQA/test\.json: is there with other content; .*overwrite"):
        run("GQA", source, root)
    assert list(written(root)) == ["Instructions/GQA/test.json"] and json.loads(mine.read_text()) == ["mine"]
    run("GQA", source, root, overwrite=True)
    before = mine.stat().st_mtime_ns
    run("GQA", source, root)
    assert mine.stat().st_mtime_ns == before, "a file with the same content is left alone"


def test_the_official_files_may_lie_in_the_image_root(tmp_path):
    source, root = made("ScienceQA", tmp_path)
    for path in source.iterdir():
        shutil.move(path, root / "cl_dataset" / "ScienceQA")
    run("ScienceQA", root / "cl_dataset" / "ScienceQA", root)
    assert (root / "cl_dataset/ScienceQA/problems.json").is_file()


def test_a_folder_under_coins_other_name_is_used(tmp_path):
    source, root = made("OCR-VQA", tmp_path)
    (root / "Instructions" / "OCRVQA").mkdir(parents=True)
    run("OCR-VQA", source, root, instructions=["original"])
    assert list(written(root)) == ["Instructions/OCRVQA/test.json", "Instructions/OCRVQA/train.json"]


# --- the command ---


def test_the_command_end_to_end(tmp_path):
    source, root = made("ImageNet", tmp_path)
    command = [sys.executable, "-m", "data.prepare", "--task", "ImageNet", "--source", source, "--root", root]
    command += ["--instructions", "original", "10type", "--seed", "3", "--synsets", source / "synsets.txt"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"ImageNet: 3 .*training records, 3 questions.*\nImageNet: 2 .*evaluated questions\n", done.stdout)
    assert {path.split("/")[0] for path in written(root)} == {"Instructions", "Instructions_10Type"}


def test_the_command_ends_with_one_message(tmp_path):
    source, root = made("GQA", tmp_path)
    (source / "train_balanced_questions.json").unlink()
    with pytest.raises(SystemExit) as end:
        main(["--task", "GQA", "--source", str(source), "--root", str(root)])
    assert str(end.value).startswith(f"data.prepare: {source / 'train_balanced_questions.json'}: no such file")
