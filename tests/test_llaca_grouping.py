"""Instruction grouping against scikit-learn's own pairwise fits, the released code's scores and the paper's groups."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from data.records import instruction_of
from eval.tasks import TASKS
from llaca import grouping
from llaca.grouping import THRESHOLDS, Codebook, group_tasks, main, similarity

ROOT = Path(__file__).parent.parent
PAPER = json.loads((ROOT / "data" / "instructions.json").read_text())
ORDER = PAPER["orders"]["original"]

# Scores of the released grouping code on the paper's instructions: the group each task meets, in training order,
# and the one it ends in.
RELEASED = {
    "original": [
        ([], 0),
        ([0.091940], 1),
        ([0.084580, 0.632790], 2),
        ([0.091940, 1, 0.632790], 1),
        ([0.091940, 1, 0.632790], 1),
        ([0, 0, 0], 3),
        ([0.091940, 1, 0.632790, 0], 1),
        ([0.091940, 1, 0.632790, 0], 1),
    ],
    "diverse": [
        ([], 0),
        ([0], 1),
        ([0, 0.253209], 2),
        ([0, 0.184432, 0.170776], 3),
        ([0, 0.450268, 0.279828, 0.201993], 1),
        ([0, 0.042290, 0, 0], 4),
        ([0.091940, 0.320111, 0.279828, 0.503103, 0], 3),
        ([0.084580, 0.353554, 0.253209, 0.468458, 0], 3),
    ],
    "10type": [
        ([], 0),
        ([0.036736], 1),
        ([0.004560, 0.267799], 2),
        ([0.044103, 0.390950, 0.277850], 1),
        ([0.051057, 0.413908, 0.267729], 1),
        ([0.010852, 0.012610, 0.006887], 3),
        ([0.052569, 0.439615, 0.264836, 0.011464], 1),
        ([0.045868, 0.450460, 0.277804, 0.017435], 1),
    ],
}


def instructions(kind):
    return {task: PAPER["instructions"][task][kind] for task in ORDER}


def built(kind, aggregate="mean"):
    codebook = Codebook(THRESHOLDS[kind], aggregate)
    group_tasks(instructions(kind), codebook)
    return codebook


def refit(a, b):
    """The released code's similarity of two texts: a fresh fit on just these two."""
    left, right = TfidfVectorizer(stop_words="english").fit_transform([a, b]).toarray()
    return left @ right


@pytest.mark.parametrize("kind", RELEASED)
def test_released_scores_and_decisions(kind):
    codebook = Codebook(THRESHOLDS[kind])
    for (task, texts), (scores, group) in zip(instructions(kind).items(), RELEASED[kind], strict=True):
        match = codebook.match(texts)
        np.testing.assert_allclose(match.scores, scores, rtol=0, atol=1e-6, err_msg=task)
        assert codebook.add(match.index, texts) == group
        assert (match.index is None) == (group == len(scores))


def test_10type_group_sizes():
    assert [len(group) for group in built("10type").groups] == [11, 39, 11, 11]


def test_released_scores_of_test_sets():
    """Own-group scores at test time with the final codebooks, and the runner-up where it was noted."""
    diverse = {t: built("diverse").choose(x) for t, x in instructions("diverse").items()}
    np.testing.assert_allclose(np.sort(diverse["GQA"].scores)[-2:], [0.1932, 0.6024], atol=5e-5)
    np.testing.assert_allclose(np.sort(diverse["TextVQA"].scores)[-2:], [0.2972, 0.7251], atol=5e-5)
    ten = {t: built("10type").choose(x) for t, x in instructions("10type").items()}
    np.testing.assert_allclose(max(ten["ScienceQA"].scores), 0.4144, atol=5e-5)
    np.testing.assert_allclose(max(ten["TextVQA"].scores), 0.3892, atol=5e-5)
    np.testing.assert_allclose(np.sort(ten["ImageNet"].scores)[-2:], [0.2692, 0.4750], atol=5e-5)


