"""Values of a recipe: the right one, or one sentence with file, field and what the field takes."""

import re
from dataclasses import MISSING, fields
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import yaml

from llaca.config import Recipe, load_recipe
from llaca.fields import declared
from llaca.launch import commands
from llaca.sections import FIELDS, SECTIONS

NEEDED = "base: b\ndata_root: d\ntasks: [GQA]\n"


def load(tmp_path, text, *arguments, needed=NEEDED):
    path = tmp_path / "r.yaml"
    path.write_text(needed + text)
    return load_recipe(["--recipe", str(path), *arguments])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: 2024", {"run": "2024"}),
        ("run: 007", {"run": "007"}),
        ("run: 1e5", {"run": "1e5"}),
        ("run: 2024-01-02", {"run": "2024-01-02"}),
        ("run: no", {"run": "no"}),
        ("zero: 2", {"zero": "2"}),
        ("zero: '2'", {"zero": "2"}),
        ("quantization: 8bit", {"quantization": "8bit"}),
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),
        ("learning_rate: '1e-4'", {"learning_rate": 1e-4}),
        ("epochs: 2", {"epochs": 2.0}),
        ("batch_size: 1_000", {"batch_size": 1000}),
        ("grouping: yes", {"grouping": True}),
        ("grouping: False", {"grouping": False}),
        ("similarity_threshold:", {"similarity_threshold": None}),
        ("similarity_threshold: ~", {"similarity_threshold": None}),
        ("similarity_threshold: 1", {"similarity_threshold": 1.0}),
        ("per_task: {GQA: {learning_rate: 1e-4}}", {"per_task": {"GQA": {"learning_rate": 1e-4}}}),
        ("per_task: {OCRVQA: {batch_size: 8}}", {"per_task": {"OCR-VQA": {"batch_size": 8}}}),
        ("one: &one {epochs: 3}", "unknown field 'one'"),
        ("per_task: {GQA: &few {epochs: 3}, VQAv2: {<<: *few, epochs: 4}}",
         {"per_task": {"GQA": {"epochs": 3.0}, "VQAv2": {"epochs": 4.0}}}),
        ("methods: {lora: {learning_rate: 1e-5}}", {"learning_rate": 1e-5}),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_field_says(tmp_path, text, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load(tmp_path, text, "--method", "lora")
        return
    flat = load(tmp_path, text, "--method", "lora").flat()
    for name, value in expected.items():
        assert flat[name] == value and type(flat[name]) is type(value)
    values = [own for own in flat["per_task"].values()]
    assert all(type(own["epochs"]) is float for own in values if "epochs" in own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: 0", "batch_size: '0' is not a whole number of at least 1"),
        ("batch_size: -4", "batch_size: '-4' is not a whole number of at least 1"),
        ("batch_size: 2.5", "batch_size: '2.5' is not a whole number"),
        ("batch_size: true", "batch_size: 'true' is not a whole number"),
        ("batch_size: !!bool true", "batch_size: True is not a whole number"),
        ("batch_size:", "batch_size: an empty value is not a whole number"),
        ("batch_size: [8]", r"batch_size: \['8'\] is not a whole number"),
        ("epochs: 0", "epochs: '0' is not a number above 0"),
        ("epochs: .nan", "epochs: '.nan' is not a number"),
        ("epochs: nan", "epochs: 'nan' is not a number"),
        ("learning_rate: .inf", "learning_rate: '.inf' is not a number of at least 0"),
        ("learning_rate: inf", "learning_rate: 'inf' is not a number of at least 0"),
        ("learning_rate: -1e-4", "learning_rate: '-1e-4' is not a number of at least 0"),
        ("learning_rate: fast", "learning_rate: 'fast' is not a number of at least 0"),
        ("learning_rate: yes", "learning_rate: 'yes' is not a number of at least 0"),
        ("warmup_ratio: 1", "warmup_ratio: '1' is not a number of at least 0 and below 1"),
        ("lora_rank: 0", "lora_rank: '0' is not a whole number of at least 1"),
        ("lora_dropout: 1.0", "lora_dropout: '1.0' is not a number of at least 0 and below 1"),
        ("grouping: 1", "grouping: '1' is not true or false"),
        ("seed: -1", "seed: '-1' is not a whole number of at least 0"),
        ("zero: 4", "zero: '4' is not known; choose one of none, 0, 1, 2, 3, 3-offload"),
        ("zero:", "zero: an empty value is not known; choose one of none"),
        ("run:", "run: an empty value is not a text"),
        ("per_task:", "per_task: an empty value is not a mapping"),
        ("per_task: [GQA]", "per_task: .*GQA.* is not a mapping"),
        ("per_task: {GQA: 3}", "per_task.GQA: '3' is not a mapping"),
        ("per_task: {GQA: {batch_size: 0}}", "per_task.GQA.batch_size: '0' is not a whole number of at least 1"),
        ("per_task: {GQA: {per_task: {}}}", "per_task.GQA: 'per_task' is no field of the training section"),
        ("per_task: {Cooking: {batch_size: 8}}", "per_task.Cooking: task 'Cooking' is not known in .*coin.yaml"),
        ("per_task: {OCRVQA: {epochs: 1}, OCR-VQA: {epochs: 2}}", "per_task.OCR-VQA: OCR-VQA stands there twice"),
        ("methods:", "methods: an empty value is not a mapping"),
        ("methods: {lora:}", "methods.lora: an empty value is not a mapping"),
        ("methods: {lora: {epochs: x}}", "methods.lora.epochs: 'x' is not a number above 0"),
        ("epochs: 1\nepochs: 2", "r.yaml, line 5, column 1: not YAML: 'epochs' stands twice"),
        ("epochs: [1", "r.yaml, line .*: not YAML: "),
        ("epochs: !!python/name:os.system", "r.yaml, line 4, .*: not YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_a_field_cannot_have_is_said_with_file_field_and_type(tmp_path, text, message):
    where = "" if message.startswith("r.yaml, line") else "r.yaml: "
    with pytest.raises(ValueError, match=rf"{tmp_path}/{where}{message}") as refused:
        load(tmp_path, text, "--method", "lora")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base:\ndata_root: d\ntasks: [GQA]", "base: an empty value is not a text; the field needs one"),
        ("base: ''\ndata_root: d\ntasks: [GQA]", "base: '' is not a text; the field needs one"),
        ("base: b\ndata_root: d\ntasks: GQA", r"tasks: 'GQA' is not a list of texts, as \[a, b\]"),
        ("base: b\ndata_root: d\ntasks: [GQA, ]\nstream:", "stream: an empty value is not a text"),
        ("base: b\ndata_root: d\ntasks: [GQA, null]", "tasks: .* is not a list of texts"),
        ("- base", "the file: .* is not a mapping"),
        ("just words", "the file: 'just words' is not a mapping"),
    ],
)
def test_the_same_of_what_every_recipe_needs(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"r\.yaml: {message}"):
        load(tmp_path, text, needed="")


def test_a_recipe_in_another_encoding_is_named(tmp_path):
    (tmp_path / "r.yaml").write_bytes("# für\n".encode("latin-1") + NEEDED.encode())
    with pytest.raises(ValueError, match=r"r\.yaml: not YAML: 'utf-8'"):
        load_recipe(["--recipe", str(tmp_path / "r.yaml")])
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + NEEDED.encode())
    assert load_recipe(["--recipe", str(tmp_path / "r.yaml")]).model.base == "b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--batch-size", "0"], "batch_size: '0' is not a whole number of at least 1"),
        (["--epochs", "nan"], "epochs: 'nan' is not a number above 0"),
        (["--epochs=-1"], "epochs: '-1' is not a number above 0"),
        (["--learning_rate", "inf"], "learning_rate: 'inf' is not a number of at least 0"),
        (["--lora-rank", "-8"], "lora_rank: '-8' is not a whole number of at least 1"),
        (["--seed", "-1"], "seed: '-1' is not a whole number of at least 0"),
        (["--base", ""], "base: '' is not a text"),
    ],
)
def test_the_command_line_is_held_to_the_same(line, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_recipe(line)


def test_every_field_reads_back_what_a_run_writes_and_refuses_what_is_of_no_type(tmp_path):
    """Whatever a field is declared as: its default goes through YAML, and a nested list is nothing that it can be."""
    recipe = load_recipe([])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.flat()))
    assert load_recipe(["--recipe", str(tmp_path / "r.yaml")]) == recipe
    for name, field in FIELDS.items():
        assert get_origin(declared(field)) in (Literal, list) or declared(field) in (str, int, float, bool, dict)
        with pytest.raises(ValueError, match=rf"r\.yaml: {name}: "):
            load(tmp_path, yaml.safe_dump({**recipe.flat(), name: [["nested"]]}), needed="")
        if field.default is not None:
            with pytest.raises(ValueError, match=rf"r\.yaml: {name}: an empty value"):
                load(tmp_path, yaml.safe_dump({**recipe.flat(), name: None}), needed="")
        if get_origin(declared(field)) is Literal:
            for value in get_args(declared(field)):
                told = {**load_recipe(["--method", "lora"]).flat(), "dtype": "float32", name: value}
                if name != "quantization" or value == "none":
                    assert load(tmp_path, yaml.safe_dump(told), needed="").flat()[name] == value
    assert {f.name for section in SECTIONS for f in fields(section)} == set(FIELDS)
    assert [name for name, field in FIELDS.items() if field.default is field.default_factory is MISSING] == [
        "base",
        "data_root",
    ]


