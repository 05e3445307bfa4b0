"""MoELoRA against plain LoRA, against a loop over its experts, and through the whole harness."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax
from test_llaca_methods import method_of
from test_llaca_train import adapters, arguments, mini  # noqa: F401
from test_llava_adapters import scrambled

from data.records import load_samples
from eval.predict import Answerer
from eval.report import main as report
from eval.runs import open_run
from eval.tables import read_matrix
from llaca.config import load_recipe
from llaca.methods import METHODS
from llaca.methods.base import Method
from llaca.sections import ModelConfig
from llaca.train import run
from llava.adapters import (
    adapter_state,
    attach_lora,
    load_adapter,
    save_adapter,
    set_adapter_state,
    trainable_parameters,
)
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.dataset import Collator, InstructionDataset

WEIGHTS = "adapter/adapter_model.safetensors"


def attached(base, experts: int, rank: int = 6, dropout: float = 0.0):
    """The base with experts, drawn by a seed."""
    torch.manual_seed(0)
    config = ModelConfig("", lora_rank=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    return method_of("moelora", "--experts", str(experts)).attach(base, Llava15, config)


def layers_of(model) -> dict:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_router")}


def batch_of(tiny, tiny_data):
    samples = load_samples(tiny_data / "train.json", tiny_data)[:2]
    return Collator(tiny[1])(list(InstructionDataset.of_samples(samples, tiny[1], 512)))


def test_one_expert_is_lora_bit_for_bit(arguments, monkeypatch):  # noqa: F811
    """Three stages with dropout, from the same start: every tensor, and a router that nothing moves."""

    class SameStart(Method):
        def attach(self, model, backbone, config):
            moelora = method_of("moelora", "--experts", "1")
            drawn = adapter_state(moelora.attach(copy.deepcopy(model), backbone, config))
            lora = super().attach(model, backbone, config)
            set_adapter_state(lora, {name: tensor for name, tensor in drawn.items() if "lora_router" not in name})
            return lora

    monkeypatch.setitem(METHODS, "lora", SameStart)
    lora = run(load_recipe([*arguments[:-1], "lora", "--method", "lora"]))
    mine = run(load_recipe([*arguments, "--method", "moelora", "--experts", "1"]))
    stages = sorted(path.name for path in lora.glob("stages/*"))
    ends = [load_file(mine / "stages" / stage / WEIGHTS) for stage in stages]
    for stage, found in zip(stages, ends, strict=True):
        plain = load_file(lora / "stages" / stage / WEIGHTS)
        routers = found.keys() - plain.keys()
        assert len(stages) == 3 and len(routers) == 14 and all(name.endswith("lora_router.weight") for name in routers)
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
        assert all(torch.equal(found[name], ends[0][name]) for name in routers)
    assert all(not torch.equal(ends[0][name], ends[2][name]) for name in ends[0] if name not in routers)


def test_outputs_and_gradients_are_those_of_a_loop_over_the_experts(tiny):
    """Values against numpy, token by token; gradients against autograd of sum_i g_i B_i A_i x written out."""
    layer = layers_of(scrambled(attached(tiny[0], 3), 1))[
        "base_model.model.model.language_model.layers.1.mlp.down_proj"
    ]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, layer.in_features, generator=generator)
    weights = [layer.base_layer.weight, *(getattr(layer, f"lora_{p}")["default"].weight for p in ("router", "A", "B"))]
    W, R, A, B = (weight.detach().double().numpy() for weight in weights)
    found = layer(x)
    for token, y in zip(x.flatten(0, 1).double().numpy(), found.detach().flatten(0, 1).numpy(), strict=True):
        expected, gates = W @ token, softmax(R @ token)
        for i in range(3):
            expected = expected + 2 * gates[i] * (B[:, 2 * i : 2 * i + 2] @ (A[2 * i : 2 * i + 2] @ token))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    gates = layer.gates(x, "default")
    assert gates.shape == (2, 5, 3) and (gates > 0).all() and (gates != gates[:1, :1]).any()
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 5))

    W, R, A, B = weights
    g = (x @ R.T).exp() / (x @ R.T).exp().sum(-1, keepdim=True)
    parts = zip(g.unbind(-1), A.split(2), B.split(2, dim=1), strict=True)
    written = x @ W.T + 2 * sum(gate.unsqueeze(-1) * (x @ a.T @ b.T) for gate, a, b in parts)
    aim = torch.randn(found.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((y * aim).sum(), [R, A, B]) for y in (found, written))
    for gradient, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_experts_sit_where_lora_does_and_a_router_beside_each(tiny, tiny_base, tiny_data):
    model, lora = attached(tiny[0], 3), attach_lora(load_base(tiny_base)[0], Llava15, 6, 12, 0.0)
    names, plain = trainable_parameters(model), trainable_parameters(lora)
    routers = {name for name in names if "lora_router" in name}
    assert names.keys() - routers == plain.keys()
    assert routers == {name.replace("lora_A", "lora_router") for name in plain if "lora_A" in name}
    assert {name: p.shape for name, p in names.items() if name in plain} == {n: p.shape for n, p in plain.items()}
    assert all(names[r].shape == (3, names[r.replace("lora_router", "lora_A")].shape[1]) for r in routers)
    scrambled(model, 1)(**batch_of(tiny, tiny_data)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in names.values()) and all(p.dtype == torch.float32 for p in names.values())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)


def test_the_start_is_the_base_model_and_small_random_experts(tiny_base):
    base, backbone = load_base(tiny_base, torch.bfloat16)
    ids = torch.tensor([backbone.tokenizer("USER: Is it?").input_ids])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = attached(base, 2).eval()
        assert torch.equal(model(input_ids=ids).logits, before)
    drawn = adapter_state(model)
    A = torch.cat([tensor.flatten() for name, tensor in drawn.items() if "lora_A" in name])
    assert A.std().item() == pytest.approx(0.01, rel=0.05) and abs(A.mean().item()) < 5e-4
    assert all(not tensor.any() for name, tensor in drawn.items() if "lora_B" in name)
    assert all(tensor.abs().max() > 0.1 for name, tensor in drawn.items() if "lora_router" in name)


def test_adapter_folder_round_trip_and_what_does_not_fit(tiny, tiny_base, tmp_path):
    model = scrambled(attached(tiny[0], 2), 2)
    save_adapter(model, tmp_path)
    other = attached(load_base(tiny_base)[0], 2)
    load_adapter(other, tmp_path)
    wanted, loaded = adapter_state(model), adapter_state(other)
    assert wanted.keys() == loaded.keys() and all(torch.equal(wanted[name], loaded[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"'shape': \[.*lora_router"):
        load_adapter(attached(load_base(tiny_base)[0], 3), tmp_path)
    with pytest.raises(ValueError, match=r"'unexpected': \[.*lora_router"):
        load_adapter(attach_lora(load_base(tiny_base)[0], Llava15, 6, 12, 0.0), tmp_path)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


def test_experts_train_upon_a_quantized_base(tiny_base, tiny_data):
    quantized = load_base(tiny_base, quantization="8bit")
    model = scrambled(attached(quantized[0], 2), 1)
    batch, losses = batch_of(quantized, tiny_data), []
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and len(layers_of(model)) == 14


def test_a_run_trains_its_routers_and_answers_with_the_experts_unmerged(arguments, tmp_path):  # noqa: F811
    folder = run(load_recipe([*arguments, "--method", "moelora"]))
    ends = [load_file(path) for path in sorted(folder.glob(f"stages/*/{WEIGHTS}"))]
    for name, tensor in ends[0].items():
        assert not torch.equal(tensor, ends[1][name]) and not torch.equal(ends[1][name], ends[2][name])
    assert sum("lora_router" in name for name in ends[0]) == 14
    found = open_run(folder)
    model = Answerer(found).model(found, "02-TextVQA")
    assert len(layers_of(model)) == 14
    assert all(torch.equal(p, ends[1][n.replace(".default", "")]) for n, p in model.named_parameters() if "lora_" in n)
    report(["--runs-dir", str(tmp_path / "runs")])
    assert np.isfinite(np.tril(read_matrix(folder / "matrix.csv")[0])).all()
    assert set(json.loads((folder / "metrics.json").read_text())) >= {"Avg.ACC", "Forgetting"}


@pytest.mark.parametrize(
    ("experts", "message"),
    [("3", "experts 3 does not divide lora_rank 4"), ("0", "experts: '0' is not a whole number of at least 1")],
)
def test_a_number_of_experts_that_cannot_be_is_refused(arguments, tmp_path, experts, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        run(load_recipe([*arguments, "--method", "moelora", "--experts", experts]))
    assert not list(tmp_path.glob("runs/*/stages/*")), "nothing has been trained"
