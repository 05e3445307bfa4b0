"""Adapters other than LoRA beside the weights: OFT against PEFT and scipy, DSEE against numpy."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from test_llaca_methods import layout_of, method_of, moved, view  # noqa: F401
from test_llaca_styles import words_of

from llaca.config import CONFIGS, load_recipe
from llaca.methods import METHODS
from llaca.methods.base import StageView
from llaca.methods.dsee import farthest
from llava.adapters import adapter_state, load_adapter, save_adapter, trainable_parameters
from llava.backbones import load_base

ROOT = Path(__file__).parents[1]


def attached(tiny_base, view, method):  # noqa: F811
    """The base with the method's adapter, as a stage of `view`'s records."""
    model, backbone = load_base(tiny_base)
    config = load_recipe(["--method", "lora", "--lora_rank", "3", "--lora_alpha", "6", "--lora_dropout", "0"]).model
    return StageView("GQA", method.attach(model, backbone, config), view.dataset, seed=7)


def test_oft_turns_inputs_and_keeps_the_bases_answers(view, tiny_base, tmp_path):  # noqa: F811
    method = method_of("oft", "--block", "8", "--penalty", "0.7")
    stage = method.stage = attached(tiny_base, view, method)
    [batch] = stage.batches([0, 3, 12], 3)
    words = words_of(view)

    def logits() -> torch.Tensor:
        return stage.backbone.answer_logits(stage.model, batch)[0].logits

    base = load_base(tiny_base)[0]
    plain = stage.backbone.answer_logits(base, batch)[0].logits
    torch.testing.assert_close(logits(), plain, rtol=0, atol=1e-5), "it starts at the base"
    method.recall({})
    memory = method.memory()
    moved(stage, 0.05)
    method.recall(memory)  # a later task: the base still teaches
    method.before_task(layout_of(stage).shards(), True, 1)
    outputs, _ = stage.backbone.answer_logits(stage.model, batch)
    p, q = (softmax(z.detach().double().numpy()[:, words], axis=1) for z in (plain, outputs.logits))
    term = method.loss(stage.model, batch, outputs)
    assert term.item() == pytest.approx(0.7 * rel_entr(p, q).sum(axis=1).mean(), rel=1e-4) and term > 0
    layer = next(module for module in stage.model.modules() if hasattr(module, "oft_R"))
    turn = layer.get_delta_weight("default").detach().double().numpy()
    for row, block in enumerate(layer.oft_R["default"].weight.detach().double().numpy()):
        q = np.zeros((8, 8))
        q[np.triu_indices(8, 1)] = block
        q = q - q.T
        exact = np.linalg.solve((np.eye(8) - q).T, (np.eye(8) + q).T).T
        mine = turn[8 * row : 8 * row + 8, 8 * row : 8 * row + 8]
        assert np.abs(mine - exact).max() < 1e-2, "Neumann's five terms"
    save_adapter(stage.model, tmp_path)
    other = attached(tiny_base, view, method)
    load_adapter(other.model, tmp_path)
    again = other.backbone.answer_logits(other.model, batch)[0].logits
    torch.testing.assert_close(again, outputs.logits, rtol=0, atol=0)
    merged = other.model.merge_and_unload()
    torch.testing.assert_close(other.backbone.answer_logits(merged, batch)[0].logits, again, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="oft_block_size 8, the model 4; attach it with the same value"):
        load_adapter(attached(tiny_base, view, method_of("oft", "--block", "4")).model, tmp_path)
    with pytest.raises(ValueError, match="block 7 does not divide the inputs of every layer"):
        attached(tiny_base, view, method_of("oft", "--block", "7"))


def test_dsee_adds_low_rank_and_the_elements_farthest_from_it(view, tiny_base, tmp_path):  # noqa: F811
    method = method_of("dsee", "--sparse", "5")
    rng = np.random.default_rng(0)
    low, spikes = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 20)), rng.choice(600, 5, replace=False)
    low.flat[spikes] += 0.5
    assert farthest(torch.tensor(low), 3, 5).tolist() == sorted(spikes)
    stage = attached(tiny_base, view, method)
    again, layers = attached(tiny_base, view, method), 0
    moved(stage, 0.1)
    places = {}
    for name, layer in stage.model.named_modules():  # those of the file count, wherever this machine finds some
        if hasattr(layer, "lora_sparse"):
            places[name] = np.sort(rng.choice(layer.base_layer.weight.numel(), 5, replace=False))
            layer.lora_sparse["default"].places.copy_(torch.from_numpy(places[name]))
    save_adapter(stage.model, tmp_path, adapter_state(stage.model))
    load_adapter(again.model, tmp_path)
    twins = dict(again.model.named_modules())
    for name, layer in stage.model.named_modules():
        if not hasattr(layer, "lora_sparse"):
            continue
        weight, values = layer.base_layer.weight.detach().numpy(), layer.lora_sparse["default"]
        sparse = np.zeros(weight.size)
        sparse[places[name]] = values.weight.detach()
        a, b = (getattr(layer, f"lora_{part}")["default"].weight.detach().numpy() for part in "AB")
        whole = weight + 2 * b @ a + sparse.reshape(weight.shape)
        x = torch.randn(2, 3, layer.in_features)
        wanted = x.numpy() @ whole.T + (0 if layer.base_layer.bias is None else layer.base_layer.bias.detach().numpy())
        np.testing.assert_allclose(layer(x).detach(), wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(twins[name](x), layer(x))
        layers += 1
    assert layers == 14
    [batch] = stage.batches([0, 3], 2)
    stage.backbone.answer_loss(stage.model, batch).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in trainable_parameters(stage.model).values())
    before = stage.backbone.answer_logits(stage.model, batch)[0].logits
    merged = copy.deepcopy(stage.model).merge_and_unload()
    torch.testing.assert_close(stage.backbone.answer_logits(merged, batch)[0].logits, before, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="take --quantization none"):
        method.check_model(load_recipe(["--method", "dsee", "--quantization", "nf4"]).model)


def test_the_mini_recipes_blocks_divide_their_bases():
    for recipe in ("coin_mini", "coin_mini_qwen25vl", "dialog_mini_t5"):
        asked = load_recipe(["--recipe", str(CONFIGS / f"{recipe}.yaml"), "--method", "oft"])
        model, backbone = load_base(ROOT / asked.model.base)
        attached = METHODS["oft"](asked.settings).attach(model, backbone, asked.model)
        assert any("oft_R" in name for name in trainable_parameters(attached))
