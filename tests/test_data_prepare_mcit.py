"""UCIT and MLLM-DCL: a release's layout becomes a benchmark; scores are those of MCITlib's evaluators."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data.answers import RuledAnswer
from data.benchmark import open_benchmark
from data.check import check
from data.prepare.mcit import LETTER, SHORT, UCIT_FOLDERS, YES_OR_NO, main, rule
from eval.score import QuestionSet, score_task
from eval.tasks import task_of

GOLDEN = json.loads((Path(__file__).parent / "golden/scores/mllm_dcl.json").read_text())


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def trained(image: str, question: str, answer: str, **own) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **own}


@pytest.fixture
def ucit(tmp_path):
    """Two records and two questions a task, in the release's files."""
    for task, names in UCIT_FOLDERS.items():
        folder, pictures = tmp_path / "instructions" / names[-1], [f"{task}/{i}.png" for i in (1, 2)]
        for picture in pictures:
            draw(tmp_path / "datasets" / picture)
        rows = [
            trained(picture, "What?", "A dog runs on a beach", question_id=f"t{n}")
            for n, picture in enumerate(pictures)
        ]
        write(folder / ("train_brief_4w.json" if task == "Flickr30k" else "train.json"), rows)
        asked = [{"question_id": n, "image": one, "text": "What?", "answer": "a Dog"} for n, one in enumerate(pictures)]
        write(folder / "test_3000.json", asked)
        if task in ("VizWiz", "Flickr30k"):
            said = ["A dog runs on a beach", "A brown dog at the sea", "Two men play chess", "Chess in a park"]
            told = [{"id": n, "image_id": 1 + n // 2, "caption": text} for n, text in enumerate(said)]
            images = [{"id": n, "file_name": f"{n}.png"} for n in (1, 2)]
            write(folder / "val_coco_type_3000.json", {"images": images, "annotations": told})
    return tmp_path


def test_ucit_is_written_checked_and_scored(ucit, capsys):
    main(["--benchmark", "ucit", "--root", str(ucit)])
    assert "VizWiz: 2 training records, 2 questions\n" in capsys.readouterr().out
    benchmark = open_benchmark(ucit)
    assert list(benchmark.tasks) == list(UCIT_FOLDERS) and benchmark.image_root == ucit / "datasets"
    report = check(benchmark, "original")
    assert report.ok and report.records == 6 * 4
    assert "40,000" in report.text() and "-39,998 records" in report.text(), "the known number stands beside"
    captions = task_of(ucit, "VizWiz").load_references(ucit)
    assert captions["1"] == ("Two men play chess", "Chess in a park")
    rows = [{"question_id": n, "text": text} for n, text in enumerate(("A dog runs on a beach", "A cat"))]
    scores = score_task(rows, QuestionSet(ucit, "VizWiz")).per_question
    assert scores["0"]["official"] > 0.5 > scores["1"]["official"]
    task = task_of(ucit, "ImageNet-R")
    assert task.official("A DOG", task.load_references(ucit)["0"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["annotations"].pop(), None),
        (
            lambda content: content.update(annotations=content["annotations"][:2]),
            "captions of 1 pictures, not of 1 to 2; take files of one release",
        ),
        (
            lambda content: content["images"][1].update(file_name="COCO/9.png"),
            "picture 2 is 9.png, of the questions it is 2",
        ),
        (lambda content: content["annotations"][0].pop("caption"), "annotation 0: 'caption' is missing"),
        (lambda content: content["annotations"].insert(0, 7), "annotation 0: no object"),
        (lambda content: content["images"].insert(0, {"id": [1]}), "picture of it: 'id'"),
    ],
)
def test_captions_of_other_questions_are_refused(ucit, change, message):
    path = ucit / "instructions/Flickr30k-cap/val_coco_type_3000.json"
    content = json.loads(path.read_text())
    change(content)
    write(path, content)
    if message is None:  # a picture may have one caption less
        return main(["--benchmark", "ucit", "--root", str(ucit)])
    with pytest.raises(SystemExit, match=message) as error:
        main(["--benchmark", "ucit", "--root", str(ucit)])
    assert path.name in str(error.value) and not (ucit / "tasks").exists()


def test_mllm_dcl_is_written_checked_and_scored(tmp_path, capsys):
    questions = {
        "RS": ("How many?", "3"),
        "Med": ("What?", "necrosis"),
        "AD": ("Turn?", "No."),
        "Sci": ("Which states are red?", "Ohio,Iowa"),
        "Fin": ("Up?", "Yes"),
    }
    for task, (question, answer) in questions.items():
        draw(tmp_path / task / "images/MapQA_1.png")
        row = trained("images/MapQA_1.png", f"{question} {YES_OR_NO}" if task == "Fin" else question, answer)
        write(tmp_path / task / "train.json", [row])
        asked = {"question_id": "q", "image": "images/MapQA_1.png", "text": question, "answer": answer}
        write(tmp_path / task / "test.json", [asked, {**asked, "question_id": "r", "answer": "B"}])
    main(["--benchmark", "mllm_dcl", "--root", str(tmp_path)])
    told = capsys.readouterr().out
    assert "Med: 1 training records, 2 questions; the evaluation's sentence ends 0 of the training questions" in told
    assert "Fin: 1 training records, 2 questions; the evaluation's sentence ends 1 of the training questions" in told
    report = check(open_benchmark(tmp_path), "original")
    assert report.ok and report.records == 5 * 3
    tests = {task: json.loads((tmp_path / "tasks" / task / "test.json").read_text()) for task in questions}
    assert {task: rows[0]["image"] for task, rows in tests.items()} == {t: f"{t}/images/MapQA_1.png" for t in questions}
    assert tests["Med"][0]["text"] == f"What? {SHORT}" and tests["RS"][0]["text"] == "How many?"
    assert [row["text"] for row in tests["Fin"]] == [f"Up? {YES_OR_NO}", f"Up? {LETTER}"]
    rows = [{"question_id": "q", "text": "iowa, Maine"}, {"question_id": "r", "text": "B"}]
    scored = score_task(rows, QuestionSet(tmp_path, "Sci"))
    assert scored.per_question["q"]["official"] == 0.5 and scored.accuracy["official"] == 75
    before = (tmp_path / "tasks/Fin/test.json").read_bytes()
    main(["--benchmark", "mllm_dcl", "--root", str(tmp_path)])
    assert (tmp_path / "tasks/Fin/test.json").read_bytes() == before
    write(tmp_path / "Sci/test.json", [{"question_id": "q", "text": "Which?", "answer": "B"}])
    with pytest.raises(SystemExit, match=r"Sci/test.json, record 0: 'image' is missing"):
        main(["--benchmark", "mllm_dcl", "--root", str(tmp_path)])
    (tmp_path / "AD/train.json").unlink()
    with pytest.raises(SystemExit, match=r"AD/train.json"):
        main(["--benchmark", "mllm_dcl", "--root", str(tmp_path)])


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['task']}-{case['said']}")
def test_scores_are_those_of_the_released_evaluators(tmp_path, case):
    (tmp_path / "benchmark.yaml").write_text(f"name: D\ntasks: {{{case['task']}: {{scoring: mllm_dcl}}}}")
    task = task_of(tmp_path, case["task"])
    reference = RuledAnswer(case["answer"], rule(case["task"], case, "here"))
    legacy = task.legacy(case["said"], reference)
    assert round(100 * legacy, 2) == case["percent"]
    assert task.lenient(case["said"], reference) >= task.official(case["said"], reference) >= legacy


def test_a_rule_that_there_is_not_is_an_error(tmp_path):
    (tmp_path / "benchmark.yaml").write_text("name: D\ntasks: {RS: {scoring: mllm_dcl}}")
    write(tmp_path / "RS/test.json", [{"question_id": 1, "text": "?", "answer": "a", "rule": "near"}])
    with pytest.raises(ValueError, match="question_id 1: 'rule' 'near' is not known; choose one of part, word"):
        task_of(tmp_path, "RS").load_references(tmp_path)
