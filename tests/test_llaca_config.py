"""Recipes: every file loads, the command line speaks last, and a run keeps the recipe it was started with."""

from pathlib import Path

import pytest
import yaml

from llaca.config import CONFIGS, Recipe, load_recipe, read_yaml
from llaca.methods import METHODS
from llaca.stream import open_run, ordered, stages_of

RECIPES = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "smoke.yaml")
ORDERS = yaml.safe_load((CONFIGS.parent / "data" / "instructions.json").read_text())["orders"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_loads_with_every_method(recipe, method):
    loaded = load_recipe(["--recipe", str(recipe), "--method", method])
    assert loaded.method.method == method
    assert Recipe.from_flat(loaded.flat()) == loaded


def test_every_method_has_its_line_in_configs():
    assert {p.stem for p in (CONFIGS / "methods").glob("*.yaml")} == set(METHODS)


def test_recipe_then_method_then_recipe_for_the_method_then_command_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "base: b\ndata_root: d\ntasks: [GQA]\ngrouping: false\nepochs: 3\nmethods: {llaca: {average: eq14}}\n"
    )
    loaded = load_recipe(["--recipe", str(recipe), "--method", "llaca", "--epochs", "2", "--lora-rank", "4"])
    assert loaded.method.grouping  # configs/methods/llaca.yaml over the recipe
    assert loaded.method.average == "eq14"  # the recipe's word on this method over the method's file
    assert (loaded.train.epochs, loaded.model.lora_rank) == (2, 4)
    assert load_recipe(["--recipe", str(recipe), "--method", "lora"]).train.epochs == 3


def test_smoke_lies_over_the_recipe():
    full, smoke = load_recipe([]), load_recipe(["--smoke"])
    assert (full.stream.max_train_samples, smoke.stream.max_train_samples) == (0, 64)
    assert full.run.run != smoke.run.run


@pytest.mark.parametrize(
    ("text", "message"),
    [("lerning_rate: 1\n", "unknown field 'lerning_rate'"), ("method: nothing\n", "method 'nothing' is not known")],
)
def test_unknown_names_are_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(["--recipe", str(tmp_path / "r.yaml")])


def test_per_task_overrides(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: b\ndata_root: d\ntasks: [GQA, VQAv2]\nbatch_size: 16\nper_task: {GQA: {batch_size: 8}}\n")
    loaded = load_recipe(["--recipe", str(recipe)])
    assert (loaded.for_task("GQA").batch_size, loaded.for_task("VQAv2").batch_size) == (8, 16)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_the_papers(order):
    assert ordered(ORDERS["original"], order) == ORDERS[order]


def test_stages_of_a_stream_and_of_joint_training(tmp_path):
    recipe = load_recipe(["--method", "lora"])
    sequential = stages_of(recipe, False, tmp_path)
    assert [s.name for s in sequential[:2]] == ["01-ScienceQA", "02-TextVQA"]
    (joint,) = stages_of(recipe, True, tmp_path)
    assert list(joint.tasks) == recipe.stream.tasks


def test_a_run_refuses_another_recipe_and_names_the_difference(tmp_path):
    base = ["--method", "lora", "--runs-dir", str(tmp_path), "--run", "x"]
    folder = open_run(load_recipe(base))
    assert open_run(load_recipe(base)) == folder
    assert read_yaml(Path(folder, "recipe.yaml"))["learning_rate"] == 1e-3
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 there, 0.5 now"):
        open_run(load_recipe([*base, "--learning-rate", "0.5"]))
