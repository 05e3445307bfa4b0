"""What tests/test_llaca_engine.py runs in several processes: faults and clipping under engines, told as JSON.

torchrun ... tests/engine_worker.py BASES DATA OUT ENGINE:SCENARIO ...

ENGINE is none, for all or for no scenario, or N of scripts/zeroN.json. BASES are folders, joined by commas; a scenario
may begin with the number of its own, 0 if it does not: 3:1.plain.
"""

import gc
import json
import sys
from itertools import count
from pathlib import Path

import torch
from torch.nn import functional
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data.records import load_samples
from llaca import ranks
from llaca.callbacks import MethodCallback
from llaca.config import load_recipe
from llaca.engines.deepspeed import cast_for_engine, sharded_loading
from llaca.methods.base import Method
from llaca.methods.llaca import LLaCA
from llava.adapters import adapter_state, attach_lora, is_connector
from llava.backbone import BaseOptions
from llava.backbones import load_base
from llava.dataset import InstructionDataset
from llava.trainer import LlavaTrainer, training_arguments

STEPS = 4
FAULTY = "layers.1.self_attn.v_proj.lora_B.default.weight"


class Recorder(Method):
    """Keeps the L2 norm of the step's whole gradient, and of the projector's."""

    watches = True

    def __init__(self):
        self.norms, self.projector = [], []

    def after_step(self, shards):
        table = torch.stack([g.double().square().sum() for g in shards.gradients])
        if not table.isfinite().all():
            broken = [n for n, value in zip(shards.names, shards.sum(table), strict=True) if not value.isfinite()]
            raise FloatingPointError(f"not finite: {broken}")
        total = shards.sum(table)
        self.norms.append(total.sum().sqrt().item())
        own = torch.tensor([is_connector(name) for name in shards.names])
        self.projector.append(total[own].sum().sqrt().item())