def test_other_released_pairs():
    one_line, vqa = (
        "Answer the object in the image using a single word or phrase",
        "Answer the question using a single word or phrase",
    )
    science = "Answer with the option's letter from the given choices directly"
    what = "What is the object in the image?"
    pairs = [
        (f"{what}\n{vqa}", what, 0.379978),
        (f"{what}\n{vqa}", vqa, 0.776515),
        (f"{what}\n{vqa}", science, 0.078745),
        (what, one_line, 0.410363),
        (what, vqa, 0),
        ("Answer using a single word or phrase.", vqa, 0.846647),
    ]
    for a, b, score in pairs:
        np.testing.assert_allclose(similarity([a], [b]), [[score]], rtol=0, atol=1e-6)


def test_similarity_equals_a_refit_for_each_pair():
    """Random texts with repeated words, punctuation, capitals, one-letter words and stop words."""
    rng = np.random.default_rng(0)
    words = ["word", "phrase", "Answer", "the", "a", "question's", "SHORT,", "using", "box.", "image-net", "2", "42"]
    words += ["of", "letter", "é", "naïve"]
    texts = [" ".join(rng.choice(words, size=rng.integers(2, 14))) + " answer" for _ in range(60)]
    texts += PAPER["instructions"]["Grounding"]["10type"]
    left, right = texts[:10], texts[10:]
    expected = np.array([[refit(a, b) for b in right] for a in left])
    assert expected.min() < 0.1 and expected.max() > 0.8
    np.testing.assert_allclose(similarity(left, right), expected, rtol=0, atol=1e-12)


