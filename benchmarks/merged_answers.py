"""What merging LoRA into a bfloat16 base does to answers and logits, against LoRA kept beside it as in training.

    python -m benchmarks.merged_answers --run runs/lora-seed0 --stage 03-VQAv2 [--questions 500]

Both are held against float32 with the same weights: the base's rounded to bfloat16, LoRA's as trained.

    merged     W + B A alpha / r rounded to bfloat16, as PEFT's merge_and_unload leaves it
    beside     W x + B A x alpha / r under autocast, as in training

Prints two tables: the greedy answers of a trained stage that differ, and the answers a second of processor time; and,
for language models of random weights, the error of their logits, where LoRA is as large beside W as it is in the
trained stage, and a tenth of that (the answers of such a model are ties, and would tell nothing).
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eval.predict import Answerer
from eval.runs import EvaluatedRun, open_run
from llaca.methods import METHODS
from llava.adapters import load_adapter
from llava.generate import answer_batches
from llava.greedy import Decoder

WIDTHS, LAYERS, TOKENS, RANK = (256, 1024, 2048), 4, 32, 128


def variants(base: nn.Module, adapted: Callable[[nn.Module], nn.Module]) -> dict[str, nn.Module]:
    """The three models of a bfloat16 `base`; `adapted` attaches LoRA, in float32."""
    return {
        "float32": adapted(copy.deepcopy(base).float()),
        "merged": adapted(copy.deepcopy(base)).merge_and_unload(),
        "beside": adapted(copy.deepcopy(base)),
    }


def size_of_lora(model: nn.Module) -> float:
    """Median over the adapted linears of |B A alpha / r| / |W|, L2."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    return float(torch.stack([share_of(layer) for layer in layers]).median())


def share_of(layer: nn.Module) -> Tensor:
    """|B A alpha / r| / |W| of one adapted linear, L2."""
    return layer.get_delta_weight("default").norm() / layer.get_base_layer().weight.float().norm()


def answers(run: EvaluatedRun, stage: str, questions: int, batch_size: int) -> float:
    """Prints the first table; returns the size of the stage's LoRA."""
    answerer = Answerer(run)
    config = replace(run.recipe.model, lora_dropout=0.0)
    method = METHODS[run.recipe.method.method](run.recipe.settings)

    def adapted(base: nn.Module) -> nn.Module:
        model = method.attach(base, answerer.backbone, config)
        load_adapter(model, run.folder / "stages" / stage / "adapter")
        return model

    models, found, seconds = variants(answerer.base.bfloat16(), adapted), {}, {}
    share = -(-questions // len(run.tasks))
    for name, model in models.items():
        start, found[name] = time.process_time(), []
        for task in run.tasks:
            asked = run.questions[task]
            numbers = range(min(share, len(asked)))
            said = [""] * len(numbers)
            ids, pictures = [asked.ids(n) for n in numbers], [asked.picture(n) for n in numbers]
            batches = answer_batches(
                Decoder(model, answerer.backbone, run.answer_limit(task)), ids, pictures, batch_size
            )
            for numbers, texts in batches:
                for number, text in zip(numbers, texts, strict=True):
                    said[number] = text
            found[name] += said
        seconds[name] = time.process_time() - start
    total = len(found["float32"])
    print(f"{total} questions of {', '.join(run.tasks)}, batches of {batch_size}\n")
    print("| | answers unlike float32's | unlike beside's | answers a second of one core |\n|---|---:|---:|---:|")
    for name, said in found.items():
        other = [sum(a != b for a, b in zip(said, found[key], strict=True)) for key in ("float32", "beside")]
        print(f"| {name} | {other[0]} | {other[1]} | {total / seconds[name]:.0f} |")
    return size_of_lora(models["float32"])


def logits(size: float) -> None:
    """Prints the second table, for LoRA of this size."""
    from peft import LoraConfig, get_peft_model

    print("\n| width | size of LoRA | error of the logits, merged | beside |\n|---:|---:|---:|---:|")
    for width in WIDTHS:
        for wanted in (size, size / 10):
            torch.manual_seed(0)
            settings = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 64}
            base = (
                LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=LAYERS, **settings)).bfloat16().eval()
            )
            drawn: dict[str, Tensor] = {}

            def adapted(model: nn.Module, wanted: float = wanted, drawn: dict[str, Tensor] = drawn) -> nn.Module:
                model = get_peft_model(
                    model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
                ).eval()
                for name, layer in model.named_modules():
                    if hasattr(layer, "lora_A"):
                        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                        if name not in drawn:
                            nn.init.normal_(b)
                            b.data *= wanted / share_of(layer)
                            drawn[name] = (a.data.clone(), b.data.clone())
                        a.data, b.data = (tensor.clone() for tensor in drawn[name])
                return model

            tokens, told = torch.randint(0, 1000, (1, TOKENS)), {}
            with torch.no_grad():
                for name, model in variants(base, adapted).items():
                    with torch.autocast("cpu", torch.bfloat16, enabled=name != "float32"):
                        told[name] = model(input_ids=tokens).logits.float()
            true = told.pop("float32")
            error = {name: float((found - true).norm() / true.norm()) for name, found in told.items()}
            print(f"| {width} | {wanted:.3f} | {error['merged']:.2%} | {error['beside']:.2%} |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run that was trained")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    logits(answers(open_run(options.run), options.stage, options.questions, options.batch_size))


if __name__ == "__main__":
    main()
