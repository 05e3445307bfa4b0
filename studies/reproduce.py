"""A table of the paper by one command: trains what is missing, evaluates it, puts the paper's numbers beside ours.

    python -m studies.reproduce table1 [--mini] [--seeds 0 1 2] [--out DIR] [--rows LLaCA LoRA] [--keep]

scripts/reproduce.sh calls it. The runs of each table stand in studies/studies.yaml. A run has the name that
train_continual.sh gives it, so tables share runs, and what is done is not repeated. --mini: the recipe of CoIN-mini, as
many runs at a time as there are cores. --keep: a table may be made in several calls, on several machines; of what an
earlier call made, DIR holds what the table needs, and the run folders may be gone.
Writes table.{txt,md,csv,tex}, seeds taken together, runs.csv, matrices.csv, recipes.json, costs.md, differences.md,
with --retained retained.{md,csv}, and figures into DIR (default: runs/tables/NAME, with --scoring legacy NAME-legacy).
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from data.benchmark import open_benchmark
from eval.intervals import differences
from eval.kept import KeptRun, read_runs
from eval.metrics import TEXT_KEYS
from eval.page import tables_page
from eval.report import answer, draw, write_table
from eval.retained import score_retained, write_stages
from eval.run_statistics import blind_notes, costs, fallback_notes, format_notes, run_statistics, scoring_notes
from eval.runs import CELLS, EvaluatedRun, open_run, retained
from eval.scored import baseline, score_run
from eval.tables import ALL_METRICS, TABLE_METRICS, Row, method_row, results_table
from eval.tasks import MODES
from llaca import machine
from llaca.config import CONFIGS, Recipe, load_recipe
from llaca.launch import choose_launcher, prepare_data, run_all
from llaca.methods import METHODS, method_of
from llaca.stream import check_run, is_begun, run_folder, stages_of

MINI = CONFIGS / "coin_mini.yaml"
PAPER = Path(__file__).parents[1] / "eval" / "paper"


def studies() -> dict[str, dict[str, Any]]:
    """studies/studies.yaml."""
    return yaml.safe_load(Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8"))


def recipe_of(study: dict[str, Any], mini: bool) -> Path:
    """The recipe at scale, or the one for CoIN-mini."""
    if mini and "mini" not in study:
        return MINI
    return CONFIGS / f"{study['mini' if mini else 'recipe']}.yaml"


def command_lines(
    study: dict[str, Any], mini: bool, seeds: Sequence[int], more: list[str]
) -> dict[str, list[list[str]]]:
    """The arguments of llaca.train by row, a list a seed."""
    recipe = recipe_of(study, mini)
    common = ["--recipe", str(recipe), *shlex.split(study.get("flags", ""))]
    return {
        label: [
            [*common, *shlex.split((mini and row.get("mini")) or row["flags"]), *more, "--seed", str(seed)]
            for seed in seeds
        ]
        for label, row in study["rows"].items()
    }


def is_done(recipe: Recipe) -> bool:
    """Whether the recipe's run has nothing left to train. Raises ValueError if its folder is that of another recipe."""
    folder, method = run_folder(recipe), METHODS[recipe.method.method]
    if not (folder / "recipe.yaml").is_file() or not is_begun(folder):
        return False
    check_run(recipe)
    stages = stages_of(recipe, method.joint, folder)
    return not method.trains or all(stage.done for stage in stages)


def printed_rows(study: dict[str, Any], tasks: Sequence[str]) -> dict[str, Row]:
    """The paper's printed numbers by our row's label, for the columns that the table has."""
    if "paper" not in study:
        return {}
    frame = pd.read_csv(PAPER / study["paper"], dtype={0: str})
    key = frame.columns[0]
    if "AR" in frame:  # Table 8, whose FWT and BWT are not those of the other tables
        short = {"AR": "AR", "FWT": "FWT (no base)", "BWT": "BWT (T-1)"}
        frame = frame.rename(
            columns={f"{name}{end}": f"{own}{end}" for name, own in short.items() for end in ("", "_sd")}
        )
    if "row" in frame:  # Table 7 prints New.ACC on a line of its own
        frame = frame.set_index([key, "row"])
        final = frame.xs("final", level="row")
        final["New.ACC"] = frame.xs("new", level="row")["New.ACC"]
        frame = final.reset_index()
    printed = {row[key]: row for row in frame.to_dict("records")}
    found = {}
    for label, row in study["rows"].items():
        if "paper" in row:
            numbers = printed[str(row["paper"])]
            mean = {
                column: None if pd.isna(numbers.get(column)) else float(numbers[column])
                for column in (*tasks, *ALL_METRICS)
            }
            spread = {column: numbers.get(f"{column}_sd") for column in mean}
            deviation = {
                column: float(value) for column, value in spread.items() if value is not None and pd.notna(value)
            }
            found[label] = Row(f"  printed: {row['paper']}", mean, deviation)
    return found


