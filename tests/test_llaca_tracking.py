"""What W&B and TensorBoard are told, read back: one run, also after a kill, equal to the run folder."""

import json
import signal
import subprocess
import time

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_llaca_train import arguments, command, mini  # noqa: F401
from wandb_files import told

from eval.report import main as report
from llaca.config import load_recipe
from llaca.train import run


def lines_of(folder) -> dict[int, dict]:
    """The lines of the training logs with a loss, by the step of the whole stream."""
    found, before = {}, 0
    for stage in sorted(folder.glob("stages/*")):
        for line in map(json.loads, (stage / "train_log.jsonl").read_text().splitlines()):
            if "loss" in line:
                found[before + line["step"]] = line
        before += json.loads((stage / "stage.json").read_text())["steps"]
    return found


@pytest.mark.slow
def test_wandb_has_one_run_that_goes_on_after_a_kill(arguments, tmp_path):  # noqa: F811
    line = [*arguments, "--method", "llaca", "--grouping", "false", "--report_to", "wandb", "--save-steps", "2"]
    line += ["--logging-steps", "1"]
    folder = tmp_path / "runs" / "r"
    process = subprocess.Popen(command(line), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob("stages/02-*.partial/trainer/checkpoint-2/COMPLETE")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(line), check=True, capture_output=True)
    report(["--runs-dir", str(tmp_path / "runs")])
    files = told(folder)
    assert len(files) == 3 and len({one["id"] for one in files}) == 1, "killed, gone on, evaluated: one run"
    recipe = load_recipe(line).flat()
    for one in files[1:]:  # what a killed process has written, W&B may still hold back
        assert {key: one["config"][key] for key in recipe} == json.loads(json.dumps(recipe))
    history = [entry for entry in files[1]["history"] if "loss" in entry]
    early = [entry for entry in files[0]["history"] if "loss" in entry]
    assert all(entry["loss"] == history[entry["step"] - 1]["loss"] for entry in early), "told again in the same words"
    wanted = lines_of(folder)
    steps = [entry["step"] for entry in history]
    assert steps == sorted(wanted) == list(range(1, len(steps) + 1)), "every step once"
    for entry in history:
        own = wanted[entry["step"]]
        assert all(entry[key] == pytest.approx(value) for key, value in own.items() if key != "step")
    assert {entry["stage"] for entry in history} == {1, 2, 3}
    told_beta = [entry for entry in history if "beta_q05" in entry]
    assert told_beta and all(e["beta_q05"] <= e["beta_median"] <= e["beta_q95"] for e in told_beta)
    assert any(entry.get("records_per_second", 0) > 0 for entry in history)
    metrics = json.loads((folder / "metrics.json").read_text())
    summary = {key: value for one in files for key, value in one["summary"].items()}
    assert summary["Avg.ACC"] == metrics["Avg.ACC"] and summary["final/GQA"] == metrics["per_task"]["GQA"]
    assert summary["stages/02-TextVQA/samples"] == 24
    [table] = files[-1]["folder"].glob("files/media/table/accuracy*.json")
    matrix, shown = pd.read_csv(folder / "matrix.csv", index_col="stage"), json.loads(table.read_text())
    assert shown["columns"] == ["stage", *matrix.columns]
    assert [[row[0], *row[1:]] for row in shown["data"]] == [
        [stage, *(None if pd.isna(value) else value for value in row)] for stage, row in matrix.iterrows()
    ]
    assert list(files[-1]["folder"].glob("files/media/html/report*.html"))
    assert list(files[-1]["folder"].glob("files/media/images/accuracy_matrix*.png"))
    report(["--runs-dir", str(tmp_path / "runs")])
    assert len(told(folder)) == 3, "the same evaluation is told once"


def test_tensorboard_has_every_step_the_matrix_and_the_figures(arguments, tmp_path):  # noqa: F811
    line = [*arguments, "--method", "lora", "--report_to", "tensorboard", "--logging-steps", "1"]
    folder = run(load_recipe(line))
    report(["--runs-dir", str(tmp_path / "runs")])
    found = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0})
    found.Reload()
    wanted = lines_of(folder)
    assert {event.step: pytest.approx(event.value, rel=1e-5) for event in found.Scalars("loss")} == {
        step: own["loss"] for step, own in wanted.items()
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert found.Scalars("Avg.ACC")[0].value == pytest.approx(metrics["Avg.ACC"], rel=1e-5)
    assert found.Images("accuracy_matrix")[0].height > 100
    text = found.Tensors("accuracy/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| stage | ScienceQA | TextVQA | GQA |" and len(text.splitlines()) == 5
    assert b"learning_rate" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
