"""The Trainer's callbacks: the method's view of every optimizer step, checkpoints inside a stage, and signals.

A checkpoint is what the Trainer writes (weights, optimizer, scheduler, the random generators of every rank, the steps
made), the method's state and the loss since the last line of the log beside it, and COMPLETE, written last, with the
sizes of all files. A process that is killed leaves at most one folder without COMPLETE, which is never read.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from llaca import ranks
from llaca.engines import engine_of
from llaca.folders import sync_tree, write_durably
from llaca.stream import Stage, write_atomically
from llaca.tracking import Tracker, tell_again, told_values
from llava.adapters import trainable_parameters
from llava.trainer import LlavaTrainer

COMPLETE = "COMPLETE"


class MethodCallback(TrainerCallback):
    """Calls `method.before_task(shards, matched, steps)` when training begins and, while `method.watches`,
    `method.after_backward(shards)` and `method.after_step(shards)` once per optimizer step.

    start: the full float32 weights that training starts from, where the engine may have rounded them; None where a
        checkpoint holds them.
    seen: the gradient that the method sees when the recipe clips it: "clipped", as the step used it, or "unclipped".

    Raises ValueError if DeepSpeed clips at another norm than the recipe says. Raises RuntimeError, naming the tensor
    and the engine's state, before the step for a gradient that is missing in one of its micro-batches, whether the
    method watches or not. Raises FloatingPointError after a step that DeepSpeed skipped for a gradient that is not
    finite (with fp16 that is its loss scaling at work, and the average is left as it is). Where the engine does step, a
    watching method finds the latter.
    """

    def __init__(self, method, matched: bool, steps: int, start: dict[str, Tensor] | None, seen: str):
        self.method, self.matched, self.steps, self.start, self.seen = method, matched, steps, start, seen
        self._handles, self._stepped, self._shown = [], {}, 0
        self._reached: Counter[str] = Counter()  # backward passes of this step that had a gradient
        self._sums: dict[str, Tensor] = {}

    def attach(self, trainer: LlavaTrainer) -> None:
        """Listens to `trainer`."""
        self.trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.engine = engine_of(trainer)
        self.layout = self.engine.layout()
        if not self.engine.tells_norm and self.seen == "unclipped" and args.max_grad_norm > 0:
            raise ValueError("ZeRO 0 clips without telling by how much; use DDP, which is the same computation")
        if (norm := self.engine.clips_at()) != args.max_grad_norm:
            raise ValueError(
                f"DeepSpeed clips gradients at {norm}, the recipe's max_grad_norm is {args.max_grad_norm}: write "
                '"gradient_clipping": "auto" into its configuration; without the key DeepSpeed clips at 1.0'
            )
        if self.method.edits_gradients and (args.max_grad_norm > 0 or args.fp16):
            raise ValueError(
                "this method changes gradients, and engines clip and unscale them at different times: max_grad_norm 0, "
                "and bfloat16 or float32"
            )
        if self.start is not None:
            self.layout.write(self.start)
            self.start = None
        self.method.before_task(self.layout.shards(), self.matched, self.steps)
        optimizer = self.engine.optimizer()
        self._handles = [optimizer.register_step_pre_hook(self._before)]
        if self.method.watches:
            self._handles.append(optimizer.register_step_post_hook(self._after))
        for name, parameter in trainable_parameters(trainer.model).items():
            reached = partial(self._reach, name)
            self._handles.append(parameter.register_post_accumulate_grad_hook(reached))

    def on_step_end(self, args, state, control, **kwargs):
        now = state.global_step
        if self.method.watches and self._shown != 1:
            if not self.engine.skipped():
                raise RuntimeError(f"the method saw {self._shown} optimizer steps instead of one: {self._state(now)}")
            if not self.engine.scales_loss():
                raise FloatingPointError(f"non-finite gradient of {self._not_finite()}: {self._state(now)}")
        self._shown = 0
        self._reached.clear()
        self._sums.clear()

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self._handles:
            handle.remove()

    def _reach(self, name: str, parameter: Tensor) -> None:
        # Where a gradient is missing ZeRO 1 and 2 step on zeros and ZeRO 3 on that of an earlier step, to which it adds
        # those of later micro-batches: only the backward pass knows. And ZeRO forgets a gradient that it does not step
        # on. A sum tells whether all elements are finite, at the price of reading them once.
        self._reached[name] += 1
        if self.engine.forgets_gradients and self.method.watches:
            seen = parameter.grad.sum(dtype=torch.float32)
            self._sums[name] = self._sums[name] + seen if name in self._sums else seen

    def _not_finite(self) -> list[str]:
        mine = [name for name, total in self._sums.items() if not total.isfinite()]
        found = {name for names in ranks.everyone(mine) for name in names}
        return [name for name in self.layout.names if name in found]

    def _before(self, optimizer, args, kwargs) -> None:
        about = {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}
        passes = self.trainer.current_gradient_accumulation_steps  # fewer at the end of an epoch
        missing = [
            part.name
            for part in self.layout.slices
            if self._reached[part.name] < passes or (id(part.flat) in about and part.flat.grad is None)
        ]
        if missing:
            now, least = self.trainer.state.global_step + 1, min(self._reached[name] for name in missing)
            raise RuntimeError(
                f"no gradient before the optimizer step for {missing}, in {passes - least} of {passes} micro-batches: "
                f"{self._state(now)}"
            )
        method = self.method
        if method.watches and method.edits_gradients and not self._stepped:  # the first call of this step
            method.after_backward(self.engine.coming_gradients(self.layout))

    def _after(self, optimizer, args, kwargs) -> None:
        self._stepped |= {id(tensor): tensor.grad for group in optimizer.param_groups for tensor in group["params"]}
        if any(id(flat) not in self._stepped for flat in self.layout.flats):
            return  # ZeRO 1 to 3 call the optimizer once for every group
        shards = self.layout.shards(self._stepped)
        if self.seen == "unclipped" and self.trainer.args.max_grad_norm > 0:
            shards.gradients = torch._foreach_mul(shards.gradients, self._clipped_by())
        self._stepped = {}
        self._shown += 1
        self.method.after_step(shards)
        if self.method.edits_weights:
            self.engine.show(self.layout)

    def _clipped_by(self) -> Tensor:
        norm = torch.as_tensor(self.engine.norm())
        return ((norm + 1e-6) / self.trainer.args.max_grad_norm).clamp(min=1.0)

    def _state(self, step: int) -> str:
        args = self.trainer.args
        return (
            f"{self.layout.engine}, rank {args.process_index} of {args.world_size}, optimizer step {step}, "
            f"{args.gradient_accumulation_steps} micro-batches a step"
        )


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, None without one; incomplete ones are removed.

    Raises ValueError if it was written by another number of processes, or has lost something since.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = [path for path in found if (path / COMPLETE).is_file()]
    ranks.wait()
    if ranks.first():
        for path in set(found) - set(complete[-1:]):
            discard(path)
    ranks.wait()
    if not complete:
        return None
    told = json.loads((complete[-1] / COMPLETE).read_text(encoding="utf-8"))
    if told["processes"] != ranks.count():
        raise ValueError(
            f"{complete[-1]} was written by {told['processes']} processes, here are {ranks.count()}: go on with as "
            f"many, or delete {folder} to train the stage anew"
        )
    sizes = files_of(complete[-1])
    if broken := [name for name, size in told["files"].items() if sizes.get(name) != size]:
        raise ValueError(
            f"{complete[-1] / broken[0]} has {sizes.get(broken[0], 'no')} bytes and was written with "
            f"{told['files'][broken[0]]}: copy it again, or delete {complete[-1]} to train the stage anew"
        )
    return complete[-1]


def files_of(checkpoint: Path) -> dict[str, int]:
    """The bytes of every file of a checkpoint, by its path in it, but for COMPLETE itself."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint; half removed it is not complete."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def truncate_log(path: Path, step: int) -> None:
    """Drops what was logged after `step`, and the summary of a training that ended: they will be logged again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        told = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        write_atomically(path, "".join(line for line, log in told if log["step"] <= step and "loss" in log))


class Checkpoints(TrainerCallback):
    """Completes the Trainer's checkpoints, and takes the method's state back from `checkpoint`, if there is one.

    seconds: of training so far, those before the kill included.
    """

    def __init__(self, callback: MethodCallback, folder: Path, checkpoint: Path | None):
        self.callback, self.folder, self.checkpoint = callback, folder, checkpoint
        self._before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def _state_file(self, checkpoint: Path, rank: int) -> Path:
        return checkpoint / f"method-{rank if self.callback.layout.sharded else 0}.pt"

    def _loss_file(self, checkpoint: Path, rank: int) -> Path:
        return checkpoint / f"loss-{rank}.json"

    def on_train_begin(self, args, state, control, **kwargs):
        if self.checkpoint is not None:
            path = self._state_file(self.checkpoint, args.process_index)
            self.callback.method.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            told = json.loads((self.checkpoint / COMPLETE).read_text(encoding="utf-8"))
            self._before = told["seconds"]
            # Since the last line of the log, which the Trainer's own checkpoint leaves out.
            loss = json.loads(self._loss_file(self.checkpoint, args.process_index).read_text(encoding="utf-8"))
            self.callback.trainer._tr_loss += loss["sum"]
            self.callback.trainer._globalstep_last_logged = loss["from"]
            state.compute_steps(args, state.max_steps)  # this command's --save_steps, not that of the one before
        self._started = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        broken = [
            name for name, p in trainable_parameters(self.callback.trainer.model).items() if not p.isfinite().all()
        ]
        if broken:
            raise FloatingPointError(f"{checkpoint}: not finite, and not completed: {broken}")
        if self.callback.layout.sharded or ranks.first():
            torch.save(self.callback.method.state_dict(), self._state_file(checkpoint, args.process_index))
        loss = {"sum": self.callback.trainer._tr_loss.item(), "from": self.callback.trainer._globalstep_last_logged}
        self._loss_file(checkpoint, args.process_index).write_text(json.dumps(loss), encoding="utf-8")
        ranks.wait()
        sync_tree(checkpoint)  # on every host
        ranks.wait()
        if ranks.first():
            told = {"step": state.global_step, "processes": args.world_size, "seconds": self.seconds}
            write_durably(checkpoint / COMPLETE, json.dumps({**told, "files": files_of(checkpoint)}))
            for path in self.folder.glob("checkpoint-*"):
                if path != checkpoint:
                    discard(path)


class Vote:
    """The largest of the ranks' numbers, under way while they go on; `result` is the same on all."""

    def __init__(self, number: int, device: torch.device):
        self._flag = torch.zeros((), dtype=torch.int32, device=device).fill_(number)  # fill_: no copy from the host
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        if self._flag.is_cuda:
            self._work.wait()  # orders the streams, and does not hold up the host
            self._host = torch.empty((), dtype=torch.int32, pin_memory=True)
            self._host.copy_(self._flag, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def result(self) -> int:
        if self._flag.is_cuda:
            self._there.synchronize()
            return int(self._host)
        self._work.wait()
        return int(self._flag)


class StopOnSignal(TrainerCallback):
    """SIGTERM or SIGINT end training with a checkpoint; more of them change nothing, except that the third one kills a
    process that nobody launched.

    Several processes stop after the same step, whoever got the signal: each tells the others after every step, and
    listens after the next one, when the answer has long been there. So neither host nor device waits, and training
    ends one step later than in one process. Before training begins and after it ends a signal ends the process at once
    (`leave_at_once`).
    """

    def __init__(self):
        self.signal = self.agreed = self._count = 0
        self._vote: Vote | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        ranks.wait()  # those that are not here yet end at once, and would be waited for
        self._alone = args.world_size == 1 and "LLACA_LAUNCHER" not in os.environ
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.signal = self.signal or number
        self._count += 1
        if self._alone and self._count == 1:  # print() may be what was interrupted
            os.write(2, f"\n{signal.Signals(number).name}: saves after this step and ends; the third kills\n".encode())
        if self._alone and self._count == 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1:
            self.agreed = self.signal
        else:
            self.agreed = self._vote.result() if self._vote else 0
            self._vote = Vote(self.signal, args.device)
            if state.global_step >= state.max_steps:
                self.agreed = self.agreed or self._vote.result()
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        # What came while the last checkpoint was written.
        late = Vote(self.signal, args.device).result() if args.world_size > 1 else self.signal
        self.agreed = self.agreed or late
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def leave_if_stopped(self, where: Path) -> None:
        """Ends the process, when all are here, if a signal asked for it."""
        if self.agreed:
            ranks.wait()  # launchers end the others when one ends
            if ranks.first():
                print(f"{where}: stopped by a signal and saved; the same command goes on", file=sys.stderr)
            sys.exit(128 + self.agreed)


class TrackLog(TrainerCallback):
    """Tells the tracker every line of the log, `before` steps on, with the stage's number and the records a second."""

    def __init__(self, tracker: Tracker, stage: Stage, log: Path, before: int):
        self.tracker, self.stage, self.before = tracker, stage, before
        tell_again(tracker, stage, log, before)

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now, (then, step) = time.monotonic(), self.last
        self.last = now, state.global_step
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        made = state.global_step - step
        rate = {"records_per_second": batch * made / (now - then)} if made else {}
        self.tracker.log(self.before + state.global_step, told_values(logs, self.stage.index) | rate)
