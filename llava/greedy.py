"""Greedy decoding behind a prefix that is in the cache already, and how many questions fit in memory at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava.backbone import Backbone
from llava.prefix import Prefix, last_of

ON_CPU, MOST = 64, 256  # questions answered at once: without a GPU, and with one at most
SPARE = 0.2  # of the free memory, for the vision tower, the logits and fragmentation


@dataclass(frozen=True)
class Decoder:
    """A model, its backbone and how long an answer may be."""

    model: torch.nn.Module
    backbone: Backbone
    max_new_tokens: int

    @property
    def dtype(self) -> torch.dtype:
        """That of the head, in which everything is computed."""
        return self.model.get_output_embeddings().weight.dtype

    def precision(self) -> torch.autocast:
        """The context to compute in: adapters may be float32 on a base that is not."""
        return torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer: the tokenizer's, and what the base's generation_config.json adds."""
        config = getattr(self.model, "generation_config", None)
        more = getattr(config, "eos_token_id", None) or []
        return {self.backbone.tokenizer.eos_token_id, *([more] if isinstance(more, int) else more)}

    def prefix(self, ids: Sequence[int], pictures: Sequence[dict[str, torch.Tensor]] | None) -> Prefix:
        """Return the cache of these ids with each of the pictures, a row each; None: one row without any."""
        rows, more = 1, {}
        if pictures is not None:
            rows, more = len(pictures), self.backbone.stack(pictures)
            more = {key: self._placed(tensor) for key, tensor in more.items()}
        with self.precision():
            return Prefix.of(self.model, self.backbone, ids, more, rows)

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.model.device, self.dtype if tensor.is_floating_point() else None)

    def answer(self, prefix: Prefix, questions: Sequence[list[int]]) -> list[list[int]]:
        """Return the token ids of the answers, without the end of text. `prefix` has a row a question and is used up.

        Equal to stock `generate` without penalties, except that a question leaves the batch when it is answered.
        """
        width, device, ends = max(map(len, questions)), self.model.device, self.ends
        inputs = [[self.backbone.tokenizer.pad_token_id] * (width - len(question)) + question for question in questions]
        real = [[0] * (width - len(question)) + [1] * len(question) for question in questions]
        inputs, real = torch.tensor(inputs, device=device), torch.tensor(real, device=device)
        positions, seen = prefix.positions(real), torch.cat([real.new_ones(len(real), prefix.length), real], 1)
        answers: list[list[int]] = [[] for _ in questions]
        waiting = answers  # of each row
        while True:
            chosen = self._next(prefix, inputs, positions, seen)
            going = []
            for row, word in enumerate(chosen.tolist()):
                if word not in ends:
                    waiting[row].append(word)
                    if len(waiting[row]) < self.max_new_tokens:
                        going.append(row)
            if not going:
                return answers
            waiting = [waiting[row] for row in going]
            prefix.select(going)
            rows = torch.tensor(going, device=device)
            inputs, positions, seen = chosen[rows, None], positions[rows, -1:] + 1, seen[rows]
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)

    def _next(self, prefix: Prefix, inputs: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Run the tokens `inputs` behind the cache; return the next one of each row."""
        with self.precision():
            output = self.model(
                input_ids=inputs,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=prefix.cache,
                use_cache=True,
                logits_to_keep=last_of(inputs),
            )
        logits = output.logits[:, -1].float()
        logits[:, self.backbone.silent] = -torch.inf
        return logits.argmax(-1)


def question_bytes(text, width: int, tokens: int) -> int:
    """What a question of so many tokens, picture and answer included, takes while it is answered.

    Its keys and values in every layer and, in the layer that is under way, the MLP's three intermediate results, in
    numbers of `width` bytes. `text` is the language model's configuration.
    """
    count = getattr(text, "num_key_value_heads", text.num_attention_heads)
    heads = count * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    inner = text.intermediate_size if hasattr(text, "intermediate_size") else text.d_ff  # T5's name
    return tokens * width * (2 * text.num_hidden_layers * heads + 3 * inner)


def fitting(decoder: Decoder, tokens: int) -> int:
    """Return how many questions of so many tokens to answer at once: as many as the GPU's free memory holds."""
    device = decoder.model.device
    if device.type != "cuda":
        return ON_CPU
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    question = question_bytes(decoder.model.config.get_text_config(), decoder.dtype.itemsize, tokens)
    return int(min(MOST, max(1, (1 - SPARE) * free // question)))
