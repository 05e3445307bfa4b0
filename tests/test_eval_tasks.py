"""Each task's reading of an answer: the rules, the released evaluators' slips, and what is forgiven."""

import json
import random
from pathlib import Path

import pytest

from data.answers import Answer, GQAAnswer, Options, Region
from data.benchmark import TaskSpec
from data.boxes import exact_box
from data.references import FILES
from eval.tasks import SCORING, TASKS
from eval.tasks.base import OpenQuestionTask
from eval.tasks.grounding import intersection_over_union, legacy_box, loose_box
from eval.tasks.words import consensus, forgiving, normalise

GOLDEN = Path(__file__).parent / "golden" / "scores"
ANIMALS = Options(("a frog", "a cat", "a dog"), answer=2)


def scores(task, text, reference):
    """(official, legacy, lenient) of one answer."""
    task = TASKS[task]
    return task.official(text, reference), task.legacy(text, reference), task.lenient(text, reference)


def test_what_is_scored_is_what_is_checked():
    assert list(SCORING) == list(FILES)
    assert all(issubclass(SCORING[name], FILES[name]) for name in FILES)


# --- words ---


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Coca-Cola's", "coca cola 's"),
        ("1,000.50", "1000.50"),
        ("St. John's", "st john 's"),
        ("a b.c", "bc"),
        ("dont", "don't"),
        ("wouldn'tve", "wouldn't've"),
        ("None", "0"),
        ("U.S.A.", "usa"),
        ("10:30", "10:30"),
        ("3.5", "3.5"),
        ("the $5", "$5"),
        ("x - y", "x y"),
        ("x-y", "x y"),
        (".", ""),
        ("." * 40, "." * 8),  # 32 full stops go, no more
    ],
)
def test_normal_form_of_the_original_evaluator(raw, normal):
    assert normalise(raw) == normal


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_consensus_by_number_of_agreeing_annotators(agreeing, score):
    answers = ["Red."] * agreeing + ["blue"] * (10 - agreeing)
    random.Random(0).shuffle(answers)
    assert consensus("red", answers) == pytest.approx(score)


def test_official_accuracy_of_vqav2_and_vizwiz_is_their_evaluators():
    cases = json.loads((GOLDEN / "vqa_official.json").read_text(encoding="utf-8"))
    seen = set()
    for case in cases:
        annotators = [answer for answer, count in case["answers"].items() for _ in range(count)]
        reference = Answer(annotators[0], tuple(annotators))
        for task in ("VQAv2", "VizWiz"):
            official, _, lenient = scores(task, case["prediction"], reference)
            assert round(100 * official, 10) == case[task.lower()], (task, case)
            assert official <= lenient <= 1
        seen.add((case["vqav2"], case["vizwiz"]))
    assert len(cases) > 400 and len(seen) > 12, "the cases hold all sorts of scores"


@pytest.mark.parametrize(
    ("said", "answers", "vqav2", "vizwiz", "textvqa"),
    [
        ("two", ["2"] * 10, 0, 1, 1),  # all the same: VQAv2 compares them as they are
        ("2", ["two"] * 10, 0, 0, 1),  # VizWiz puts the prediction alone into the normal form
        ("dog", ["a dog"] * 10, 0, 0, 1),
        ("Yes", ["yes"] * 10, 0, 1, 1),
        ("red white", ["red,white"] * 9 + ["red"], 1, 0, 0),  # a comma becomes a space; TextVQA deletes it
        ("redwhite", ["red,white"] * 9 + ["red"], 0, 0, 1),
        ("dont", ["don't"] * 5 + ["do not"] * 5, 1, 0, 1),
        ("dont", ["don’t"] * 5 + ["do not"] * 5, 0, 1, 0),
    ],
)
def test_where_the_three_evaluators_differ(said, answers, vqav2, vizwiz, textvqa):
    reference = Answer(answers[0], tuple(answers))
    given = [TASKS[task].official(said, reference) for task in ("VQAv2", "VizWiz", "TextVQA")]
    assert given == [vqav2, vizwiz, textvqa]
    own = OpenQuestionTask(TaskSpec("T", "open", ("T",)))
    assert own.official(said, reference) == textvqa, "one's own benchmark has TextVQA's rule"


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("The Red.", "red", True),
        ("It is red, I think", "red", True),
        ("reddish", "red", False),
        ("two", "2", True),
        ("no, yes would be wrong", "yes", False),
        ("", "red", False),
        ("the", "a", False),  # both are nothing once articles are gone
    ],
)
def test_what_is_forgiven(said, wanted, right):
    assert forgiving(said, wanted) is right