def test_stop_words_alone_do_not_crash():
    scores = similarity(["what is this", "is it", "name the animal"], ["is it", "name the animal", "of the"])
    np.testing.assert_allclose(scores, [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    codebook = Codebook(0.9, groups=[["what is this"], ["who are they"]])
    assert codebook.match(["who are they"]).index == 1
    assert codebook.match(["and so on"]) == (None, [0.0, 0.0])


def test_mean_and_max():
    codebook = Codebook(0.9, "mean", [["name the animal", "draw a box"], ["read the word"]])
    assert codebook.match(["name the animal"]) == (None, [0.5, 0.0])
    codebook.aggregate = "max"
    assert codebook.match(["name the animal"]) == (0, [1.0, 0.0])


def test_threshold_is_inclusive_and_the_first_of_equals_wins():
    groups = [["draw a box"], ["name the animal", "read the word"], ["read the word", "name the animal"]]
    assert Codebook(0.5, groups=groups).match(["name the animal"]).index == 1
    assert Codebook(0.5000001, groups=groups).match(["name the animal"]).index is None


def test_unmatched_test_set():
    codebook = Codebook(0.9, groups=[["draw a box"], ["name the animal"], ["read the word"]])
    near = ["name the animal or plant"]
    assert codebook.choose(near)[:2] == (1, False)
    assert codebook.choose(["read the word"])[:2] == (2, True)
    with pytest.raises(ValueError, match="empty"):
        Codebook(0.9).choose(near)


def test_adding_twice_changes_nothing():
    codebook = Codebook(0.3)
    steps = [(None, ["b", "a"]), (None, ["c"]), (0, ["d", "a"]), (1, ["c", "c"])]
    for index, texts in steps:
        codebook.add(index, texts)
    once = codebook.to_json()
    assert codebook.groups == [["b", "a", "d"], ["c"]]
    for index, texts in steps[1:]:
        assert codebook.add(index, texts) == (1 if index is None else index)
    assert codebook.to_json() == once
    with pytest.raises(ValueError, match="no group 2 in a codebook of 2"):
        codebook.add(2, ["e"])


def test_json_round_trip():
    codebook = built("10type", "max")
    copy = Codebook.from_json(codebook.to_json())
    assert (copy.groups, copy.threshold, copy.aggregate) == (codebook.groups, 0.3, "max")
    assert copy.to_json() == codebook.to_json()


@pytest.mark.parametrize("bad", [[], [""], ["a", "  "], "one string"])
def test_empty_instructions_are_refused(bad):
    for call in (Codebook(0.3, groups=[["a"]]).match, lambda x: Codebook(0.3).add(None, x)):
        with pytest.raises(ValueError, match="non-empty instructions"):
            call(bad)


VQA = "Answer the question using a single word or phrase"
GROUND = "Please provide the bounding box coordinate of the region this sentence describes"


@pytest.mark.parametrize(
    ("task", "prompt", "expected"),
    [
        ("VQAv2", f"<image>\nWhat is this?\n{VQA}.", VQA),
        ("VQAv2", f"What is this?\n{VQA}", VQA),
        ("TextVQA", f"<image>\nWhat is written?\nReference OCR token: A, B.\n{VQA}.\n", VQA),
        ("ScienceQA", "Which?\nA. x\nB. y\nAnswer with the letter.", "Answer with the letter"),
        ("ImageNet", "<image>\nAnswer the object in the image.", "Answer the object in the image"),
        ("ImageNet", "Answer the object in the image.", "Answer the object in the image"),
        ("ImageNet", f"<image>\nWhat is the object?\n{VQA}.", "What is the object?"),
        ("ImageNet", f"What is the object?\n{VQA}.", "What is the object?"),
        ("Grounding", f"<image>\n{GROUND}: the man: left of the dog.", GROUND),
        ("Grounding", f"{GROUND}: dog", GROUND),
        ("Grounding", f"<image>\n{GROUND}.", GROUND),
        ("GQA", f"<image>{VQA}", VQA),
    ],
)
def test_instruction_of_a_prompt(task, prompt, expected):
    assert instruction_of(prompt, TASKS[task].spec.instruction) == expected


@pytest.mark.parametrize(("task", "prompt"), [("VQAv2", "<image>\n"), ("Grounding", ": the dog"), ("GQA", ".")])
def test_prompt_without_instruction(task, prompt):
    with pytest.raises(ValueError, match="no instruction in the prompt"):
        instruction_of(prompt, TASKS[task].spec.instruction)


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_command_prints_the_papers_groups(kind, capsys):
    main(["--instructions", str(ROOT / "data" / "instructions.json"), "--set", kind])
    assert json.loads(capsys.readouterr().out) == PAPER["groups"][kind]


def test_command_with_max_gives_three_groups_for_10type(capsys):
    main(["--set", "10type", "--aggregate", "max"])
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_command_as_typed():
    command = [sys.executable, "-m", "llaca.grouping", "--instructions", "data/instructions.json", "--set", "diverse"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == PAPER["groups"]["diverse"]


def test_command_names_what_is_missing(tmp_path, capsys):
    file = tmp_path / "i.json"
    for content, message in [
        ("{", "cannot read"),
        ('{"orders": {"original": ["GQA"]}, "instructions": {}}', "'GQA' is missing"),
    ]:
        file.write_text(content)
        with pytest.raises(SystemExit):
            main(["--instructions", str(file)])
        assert message in capsys.readouterr().err


def test_thousands_of_instructions_are_compared_in_bounded_memory():
    """Blocks give what the whole matrix gives, and 5,000 texts against as many stay near the 200 MB of one matrix
    of their similarities."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(300)])
    texts = [" ".join(rng.choice(words, 5)) for _ in range(5_000)]
    for aggregate, reduce in (("mean", np.mean), ("max", np.max)):
        codebook = Codebook(0.5, aggregate, [texts[:700]])
        whole = float(reduce(similarity(texts[650:1_300], texts[:700])))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grouping, "PAIRS", 10_000)
            assert codebook.match(texts[650:1_300]).scores == pytest.approx([whole], rel=1e-12)
    tracemalloc.start()
    [score] = Codebook(0.5, "mean", [texts]).match(texts[::-1]).scores
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < score < 0.1 and peak < 300e6
