"""How a tiny base learns to see: its phases, batches and losses, for scripts/pretrain_tiny.py.

First the vision tower alone: every patch is asked for the name, the colour and the box of the thing that covers it
(`PatchProbe`, thrown away at the end). Then the whole model on captions and conversations of `data.mini.corpus`, with
the patch loss as a side loss. At last the same at half the learning rate, with words to repeat mixed in, so that every
token of the vocabulary can be said.
"""

import random

import torch
from torch import nn
from transformers import PreTrainedModel

from data.mini import corpus
from data.mini.world import GRID, SIDE, World
from llava.conversation import Vocabulary, encode
from scripts.tiny_families import Phase, TinyLlava, TinyQwen25
from scripts.tiny_targets import COLOR_ID, names_of

CELLS = SIDE // GRID + 1
Family = TinyLlava | TinyQwen25
PHASES = {
    "vision": Phase(4000, lr=1e-3, vision_lr=1e-3, batch=32, side=1.0),
    "whole": Phase(6000, lr=1e-3, vision_lr=2e-4, batch=16, side=0.2, text_share=0.2),
    "finish": Phase(3000, lr=5e-4, vision_lr=1e-4, batch=16, side=0.2, text_share=0.3, echo=True),
}


class PatchProbe(nn.Module):
    """Linear read-outs of each patch's feature: name, colour, box corners on the grid, and the number of copies."""

    def __init__(self, width: int, world: World):
        super().__init__()
        self.name = nn.Linear(width, len(names_of(world)))
        self.color = nn.Linear(width, len(COLOR_ID) + 1)
        self.box = nn.Linear(width, 4 * CELLS)

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """features: [patches, width]; targets: [patches, 6] of scripts.tiny_targets.patch_targets."""
        logits = [self.name(features), self.color(features), *self.box(features).split(CELLS, -1)]
        losses = [
            nn.functional.cross_entropy(row.float(), targets[:, i], ignore_index=-100) for i, row in enumerate(logits)
        ]
        return losses[0] + losses[1] + 0.5 * sum(losses[2:])


class Batches:
    """Endless random batches of one rank, from `rng` as it is seeded."""

    def __init__(self, family: Family):
        self.family, self.rng = family, random.Random()
        self.vocabulary = Vocabulary.of(family.tokenizer, family.template)

    def draw(self, name: str) -> tuple[dict, torch.Tensor, float]:
        """A batch of one of PHASES, as `Pretraining` takes it."""
        phase = PHASES[name]
        if name == "vision":
            return *self.vision(phase.batch), phase.side
        return *self.conversations(phase.batch, phase.text_share, phase.echo), phase.side

    def vision(self, size: int) -> tuple[dict, torch.Tensor]:
        """Pictures, and the targets of their patches."""
        scenes = [corpus.scene(self.rng, self.family.world)[1] for _ in range(size)]
        return self.family.pictures(scenes), self.family.targets(scenes)

    def encode(self, turns: list[corpus.Turn], tokens: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation whose picture takes so many tokens."""
        encoded = encode(self.vocabulary, turns, tokens, 512)
        return encoded.input_ids, encoded.labels

    def conversations(
        self, size: int, text_share: float = 0.0, echo: bool = False, turns: int = 4
    ) -> tuple[dict, torch.Tensor]:
        """A batch for the whole model, pictures first, and the patch targets of its pictures. The attention mask alone
        tells padding, whose token may end answers, too."""
        texts = round(size * text_share)
        with_picture = [corpus.conversation(self.rng, turns, self.family.world) for _ in range(size - texts)]
        for _, said in with_picture:
            said[0] = (f"<image>\n{said[0][0]}", said[0][1])
        rows = [self.encode(said, self.family.tokens(scene)) for scene, said in with_picture]
        talk = [corpus.echo if echo and i % 2 else corpus.text_only for i in range(texts)]
        rows += [self.encode(say(self.rng), 0) for say in talk]
        length, pad = max(len(ids) for ids, _ in rows), self.family.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        scenes = [scene for scene, _ in with_picture]
        inputs = {
            "input_ids": ids,
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            **self.family.beside_ids(ids),
            **self.family.pictures(scenes),
        }
        return inputs, self.family.targets(scenes)


class Pretraining(nn.Module):
    """The model and its probe as one module, so that one backward reaches both."""

    def __init__(self, model: PreTrainedModel, family: Family):
        super().__init__()
        self.model, self.family, self.probe = model, family, PatchProbe(family.width, family.world)

    def begin(self, name: str) -> set[int]:
        """Have a phase train what it trains; return the ids of the parameters of what sees."""
        seeing = {id(p) for p in self.family.tower(self.model).parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in seeing:
                parameter.requires_grad_(name != "vision")
        return seeing

    def forward(self, inputs: dict, targets: torch.Tensor, side: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(total loss, language loss and patch loss); without text only what sees is trained."""
        captured = []
        tower = self.family.tower(self.model)
        handle = tower.register_forward_hook(lambda _, __, output: captured.append(self.family.features(output)))
        if "input_ids" in inputs:
            language = self.model(**inputs).loss
        else:
            self.family.look(self.model, inputs)
            language = torch.zeros(())
        handle.remove()
        patches = self.probe(captured[0], targets)
        return language + side * patches, torch.stack([language.detach(), patches.detach()])
