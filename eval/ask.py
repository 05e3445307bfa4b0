"""A question to a run: what the parameters of one stage answer, of all stages, or of the base.

    python -m eval.ask --run NAME --image cat.png --question "What is it?" --like GQA    by the last stage
    python -m eval.ask --run NAME --stage all --task GQA --id 17                         a question of a test set
    python -m eval.ask --run NAME --stage 4                                              asks for picture and question

--stage takes a stage's number, its name, `base` or `all`. What was trained on questions that end in an instruction
wants one: --like adds that of a task. In a run with groups it also chooses whose parameters answer, as a test set's
does; without --like the question's last line does.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from data.records import IMAGE, instruction_of
from eval.predict import Answerer
from eval.runs import BASE, EvaluatedRun, open_run
from eval.tasks import task_of
from llaca.methods import METHODS
from llaca.pool import Pool
from llava.generate import answer_batches, encode_questions
from llava.greedy import Decoder
from llava.states import asked


class Question(NamedTuple):
    """What is asked: its token ids, its picture, its instructions as the grouping compares them, the longest answer in
    tokens; of a test set, its task and what would be right."""

    ids: list[int]
    image: Path | None
    instructions: list[str]
    limit: int
    task: str = ""
    right: str | None = None


class Answer(NamedTuple):
    """What a stage answers, and whose parameters did."""

    stage: str
    holder: str
    text: str


class Asker:
    """A run that answers questions, one at a time. A stage's model is kept until another is needed."""

    def __init__(self, run: EvaluatedRun):
        # a picture of the user's has no features that were made before
        model = replace(run.recipe.model, reuse_vision_features=False)
        self.run = replace(run, recipe=replace(run.recipe, model=model))
        self.answerer, self.loaded = Answerer(self.run), (None, None)

    def stages(self, wanted: str | None) -> list[str]:
        """The stages that --stage means: the last without a word. Raises ValueError for one that there is not."""
        names = [stage.name for stage in self.run.stages]
        if wanted == "all":
            return [BASE, *names]
        if wanted == BASE or not names:
            return [BASE]
        if wanted is None:
            return names[-1:]
        found = [name for number, name in enumerate(names, 1) if wanted in (str(number), name)]
        if not found:
            raise ValueError(f"--stage {wanted}: {self.run.name} has {BASE}, all, {', '.join(names)}")
        return found

    def own(self, text: str, image: Path | None, like: str | None = None) -> Question:
        """A question of the user's, with the first instruction of the task `like`. Raises ValueError or OSError for
        what cannot be asked."""
        if like is not None:
            spec = task_of(self.run.recipe.stream.data_root, like).spec
            form = {"last line": "{1}\n{0}", "first line": "{0}\n{1}", "before colon": "{0}: {1}"}[spec.instruction]
            text = form.format(self.run.questions[spec.name].wordings(True)[0], text)
        if image is not None and not image.is_file():
            raise FileNotFoundError(f"{image} is not there")
        shown = text if image is None or IMAGE in text else f"{IMAGE}\n{text}"
        [ids] = encode_questions(self.answerer.backbone, [shown], [image])
        return Question(ids, image, [instruction_of(text)], self.run.recipe.stream.max_new_tokens or 128)

    def stored(self, task: str, question_id: str) -> Question:
        """A question of a test set. Raises ValueError if there is none of this id."""
        stream = self.run.recipe.stream
        rule = task_of(stream.data_root, task)
        questions = self.run.questions[rule.name]
        places = {str(questions.question_id(number)): number for number in range(len(questions))}
        if question_id not in places:
            raise ValueError(
                f"{rule.name} has no question {question_id} that is asked; the first is {next(iter(places))}"
            )
        number = places[question_id]
        known = rule.read_references(stream.data_root, stream.instructions, self.run.split).asked
        right = rule.right_answer(known[question_id].reference) if question_id in known else None
        wordings = questions.wordings(self.run.recipe.method.grouping)
        limit = self.run.answer_limit(rule.name)
        return Question(questions.ids(number), questions.picture(number), wordings, limit, rule.name, right)

    def holder(self, stage: str, question: Question) -> str:
        """Whose parameters answer a question after a stage."""
        if stage == BASE:
            return BASE
        if METHODS[self.run.recipe.method.method].route:
            picture = None if question.image is None else self.answerer.backbone.picture(question.image)
            return self.answerer.routes(self.run, stage, [asked(self.answerer.backbone, question.ids, picture)])[0]
        pool = Pool.from_json((self.run.folder / "stages" / stage / "codebook.json").read_text(encoding="utf-8"))
        return pool.holder_for(question.instructions, question.task)[0]

    @torch.no_grad()
    def answers(self, question: Question, stages: Sequence[str]) -> Iterator[Answer]:
        """What these stages answer. The same parameters are asked once."""
        known: dict[str, str] = {}
        for stage in stages:
            holder = self.holder(stage, question)
            if holder not in known:
                if self.loaded[0] != holder:
                    self.loaded = (None, None)  # one copy of the base at a time
                    self.loaded = (holder, self.answerer.model(self.run, holder))
                decoder = Decoder(self.loaded[1], self.answerer.backbone, question.limit)
                [(_, texts)] = answer_batches(decoder, [question.ids], [question.image])
                known[holder] = texts[0]
            yield Answer(stage, holder, known[holder])


def tell(asker: Asker, question: Question, stages: Sequence[str]) -> None:
    """Prints the answers, and what would be right."""
    if question.right is not None:
        print(f"right: {question.right}")
    for answer in asker.answers(question, stages):
        by = "" if answer.holder == answer.stage else f"  (parameters of {answer.holder})"
        print(f"{answer.stage}: {answer.text or '(nothing)'}{by}", flush=True)


def talk(asker: Asker, stages: Sequence[str], like: str | None) -> None:
    """Asks for questions until there are none."""
    print(f"{asker.run.name}, {', '.join(stages)}. An empty question ends; the picture stays until another is named.")
    image = None
    while True:
        try:
            told = input("picture (path, - for none, empty for the same): ").strip()
            image = None if told == "-" else Path(told) if told else image
            text = input("question: ").strip()
            if not text:
                return
            tell(asker, asker.own(text, image, like), stages)
        except EOFError:
            return
        except (ValueError, OSError) as error:
            print(f"{error}")


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--stage", help="number or name of a stage, base, or all; default: the last")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--question")
    parser.add_argument("--like", metavar="TASK", help="add this task's instruction to the question")
    parser.add_argument("--task", help="of the test set, with --id")
    parser.add_argument("--id")
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    options = parser.parse_args(given)
    if (options.task is None) != (options.id is None) or (options.task and (options.question or options.image)):
        parser.error("give --task and --id, or --question and maybe --image, or none of them")
    if options.image and not options.question:
        parser.error("--image needs --question")
    try:
        asker = Asker(open_run(options.runs_dir / options.run, options.split))
        stages = asker.stages(options.stage)
        if options.task:
            tell(asker, asker.stored(options.task, options.id), stages)
        elif options.question:
            tell(asker, asker.own(options.question, options.image, options.like), stages)
        else:
            talk(asker, stages, options.like)
    except (ValueError, OSError) as error:
        sys.exit(f"eval.ask: {error}")


if __name__ == "__main__":
    main()
