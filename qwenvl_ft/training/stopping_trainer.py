"""Trainer that saves what it has before it stops: for a signal, for records that cannot be read, for a full disk."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import TrainerCallback

from qwenvl_ft.checkpoint.complete import PREFIX, checkpoints, missing
from qwenvl_ft.checkpoint.lock import require_own
from qwenvl_ft.checkpoint.same_run import NOT_SHARDED
from qwenvl_ft.checkpoint.space import require_space, size_of, written_whole
from qwenvl_ft.data.sources.shards import ShardError
from qwenvl_ft.errors import DataError, QwenVLError
from qwenvl_ft.training.agreement import OtherRankError, only_run_of
from qwenvl_ft.training.callbacks.signals import Interrupted, SignalCallback
from qwenvl_ft.training.checkpoint_size import checkpoint_bytes, planned_checkpoints, weight_bytes
from qwenvl_ft.training.row_trainer import RowTrainer
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel


class StoppingTrainer(RowTrainer):
    """Adds to `RowTrainer` what happens when a run has to stop before its end; `QwenVLTrainer` adds the rest.

    Between two steps the state is that of the last finished step, whose checkpoint a run resumes exactly. So a run that
    stops there saves it first. All ranks stop at the same place (`Agreement`).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.signals: SignalCallback | None = None
        self.interrupted = False
        """True once a signal has ended the training within an evaluation."""
        self.evaluating = False
        """True while the trainer's own sets are evaluated, and once that was left."""
        self._begun: int | None = None
        """Number of the last step that this call of `train` has begun, from 0."""
        self._saved_bytes = 0
        self.saves_result = True
        """True if the trained model is saved at the end."""
        super().__init__(*arguments, **options)

    def listen_to(self, signals: SignalCallback) -> None:
        """Stop for the signals that a callback receives."""
        self.signals = signals
        self.add_callback(signals)

    def check_signals(self) -> None:
        """Raise Interrupted on every rank if a signal has reached any; every rank must call it."""
        if self.signals is not None:
            self.signals.check()

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as transformers does, as the only run in its folder; save the last finished step if it has to stop.

        Raises:
            DataError: a record cannot be read; on every rank. The message names the checkpoint that was saved.
            CheckpointError: another run writes into the folder, or a checkpoint could not be written.
            OtherRankError: another rank has met an error that is not the user's.
        """
        self._begun, self.interrupted, self.evaluating = None, False, False
        self.remove_callback(_BeforeFirstStep)
        self.add_callback(_BeforeFirstStep(self))  # the last one
        with only_run_of(self.agreement, self._output_dir, on_rank_0=self.is_world_process_zero()):
            try:
                return super().train(*arguments, **options)
            except Interrupted:
                self.interrupted = True
                self._save_finished_step()
                return self.end_early()
            except Exception as error:
                if not self._can_save(error):
                    raise
                saved = self._save_finished_step()
                if isinstance(error, DataError):
                    raise DataError(f"{error} {saved}{self._advice(error)}") from error
                if isinstance(error, OtherRankError):
                    raise OtherRankError(f"{error} {saved}") from error
                if self.is_world_process_zero():
                    print(f"stopped by an error. {saved}", flush=True)
                raise

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._begun = self.state.global_step
        return super().training_step(model, inputs, num_items_in_batch)

    def guarded(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches, of which every rank has the same number.

        Raises:
            Interrupted: a signal has arrived.
            DataError: a batch of any rank cannot be made; on every rank.
        """
        iterator = iter(batches)
        while True:
            self.check_signals()
            batch = self.agreement.together(lambda: next(iterator, None))
            if batch is None:
                return
            yield batch

    @contextmanager
    def saving(self) -> Iterator[None]:
        folder, leads = self._checkpoint, self.is_world_process_zero()
        self.agreement.together(self._require_space if leads else lambda: None)
        with self.writing(), written_whole(folder, self._checkpoint_bytes, removes=leads):
            yield
        self._saved_bytes = size_of(folder)

    def result_bytes(self) -> int:
        """Return the bytes of the trained model's weights."""
        return weight_bytes(cast(nn.Module, self.model), adapter=self._is_adapter())

    def writing(self) -> Any:
        """Return a context in which a second signal waits until what is written is whole."""
        return self.signals.writing() if self.signals is not None else nullcontext()

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def _checkpoint(self) -> Path:
        """Folder of the last finished step's checkpoint."""
        return self._output_dir / f"{PREFIX}-{self.state.global_step}"

    def _can_save(self, error: Exception) -> bool:
        """Return True if the last finished step can be saved: by every rank, with nothing begun since."""
        if self._begun is not None and self._begun >= self.state.global_step:
            return False
        if isinstance(error, QwenVLError):
            return isinstance(error, DataError | OtherRankError)
        return self.agreement.is_shared(error)

    def _save_finished_step(self) -> str:
        """Save the last finished step unless its checkpoint exists; return a sentence that says so, or nothing."""
        if self._begun is None:  # nothing was trained since the run began, or was resumed
            return ""
        if self.evaluating:  # the resumed run evaluates this step anew, all sets of it
            history = self.state.log_history
            self.state.log_history = [entry for entry in history if not self._is_of_evaluation(entry)]
        if self.agreement.largest(int(self.is_world_process_zero() and missing(self._checkpoint) is not None)):
            self.save_now()
        return f"Step {self.state.global_step} is saved in {self._checkpoint}. "

    def _advice(self, error: DataError) -> str:
        """Return how to go on after a record or a shard that cannot be read."""
        if isinstance(error, ShardError):
            return "" if self._begun is None else "Go on with training.resume_from_checkpoint=true when it can be read."
        skips = "set data.on_error=skip if its header can still be read"
        if self.samples.on_error == "skip":
            skips = "raise data.max_bad_fraction"
        go_on = "" if self._begun is None else "; then go on with training.resume_from_checkpoint=true"
        return f"Replace the file by one of the same size (the records must stay), or {skips}{go_on}."

    def _is_adapter(self) -> bool:
        return isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), TrainedPeftModel)

    def _checkpoint_bytes(self) -> int:
        """Return the bytes of the last checkpoint, or an estimate before there is one."""
        if self._saved_bytes:
            return self._saved_bytes
        model, sharded = cast(nn.Module, self.model), self.engine != NOT_SHARDED
        return checkpoint_bytes(model, self.args, adapter=self._is_adapter(), sharded=sharded)

    def _require_space(self) -> None:
        """Raise if another run has taken over the folder, or the next checkpoint does not fit."""
        require_own(self._output_dir)
        advice = "choose another training.output_dir; then go on with training.resume_from_checkpoint=true"
        require_space(self._output_dir, self._checkpoint_bytes(), self._checkpoint.name, advice)

    def require_space_for_run(self) -> None:
        """Raise before the first step if the run's checkpoints and final model do not fit on its disk."""
        if not self.is_world_process_zero():
            return
        there = sum(missing(path) is None for path in checkpoints(self._output_dir))
        number = max(0, planned_checkpoints(self.args, self.state) - there)
        needed = number * self._checkpoint_bytes() + (self.result_bytes() if self.saves_result else 0)
        what = f"the trained model with {number} checkpoints (training.save_total_limit={self.args.save_total_limit})"
        require_space(
            self._output_dir, needed, what, "lower training.save_total_limit, or choose another training.output_dir"
        )

    def evaluate_if_left(self) -> None:
        """Evaluate the step of the checkpoint that is resumed if the run had ended before that evaluation did."""
        args, state = self.args, self.state
        strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
        every, at = {"steps": (state.eval_steps, state.global_step), "epoch": (1, state.epoch)}.get(strategy, (0, 0))
        due = bool(every and at) and at % every == 0 and at >= (args.eval_delay or 0)
        if due and not any(self._is_of_evaluation(entry) for entry in state.log_history):
            self.evaluate_step(str(self._checkpoint))

    def _is_of_evaluation(self, entry: dict[str, Any]) -> bool:
        """Return True if an entry of the log is of an evaluation of the last finished step."""
        return entry.get("step") == self.state.global_step and any(key.startswith("eval_") for key in entry)


class _BeforeFirstStep(TrainerCallback):
    """Asks for disk space, and evaluates what a resumed run had not evaluated."""

    def __init__(self, trainer: StoppingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.agreement.together(self.trainer.require_space_for_run)
        self.trainer.evaluate_if_left()
