"""The page of a run and of a table: what stands in it, hostile answers, and, in a browser, that every part works."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from test_llaca_train import arguments, mini  # noqa: F401

from eval.ask import Asker, main
from eval.page import data_url, run_page
from eval.page_template import embedded
from eval.report import main as report
from eval.report import show
from eval.runs import open_run
from eval.scored import baseline
from llaca.config import load_recipe
from llaca.train import run

HOSTILE = [
    "<script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    "</script><b>bold</b>",
    "long " * 400,
    "\u202eright to left \u05d0\u05d1\u05d2",
    "{{ 7 * 7 }} ${alert(1)} \\u0000",
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, mini, tiny_base):  # noqa: F811
    """A run in groups, answered; then some of its answers are replaced by hostile ones and scored anew."""
    folder = tmp_path_factory.mktemp("pages")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base: {tiny_base}\ndata_root: {mini}\ntasks: [ScienceQA, TextVQA, GQA]\nlora_rank: 4\nlora_alpha: 8\n"
        "dtype: float32\nattention: eager\nreuse_vision_features: true\ngradient_checkpointing: false\n"
        "batch_size: 8\nlearning_rate: 1.0e-2\nmax_new_tokens: 4\n"
    )
    line = ["--recipe", str(recipe), "--runs-dir", str(folder / "runs"), "--run", "r", "--method", "llaca"]
    made = run(load_recipe(line))
    report(["--runs-dir", str(folder / "runs")])
    file = made / "answers" / "02-TextVQA" / "TextVQA.jsonl"
    kept = file.read_text()
    rows = [json.loads(line) for line in kept.splitlines()]
    for row, text in zip(rows, HOSTILE, strict=True):
        row["text"] = text
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(["--runs-dir", str(folder / "runs")])
    yield made
    file.write_text(kept)


def content_of(page: Path) -> dict:
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_the_page_holds_every_answer_as_it_was_given(evaluated):
    found, text = content_of(evaluated / "report.html"), (evaluated / "report.html").read_text()
    assert len(text) < 15e6 and "http://" not in text.split("<script>")[0].replace("https://vega.github.io", "")
    assert [row["stage"] for row in found["rows"]] == ["01-ScienceQA", "02-TextVQA", "03-GQA"]
    done, cells = open_run(evaluated), 0
    for row in found["rows"]:
        for task, holder in row["holders"].items():
            one = next(entry for entry in found["tasks"] if entry["name"] == task)
            rows = [json.loads(line) for line in done.answer_file(holder, task).read_text().splitlines()]
            assert dict(zip(one["ids"], one["answers"][holder], strict=True)) == {
                str(r["question_id"]): r["text"] for r in rows
            }
            scores = pd.read_csv(evaluated / "scores" / holder / f"{task}.csv", dtype={"question_id": str})
            assert one["scores"][holder]["official"] == pytest.approx(
                scores.set_index("question_id").loc[one["ids"], "official"].tolist(), abs=1e-3
            )
            cells += 1
    assert cells == 6 and all(one["total"] == 6 for one in found["tasks"])
    matrix = pd.read_csv(evaluated / "matrix.csv", index_col="stage")
    shown = re.findall('data-task="(.*?)" data-stage="(.*?)".*?>([0-9.]+)</button>', text)
    assert {(task, stage): float(value) for task, stage, value in shown} == pytest.approx(
        {(t, s): v for s, cells in matrix.iterrows() for t, v in cells.dropna().items()}, abs=0.05
    )
    assert found["pictures"] and all(url.startswith("data:image/png;base64,") for url in found["pictures"])


def test_markup_in_data_stays_text(evaluated):
    """Nothing of the answers stands in the file as markup, whatever the script does with it."""
    text = (evaluated / "report.html").read_text()
    assert "<img src=x" not in text and "<b>bold" not in text and text.count("</script>") == 3
    assert json.loads(embedded({"a": "</script>\u2028&"})) == {"a": "</script>\u2028&"} and "<" not in embedded("<>&")


def test_a_large_page_says_what_it_leaves_out(evaluated, monkeypatch):
    monkeypatch.setattr("eval.page.QUESTIONS", 4)
    monkeypatch.setattr("eval.page.PICTURES", 1000)
    done = open_run(evaluated)
    page = run_page(done, json.loads((evaluated / "metrics.json").read_text()), baseline(done)[0])
    found = content_of(page)
    assert all(len(one["ids"]) == 4 and one["total"] == 6 for one in found["tasks"])
    assert sum(map(len, found["pictures"])) <= 1000
    text = page.read_text()
    assert "The page holds 12 of 18 questions" in text and re.search(r"\d+ of \d+ pictures stand in it", text)
    monkeypatch.undo()
    run_page(done, json.loads((evaluated / "metrics.json").read_text()), baseline(done)[0])


def test_half_a_stream_and_some_of_its_cells_have_a_page(evaluated, monkeypatch):
    """One stage of three, and the diagonal alone: columns are the tasks that were answered."""
    done = open_run(evaluated)
    done.stages = done.stages[:1]
    found = content_of(run_page(done, {}, baseline(done)[0]))
    assert [one["name"] for one in found["tasks"]] == ["ScienceQA"] and len(found["rows"]) == 1
    page = run_page(open_run(evaluated, cells="final"), {}, baseline(done)[0])
    assert [list(row["holders"]) for row in content_of(page)["rows"]] == [[], [], ["ScienceQA", "TextVQA", "GQA"]]
    done = open_run(evaluated)
    run_page(done, json.loads((evaluated / "metrics.json").read_text()), baseline(done)[0])


def test_a_large_picture_is_made_small(tmp_path):
    from PIL import Image

    Image.effect_noise((900, 600), 50).save(tmp_path / "big.png")
    Image.new("L", (4, 4)).save(tmp_path / "small.bmp")
    urls = [data_url(tmp_path / name) for name in ("big.png", "small.bmp")]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls) and len(urls[0]) < 30_000


def test_the_table_links_to_the_runs(evaluated):
    text = (evaluated.parent / "tables" / "report.html").read_text()
    assert '<a href="../r/report.html">r</a>' in text and "Question-only majority" in text
    points = content_of(evaluated.parent / "tables" / "report.html")["charts"]["scatter"]["data"]["values"]
    assert [point["run"] for point in points] == ["r"]


def test_asking_gives_the_stored_answers(evaluated, capsys):
    """Of every question and stage; by all stages, the base, and of a picture named by its path."""
    done, asker = open_run(evaluated), Asker(open_run(evaluated))
    for task, questions in done.questions.items():
        for number in range(len(questions)):
            question = asker.stored(task, str(questions.question_id(number)))
            for answer in asker.answers(question, [stage.name for stage in done.stages]):
                holder = dict(done.rows)[answer.stage].get(task)
                if holder is None or (task, holder) == ("TextVQA", "02-TextVQA"):
                    continue  # not asked then; replaced in this test
                rows = map(json.loads, done.answer_file(holder, task).read_text().splitlines())
                assert answer.holder == holder
                assert [r["text"] for r in rows if str(r["question_id"]) == str(questions.question_id(number))] == [
                    answer.text
                ]
    line = ["--run", "r", "--runs-dir", str(evaluated.parent)]
    questions = done.questions["GQA"]
    main([*line, "--stage", "all", "--task", "GQA", "--id", str(questions.question_id(0))])
    by_id = capsys.readouterr().out.splitlines()
    assert by_id[0].startswith("right: ") and [told.split(":")[0] for told in by_id[1:]] == [
        "base", "01-ScienceQA", "02-TextVQA", "03-GQA"]  # fmt: skip
    text, _, _instruction = questions.text(0).rpartition("\n")
    main([*line, "--stage", "3", "--image", str(questions.picture(0)), "--question", text, "--like", "GQA"])
    assert capsys.readouterr().out.splitlines() == by_id[-1:]
    with pytest.raises(SystemExit, match="GQA has no question x that is asked"):
        main([*line, "--task", "GQA", "--id", "x"])
    with pytest.raises(SystemExit, match="--stage 9: r has base, all, 01-ScienceQA"):
        main([*line, "--stage", "9", "--question", "Who?"])


def test_talking_goes_on_after_a_mistake(evaluated, monkeypatch, capsys):
    told = iter(["nowhere.png", "What?", "-", "Is it red?\nAnswer with a word.", "", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(told))
    main(["--run", "r", "--runs-dir", str(evaluated.parent)])
    out = capsys.readouterr().out
    assert "nowhere.png is not there" in out and out.splitlines()[-1].startswith("03-GQA: ")


# --- in a browser ---


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt install chromium")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        yield started.chromium.launch(executable_path=chromium, args=flags)


def opened(browser, page: Path, **how):
    """The page, what it asked for and what went wrong in it."""
    tab, asked, wrong = browser.new_page(**how), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector("#curves svg, #scatter svg", timeout=30_000)
    return tab, [url for url in asked if not url.startswith("data:")], wrong


@pytest.mark.slow
def test_in_a_browser_every_filter_and_cell_works_and_nothing_is_asked_of_the_network(evaluated, browser):
    page = evaluated / "report.html"
    tab, asked, wrong = opened(browser, page, viewport={"width": 1280, "height": 900})
    assert asked == [page.as_uri()] and not wrong
    found = content_of(page)
    for row in found["rows"]:
        for task in row["holders"]:
            button = tab.locator(f'button[data-task="{task}"][data-stage="{row["stage"]}"]')
            button.click()
            assert tab.text_content("#count") == f"6 of 6 questions of {task}"
            assert button.get_attribute("aria-pressed") == "true"
            assert tab.locator('.matrix button[aria-pressed="true"]').count() == 1
    tab.locator('button[data-task="TextVQA"][data-stage="02-TextVQA"]').click()
    cards = tab.locator("#found > li")
    assert cards.count() == 6
    for card, text in zip(cards.all(), HOSTILE, strict=True):
        assert " ".join(text.split()) in " ".join(card.inner_text().split()), "shown as it is"
    assert tab.evaluate("window.broken") is None and tab.locator("#found b, #found script").count() == 0
    counts = {}
    for kind in ("lost", "gained", "kept", "never", "all"):
        tab.select_option("#show", kind)
        counts[kind] = int(tab.text_content("#count").split()[0])
    assert sum(counts[kind] for kind in ("lost", "gained", "kept", "never")) == counts["all"] == 6
    tab.fill("#search", "onerror")
    assert tab.text_content("#count").startswith("1 of 6")
    tab.fill("#search", "")
    tab.select_option("#mode", "lenient")
    tab.select_option("#sort", "early")
    assert cards.count() == 6 and not wrong
    for scheme, width in (("dark", 1280), ("light", 390)):
        tab, _, wrong = opened(browser, page, viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert not wrong and tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"


@pytest.mark.slow
def test_in_a_browser_a_table_sorts_and_searches(evaluated, browser):
    tab, asked, wrong = opened(browser, evaluated.parent / "tables" / "report.html")
    rows = tab.locator("#table tbody tr")
    assert len(asked) == 1 and not wrong and rows.count() == 2
    head = tab.locator("#table thead th").filter(has_text="Avg.ACC")
    for way in ("descending", "ascending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == way
        values = [float(cell) for cell in tab.locator("#table tbody tr td:nth-child(5)").all_inner_texts()]
        assert values == sorted(values, reverse=way == "descending")
    tab.fill("#search", "majority")
    assert [row.is_visible() for row in rows.all()].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r/report.html", "tables/report.html"])
def test_in_a_browser_axe_finds_no_serious_fault(evaluated, browser, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for scheme in ("light", "dark"):
        tab, _, _ = opened(browser, evaluated.parent / name, color_scheme=scheme)
        faults = axe.Axe().run(tab).response["violations"]
        assert not [(f["id"], f["nodes"][0]["html"][:200]) for f in faults if f["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(("screen", "opened"), [("", False), (":0", True)])
def test_a_page_is_opened_where_there_is_a_screen(tmp_path, monkeypatch, capsys, screen, opened):
    seen = []
    monkeypatch.setattr("webbrowser.open", seen.append)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    show(tmp_path / "a page.html")
    address = capsys.readouterr().out.strip()
    assert address.startswith("file:///") and address.endswith("/a%20page.html")
    assert seen == [address] * opened