def storages() -> dict[int, torch.UntypedStorage]:
    """Those of all tensors in this process, by their addresses."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    return {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}


class Weighed(LLaCA):
    """Adds up the bytes of all tensors after its one step, each storage once, without those of earlier scenarios."""

    norms, bytes = (), 0

    def __init__(self, settings):
        super().__init__(settings)
        self.before = storages()

    def after_step(self, shards):
        super().after_step(shards)
        self.bytes = sum(storage.nbytes() for address, storage in storages().items() if address not in self.before)


def scenario(name: str, base: Path, data: Path, folder: Path, zero: str | None) -> dict:
    """One short training of a base; returns the gradients' norms or the error."""
    # as at real sizes: ZeRO 3 gathers every tensor whenever it is used, where small ones would stay
    gathered, options = name.startswith("gathered"), BaseOptions(train_connector=not name.endswith("frozen"))
    if gathered and zero:
        config = json.loads(Path(zero).read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gathered.json").write_text(json.dumps(config))
        zero = str(folder / "gathered.json")
    sharded, dtype = name.startswith("sharded"), torch.bfloat16 if name.endswith("bf16") else torch.float32
    weighs = name == "bytes"
    settings = load_recipe(["--method", "llaca", "--average", "eq45"]).settings
    method = Weighed(settings) if weighs else Recorder()
    with sharded_loading("3" if sharded else "none", dtype):
        model, backbone = load_base(base, dtype if sharded else torch.float32, options=options)
    torch.manual_seed(0)
    model = attach_lora(model, backbone, 64 if weighs else 4, 8, 0.0)
    samples = load_samples(data / "train.json", data)  # 10 with a picture, 6 without
    samples = {"text": samples[10:], "turns": samples[:8] + samples[12:]}.get("turns" if gathered else name, samples)
    if backbone.placeholder is None:  # as many as a step takes, of several ranks or of one
        samples = [sample for sample in samples if sample.image is None][:4]
    dataset = InstructionDataset.of_samples(samples, backbone, 512)
    if name == "nan":
        poisoned = next(p for path, p in model.named_parameters() if path.endswith(FAULTY))
        poisoned.register_hook(lambda gradient: gradient * float("nan"))
    if name == "missing":
        lost = next(module for path, module in model.named_modules() if f"{path}.weight".endswith(FAULTY))
        lost.forward = lambda x: functional.linear(x, lost.weight.detach())
    if name == "late":
        lost = next(module for path, module in model.named_modules() if f"{path}.weight".endswith(FAULTY))
        calls = count()
        lost.forward = lambda x: functional.linear(x, lost.weight if next(calls) % 2 else lost.weight.detach())
    start = {} if weighs else adapter_state(model)
    if sharded:
        cast_for_engine(model, dtype)
    arguments = training_arguments(
        folder / name,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 if name == "late" else 2 // ranks.count(),
        max_steps=1 if weighs else STEPS,
        learning_rate=0.0 if name == "still-bf16" else 1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.01 if name in ("clipped", "unclipped") else 0.0,
        bf16=dtype == torch.bfloat16,
        deepspeed=zero,
    )
    trainer = LlavaTrainer(model, arguments, dataset, None, "global", method)
    callback = MethodCallback(
        method,
        True,
        STEPS,
        dict(start) if name == "still-bf16" else None,
        "unclipped" if name == "unclipped" else "clipped",
    )
    callback.attach(trainer)
    try:
        trainer.train()
    except (RuntimeError, ValueError, FloatingPointError) as error:
        return {"error": str(error), "steps": len(method.norms)}
    finally:
        unset_hf_deepspeed_config()
    if weighs:
        return {"bytes": method.bytes}
    weights = callback.layout.gather(callback.layout.shards().parameters)
    moved = {key: (weight - start[key]).abs().sum().item() for key, weight in weights.items()}
    told = {
        "projector": sum(value for key, value in moved.items() if is_connector(key)),
        "all": sum(moved.values()),
        "lora": all(value > 0 for key, value in moved.items() if "lora_B" in key),
    }
    return {
        "norms": method.norms,
        "projector": method.projector,
        "moved": told,
        "sum": {n: t.double().abs().sum().item() for n, t in weights.items()},
    }


def clipping(base: Path, data: Path, folder: Path) -> dict:
    """At which norm DeepSpeed clips where the recipe says 0 and 0.5, by its configuration; "silent" has no key for it,
    and tells the error."""
    told, files = {}, sorted(Path("scripts").glob("zero*.json"))
    silent = json.loads(files[0].read_text())
    del silent["gradient_clipping"]
    (folder / "silent").write_text(json.dumps(silent))
    for file in [*files, folder / "silent"]:
        for norm in (0.0, 0.5):
            model, backbone = load_base(base)
            model = attach_lora(model, backbone, 4, 8, 0.0)
            dataset = InstructionDataset.of_samples(load_samples(data / "train.json", data)[:2], backbone, 512)
            arguments = training_arguments(
                folder / "clipping",
                max_steps=1,
                max_grad_norm=norm,
                use_cpu=True,
                disable_tqdm=True,
                deepspeed=str(file),
            )
            trainer = LlavaTrainer(model, arguments, dataset)
            MethodCallback(Recorder(), True, 1, None, "clipped").attach(trainer)
            try:
                trainer.train()
            except ValueError as error:
                told.setdefault(file.name, str(error))
            else:
                told.setdefault(file.name, []).append(trainer.model_wrapped.gradient_clipping())
            unset_hf_deepspeed_config()
    return told


def main() -> None:
    bases, data, out, *scenarios = sys.argv[1:]
    gc.freeze()  # what the imports left: looking at it, at the end of every training, takes longer than the training
    ranks.start("none" if scenarios[0].startswith("none:") else "2")
    told, folder = {}, Path(out).parent
    for given in scenarios:
        zero, _, place = given.partition(":")
        number, _, name = place.rpartition(".")
        base = Path(bases.split(",")[int(number or 0)])
        config = None if zero == "none" else f"scripts/zero{zero}.json"
        if name == "clipping":
            told[given] = clipping(base, Path(data), folder)
        else:
            told[given] = scenario(name, base, Path(data), folder / given.replace(":", "-"), config)
    if ranks.first():
        Path(out).write_text(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main()