def test_seeds_are_those_that_numpy_takes_in_the_last_stage():
    largest = (2**32 - 1 - 800) // 10_000
    recipe = load_recipe(["--seed", str(largest)])
    np.random.seed(recipe.stage_seed(8))
    assert [load_recipe(["--seed", "3"]).stage_seed(index) for index in (1, 8)] == [30_100, 30_800]
    with pytest.raises(ValueError, match=f"seed: {largest + 1} is too large; for 8 tasks it may be {largest} at most"):
        load_recipe(["--seed", str(largest + 1)])


@pytest.mark.parametrize("name", ["a/b", "/tmp/x", "..", ".", "a\nb", "a\0b", "x" * 256, "é" * 128])
def test_a_name_that_is_no_folders_is_refused(name):
    with pytest.raises(ValueError, match=r"run: .* cannot be a folder's name"):
        load_recipe(["--run", name])


def test_names_tell_the_recipe_and_fit_into_a_folder(tmp_path):
    names = set()
    for stem in ("one", "another"):
        path = tmp_path / f"{stem}.yaml"
        path.write_text(NEEDED)
        names |= {recipe.run.run for recipe, _ in commands(["--recipe", str(path), "--seed", "2"])}
    assert names == {"lora-one-seed2", "llaca-one-seed2", "lora-another-seed2", "llaca-another-seed2"}
    long = [["--base", str(tmp_path / ("é" * 120 + end)), "--data_root", "é" * 100, "--seed", "7"] for end in "ab"]
    first, second = (load_recipe(line).run.run for line in long)
    assert first != second and len(first.encode()) < 200 and first.startswith("llaca-base-_tmp")
    assert re.search(r"-[0-9a-f]{8}-seed7$", first)
    (tmp_path / first).mkdir()