# --- the tasks ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", (1, 1, 1)),
        ("C.", (1, 1, 1)),
        ("(c)", (1, 1, 1)),
        ("C. a dog", (1, 1, 1)),
        ("The answer is C.", (1, 1, 1)),
        ("B", (0, 0, 0)),
        ("E", (0, 0, 0)),
        ("", (0, 0, 0)),
        ("dog", (0, 0, 1)),
        ("It shows a dog", (0, 0, 1)),  # legacy reads the article as option A
        ("I choose C here", (0, 0, 1)),  # legacy reads the pronoun as option I
        ("a cat or a dog", (0, 0, 0)),
        ("7 C", (0, 0, 1)),
        # ScienceQA's own: "The answer is X." stands once, wherever it is, and the reason behind it does not matter.
        ("The answer is C. BECAUSE: a dog is the largest, and A is not.", (1, 1, 1)),
        ("The answer is C.\nBECAUSE: A is wrong.", (1, 1, 1)),
        ("LECTURE: B is a cat. The answer is C.", (1, 0, 1)),
        ("The answer is C, not A", (1, 1, 1)),  # any character may stand behind the letter
        ("The answer is Cats.", (1, 0, 1)),  # also one of the same word
        ("The answer is B. BECAUSE: C is wrong.", (0, 0, 0)),
        ("The answer is C. The answer is C.", (0, 1, 1)),  # twice is not once
        ("The answer is A. No, the answer is C.", (0, 0, 0)),
        ("The answer is E. BECAUSE: C is wrong.", (0, 0, 0)),
        ("the answer is (C). BECAUSE: A is wrong.", (0, 1, 1)),
        ("C because A is wrong", (0, 1, 1)),
        ("a dog BECAUSE: a cat is smaller, B", (0, 0, 1)),
        ("because A and B are wrong, C", (0, 0, 0)),
    ],
)
def test_scienceqa(text, expected):
    assert scores("ScienceQA", text, ANIMALS) == expected


def test_scienceqa_legacy_reads_an_article_as_an_option():
    assert scores("ScienceQA", "It is a cat", Options(("a frog", "a cat"), answer=0)) == (0, 1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", (1, 1, 1)),
        ("Cat", (1, 0, 1)),
        ("", (0, 1, 0)),
        ("at", (0, 1, 0)),
        ("catamaran", (0, 1, 0)),
        ("a cat.", (0, 1, 1)),
    ],
)
def test_imagenet(text, expected):
    assert scores("ImageNet", text, Answer("cat")) == expected


@pytest.mark.parametrize("task", ["VizWiz", "VQAv2", "OCR-VQA"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("RED BUS", (1, 1, 1)), (" red bus", (1, 0, 1)), ("red bus.", (0, 0, 1)), ("bus", (0, 0, 0))],
)
def test_single_answer_tasks(task, text, expected):
    assert scores(task, text, Answer("red bus")) == expected


def test_ocrvqa_legacy_rejects_unanswerable_even_where_it_is_right():
    assert scores("OCR-VQA", "Unanswerable", Answer("Unanswerable")) == (1, 0, 1)
    assert scores("VizWiz", "Unanswerable", Answer("unanswerable")) == (1, 1, 1)


def test_ten_annotators_are_scored_by_consensus():
    reference = Answer("red", ("red",) * 3 + ("crimson",) * 7)
    official, legacy, lenient = scores("VQAv2", "red", reference)
    assert (official, legacy, lenient) == (pytest.approx(0.9), 1, pytest.approx(0.9))
    assert scores("TextVQA", "it says crimson", reference) == (0, 0, 1)


