"""The pool of parameter sets: which stage's parameters a task starts from, and which a test set is answered with.

A parameter set is named by the stage whose folder holds it. With grouping, tasks of similar instructions share one set
(llaca/grouping.py); without, there is one set and every stage continues it; an oracle has one for every task.
"""

import json
from dataclasses import dataclass, field

from llaca.grouping import Codebook


@dataclass(frozen=True)
class Choice:
    """Where a stage starts. `group` is None for a new one; `start` is a stage's name, None for fresh parameters;
    `scores` holds the similarity to every group that there was."""

    group: int | None
    start: str | None
    scores: list[float]

    @property
    def matched(self) -> bool:
        return self.group is not None


@dataclass
class Pool:
    """`holders[g]` is the stage that holds group g's parameters, `members[g]` the tasks trained into it."""

    grouping: bool
    codebook: Codebook
    new_group_start: str = "latest"
    oracle: bool = False
    holders: list[str] = field(default_factory=list)
    members: list[list[str]] = field(default_factory=list)
    latest: str | None = None

    def choose(self, instructions: list[str]) -> Choice:
        """Where a task with these instructions starts (Algorithm 1)."""
        if not self.holders:
            return Choice(None, None, [])
        if not self.grouping and not self.oracle:
            return Choice(0, self.holders[0], [])
        group, scores = (None, []) if self.oracle else self.codebook.match(instructions)
        if group is not None:
            return Choice(group, self.holders[group], scores)
        return Choice(None, self.latest if self.new_group_start == "latest" else None, scores)

    def put(self, choice: Choice, instructions: list[str], task: str, stage: str) -> None:
        """Records that `stage` has trained `task` from `choice`; its parameters replace the group's."""
        if self.oracle:
            group = len(self.holders)
        else:
            group = self.codebook.add(choice.group, instructions) if self.grouping else 0
        if group < len(self.holders):
            self.holders[group] = stage
            self.members[group].append(task)
        else:
            self.holders.append(stage)
            self.members.append([task])
        self.latest = stage

    def holder_for(self, instructions: list[str], task: str) -> tuple[str, bool]:
        """(stage whose parameters answer a task's test set with these instructions, whether its group reaches the
        threshold). Below the threshold the most similar group answers; an oracle has the latest answer a task that it
        has not been trained on.
        """
        if self.oracle:
            own = [holder for holder, members in zip(self.holders, self.members, strict=True) if task in members]
            return own[0] if own else self.latest, bool(own)
        if not self.grouping:
            return self.holders[0], True
        chosen = self.codebook.choose(instructions)
        return self.holders[chosen.index], chosen.matched

    def to_json(self) -> str:
        """All of it as JSON text, for codebook.json."""
        content = {**vars(self), "codebook": json.loads(self.codebook.to_json())}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Pool":
        """The inverse of `to_json`."""
        content = json.loads(text)
        return cls(**{**content, "codebook": Codebook.from_json(json.dumps(content["codebook"]))})
