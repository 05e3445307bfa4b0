"""What tests/test_llaca_methods_whole.py runs in several processes: methods train some steps, with a memory.

torchrun ... tests/method_worker.py BASE DATA OUT ENGINE:METHOD[.bf16] ...

ENGINE is none, for all methods or for no method, or N of scripts/zeroN.json. OUT.ENGINE.METHOD.pt gets the trained
weights, those that the method hands on, what it reports and, for PGP, X X^T of every layer's inputs.
"""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data.records import load_samples
from llaca import ranks
from llaca.callbacks import MethodCallback
from llaca.config import load_recipe
from llaca.methods import METHODS
from llaca.methods.base import StageView
from llaca.second_moments import second_moments, width
from llaca.sections import ModelConfig
from llava.adapters import trainable_parameters
from llava.backbones import load_base
from llava.dataset import InstructionDataset
from llava.trainer import LlavaTrainer, training_arguments

OWN = {"olora": ["--blocks", "2"], "sd_lora": ["--blocks", "2"]}


def memory_of(name: str, model: torch.nn.Module) -> dict:
    """Records with other answers than the stage's; random Fisher information; or random directions: half of every
    layer's inputs."""
    if name in ("agem", "replay"):  # replay: whole steps on any number of ranks
        return {"buffer": {"old": [0, 2, 5, 11, 14, *([1, 7, 8] if name == "replay" else [])]}}
    if name in ("olora", "sd_lora"):
        return {"tasks": 1}
    generator, weights = torch.Generator().manual_seed(3), trainable_parameters(model)
    if name == "reglora":
        return {"held": {key: torch.arange(0, w.numel(), 3) for key, w in weights.items() if "lora_A" in key}}
    if name == "magmax":
        start = {key: weight.detach().clone() for key, weight in weights.items()}
        largest = {key: 0.01 * torch.randn(weight.shape, generator=generator) for key, weight in weights.items()}
        return {"start": start, "largest": largest, "trained": {key: w + largest[key] for key, w in start.items()}}
    if name == "ccfi":
        fisher = {key: torch.rand(weight.shape, generator=generator) for key, weight in weights.items()}
        anchor = {key: weight.detach() + 0.1 for key, weight in weights.items()}
        return {"buffer": {"old": [0, 2, 5, 11]}, "fisher": fisher, "anchor": anchor}
    if name == "l2":
        return {"anchor": {key: weight.detach() + 0.1 for key, weight in weights.items()}}
    if name in ("ewc", "cofima"):
        fisher = {key: 1e-4 * torch.rand(weight.shape, generator=generator) for key, weight in weights.items()}
        anchor = {key: weight.detach() + 0.1 for key, weight in weights.items()}
        return {"fisher": fisher, **({"anchor": anchor} if name == "ewc" else {})}
    if name not in ("pgp", "rcl"):
        return {}
    basis = {}
    for key, weight in weights.items():
        inputs = width(weight.shape)
        basis[key] = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q[:, : inputs // 2].contiguous()
    return {"basis": basis}


def train(name: str, base: Path, data: Path, folder: Path, zero: str | None, half: bool) -> dict:
    """Four optimizer steps of four records, one at a time, on as many ranks as there are; `half`: in bfloat16."""
    torch.manual_seed(0)
    model, backbone = load_base(base, torch.bfloat16 if half else torch.float32)
    method = METHODS[name](load_recipe(["--method", name, *OWN.get(name, [])]).settings)
    rank = 4 if name in ("moelora", "olora", "sd_lora") else 3  # two experts or blocks share it
    # Dropout would differ: every rank draws its own.
    model = method.attach(model, backbone, ModelConfig(str(base), lora_rank=rank, lora_alpha=6, lora_dropout=0.0))
    for key, weight in trainable_parameters(model).items():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, 0, 0.1)
        # Two equal blocks would be cut between them. So two ranks share a row of the first one's down_proj.lora_A.
        weight.requires_grad_("layers.1.mlp.gate_proj" not in key)
    samples = load_samples(data / "train.json", data)
    others = [replace(s, turns=tuple((question, "The bird.") for question, _ in s.turns)) for s in samples]
    own, old = (InstructionDataset.of_samples(each, backbone, 512) for each in (samples, others))
    method.stage = StageView("new", model, own, seed=5)
    method.recall(memory_of(name, model))
    dataset = method.extend(own, {"new": own, "old": old})
    arguments = training_arguments(
        folder / name,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // ranks.count(),
        bf16=half,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=zero,
    )
    start = {key: weight.detach().clone() for key, weight in trainable_parameters(model).items()}
    trainer = LlavaTrainer(model, arguments, dataset, 1e-3, "local", method)
    callback = MethodCallback(method, True, 4, None, "clipped")
    callback.attach(trainer)
    trainer.train()
    unset_hf_deepspeed_config()
    told = {"weights": callback.layout.gather(callback.layout.shards().parameters)}
    told["moved"] = float(sum((weight - start[key]).norm() for key, weight in told["weights"].items()))
    held = {key: weight.dtype for key, weight in trainable_parameters(model).items()}
    shown = {key: weight.detach().float().clone() for key, weight in trainable_parameters(model).items()}
    told["shown"] = all(
        torch.equal(shown[key], weight.to(held[key]).float()) for key, weight in told["weights"].items()
    )
    if name == "pgp":
        told["cut"] = method.places
        told["energies"] = second_moments(method.stage, list(shown), 6)
    if name == "discriminant_router":
        told["router"] = method.memory()
    handed, told["report"] = method.after_task(callback.layout.shards(), folder)
    told["handed"] = {} if handed is None else callback.layout.gather(handed)
    return told


def main() -> None:
    base, data, out, *given = sys.argv[1:]
    gc.freeze()  # what the imports left: looking at it, at the end of every training, takes longer than the training
    ranks.start("none" if given[0].startswith("none:") else "2")
    for engine, name in (one.split(":") for one in given):
        method, _, half = name.partition(".")
        folder, config = Path(out).parent / engine, None if engine == "none" else f"scripts/zero{engine}.json"
        told = train(method, Path(base), Path(data), folder, config, half == "bf16")
        if ranks.first():
            torch.save(told, f"{out}.{engine}.{name}.pt")
    ranks.leave()


if __name__ == "__main__":
    main()