def test_gqa():
    question = GQAAnswer("red", balanced=True, open=True, group=None)
    assert scores("GQA", "Red..", question) == (1, 1, 1)
    assert scores("GQA", "the red", question) == (0, 0, 1)


@pytest.mark.parametrize(
    ("text", "exact", "legacy", "loose"),
    [
        ("[0.1, 0.2, 0.5, 0.783]", (0.1, 0.2, 0.5, 0.783), (0.1, 0.2, 0.5, 0.78), (0.1, 0.2, 0.5, 0.783)),
        ("0.1,0.2,0.5,0.5", (0.1, 0.2, 0.5, 0.5), (0.1, 0.2, 0.5, 0), (0.1, 0.2, 0.5, 0.5)),
        ("[0.1, 0.2, 0.5]", None, None, None),
        ("the box (.1 .2 .5 .5).", None, None, (0.1, 0.2, 0.5, 0.5)),
        ("x1=0.1 y1=0.2 x2=0.5 y2=0.5", None, None, (0.1, 0.2, 0.5, 0.5)),
        ("no box", None, None, None),
        ("[7.8125e-05, .2, 5e-1, 1E+0]", (7.8125e-05, 0.2, 0.5, 1), None, (7.8125e-05, 0.2, 0.5, 1)),
        ("[1e-05,0.2,0.5,0.6]", (1e-05, 0.2, 0.5, 0.6), None, (1e-05, 0.2, 0.5, 0.6)),
        ("x1=7.8125e-05 y1=0.2 x2=0.5 y2=0.5", None, None, (7.8125e-05, 0.2, 0.5, 0.5)),
        ("[0.1, 0.2, 0.5, 1e999]", None, (0.1, 0.2, 0.5, 1e99), None),  # not finite
        ("[nan, 0.2, inf, Infinity]", None, None, None),
        ("[0.1, 0.2, 0.5e, 0.6]", None, None, (0.1, 0.2, 0.5, 0.6)),
    ],
)
def test_reading_boxes(text, exact, legacy, loose):
    assert (exact_box(text), legacy_box(text), loose_box(text)) == (exact, legacy, loose)


def test_overlap_against_counted_pixels():
    generator = random.Random(0)

    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    for _ in range(200):
        a, b = ([generator.randrange(12) for _ in range(4)] for _ in range(2))
        union = pixels(a) | pixels(b)
        if pixels(a) and pixels(b):  # proper boxes; a degenerate one overlaps nothing
            expected = len(pixels(a) & pixels(b)) / len(union)
            assert intersection_over_union(a, b) == pytest.approx(expected)
        else:
            assert intersection_over_union(a, b) == 0