def frozen(tmp_path, recipe):
    """The recipe.yaml that a run leaves."""
    path = tmp_path / recipe.run.runs_dir / recipe.run.run / "recipe.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({**recipe.flat(), "inputs": {"config.json": "0" * 64}}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize(
    "line",
    [
        ["--method", "ewc", "--penalty", "5", "--consolidation", "per_task", "--seed", "3"],
        ["--method", "llaca", "--average", "eq45", "--order", "reverse", "--epochs", "1.5"],
        ["--method", "lora_low_lr", "--smoke"],
        ["--method", "llaca", "--stream", "coin6", "--run", "2024", "--zero", "2"],
    ],
)
def test_a_runs_recipe_given_back_is_the_same_run(tmp_path, line):
    recipe = load_recipe(line)
    given = ["--recipe", frozen(tmp_path, recipe)]
    assert load_recipe(given) == recipe
    ((again, command),) = commands(given)  # the launcher trains the run's method, not LoRA and LLaCA
    assert again == recipe == load_recipe(command)
    other = load_recipe([*given, "--run", "other", "--learning_rate", "0.5"])
    assert other.flat() == {**recipe.flat(), "run": "other", "learning_rate": 0.5}


def test_a_runs_recipe_and_another_stream_or_method(tmp_path):
    run = load_recipe(["--method", "llaca", "--grouping", "true", "--learning_rate", "0.5", "--stream", "coin8"])
    given = ["--recipe", frozen(tmp_path, run)]
    assert load_recipe([*given, "--stream", "coin6"]).stream.tasks == load_recipe(["--stream", "coin6"]).stream.tasks
    other = load_recipe([*given, "--method", "ewc"])
    alone = load_recipe(["--method", "ewc", "--penalty", "1000", "--learning_rate", "0.5", "--stream", "coin8"])
    assert other.run.run == f"ewc-{run.run.run}-seed0"
    assert Recipe.from_flat({**other.flat(), "run": ""}) == Recipe.from_flat({**alone.flat(), "run": ""})