def kept_rows(
    study: dict[str, Any], recipes: dict[str, list[Recipe]], options: argparse.Namespace
) -> dict[str, list[KeptRun]]:
    """With --keep, the rows that the table in --out has already, those apart that --rows names, which are made anew.

    Raises ValueError for a row of other seeds, or trained by another recipe, from other files, or scored otherwise.
    """
    if not options.keep:
        return {}
    there = read_runs(options.out)
    kept = {label: there[label] for label in study["rows"] if label in there and label not in options.rows}
    for label, members in kept.items():
        remedy = f"make the row anew: --keep --rows '{label}'"
        if (seeds := sorted(run.seed for run in members)) != sorted(options.seeds):
            raise ValueError(f"{options.out}: {label} is of the seeds {seeds}, not {sorted(options.seeds)}; {remedy}")
        by_seed = {recipe.run.seed: recipe for recipe in recipes[label]}
        for run in members:
            if lines := run.differs(
                by_seed[run.seed], split=options.split, scoring=options.scoring, cells=options.cells
            ):
                told = "".join(f"  {line}\n" for line in lines)
                raise ValueError(f"{options.out}: {run.name} is of another recipe:\n{told}{remedy}")
    return kept


def reproduce(name: str, options: argparse.Namespace, more: list[str]) -> str:
    """Trains and evaluates the runs of a study; writes its table and returns it as text."""
    study = studies()[name]
    if unknown := [row for row in options.rows if row not in study["rows"]]:
        raise ValueError(f"{name} has no row '{unknown[0]}'; it has {', '.join(study['rows'])}")
    if options.rows and not options.keep:
        study["rows"] = {label: study["rows"][label] for label in options.rows}
    lines = command_lines(study, options.mini, options.seeds, ["--runs-dir", str(options.runs_dir), *more])
    recipes = {label: [load_recipe(line) for line in own] for label, own in lines.items()}
    for different in {own[0].stream.instructions: own[0] for own in recipes.values()}.values():
        prepare_data(different)
    kept = kept_rows(study, recipes, options)
    wanted = [label for label in study["rows"] if label not in kept and (not options.rows or label in options.rows)]
    study["rows"] = {label: row for label, row in study["rows"].items() if label in kept or label in wanted}
    flat = [line for label in wanted for line in lines[label]]
    every = [recipe for label in wanted for recipe in recipes[label]]
    if not every:
        raise ValueError(f"{options.out} has every row; name those to make anew with --rows")
    for asked in every:
        method_of(asked)  # raises now for what the last of the runs would refuse
    waiting = [line for line, own in zip(flat, every, strict=True) if not is_done(own)]
    minutes, launcher = (
        every[0].run.expected_minutes,
        choose_launcher(None, options.num_gpus, None, every[0].engine.zero),
    )
    side_by_side = machine.side_by_side() if launcher.name == "python" else 1
    print(f"{study['title']}\n{len(flat)} runs, of which {len(flat) - len(waiting)} are done", end="")
    print(f"; {len(kept)} rows are kept" if kept else "", end="")
    print(f": about {minutes * -(-len(waiting) // side_by_side):.0f} minutes" if minutes else "", flush=True)
    start = time.monotonic()
    if status := run_all([launcher.line(line) for line in waiting], side_by_side):
        sys.exit(status)
    rows: dict[str, list[EvaluatedRun | KeptRun]] = {}
    for label in study["rows"]:
        folders = [Path(r.run.runs_dir) / r.run.run for r in recipes[label]]
        rows[label] = kept.get(label) or [open_run(folder, options.split, options.cells) for folder in folders]
    return table(study, rows, options, time.monotonic() - start)