def test_grounding_needs_more_than_half():
    reference = Region("[0.0, 0.0, 1.0, 0.5]")
    assert scores("Grounding", "[0.0, 0.0, 1.0, 1.0]", reference)[0] == 0  # IoU is one half, not more
    assert scores("Grounding", "[0.0, 0.0, 1.0, 0.99]", reference)[0] == 1
    # The last digit is lost: 0.5 becomes 0., a box without height.
    assert scores("Grounding", "[0.0, 0.0, 1.0, 0.5]", reference) == (1, 0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_lenient_is_never_below_official(task):
    references = TASKS[task].load_references(GOLDEN).values()
    lines = (GOLDEN / "answers" / f"{task}.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines][::3]
    for reference in list(references)[::3]:
        own = [getattr(reference, "answer", "")] if task != "ScienceQA" else ["B"]
        for text in texts + own:
            official, _, lenient = scores(task, text, reference)
            assert 0 <= official <= lenient <= 1


@pytest.mark.parametrize(
    ("task", "reference", "good", "bad"),
    [
        ("ScienceQA", ANIMALS, ["A", "C"], ["D", "c", "C.", "AB", ""]),
        ("Grounding", Region(""), ["[0.1, 0.2, 0.3, 1]"], ["0.1, 0.2, 0.3, 1", "[1, 2, 30, 40]", "cat"]),
        ("GQA", None, ["cat", "red bus"], ["a b c d", "B", "[0.1, 0.2, 0.3, 0.4]", "", "cat."]),
        ("OCR-VQA", None, ["the long and winding title of a book"], ["A", "yes\nno", ""]),
    ],
)
def test_form_of_an_answer(task, reference, good, bad):
    assert all(TASKS[task].has_form(text, reference) for text in good)
    assert not any(TASKS[task].has_form(text, reference) for text in bad)


# --- files ---


def test_the_eight_tasks_in_the_papers_order():
    orders = json.loads((Path(__file__).parents[1] / "data" / "instructions.json").read_text())["orders"]
    assert list(TASKS) == orders["original"]
    assert [task.name for task in TASKS.values()] == list(TASKS)
    evaluated = {name: task.spec.test for name, task in TASKS.items()}
    assert {name for name, file in evaluated.items() if file == "val.json"} == {"TextVQA", "VizWiz", "VQAv2"}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_question_files(tmp_path):
    for folder in ("Instructions/VizWiz", "Instructions_Diverse/OCRVQA", "Instructions_10Type/OCR-VQA"):
        (tmp_path / folder).mkdir(parents=True)
    find = lambda task, *where: TASKS[task].question_file(tmp_path, *where).relative_to(tmp_path).as_posix()  # noqa: E731
    assert find("VizWiz") == "Instructions/VizWiz/val.json"
    assert find("VizWiz", "original", "dev") == "Instructions/VizWiz/dev.json"
    assert find("OCR-VQA", "diverse") == "Instructions_Diverse/OCRVQA/test.json"
    assert find("OCR-VQA", "10type") == "Instructions_10Type/OCR-VQA/test.json"
    with pytest.raises(FileNotFoundError, match="no folder GQA"):
        find("GQA")
    with pytest.raises(ValueError, match="'val' is not known"):
        find("VizWiz", "original", "val")


def test_dev_references_lie_beside_the_test_ones(tmp_path):
    science = tmp_path / "cl_dataset" / "ScienceQA"
    write(science / "pid_splits.json", {"test": ["1"], "val": ["2"]})
    problems = {pid: {"choices": ["x", "y"], "answer": int(pid) - 1} for pid in "12"}
    write(science / "problems.json", problems)
    annotated = {"question_id": 7, "answers": ["stop"] * 10}
    write(tmp_path / "cl_dataset/TextVQA/TextVQA_0.5.1_dev.json", {"data": [annotated]})
    question = {
        "answer": "red",
        "isBalanced": True,
        "types": {"structural": "query"},
    }
    write(tmp_path / "cl_dataset/GQA/dev_balanced_questions.json", {"g": question})
    loaded = {name: TASKS[name].load_references(tmp_path, split="dev") for name in ("ScienceQA", "TextVQA", "GQA")}
    assert loaded["ScienceQA"] == {"2": Options(("x", "y"), 1)}
    assert loaded["TextVQA"] == {"7": Answer("stop", ("stop",) * 10)}
    assert loaded["GQA"] == {"g": GQAAnswer("red", balanced=True, open=True, group=None)}


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("VizWiz", {"text": "q", "answer": "x"}, r"val\.json, record 1: has no question_id"),
        ("VizWiz", {"question_id": "0", "text": "q", "answer": "x"}, r"record 0 has this id too"),
        ("VizWiz", {"question_id": "1", "text": "q"}, r"question_id 1: 'answer'"),
        ("VizWiz", {"question_id": "1", "text": "q", "answer": "", "answers": ["x"]}, r"id 1: 'answers'"),
        ("Grounding", {"question_id": "1", "text": "q", "answer_bbox": "[1, 2]"}, r"id 1: answer_bbox"),
    ],
)
def test_broken_records_are_named(tmp_path, task, record, message):
    good = {"question_id": "0", "text": "q", "answer": "x", "answer_bbox": "[0, 0, 1, 1]"}
    write(tmp_path / "Instructions" / task / TASKS[task].spec.test, [good, record])
    with pytest.raises(ValueError, match=message):
        TASKS[task].load_references(tmp_path)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pid_splits\.json"):
        TASKS["ScienceQA"].load_references(tmp_path)
    path = tmp_path / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json"
    write(path, {"data": []})
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match=r"TextVQA_0\.5\.1_val\.json: not JSON"):
        TASKS["TextVQA"].load_references(tmp_path)
