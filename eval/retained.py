"""What stays of what the base could do before the stream: the benchmark that a recipe calls `retained`, stage by stage.

    retained/matrix.csv      accuracy in percent of the base and after every stage [base and stages, tasks]
    retained/loss.csv        nats a token of each text file (*.txt) of the folder, in the same rows

Tasks are scored by their official rules. A text's loss is that of every token but the first of a window of LENGTH
tokens, given those before it in the window: labels are shifted once. The base's is taken without an adapter. With
groups, the base's instructions choose whose parameters answer, as those of a test set do; a text, which has none, is
read by the parameters that the stage itself left.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from eval.kept import RETAINED, KeptRun
from eval.predict import Answerer
from eval.runs import BASE, EvaluatedRun, RetainedRun
from eval.score import QuestionSet, read_answers, score_task
from llaca.stream import write_atomically
from llava.backbone import Backbone
from llava.generate import Decoder

LENGTH = 512


def score_retained(kept: RetainedRun) -> dict[str, float | None]:
    """Scores the answers, reads the texts and writes both matrices; the figures of RETAINED_KEYS that there are."""
    folder = kept.folder / "retained"
    folder.mkdir(exist_ok=True)
    tasks, rows, known = kept.tasks, dict(kept.rows), {}
    found = pd.DataFrame(np.nan, index=list(rows), columns=tasks)
    for stage, holders in rows.items():
        for task, holder in holders.items():
            if (holder, task) not in known:
                questions = QuestionSet(kept.recipe.stream.data_root, task)
                known[holder, task] = score_task(read_answers(kept.answer_file(holder, task)), questions)
            found.loc[stage, task] = known[holder, task].accuracy["official"]
    found.to_csv(folder / "matrix.csv", index_label="stage", float_format="%.10g")
    means = found.mean(axis=1)
    told = {"Retained": float(means.iloc[-1]), "Retained (base)": float(means[BASE])}
    if (losses := text_losses(kept)) is not None:
        losses.to_csv(folder / "loss.csv", index_label="stage", float_format="%.10g")
        means = losses.mean(axis=1)
        told |= {"Retained loss": float(means.iloc[-1]), "Retained loss (base)": float(means[BASE])}
    return told


def text_losses(kept: RetainedRun) -> pd.DataFrame | None:
    """Nats a token of each text of the folder [base and stages, texts]; None without texts. What was read before is not
    read again, unless a text or a stage is newer."""
    texts = sorted(Path(kept.recipe.stream.data_root).glob("*.txt"))
    if not texts:
        return None
    path = kept.folder / "retained" / "loss.csv"
    sources = [*texts, *(stage.folder / "DONE" for stage in kept.stages)]
    fresh = path.is_file() and all(source.stat().st_mtime_ns < path.stat().st_mtime_ns for source in sources)
    found = pd.read_csv(path, index_col="stage") if fresh else pd.DataFrame()
    found = found.reindex(index=[stage for stage, _ in kept.rows], columns=[text.stem for text in texts])
    answerer = None
    for stage in found.index[found.isna().any(axis=1)]:
        answerer = answerer or Answerer(kept)
        model = answerer.model(kept, stage)
        for text in texts:
            found.loc[stage, text.stem] = token_loss(model, answerer.backbone, text.read_text(encoding="utf-8"))
        del model
    return found


@torch.no_grad()
def token_loss(model: nn.Module, backbone: Backbone, text: str) -> float:
    """Mean nats of a text's tokens but the first of every window of LENGTH. Raises ValueError for an encoder-decoder,
    which reads no text by itself, and for a text of fewer than two tokens."""
    if backbone.generates:
        raise ValueError("retained: an encoder-decoder has no loss of a text by itself; leave the .txt files out")
    ids = backbone.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"retained: a text of {len(ids)} tokens has no loss; give a longer one")
    total, count = 0.0, 0
    with Decoder(model.eval(), backbone, 1).precision():
        for begin in range(0, len(ids), LENGTH):
            window = torch.tensor([ids[begin : begin + LENGTH]], device=model.device)
            if window.shape[1] > 1:
                logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
                total += cross_entropy(logits, window[0, 1:], reduction="sum").item()
                count += window.shape[1] - 1
    return total / count


def matrix_of(run: EvaluatedRun | KeptRun) -> pd.DataFrame | None:
    """Accuracy of the base and after every stage, as `score_retained` wrote it; None where it did not."""
    if isinstance(run, KeptRun):
        return run.retained
    path = run.folder / "retained" / "matrix.csv"
    return pd.read_csv(path, index_col="stage") if path.is_file() else None


def write_stages(methods: Mapping[str, Sequence[EvaluatedRun | KeptRun]], out: Path) -> None:
    """RETAINED: every cell of the runs' matrices; retained.md: a row a method, after every stage the mean over the
    tasks, ± its standard deviation over the runs. Methods whose runs were not all measured are left out."""
    rows, told = [], {}
    for label, runs in methods.items():
        matrices = {run.name: matrix_of(run) for run in runs}
        if any(matrix is None for matrix in matrices.values()):
            continue
        for name, matrix in matrices.items():
            cells = matrix.stack().items()
            rows += [
                {"method": label, "run": name, "stage": stage, "task": task, "accuracy": accuracy}
                for (stage, task), accuracy in cells
            ]
        means = pd.DataFrame({name: matrix.mean(axis=1) for name, matrix in matrices.items()})
        shown = means.mean(axis=1).map("{:.1f}".format)
        if len(runs) > 1:
            shown += " ± " + means.std(axis=1, ddof=1).map("{:.1f}".format)
        told[f"{label} (n={len(runs)})"] = shown.to_dict()
    stages = list(dict.fromkeys(stage for shown in told.values() for stage in shown))
    table = [["Method", *stages], ["---", *["---:"] * len(stages)]]
    table += [[label, *(shown.get(stage, "-") for stage in stages)] for label, shown in told.items()]
    write_atomically(out / "retained.md", "".join(f"| {' | '.join(line)} |\n" for line in table))
    write_atomically(out / RETAINED, pd.DataFrame(rows).to_csv(index=False, float_format="%.10g"))