def table(
    study: dict[str, Any], rows: dict[str, list[EvaluatedRun | KeptRun]], options: argparse.Namespace, seconds: float
) -> str:
    """Scores the runs and writes the table, the runs' facts and the figures; returns the table as text."""
    runs = {label: own for label, own in rows.items() if isinstance(own[0], EvaluatedRun)}
    every = [run for own in runs.values() for run in own]
    for run in every:
        run.scoring = options.scoring
    answer(every, options)
    metrics = {run.name: score_run(run) for run in every}
    measured = {run.name: own for run in every if (own := retained(run, options.retained))}
    if measured:
        answer(list(measured.values()), options)
    for name, own in measured.items():
        metrics[name] |= score_retained(own)
    earlier = [run for own in rows.values() for run in own if isinstance(run, KeptRun)]
    metrics |= {run.name: run.metrics for run in earlier}
    stream, split = every[0].recipe.stream, every[0].split
    printed, lines = printed_rows(study, stream.tasks), []
    for label, own in rows.items():
        lines.append(method_row(label, [metrics[run.name] for run in own]))
        lines += [printed[label]] if label in printed else []
    made = run_statistics(runs, metrics).set_index("method")
    told = pd.DataFrame([run.line for run in earlier]).set_index("method") if earlier else made[:0]
    behind = pd.concat([(made if label in runs else told).loc[[label]] for label in rows]).reset_index()
    behind = behind[["run", "method", *behind.columns.drop(["run", "method"])]]
    majority, left_out = baseline(every[0])
    found = results_table(lines, majority)
    bases = {run.recipe.model.base for run in every} | {run.recipe["base"] for run in earlier if run.recipe}
    told_bases = " and ".join(sorted(Path(base).name for base in bases))
    where = f", on {open_benchmark(stream.data_root).name} with {told_bases}" if options.mini else ""
    notes = [f"{study['title']}{where}; {split} split.", *study.get("notes", [])]
    wordings = {run.recipe.stream.instructions for run in every}
    notes += [f"The majority row is of the {stream.instructions} instructions."] if len(wordings) > 1 else []
    whose = study.get("printed", "of the 7B or 13B model on CoIN")
    notes += [f"Lines marked 'printed' are the paper's, {whose}."] if printed else []
    notes += kept_notes(earlier)
    released = "AR" not in metrics[every[0].name]  # ROUGE-L is the same whoever computes it
    notes += scoring_notes(every[0].scoring, bool(printed) and released)
    notes += [*found.notes, *left_out, *format_notes(behind, metrics), *blind_notes(behind, metrics, majority)]
    found = replace(found, notes=(*notes, *fallback_notes(behind)))
    write_table(found, behind, [run for own in rows.values() for run in own], options.out)
    (options.out / "costs.md").write_text(costs(behind), encoding="utf-8")
    told = set(study["rows"])
    if pairs := {words: pair for words, pair in study.get("differences", {}).items() if told.issuperset(pair)}:
        shown = TABLE_METRICS if released else TEXT_KEYS
        (options.out / "differences.md").write_text(differences(behind, pairs, runs, shown), encoding="utf-8")
    if measured:
        write_stages(rows, options.out)
    if len({tuple(run.tasks) for own in rows.values() for run in own}) == 1:
        draw(rows, metrics, options.out)
    tables_page(found, rows, metrics, options.out)
    print(f"\n{found.text()}\nTables (txt, md, csv, tex) and figures: {options.out}")
    print(f"{seconds / 60:.1f} minutes of training in this call")
    return found.text()


def kept_notes(earlier: list[KeptRun]) -> list[str]:
    """The line under a table on the rows of earlier calls."""
    unknown, formless = sum(run.recipe is None for run in earlier), sum(not run.form for run in earlier)
    told = f"{len(earlier)} of the runs are of earlier calls, at the commits that runs.csv names"
    told += f"; the recipes of {unknown} were not recorded, and were not compared" if unknown else ""
    told += f"; the form of the answers of {formless} was not recorded" if formless else ""
    return [f"{told}."] if earlier else []


def main(given: list[str] | None = None) -> None:
    """Command line; what it does not know goes to every run, as --epochs 1."""
    known = studies()
    parser = argparse.ArgumentParser(
        prog="reproduce",
        description=__doc__.splitlines()[0],
        epilog="\n".join(["studies:", *(f"  {name:18s}{study['title']}" for name, study in known.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=known)
    parser.add_argument("--mini", action="store_true", help="the study's recipe for a CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=[], help="only these rows")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="take rows that --out's table has from there, and make the rest, or, with --rows, those alone",
    )
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--num-gpus", type=int)
    parser.add_argument("--scoring", choices=MODES, default="official", help="of answers, see docs/BENCHMARKS.md")
    batch = "questions answered at once by one process; default: what the GPU's free memory holds, without a GPU 64"
    parser.add_argument("--eval-batch-size", dest="batch_size", type=int, help=batch)
    parser.add_argument("--cells", choices=CELLS, default="triangle", help="of the accuracy matrix")
    parser.add_argument("--retained", metavar="DIR", help="measure what stays of the base on this benchmark, too")
    rest = sys.argv[1:] if given is None else list(given)
    name = parser.parse_known_args(rest)[0].study
    rest.remove(name)
    options, more = parser.parse_known_args([name, *shlex.split(known[name].get("options", "")), *rest])
    usual = options.study if options.scoring == "official" else f"{options.study}-{options.scoring}"
    options.out = options.out or options.runs_dir / "tables" / usual
    try:
        reproduce(options.study, options, more)
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"reproduce: {error}\n(LLACA_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
