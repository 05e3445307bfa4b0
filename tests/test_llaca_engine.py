"""The dynamic average under every engine: two real processes, the numbers of one; a missing gradient stops the run."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from text_bases import make_text
from vl_bases import QWEN as QWENS
from vl_bases import make_vl

from llaca.callbacks import MethodCallback
from llaca.engines.deepspeed import DeepSpeed
from llaca.engines.shards import Layout, TensorSlice

ROOT = Path(__file__).parents[1]
RULES = ["eq45", "eq14"]  # eq14 keeps one tensor more


@pytest.mark.slow
def test_every_engine_gives_the_betas_and_averages_of_one_process(tmp_path):
    """The script exits with 1 if a beta or an average is more than 1e-4 apart."""
    one, others = "one process, accumulation 2", ["DDP x2", "ZeRO 2 x2", "ZeRO 3 x2"]
    line = [sys.executable, "scripts/engines.py", "--out", str(tmp_path / "table.csv"), "--work", str(tmp_path),
            "--records", "32", "--engines", one, *others, "--rules", *RULES]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "table.csv").set_index(["rule", "engine"])
    assert len(table) == len(RULES) * (1 + len(others))
    for rule, engine in product(RULES, others):
        first, own = (table.loc[(rule, name)] for name in (one, engine))
        share = 1 if engine == "DDP x2" else 0.5
        assert 5 < first["fallback %"] < 95, "both branches of the range rule are compared"
        assert own["bytes a rank"] / first["bytes a rank"] == pytest.approx(share, rel=0.05)
        assert own["collectives a step"] == (share < 1)
        assert own["relative"] < 1e-5 or engine != "ZeRO 2 x2"


FAULTY = "base_model.model.model.language_model.layers.1.self_attn.v_proj.lora_B.default.weight"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]


def work(bases: list[Path], data: Path, folder: Path, launch: list[str], scenarios: dict[str, list[str]]) -> dict:
    """What tests/engine_worker.py tells of scenarios, in one start: engine -> scenario -> figures."""
    out = folder / "told.json"
    asked = [f"{engine}:{name}" for engine, names in scenarios.items() for name in names]
    line = [*launch, "tests/engine_worker.py", ",".join(map(str, bases)), str(data), str(out), *asked]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.is_file(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    return {engine: {name: found[f"{engine}:{name}"] for name in names} for engine, names in scenarios.items()}


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory) -> list[Path]:
    """One of each family: LLaVA-1.5, Qwen2.5-VL, Qwen3-VL, T5, InternVL."""
    qwen, intern = [make_vl(tmp_path_factory.mktemp(kind), kind) for kind in QWENS], tmp_path_factory.mktemp("internvl")
    return [tiny_base, *qwen, make_text(tmp_path_factory.mktemp("t5"), "t5"), make_vl(intern, "internvl")]


QWEN = [f"{number}.{name}" for number in (1, 2) for name in ("plain", "turns")]
FROZEN = ["1.gathered-frozen", "2.gathered-frozen"]  # their mergers stay as they are
OTHERS = [*QWEN, "3.text", "4.turns", *FROZEN, "0.gathered"]
SCENARIOS = {
    "none": ["clipped", "unclipped", "plain", "bf16", "missing", "nan", *OTHERS],
    "0": ["1.plain", "4.turns"],
    "1": ["2.turns", "3.text"],
    "2": ["clipped", "unclipped", "plain", "bf16", "text", "turns", "missing", "nan", "late", *OTHERS],
    "3": ["clipped", "unclipped", "plain", "bf16", "sharded", "sharded-bf16", "still-bf16", "text", "turns", "missing",
          "nan", "late", "1.turns", "2.turns", "3.text", "4.turns", *FROZEN, "0.gathered", "1.sharded", "2.sharded"],
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(bases, tiny_data, tmp_path_factory):
    """One process that makes the two processes' micro-batches one after the other."""
    names, folder = ["clipped", "unclipped", "plain", *OTHERS], tmp_path_factory.mktemp("alone")
    return work(bases, tiny_data, folder, [sys.executable], {"none": names})["none"]


