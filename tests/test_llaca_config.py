"""Recipes: every file loads, the command line speaks last, and a run keeps the recipe it was started with."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from llaca import train
from llaca.config import CONFIGS, Recipe, load_recipe
from llaca.methods import METHODS, method_of
from llaca.stream import ordered, stages_of

RECIPES = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "smoke.yaml")
ORDERS = yaml.safe_load((CONFIGS.parent / "data" / "instructions.json").read_text())["orders"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_loads_with_every_method(recipe, method):
    loaded = load_recipe(["--recipe", str(recipe), "--method", method])
    assert loaded.method.method == method
    assert Recipe.from_flat(loaded.flat()) == loaded


@pytest.mark.parametrize("method", METHODS)
def test_help_method_prints_every_setting_from_the_methods_own_file(method, capsys):
    with pytest.raises(SystemExit) as done:
        train.main(["--help-method", method])
    assert done.value.code is None
    first, *lines = capsys.readouterr().out.splitlines()
    file = Path(METHODS[method].__module__.replace(".", "/") + ".py")
    assert first.startswith(f"{method} ({file}): ") and (CONFIGS.parent / file).is_file()
    own = {f.name: getattr(METHODS[method].Settings(), f.name) for f in fields(METHODS[method].Settings)}
    assert [line.split()[0] for line in lines if line.startswith("  --")] == [f"--{name}" for name in own]
    for name, value in own.items():
        (line,) = (line for line in lines if line.startswith(f"  --{name} "))
        assert line.endswith(f"default: {'none' if value is None else value})")


def test_help_method_of_an_unknown_one():
    with pytest.raises(SystemExit, match="nothing; the methods are zero_shot"):
        train.main(["--help-method", "nothing"])


def test_a_run_of_before_methods_had_their_own_settings_is_read(tmp_path):
    """Its recipe.yaml has the settings of all methods, empty but for its own."""
    recipe = load_recipe(["--method", "ewc", "--penalty", "5"])
    older = {**recipe.flat(), "average": None, "energy": None, "beta_trace": None}
    assert Recipe.from_flat(older) == recipe
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(older))
    assert load_recipe(["--recipe", str(tmp_path / "recipe.yaml")]) == recipe
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**older, "energy": 0.5}))
    with pytest.raises(ValueError, match=r"recipe\.yaml: method ewc has no energy: it has penalty, consolidation"):
        load_recipe(["--recipe", str(tmp_path / "recipe.yaml")])


def test_recipe_then_method_then_recipe_for_the_method_then_command_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "base: b\ndata_root: d\ntasks: [GQA]\ngrouping: false\nepochs: 3\nmethods: {llaca: {average: eq14}}\n"
    )
    loaded = load_recipe(["--recipe", str(recipe), "--method", "llaca", "--epochs", "2", "--lora-rank", "4"])
    assert loaded.method.grouping  # what the method changes over the recipe
    assert loaded.settings.average == "eq14"  # the recipe's word on this method over the method's file
    assert (loaded.train.epochs, loaded.model.lora_rank) == (2, 4)
    assert load_recipe(["--recipe", str(recipe), "--method", "lora"]).train.epochs == 3


def test_a_recipe_that_names_the_method_stands_above_its_file(tmp_path):
    """As a run's recipe.yaml does: read again it gives the same run, but for another method's settings."""
    recipe = tmp_path / "recipe.yaml"
    asked = load_recipe(["--method", "ewc", "--penalty", "5", "--consolidation", "per_task"])
    recipe.write_text(yaml.safe_dump(asked.flat()))
    assert load_recipe(["--recipe", str(recipe)]) == asked
    assert load_recipe(["--recipe", str(recipe), "--method", "lwf"]).settings.penalty == 1.0


def test_smoke_lies_over_the_recipe():
    full, smoke = load_recipe([]), load_recipe(["--smoke"])
    assert (full.stream.max_train_samples, smoke.stream.max_train_samples) == (0, 64)
    assert full.run.run != smoke.run.run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\n", "unknown field 'lerning_rate'"),
        ("method: nothing\n", "method 'nothing' is not known"),
        ("methods: {llaca: {averge: eq14}}\n", "unknown field 'averge'"),
        ("methods: {llcaa: {}}\n", "methods names 'llcaa'"),
        ("order: alphabetical\n", "order: 'alphabetical' is not known; choose one of original"),
        ("dtype: float31\n", "dtype: 'float31'"),
        ("per_task: {GQA: {batchsize: 3}}\n", "per_task.GQA: 'batchsize'"),
        ("tasks: [GQA, GQA]\n", "each once"),
    ],
)
def test_unknown_names_are_refused(tmp_path, text, message):
    needed = "base: b\ndata_root: d\n" + ("" if "tasks:" in text else "tasks: [GQA]\n")
    (tmp_path / "r.yaml").write_text(needed + text)
    with pytest.raises(ValueError, match=message):
        load_recipe(["--recipe", str(tmp_path / "r.yaml")])


def test_per_task_overrides(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: b\ndata_root: d\ntasks: [GQA, VQAv2]\nbatch_size: 16\nper_task: {GQA: {batch_size: 8}}\n")
    loaded = load_recipe(["--recipe", str(recipe)])
    assert (loaded.for_stage(("GQA",)).batch_size, loaded.for_stage(("VQAv2",)).batch_size) == (8, 16)
    assert loaded.for_stage(("GQA", "VQAv2")).batch_size == 16


RELEASED = {"ScienceQA": 16, "TextVQA": 16, "ImageNet": 20, "GQA": 8, "VizWiz": 16, "Grounding": 8, "VQAv2": 10,
            "OCR-VQA": 12}  # fmt: skip


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_batches_of_the_release_on_eight_gpus_and_the_same_steps_on_others(size):
    line = ["--recipe", str(CONFIGS / f"coin_llava{size}.yaml"), "--method", "llaca"]
    loaded = load_recipe(line)
    eight = {task: loaded.for_stage((task,), 8) for task in loaded.stream.tasks}
    assert {task: s.batch_size for task, s in eight.items()} == RELEASED
    assert {s.gradient_accumulation for s in eight.values()} == {1}
    for devices, largest in ((1, 20), (2, 20), (4, 6), (8, 3), (16, 20)):
        smaller = load_recipe([*line, "--batch-size", str(largest)])
        for task, released in RELEASED.items():
            s = smaller.for_stage((task,), devices)
            assert s.batch_size * s.gradient_accumulation * devices == 8 * released and s.batch_size <= largest
    with pytest.raises(ValueError, match="ScienceQA: global_batch_size 128 cannot be shared by 3 devices"):
        loaded.for_stage(("ScienceQA",), 3)


def test_the_command_line_speaks_last_of_a_task_too(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: b\ndata_root: d\ntasks: [GQA]\nper_task: {GQA: {batch_size: 8, epochs: 3}}\n")
    for flag in (["--batch_size=4"], ["--batch-size", "4"]):
        settings = load_recipe(["--recipe", str(recipe), *flag]).for_stage(("GQA",))
        assert (settings.batch_size, settings.epochs) == (4, 3)


def test_a_quantized_base_under_deepspeed_is_refused():
    with pytest.raises(ValueError, match="quantized base is for one process or DDP"):
        load_recipe(["--quantization", "nf4", "--zero", "2"])


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_the_papers(order):
    assert ordered(ORDERS["original"], order) == ORDERS[order]


def test_stages_of_a_stream_and_of_joint_training(tmp_path):
    recipe = load_recipe(["--method", "lora"])
    sequential = stages_of(recipe, False, tmp_path)
    assert [s.name for s in sequential[:2]] == ["01-ScienceQA", "02-TextVQA"]
    (joint,) = stages_of(recipe, True, tmp_path)
    assert list(joint.tasks) == recipe.stream.tasks


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--method", "lora", "--average", "eq14"], "method lora has no average: it has no settings"),
        (
            ["--method", "ewc", "--temperature", "2"],
            "has no temperature: it has penalty, consolidation",
        ),
        (["--method", "llaca", "--average", "nonsense"], "unknown variant"),
        (["--method", "llaca", "--average", "eq45", "--constant", "2"], "has no setting constant"),
        (["--method", "fixed_ema", "--beta", "1.5"], "beta = 1.5"),
    ],
)
def test_a_method_refuses_settings_that_are_not_its_own(line, message):
    with pytest.raises(ValueError, match=message):
        method_of(load_recipe(line))


def test_an_automatic_name_says_what_differs():
    names = {
        "llaca-seed0": ["--method", "llaca"],
        "llaca-smoke-seed3": ["--smoke", "--seed", "3"],
        "lora-reverse-10type-seed0": ["--method", "lora", "--order", "reverse", "--instructions", "10type"],
        "lora-learning_rate-0.0005-grouping-True-seed0": [
            "--method=lora",
            "--grouping",
            "true",
            "--learning_rate=5e-4",
        ],
    }
    assert {load_recipe(line).run.run for line in names.values()} == set(names)


def test_abbreviated_flags_are_refused():
    with pytest.raises(ValueError, match="--meth"):
        load_recipe(["--meth", "lora"])


def test_another_rule_does_not_inherit_the_constant_of_the_recipes_rule():
    assert load_recipe(["--method", "llaca"]).settings.constant is not None
    for rule in ("eq45", "fixed"):
        recipe = load_recipe(["--method", "llaca", "--average", rule])
        own = recipe.settings
        assert (own.average, own.constant, own.beta, recipe.method.grouping) == (rule, None, None, True)
    own = load_recipe(["--method", "llaca", "--average", "next_release", "--constant", "0.3"]).settings
    assert (own.average, own.constant) == ("next_release", 0.3)
