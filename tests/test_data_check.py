"""The check of a benchmark finds what is broken, notes what is whole, and stands before every training run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data.benchmark import COIN, open_benchmark
from data.check import check, check_benchmark, main
from data.mini import build
from data.preprocess import RecordFile, open_records
from data.records import DataError
from eval.report import main as report
from eval.score import QuestionSet, score_task
from llaca.config import load_recipe
from llaca.launch import prepare_data
from llaca.stream import ordered
from llaca.train import run
from llava.check import main as check_with_base
from llava.check import reader_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "BENCHMARKS.md"


@pytest.fixture
def mini(tmp_path):
    root = tmp_path / "mini"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SIZES", {"train": 8, "dev": 2, "test": 4})
        build.build(root)
    return root


def edit(path, change):
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def jpeg(path: Path) -> Path:
    Image.effect_noise((64, 48), 50).save(path, "JPEG")
    return path


def test_a_whole_benchmark_passes_in_all_sets(mini, tmp_path, capsys):
    line = ["--root", str(mini), "--instructions", "original", "diverse", "10type"]
    line += ["--json", str(tmp_path / "report.json")]
    with pytest.raises(SystemExit) as done:
        main(line)
    assert done.value.code == 0
    reports = json.loads((tmp_path / "report.json").read_text())
    assert [told["instructions"] for told in reports] == ["original", "diverse", "10type"]
    for told in reports:
        assert told["ok"] and told["records"] == 8 * (8 + 4)
        assert [(f["records"], f["known"]) for f in told["files"]] == [(8, 8), (4, 4)] * 8
    printed = capsys.readouterr().out
    assert printed.count("none\n") == 48 and "records a second" not in printed
    assert re.search(r"96 records in [\d.]+ s \([\d,]+ a second\)", printed)


def test_everything_that_can_be_wrong_is_counted_by_kind_with_a_remedy(mini, tmp_path, capsys):
    train = mini / "Instructions" / "GQA" / "train.json"
    pictures = mini / "cl_dataset"
    whole = jpeg(pictures / "whole.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "text.png").write_text("not a picture")
    png = (pictures / "GQA/train/5.png").read_bytes()
    (pictures / "GQA/train/5.png").write_bytes(png[:-20])

    def spoil(records):
        records[0]["image"] = "GQA/train/gone.png"
        records[1]["image"] = "../secret.png"
        records[2]["image"] = "cut.jpg"
        records[3]["image"] = "text.png"
        records[4]["conversations"].pop()
        records[7]["id"] = records[6]["id"]
        records[6]["image"] = "whole.jpg"

    edit(train, spoil)
    edit(mini / "Instructions/GQA/test.json", lambda records: records[3].update(question_id=records[0]["question_id"]))
    edit(mini / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json", lambda content: content["data"][0]["answers"].pop())
    edit(mini / "Instructions/ImageNet/train.json", lambda records: records.pop())
    (mini / "Instructions/VizWiz/val.json").write_text("[{")
    (mini / "Instructions/VQAv2").rename(mini / "Instructions/VQA")
    with pytest.raises(SystemExit) as done:
        main(["--root", str(mini), "--json", str(tmp_path / "report.json")])
    assert done.value.code == 1
    [told] = json.loads((tmp_path / "report.json").read_text())
    found = {(f["task"], f["split"]): f["problems"] for f in told["files"] if f["problems"]}
    assert found == {
        ("GQA", "train"): {
            "missing image": 1, "outside root": 1, "unreadable image": 3, "schema": 1
        },
        ("GQA", "test"): {"duplicate id": 1},
        ("TextVQA", "test"): {"annotations": 1},
        ("VizWiz", "test"): {"unreadable file": 1},
        ("VQAv2", "all"): {"missing file": 1},
    }  # fmt: skip
    texts = " ".join(next(f["first"] for f in told["files"] if (f["task"], f["split"]) == ("GQA", "train")))
    for part in ("gone.png does not exist; add", "leads out of the image root", "cut.jpg cannot be read", "text.png"):
        assert part in texts
    assert "record 7" not in texts, "nothing joins training records by their ids"
    printed = capsys.readouterr().out
    assert "none; -1 records" in printed and str(train) in printed
    assert not list(mini.glob(".checked*"))


def test_coins_own_description_says_where_to_get_what_is_missing(mini, capsys):
    with pytest.raises(SystemExit) as done:
        main(["--root", str(mini), "--benchmark", "coin"])
    assert done.value.code == 0 and "12,726" in capsys.readouterr().out, "another count is told, and no problem"
    (mini / "cl_dataset/VizWiz/train/3.png").unlink()
    with pytest.raises(SystemExit):
        main(["--root", str(mini), "--benchmark", "coin"])
    assert "get it: vizwiz.org" in capsys.readouterr().out


def test_a_note_holds_until_a_file_changes(mini):
    tasks = ["GQA", "VizWiz"]
    first = check_benchmark(mini, "original", tasks)
    assert first.records == 2 * (8 + 4) and first.seconds > 0, "nothing was noted before"
    again = check_benchmark(mini, "original", ["VizWiz"])
    assert again.seconds == 0 and again.records == 8 + 4
    assert check_benchmark(mini, "original", ["TextVQA"]).seconds > 0
    assert check_benchmark(mini, "diverse", ["GQA"]).seconds > 0
    check_benchmark(mini, "original", tasks)
    assert check_benchmark(mini, "original", tasks).seconds == 0
    annotations = mini / "cl_dataset/GQA/testdev_balanced_questions.json"
    whole = annotations.read_text()
    edit(annotations, lambda content: content.pop("GQA-test-2"))  # an annotation file counts, too
    with pytest.raises(ValueError, match=r"GQA-test-2.*no entry for it"):
        check_benchmark(mini, "original", tasks)
    annotations.write_text(whole)
    edit(mini / "Instructions/GQA/train.json", lambda records: records[2].update(image="gone.png"))
    with pytest.raises(ValueError, match=r"(?s)record 2 .*gone\.png does not exist.*Nothing was trained"):
        check_benchmark(mini, "original", tasks)
    assert not check_benchmark(mini, "original", tasks, unchecked=True).ok


def test_a_picture_that_is_gone_is_noticed_though_the_note_holds(mini, tiny_base, tmp_path):
    check_benchmark(mini, "original", ["GQA"])
    next((mini / "cl_dataset/GQA/train").iterdir()).unlink()
    assert check_benchmark(mini, "original", ["GQA"]).seconds == 0
    line = ["--base", str(tiny_base), "--data-root", str(mini), "--tasks", "GQA", "--runs-dir", str(tmp_path / "runs")]
    with pytest.raises(DataError, match="does not exist"):
        run(load_recipe([*line, "--method", "lora"]))


def test_a_picture_that_changed_is_looked_at_again_by_the_check_alone(mini):
    picture = mini / "cl_dataset/GQA/train/5.png"
    assert check_benchmark(mini, "original", ["GQA"]).ok
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-20])
    assert check_benchmark(mini, "original", ["GQA"]).ok, "the note holds"
    with pytest.raises(SystemExit):
        main(["--root", str(mini), "--tasks", "GQA"])
    sources = [RecordFile(mini / "Instructions/GQA/train.json", "train", "last line")]
    [started] = open_records(sources, open_benchmark(mini).image_root, None).values()
    assert [p.record for p in started.problems] == [5], "what the check has found no start overlooks"
    with pytest.raises(ValueError, match="5\\.png cannot be read"):
        check_benchmark(mini, "original", ["GQA"])
    [train, _] = check(open_benchmark(mini), "original", ["GQA"]).files
    assert [(p.kind, p.record) for p in train.problems] == [("unreadable image", 5)]
    picture.write_bytes(whole)
    assert check(open_benchmark(mini), "original", ["GQA"]).ok


def test_a_task_by_the_name_of_its_folder_is_that_task(mini, tiny_base, capsys):
    line = ["--base", str(tiny_base), "--data-root", str(mini), "--tasks", "OCRVQA", "GQA", "--method", "lora"]
    recipe = load_recipe(line)
    assert recipe.stream.tasks == ["OCR-VQA", "GQA"]
    prepare_data(recipe)
    assert "24 records checked" in capsys.readouterr().out
    report = check_benchmark(mini, "original", ["OCRVQA"], reader=reader_of(tiny_base, {"OCR-VQA": 2048}, False))
    assert report.records == 8 + 4
    assert check_benchmark(mini, "original", ["OCRVQA"]).records == 8 + 4
    shutil.rmtree(mini / "Instructions/OCR-VQA")
    assert "no folder" in check(open_benchmark(mini), "original", ["OCRVQA"]).text().lower()


def test_the_check_with_a_base_has_its_own_command(mini, tiny_base, capsys):
    line = ["--root", str(mini), "--tasks", "OCRVQA", "--max-length", "40"]
    with pytest.raises(SystemExit) as done:
        main(line)
    assert done.value.code == 2, "a length says nothing without a base"
    with pytest.raises(SystemExit) as done:
        check_with_base([*line, "--base", str(tiny_base)])
    assert done.value.code == 1 and "8 too long" in capsys.readouterr().out


def test_a_data_root_that_cannot_be_written_to_is_read_once_too(mini):
    """The notes and what is read lie in the cache, and nothing lies in the data."""
    before = {path: path.stat().st_mtime_ns for path in mini.rglob("*")}
    assert check_benchmark(mini, "original", ["GQA"]).seconds > 0
    assert check_benchmark(mini, "original", ["GQA"]).seconds == 0
    assert {path: path.stat().st_mtime_ns for path in mini.rglob("*")} == before


def test_what_the_recipe_cannot_use_is_found_by_the_check(mini, tiny_base):
    def spoil(records):
        records[1]["conversations"][0]["value"] = "<image>\n" + "Is it a dog? " * 300
        records[2]["conversations"][0]["value"] = "<image>"

    edit(mini / "Instructions/GQA/train.json", spoil)
    [train, _] = check(open_benchmark(mini), "original", ["GQA"]).files
    assert not train.problems and train.notes == ["1 records without an instruction; --grouping true refuses them"]
    [train, _] = check(open_benchmark(mini), "original", ["GQA"], reader_of(tiny_base, {"GQA": 512}, True)).files
    assert [(p.kind, p.record) for p in train.problems] == [("too long", 1), ("no instruction", 2)]
    assert "raise max_length or shorten" in train.problems[0].text and "last line" in train.problems[1].text
    [train, _] = check(open_benchmark(mini), "original", ["GQA"], reader_of(tiny_base, {"GQA": 4096}, False)).files
    assert not train.problems


def test_an_unchecked_run_leaves_out_what_it_cannot_use_and_says_so(mini, tiny_base, tmp_path, capsys):
    edit(mini / "Instructions/GQA/train.json", lambda records: [r.update(image="gone.png") for r in records[:3]])
    edit(mini / "Instructions/GQA/test.json", lambda records: records[1].update(image="gone.png"))
    line = ["--base", str(tiny_base), "--data-root", str(mini), "--tasks", "GQA", "VizWiz", "--lora_rank", "2"]
    line += ["--runs-dir", str(tmp_path / "runs"), "--run", "r", "--method", "lora", "--max_new_tokens", "2"]
    line += ["--max_test_samples", "3"]
    with pytest.raises(DataError, match=r"GQA/train\.json: 3 problem"):
        run(load_recipe(line))
    folder = run(load_recipe([*line, "--unchecked", "true"]))
    story = json.loads((folder / "stages/01-GQA/stage.json").read_text())
    assert (story["samples"], story["dropped_records"]) == (5, 3)
    report(["--runs-dir", str(tmp_path / "runs")])
    assert "lora: 3 broken records were left out of training." in capsys.readouterr().out
    scores = json.loads((folder / "scores.json").read_text())
    assert {(s["task"], s["missing"], s["questions"]) for s in scores} == {("GQA", 1, 3), ("VizWiz", 0, 3)}
    answers = folder / "answers/02-VizWiz/GQA.jsonl"
    assert len(answers.read_text().splitlines()) == 2, "of the file's first three questions one cannot be asked"


def test_descriptions_that_cannot_be_followed_are_refused(tmp_path):
    good = {"tasks": {"A": {"scoring": "open"}}}
    broken = {
        "tasks must be a mapping": {"tasks": ["A"]},
        "unknown key 'colour'": good | {"colour": 1},
        "task A lacks 'scoring'": {"tasks": {"A": {}}},
        "task A has an unknown key 'score'": {"tasks": {"A": {"scoring": "open", "score": 1}}},
        "stream s names the task 'B'": good | {"streams": {"s": ["A", "B"]}},
        "instruction set 'english' is not one of": good | {"instructions": {"english": "."}},
        "instruction is one of": {"tasks": {"A": {"scoring": "open", "instruction": "middle"}}},
        "scoring 'vague' of task A is not one of": {"tasks": {"A": {"scoring": "vague"}}},
    }
    for message, content in broken.items():
        (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=message) as error:
            check(open_benchmark(tmp_path), "original")
            score_task([], QuestionSet(tmp_path, "A"))
        assert "benchmark.yaml" in str(error.value)
    (tmp_path / "benchmark.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        open_benchmark(tmp_path)


def test_streams_of_coin():
    coin = open_benchmark(".", COIN)
    assert coin.stream("coin6") == ["ScienceQA", "TextVQA", "GQA", "VizWiz", "VQAv2", "OCR-VQA"]
    assert coin.stream("") == coin.stream("coin8") == list(coin.tasks)
    with pytest.raises(ValueError, match="known: coin8, coin6"):
        coin.stream("coin9")


@pytest.mark.parametrize("recipe", ["coin_mini", "coin_llava7b", "coin_llava13b"])
def test_every_recipe_runs_either_stream_in_every_order(recipe):
    for order, first in (("original", "ScienceQA"), ("reverse", "OCR-VQA"), ("alphabet", "GQA")):
        line = ["--recipe", str(ROOT / f"configs/{recipe}.yaml"), "--stream", "coin6", "--order", order]
        loaded = load_recipe([*line, "--method", "llaca", "--grouping", "false", "--instructions", "10type"])
        assert len(loaded.stream.tasks) == 6 and not loaded.method.grouping
        assert ordered(loaded.stream.tasks, order)[0] == first


def test_your_own_benchmark_as_the_docs_say(tmp_path, tiny_base, capsys):
    """The description in docs/BENCHMARKS.md, with files as shown there, from the check to the table."""
    root = tmp_path / "pets"
    (root / "photos").mkdir(parents=True)
    Image.new("RGB", (40, 30), "tan").save(root / "photos/cat.png")
    description = DOCS.read_text().split("```yaml\n")[1].split("```")[0]
    (root / "benchmark.yaml").write_text(description)
    tasks = {
        "Breeds": ("Which breed?\nAnswer briefly.", "siamese", {"answer": "manx"}),
        "Letters": ("Which?\nA. cat\nB. dog\nAnswer with the letter.", "A", {"answer": "B", "choices": ["cat", "dog"]}),
        "Boxes": ("Give the box: the ear", "[0.10, 0.20, 0.50, 0.60]", {"answer_bbox": "[0.1, 0.2, 0.5, 0.6]"}),
    }
    for task, (question, answer, reference) in tasks.items():
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        (root / task).mkdir()
        records = [{"id": str(i), "image": "cat.png", "conversations": turns} for i in range(6)]
        (root / task / "train.json").write_text(json.dumps(records))
        questions = [{"question_id": str(i), "image": "cat.png", "text": question, **reference} for i in range(3)]
        (root / task / "test.json").write_text(json.dumps(questions))
    done = subprocess.run(
        [sys.executable, "-m", "data.check", "--root", str(root)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Pets, original instructions") and "27 records" in done.stdout
    line = ["--base", str(tiny_base), "--data-root", str(root), "--lora_rank", "2"]
    line += ["--runs-dir", str(tmp_path / "runs")]
    recipe = load_recipe([*line, "--method", "llaca", "--max_new_tokens", "3", "--run", "r"])
    assert recipe.stream.tasks == list(tasks)
    folder = run(recipe)
    pool = json.loads((folder / "stages/03-Boxes/codebook.json").read_text())["codebook"]
    assert pool["groups"] == [["Answer briefly"], ["Answer with the letter"], ["Give the box"]]
    report(["--runs-dir", str(tmp_path / "runs")])
    assert "Breeds" in capsys.readouterr().out
    for task, text, right in (
        ("Breeds", "Manx", 100), ("Breeds", "the manx", 0), ("Letters", "B.", 100), ("Letters", "A", 0),
        ("Boxes", "[0.1, 0.2, 0.5, 0.61]", 100), ("Boxes", "[0.6, 0.7, 0.9, 0.9]", 0),
    ):  # fmt: skip
        rows = [{"question_id": str(i), "text": text} for i in range(3)]
        assert score_task(rows, QuestionSet(root, task)).accuracy["official"] == right, (task, text)
    spoken = score_task([{"question_id": "0", "text": "the dog"}], QuestionSet(root, "Letters"))
    assert spoken.per_question["0"]["lenient"] == 1