@pytest.fixture(scope="module")
def together(bases, tiny_data, tmp_path_factory):
    """What two processes tell under an engine: one start for DDP, one for all of DeepSpeed."""

    @cache
    def start(deepspeed: bool) -> dict:
        scenarios = {engine: names for engine, names in SCENARIOS.items() if (engine != "none") == deepspeed}
        return work(bases, tiny_data, tmp_path_factory.mktemp("together"), TORCHRUN, scenarios)

    return lambda zero: start(zero != "none")[zero]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_two_processes_train_as_one_and_stop_for_a_missing_gradient(alone, together, zero):
    """The last batch has pictures on one rank and none on the other: the ranks' backward passes must not differ."""
    told = together(zero)
    for name in ("clipped", "unclipped", "plain"):
        assert told[name]["norms"] == pytest.approx(alone[name]["norms"], rel=2e-5)
        assert told[name]["sum"] == pytest.approx(alone[name]["sum"], rel=1e-4, abs=1e-4)
    assert told["clipped"]["norms"] == pytest.approx([0.01] * 4, rel=1e-4)
    assert told["unclipped"]["norms"][0] == pytest.approx(told["plain"]["norms"][0], rel=1e-5)
    error = told["missing"]["error"]
    assert (
        f"no gradient before the optimizer step for ['{FAULTY}']" in error and "rank 0 of 2, optimizer step 1" in error
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "0", "1", "2", "3"])
def test_two_processes_train_other_families_as_one(alone, together, zero):
    """Pictures of several sizes, packed; also steps with a picture on one rank alone, and on none. T5 has none."""
    told = together(zero)
    for name in filter(SCENARIOS[zero].__contains__, OTHERS):
        assert told[name]["norms"] == pytest.approx(alone[name]["norms"], rel=5e-5), name
        assert told[name]["sum"] == pytest.approx(alone[name]["sum"], rel=1e-4, abs=1e-4), name
        trains = name in QWEN or name in ("4.turns", "0.gathered")
        assert (told[name]["moved"]["projector"] > 0) == trains and told[name]["moved"]["lora"], name
    for number in (1, 2) if zero == "3" else ():
        assert told[f"{number}.sharded"]["norms"] == pytest.approx(alone[f"{number}.plain"]["norms"], rel=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "2", "3"])
