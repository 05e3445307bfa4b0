#!/usr/bin/env bash
# torch 2.13.0 on a CPU, transformers 5.23.0: a linear layer whose weight is frozen (requires_grad False, as an adapter
# leaves a base, and as serving code sets it) takes up to hundreds of times as long on hidden[:, -1:] as on a copy of it.
# That is what logits_to_keep=1 does with the language head before the first new token of a batch.
#
# A slice of three dimensions is not made one matrix but becomes a product of batches with the weight repeated, which has
# no fast path in bfloat16. With a weight that asks for a gradient the same call makes one matrix, also under no_grad.
# hidden[:, torch.tensor([-1])] is contiguous, so logits_to_keep=torch.tensor([-1]) is quick and gives the same logits.
# With a frozen head of 49,153 words, 64 prompts and width 576 it was 9.6 s against 0.03 s.
#
# Guess: a slice costs what its copy costs, give or take the copy, and freezing a weight makes nothing slower.
#
# Seen, 64 prompts of 40 tokens, width 576, 8,192 words, one thread, an EPYC with AVX512-BF16 (times differ):
#   a frozen weight: the slice runs as aten::bmm, its copy as aten::mm; one that asks for a gradient: aten::mm
#   bfloat16: slice 674 ms, copy 4 ms
#   the head of a frozen Llama with logits_to_keep=1 runs as aten::bmm, with torch.tensor([-1]) as aten::mm; equal: True
# Needs: python3 (3.10 or newer), the network for pip (about 3 GB with CUDA's torch).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy
cd "$work"
cat > last.py <<'PYTHON'
import time

import torch
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)


def products(call):
    """The matrix products that a call runs, as the profiler names them."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return [row.name for row in seen.events() if row.name in ("aten::mm", "aten::bmm", "aten::addmm")]


def fastest(call):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


with torch.no_grad():
    hidden, head = torch.randn(64, 40, 576).bfloat16(), torch.randn(8192, 576).bfloat16()
    part = hidden[:, -1:]
    ran = products(lambda: linear(part, head)), products(lambda: linear(part.contiguous(), head))
    asks = head.clone().requires_grad_()
    ran += (products(lambda: linear(part, asks)),)
    print(f"a frozen weight: the slice runs as {ran[0][0]}, its copy as {ran[1][0]}; one that asks for a gradient: {ran[2][0]}")
    slow, quick = fastest(lambda: linear(part, head)), fastest(lambda: linear(part.contiguous(), head))
    print(f"bfloat16: slice {1000 * slow:.0f} ms, copy {1000 * quick:.0f} ms")
    size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=8192)
    model = LlamaForCausalLM(LlamaConfig(**size)).eval().requires_grad_(False)
    ids = torch.randint(0, 8192, (64, 40))
    kept = [products(lambda keep=keep: model(ids, logits_to_keep=keep))[-1] for keep in (1, torch.tensor([-1]))]
    one, other = (model(ids, logits_to_keep=keep).logits for keep in (1, torch.tensor([-1])))
    print(f"the head of a frozen Llama with logits_to_keep=1 runs as {kept[0]}, with torch.tensor([-1]) as {kept[1]}; "
          f"equal: {torch.allclose(one, other, atol=1e-4)}")
assert ran == (["aten::bmm"], ["aten::mm"], ["aten::mm"]) and kept == ["aten::bmm", "aten::mm"], (ran, kept)
assert slow > 5 * quick and torch.allclose(one, other, atol=1e-4), (slow, quick)
PYTHON
"$work/venv/bin/python" -W ignore last.py