def test_a_runs_recipe_with_its_methods_own_learning_rates_is_not_lent_to_another(tmp_path):
    given = ["--recipe", frozen(tmp_path, load_recipe(["--method", "lora_low_lr"])), "--method", "lora"]
    with pytest.raises(ValueError, match="of a run with the method lora_low_lr, which has a learning_rate of its own"):
        load_recipe(given)
    rates = ["--learning_rate", "1e-3", "--projector_learning_rate", "1e-4"]
    assert load_recipe([*given, *rates]).train.learning_rate == 1e-3


def test_a_recipe_that_names_its_method_is_trained_with_it(tmp_path):
    (tmp_path / "r.yaml").write_text(NEEDED + "method: ewc\npenalty: 5\nrun: mine\n")
    ((recipe, _),) = commands(["--recipe", str(tmp_path / "r.yaml")])
    assert (recipe.method.method, recipe.settings.penalty, recipe.run.run) == ("ewc", 5.0, "mine")
    ((other, _),) = commands(["--recipe", str(tmp_path / "r.yaml"), "--method", "lora"])
    assert "penalty" not in other.flat()
    (tmp_path / "r.yaml").write_text(NEEDED + "run: mine\n")
    names = [recipe.run.run for recipe, _ in commands(["--recipe", str(tmp_path / "r.yaml")])]
    assert names == ["mine-lora", "mine-llaca"]


def test_a_field_without_a_default_may_stand_on_the_command_line_alone(tmp_path):
    (tmp_path / "own.yaml").write_text(NEEDED.replace("base:", "# base:"))
    recipe = load_recipe(["--recipe", str(tmp_path / "own.yaml"), "--base", "checkpoints/tiny-llava", "--epochs", "7"])
    assert (recipe.model.base, recipe.train.epochs) == ("checkpoints/tiny-llava", 7)
    assert "epochs-7" in recipe.run.run and "base" not in recipe.run.run
    with pytest.raises(ValueError, match=r"base: a recipe needs it; give --base, or a line in .*own\.yaml"):
        load_recipe(["--recipe", str(tmp_path / "own.yaml")])