def test_a_gradient_that_is_not_a_number_stops_the_run_with_its_name(together, zero):
    """ZeRO skips such a step without a word, in float32 too."""
    told = together(zero)["nan"]
    assert f"['{FAULTY}']" in told["error"] and "finite" in told["error"] and told["steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["2", "3"])
def test_steps_without_pictures_do_not_see_the_projectors_gradient_of_an_earlier_one(together, zero):
    """ZeRO 3 would step on it again. What is absent in the first micro-batch only stops the run: it would be added."""
    told = together(zero)
    assert told["text"]["projector"] == [0.0] * 4 and told["text"]["moved"]["projector"] == 0.0
    assert told["text"]["moved"]["lora"], "every B of LoRA moves"
    pictures = [norm > 0 for norm in told["turns"]["projector"]]
    assert [True, False] in [pictures[i : i + 2] for i in range(3)], "a step of text follows one with pictures"
    error = told["late"]["error"]
    assert f"['{FAULTY}'], in 1 of 2 micro-batches" in error and "optimizer step 1" in error, error
    assert told["late"]["steps"] == 0


@pytest.mark.slow
def test_a_base_that_comes_in_shards_trains_to_the_same_numbers_as_a_whole_one(alone, together):
    told = together("3")
    for key in ("norms", "projector", "sum"):  # "moved" starts from weights before the cast
        assert told["sharded-bf16"][key] == told["bf16"][key] and told["sharded"][key] == told["plain"][key]
    assert told["still-bf16"]["moved"]["all"] == 0, "the float32 weights that a stage starts from, not their rounding"
    assert told["sharded"]["norms"] == pytest.approx(alone["plain"]["norms"], rel=2e-5)
    assert told["sharded"]["sum"] == pytest.approx(alone["plain"]["sum"], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_deepspeed_clips_at_the_recipes_norm_and_nowhere_else(tiny_base, tiny_data, tmp_path):
    """A configuration without the key would clip at 1.0, whatever max_grad_norm is; bfloat16 is refused at ZeRO 0."""
    told = work([tiny_base], tiny_data, tmp_path, [*TORCHRUN[:-2], "1", "--"], {"0": ["clipping", "bf16"]})["0"]
    assert "stage 0 in half precision" in told["bf16"]["error"]
    told = told["clipping"]
    files = sorted(path.name for path in (ROOT / "scripts").glob("zero*.json"))
    assert len(files) == 5 and told.pop("silent") == (
        "DeepSpeed clips gradients at 1.0, the recipe's max_grad_norm is 0.0: write "
        '"gradient_clipping": "auto" into its configuration; without the key DeepSpeed clips at 1.0'
    )
    assert told == {name: [0.0, 0.5] for name in files}


@pytest.mark.slow
def test_bfloat16_trains_alike_under_ddp_and_zero_2(together):
    ddp, zero = (together(stage)["bf16"] for stage in ("none", "2"))
    assert zero["norms"] == pytest.approx(ddp["norms"], rel=0.02)
    assert sum(zero["sum"].values()) == pytest.approx(sum(ddp["sum"].values()), rel=1e-3)


@pytest.mark.parametrize(
    ("shown", "overflow", "fp16", "error"),
    [
        (1, False, False, None),
        (0, True, True, None),
        (0, True, False, FloatingPointError),
        (0, False, True, RuntimeError),
    ],
)
def test_a_step_that_the_engine_skipped_is_told_from_one_that_was_missed(shown, overflow, fp16, error):
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(overflow=overflow),
        fp16_enabled=lambda: fp16,
        zero_optimization_stage=lambda: 2,
    )
    args = SimpleNamespace(process_index=0, world_size=1, gradient_accumulation_steps=1)
    callback = MethodCallback(SimpleNamespace(watches=True), True, 1, None, "clipped")
    callback.trainer = SimpleNamespace(model_wrapped=engine, args=args)
    callback.engine, callback._shown = DeepSpeed(callback.trainer), shown
    callback.layout = SimpleNamespace(engine="test", names=["a", "b"])
    callback._sums = {"a": torch.tensor(1.0), "b": torch.tensor(float("inf"))}
    with (
        pytest.raises(error, match=r"non-finite gradient of \['b'\]|saw 0 optimizer steps") if error else nullcontext()
    ):
        callback.on_step_end(args, SimpleNamespace(global_step=1), None)


def test_pieces_of_two_ranks_make_up_the_tensors():
    """Two tensors laid end to end, cut in the middle of the second, the last partition padded."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(10.0, 18.0).view(8)}
    laid = torch.cat([*(t.flatten() for t in tensors.values()), torch.zeros(2)])
    ranks = []
    for rank, flat in enumerate(laid.clone().view(2, 8)):
        slices = (
            [TensorSlice("a", torch.Size([2, 3]), flat, 0, 0, 6), TensorSlice("b", torch.Size([8]), flat, 6, 0, 2)]
            if rank == 0
            else [TensorSlice("a", torch.Size([2, 3]), None, 0, 0, 0), TensorSlice("b", torch.Size([8]), flat, 0, 2, 6)]
        )
        ranks.append(Layout("test", slices, [flat], True, torch.device("cpu")))
    for index, tensor in enumerate(tensors.values()):
        parts = [layout.shards().parameters[index] for layout in ranks]
        assert torch.equal(torch.cat([part.flatten() for part in parts]), tensor.flatten())
    for layout in ranks:
        layout.write({name: tensor + 100 for name, tensor in tensors.items()})
        gradients = layout.shards({id(layout.flats[0]): layout.flats[0] * 2}).gradients
        for parameter, gradient in zip(layout.shards().parameters, gradients, strict=True):
            assert torch.equal(2 * parameter, gradient)
    assert torch.equal(torch.cat([layout.flats[0] for layout in ranks])[:14], laid[:14] + 100)
    assert torch.equal(ranks[1].flats[0][6:], torch.zeros(2)), "the padding is nobody's"
