"""Training against loops written out by hand, and the moments at which hooks are called."""

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback, set_seed

from data.records import load_samples
from llava.adapters import adapter_state, attach_lora, save_adapter, set_adapter_state, trainable_parameters
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.conversation import IGNORE
from llava.dataset import InstructionDataset
from llava.hooks import TrainHooks
from llava.trainer import LlavaTrainer, training_arguments


@pytest.fixture
def adapted(tiny, tiny_data):
    """A model with LoRA and the samples: ten with a picture, six without."""
    model, backbone = tiny
    torch.manual_seed(0)
    samples = load_samples(tiny_data / "train.json", tiny_data)
    return attach_lora(model, Llava15, 4, 8, 0.0), InstructionDataset.of_samples(samples, backbone, 512)


def arguments(folder, **settings):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    return training_arguments(folder, **{**defaults, **settings})


class Recorder(TrainHooks, TrainerCallback):
    """Copies of every batch, and of gradients and weights on either side of every step."""

    def __init__(self, model):
        self.parameters = trainable_parameters(model)
        self.batches, self.before, self.after = [], [], []

    def loss(self, model, inputs, outputs):
        self.batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        self.logits = outputs.logits
        return None

    def now(self):
        return {name: (p.detach().clone(), p.grad.clone()) for name, p in self.parameters.items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before.append(self.now())

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.after.append(self.now())


def plain_loss(model, batch, reduction):
    """The shifted cross entropy over all positions and all words but the placeholder."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[:, :-1]
    logits = logits[..., : model.config.image_token_id]  # the placeholder is the last word of this vocabulary
    return functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction=reduction
    )


def replay(model, batches, normalisation, accumulation, projector_lr):
    """Train by hand on recorded batches; returns the gradients of each step."""
    parameters = trainable_parameters(model)
    groups = [
        {"params": [p for name, p in parameters.items() if "projector" not in name], "lr": 1e-2},
        {"params": [p for name, p in parameters.items() if "projector" in name], "lr": projector_lr},
    ]
    optimizer, gradients = torch.optim.AdamW(groups, weight_decay=0.0), []
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        supervised = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in step)
        for batch in step:
            if normalisation == "local":
                loss = plain_loss(model, batch, "mean") / len(step)
            else:
                loss = plain_loss(model, batch, "sum") / supervised
            loss.backward()
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    return gradients


@pytest.mark.parametrize("normalisation", ["local", "global"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_equal_a_loop_by_hand(adapted, tmp_path, normalisation, accumulation):
    model, dataset = adapted
    start, hooks = adapter_state(model), Recorder(model)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = LlavaTrainer(model, args, dataset, 1e-3, normalisation, hooks)
    trainer.add_callback(hooks)
    trainer.train()
    trained = adapter_state(model)
    assert len(hooks.batches) == 4 and len(hooks.before) == len(hooks.after) == 4 // accumulation
    assert any("pixel_values" not in batch for batch in hooks.batches)

    set_adapter_state(model, start)
    gradients = replay(model, hooks.batches, normalisation, accumulation, projector_lr=1e-3)
    for step, (before, after) in enumerate(zip(hooks.before, hooks.after, strict=True)):
        for name, gradient in gradients[step].items():
            torch.testing.assert_close(before[name][1], gradient, rtol=1e-4, atol=1e-6)
            assert torch.equal(before[name][1], after[name][1])
    for name, tensor in adapter_state(model).items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=2e-5)
        assert torch.equal(hooks.after[-1][name][0], trained[name])
        assert torch.equal(hooks.before[0][name][0], start[name])


@pytest.mark.parametrize("normalisation", ["local", "global"])
def test_extra_loss_is_averaged_over_a_step(adapted, tmp_path, normalisation):
    model, dataset = adapted
    start = adapter_state(model)

    class Pull(Recorder):
        def __init__(self, weight):
            super().__init__(model)
            self.weight = weight

        def loss(self, model, inputs, outputs):
            assert outputs.logits.shape[0] == int((inputs["labels"][:, 1:] != IGNORE).sum())
            return self.weight * sum(parameter.sum() for parameter in trainable_parameters(model).values())

    seen = []
    for weight in (0.0, 3.0):
        set_adapter_state(model, start)
        hooks = Pull(weight)
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2)
        trainer = LlavaTrainer(model, args, dataset, None, normalisation, hooks)
        trainer.add_callback(hooks)
        trainer.train()
        seen.append(hooks.before[0])
    for name in seen[0]:
        torch.testing.assert_close(seen[1][name][1], seen[0][name][1] + 3.0, rtol=1e-5, atol=1e-5)


def test_gradients_are_clipped_only_if_configured(adapted, tmp_path):
    model, dataset = adapted
    start, norms = adapter_state(model), []
    for limit in (0.0, 1e-3):
        set_adapter_state(model, start)
        hooks = Recorder(model)
        settings = arguments(tmp_path, max_grad_norm=limit, max_steps=1)
        trainer = LlavaTrainer(model, settings, dataset)
        trainer.add_callback(hooks)
        trainer.train()
        norms.append(torch.stack([gradient.norm() for _, gradient in hooks.before[0].values()]).norm().item())
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_projector_learns_at_the_common_rate_unless_told(adapted, tmp_path):
    model, dataset = adapted
    rates = {}
    for projector_lr in (None, 1e-4):
        trainer = LlavaTrainer(model, arguments(tmp_path, weight_decay=0.1), dataset, connector_lr=projector_lr)
        names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
        for group in trainer.create_optimizer().param_groups:
            for parameter in group["params"]:
                rates[projector_lr, names.pop(id(parameter))] = (group["lr"], group["weight_decay"])
        assert not names
    for (projector_lr, name), (rate, decay) in rates.items():
        assert rate == (projector_lr if projector_lr and "projector" in name else 1e-2)
        assert decay == (0.0 if name.endswith("bias") else 0.1)


def train_from_scratch(base, data, folder, **settings):
    """One whole training as a stage runs it: seed, load, cache, attach, train, save."""
    set_seed(7)
    model, backbone = load_base(base)
    samples = load_samples(data / "train.json", data)
    lists = [[sample.image for sample in samples if sample.image]]
    backbone.use_features(model, backbone.vision_features(model, lists))
    model = attach_lora(model, Llava15, 4, 8, 0.1)
    dataset = InstructionDataset.of_samples(samples, backbone, 512)
    LlavaTrainer(model, arguments(folder / "trainer", **settings), dataset, 1e-3).train()
    save_adapter(model, folder)
    return model


def test_one_seed_gives_one_adapter_byte_for_byte(tiny_base, tiny_data, tmp_path):
    for name in ("a", "b", "c"):
        train_from_scratch(tiny_base, tiny_data, tmp_path / name, seed=6 if name == "c" else 5)
    contents = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b", "c")]
    assert contents[0] == contents[1] != contents[2]
    configs = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("a", "b")]
    assert configs[0] == configs[1]


def test_checkpointing_activations_changes_nothing(tiny_base, tiny_data, tmp_path):
    states = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        model = train_from_scratch(tiny_base, tiny_data, folder, activation_checkpointing=checkpointing)
        states.append(adapter_state(model))
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=1e-6)


def test_training_learns(tiny_base, tiny_data, tmp_path):
    losses = []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.append(logs.get("loss"))

    set_seed(0)
    model, backbone = load_base(tiny_base)
    samples = load_samples(tiny_data / "train.json", tiny_data)
    dataset = InstructionDataset.of_samples(samples[:10], backbone, 512)
    args = arguments(tmp_path, num_train_epochs=6, logging_steps=1)
    model = attach_lora(model, Llava15, 4, 8, 0.0)
    trainer = LlavaTrainer(model, args, dataset)
    trainer.add_callback(Losses())
    trainer.train()
    assert losses[-2] < losses[0] / 2  # the last line is the summary


def test_unknown_normalisation_is_refused(adapted, tmp_path):
    model, dataset = adapted
    with pytest.raises(ValueError, match="'mean'; it must be one of"):
        LlavaTrainer(model, arguments(tmp_path), dataset, normalisation="mean")
