"""What a model makes of a question before it answers: the state that its head turns into the first word."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from llava.backbone import Backbone
from llava.conversation import IGNORE
from llava.dataset import Collator

BATCH = 16  # questions of one pass


def asked(backbone: Backbone, ids: list[int], picture: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """An item for `question_states` of the token ids that ask a question, and what `Backbone.picture` gives."""
    tokens = torch.tensor([*ids, backbone.tokenizer.eos_token_id])
    return {"input_ids": tokens, "labels": _last_alone(tokens), **(picture or {})}


def question_of(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """A record (an item of a dataset) up to the first word of its first answer."""
    tokens = item["input_ids"][: int((item["labels"] != IGNORE).nonzero()[0]) + 1]
    return {**item, "input_ids": tokens, "labels": _last_alone(tokens)}


@torch.no_grad()
def question_states(model: nn.Module, backbone: Backbone, items: Iterable[dict[str, Tensor]]) -> Tensor:
    """What goes into the head at the first word of each item's answer: float32 [items, width], on the model's device;
    [0] without items. The model is in evaluation mode."""
    found, device, items = [], next(model.parameters()).device, iter(items)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: found.append(inputs[0]))
    try:
        while some := list(islice(items, BATCH)):
            batch = {key: value.to(device) for key, value in Collator(backbone)(some).items()}
            backbone.answer_logits(model, batch)
    finally:
        hook.remove()
    return torch.cat([state.flatten(0, -2).float() for state in found]) if found else torch.zeros(0, device=device)


def _last_alone(tokens: Tensor) -> Tensor:
    labels = torch.full_like(tokens, IGNORE)
    labels[-1] = tokens[-1]
    return labels
