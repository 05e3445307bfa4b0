"""Model Tailor (Zhu et al., arXiv 2402.12048): a stage keeps a tenth of what it changed, adjusted for losing the rest.

For a layer w [out, in] with inputs x, H = sum x x^T + damping, after a stage from w_old to w_new:

    score       0.8 z(|w_new - w_old|) + 0.2 z(w_new^2 / u^2),    z standardises rows, in blocks of 128 columns
    keep        K, the `keep_share` of a tensor with the highest scores; the rest R goes back to w_old
    compensate  w[K] = w_new[K] - H_KK^-1 H_KR (w_old - w_new)[R],    row by row

So a row's outputs are the nearest to those of w_new that any w with w[R] = w_old[R] has. H is that of
`estimate_records` records of the stage, its damping 0.01 of the mean diagonal, and u the diagonal of the upper Cholesky
factor of H^-1, as in SparseGPT and the released code: 1/u_j^2 is what of input j later inputs do not explain.

The layers are LoRA's A and B, tensor by tensor, as LLaCA averages them, and w_old is the start of the stage, of the
first stage the untrained LoRA. The projector goes back to it whole, as released, so it never moves. With keep_share 1
nothing goes back, the projector neither: LoRA.

The released code tailors the last twelve blocks' full weights, keeps the share in each 128 columns, and lets only later
columns compensate: it adds there what the equation subtracts. It takes each layer's inputs behind layers tailored
already; here all are those of the trained model.

Cost for LLaVA-7B at rank 128: H is 28 GB in all, collected in seven passes over the records
(llaca/second_moments.py). The largest of the solves are 128 rows of about 1100 unknowns.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS
from llaca.methods.merging import CoMA
from llaca.second_moments import passes, second_moments
from llava.adapters import is_connector

SOLVE_BYTES = 2**28  # of the systems that are solved at once
BLOCK = 128
DAMPING = 0.01


class ModelTailor(CoMA):
    """Holds the start of every stage, as CoMA does, and returns to it but for a patch."""

    @dataclass
    class Settings:
        keep_share: float = setting(0.1, "share of each tensor that keeps what the stage gave it", above=0, most=1)
        estimate_records: int = setting(128, "records whose inputs make H", least=1)

    engines = WHOLE_TENSORS

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        super().before_task(shards, True, steps)  # the first stage of a group has a start, too

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        if self.settings.keep_share == 1:
            return None, {}
        tailored, trained = shards.layout.gather(self.start), shards.layout.gather(shards.parameters)
        layers = {name: weight for name, weight in trained.items() if not is_connector(name)}
        kept = adjusted = 0.0
        for names in passes(layers.items()):
            for name, total in second_moments(self.stage, names, self.settings.estimate_records).items():
                H, old, new = damped(total), tailored[name].to(total.device), layers[name].to(total.device)
                patch = top_share(score(new, old, H), self.settings.keep_share)
                compensation = compensations(new, old, patch, H)
                tailored[name] = torch.where(patch, new - compensation, old).cpu()
                kept += patch.sum().item()
                adjusted += compensation.abs().sum().item()
        told = {"kept_share": kept / sum(map(Tensor.numel, layers.values())), "mean_compensation": adjusted / kept}
        return shards.layout.cut(tailored), told


def damped(moments: Tensor) -> Tensor:
    """H in float64, DAMPING of its mean diagonal added to the diagonal; inputs that are always 0 count as 1 there."""
    H = moments.to(torch.float64, copy=True)
    diagonal = H.diagonal()
    diagonal += torch.where(diagonal == 0, 1.0, 0.0)
    diagonal += DAMPING * diagonal.mean()
    return H


def score(new: Tensor, old: Tensor, H: Tensor) -> Tensor:
    """How much each weight of `new` [out, in] is worth keeping; `H` [in, in]."""
    # A Cholesky diagonal is what earlier columns leave of each column; with the columns reversed it is 1 / u.
    rest = torch.linalg.cholesky(H.flip(0, 1)).diagonal().flip(0)
    return 0.8 * standardised((new - old).abs().double()) + 0.2 * standardised((new.double() * rest).square())


def standardised(values: Tensor) -> Tensor:
    """(v - mean) / standard deviation along the rows, in blocks of BLOCK columns; 0 where a row's are all the same."""
    parts = []
    for part in values.split(BLOCK, dim=1):
        deviation, mean = torch.std_mean(part, dim=1, correction=0, keepdim=True)
        parts.append((part - mean) / deviation.where(deviation > 0, 1))
    return torch.cat(parts, dim=1)


def top_share(scores: Tensor, share: float) -> Tensor:
    """True for the round(share * numel), at least one, highest scores of a tensor."""
    highest = scores.flatten().topk(max(1, round(share * scores.numel()))).indices
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, highest, True).view(scores.shape)


def compensations(new: Tensor, old: Tensor, patch: Tensor, H: Tensor) -> Tensor:
    """H_KK^-1 H_KR (old - new)[R] of every row, in new's dtype: 0 outside of the `patch` K.

    new, old, patch [out, in]; H [in, in], positive definite. Rows share H, but each has a K of its own: the systems of
    several rows are padded to the longest with the identity, and solved at once.
    """
    pull = (old - new).double().masked_fill(patch, 0) @ H
    order = patch.int().argsort(dim=1, descending=True, stable=True)  # each row's K comes first
    longest = int(patch.sum(1).max())
    found = torch.zeros_like(pull)
    for rows in torch.arange(len(new), device=H.device).split(max(1, SOLVE_BYTES // (8 * longest**2))):
        places = order[rows, :longest]
        inside = patch[rows].gather(1, places)
        systems = H[places.unsqueeze(2), places.unsqueeze(1)]
        padding = torch.diag_embed((~inside).double())
        systems = torch.where(inside.unsqueeze(2) & inside.unsqueeze(1), systems, padding)
        wanted = pull[rows].gather(1, places).where(inside, 0).unsqueeze(2)
        solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(systems)).squeeze(2)
        found[rows] = found[rows].scatter(1, places, solved)
    return found.to(new.dtype)
