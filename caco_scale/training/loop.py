"""The loop of a run: trains, evaluates, saves, stops. Data and method meet here.

Checkpoints and metrics count finished steps: ``step_00000100`` and the metrics line of step 100 stand after 100
updates. The audit names a step by its place in the order, 0 for the first, as ``Order.batch`` does.

What has a concern of its own is a part of the loop, in a file of its own, with ``state_dict()`` and
``load_state_dict()`` for what a checkpoint keeps of it.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Self

from caco_scale import config as configuration
from caco_scale.checkpoint.contents import restore, training_state
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.config import Config
from caco_scale.data.counters import COUNTERS
from caco_scale.data.folders import in_words
from caco_scale.data.loader import Batch, batch_bytes, cache_is_large_enough
from caco_scale.data.to_device import on_device
from caco_scale.data.workers import StoppedWaiting, small_shared_memory, too_many_workers
from caco_scale.distributed.collectives import gather_if_any
from caco_scale.distributed.strategies.base import Strategy
from caco_scale.errors import UserError
from caco_scale.method.model import synchronise_key
from caco_scale.optim.schedule import HyperParameters, Schedule, hyper_parameters
from caco_scale.run.directory import RunDirectory
from caco_scale.run.profiling import StepProfiler, part
from caco_scale.run.signals import Signals
from caco_scale.run.stopping import Requests
from caco_scale.training.assemble import (
    MicroBatches,
    TrainingData,
    augmentation_note,
    build_augment,
    build_bank,
    channel_notes,
    parameter_dtype,
    view_specs,
)
from caco_scale.training.corrupt import CorruptImages
from caco_scale.training.evaluations import Evaluations
from caco_scale.training.fit import misfits
from caco_scale.training.health import Health
from caco_scale.training.records import Records, summary
from caco_scale.training.skipped import SkippedSteps
from caco_scale.training.step import StepResult, train_step


class Loop:
    """A run and its loop. Use as a context: leaving it ends records, profile and pending saves.

    Args:
        end: the last step.
        resumed: the checkpoint to go on from, or None.
        weights_sha256: of what a fresh run starts from, None where that is random.
    """

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        data: TrainingData,
        schedule: Schedule,
        end: int,
        directory: RunDirectory,
        checkpointer: Checkpointer,
        resumed: Path | None = None,
        signals: Signals | None = None,
        on_metrics: Callable[[dict], object] | None = None,
        weights_sha256: str | None = None,
    ):
        self.config, self.strategy, self.data, self.schedule, self.end = config, strategy, data, schedule, end
        self.directory, self.checkpointer = directory, checkpointer
        self.steps_per_epoch = data.order.steps_per_epoch
        self.augment = build_augment(config)
        self.bank = build_bank(config, strategy.device)
        values = restore(resumed, strategy, self.bank) if resumed else {}
        self.step = values.get("step", 0)
        self._began = self.step
        self.saved = self.step  # the last step of which there is, or will be, a checkpoint; 0: none
        self.weights_sha256 = values.get("weights_sha256", weights_sha256)
        # The checkpoint of another run that this one began with.
        self.branched_from = values.get("branched_from")
        of_another = bool(resumed) and resumed.absolute().parent != directory.checkpoints.absolute()
        if resumed and of_another:
            self.branched_from = str(resumed.absolute())
        checkpointer.prune()  # a kill may have come between a save and this
        self.read = Counter()  # what the stores did since this start, over all ranks
        self.records = Records(
            config,
            directory,
            strategy,
            steps_per_epoch=self.steps_per_epoch,
            step=self.step,
            end=end,
            resumed=resumed,
            of_another=of_another,
            on_metrics=on_metrics,
        )
        telemetry = self.records.telemetry
        images = data.store.manifest
        telemetry.note(f"training on {in_words(images.num_samples, images.classes)} of {data.store.url}")
        if resumed and values["fingerprint"] != data.fingerprint:
            telemetry.warn(
                f"data.relist: a new data set from here on, {data.order.num_samples:,} images instead of "
                f"{values['num_samples']:,}"
            )
        for note in channel_notes(config):
            telemetry.note(note)
        self.profiler = StepProfiler(
            directory.path / "profile",
            config.run.profile_steps,
            strategy.device,
            strategy.rank,
            note=telemetry.note,
        )
        self.skipped = SkippedSteps(config.run.max_skipped, telemetry)
        self.corrupt = CorruptImages(
            config, data.order.num_samples, data.store.repair_hint, directory, telemetry
        )
        self.health = Health(
            strategy.module.query.backbone,
            self.bank,
            world_size=strategy.world_size,
            steps_per_epoch=self.steps_per_epoch,
            bank_warmup_steps=schedule.warmup_steps,
            telemetry=telemetry,
        )
        self.signals = signals
        self.requests = Requests(signals, directory, config.run.stop_before_end_seconds)
        self.evaluations = Evaluations(config, data, strategy, end, self.requests.job_end, telemetry)
        self.parts = (self.skipped, self.corrupt, self.health, self.evaluations, self.requests)
        for resumed_part in self.parts if resumed else ():
            resumed_part.load_state_dict(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            self.profiler.close()  # stopped on a request before it had all its steps
        self.records.close()
        if error_type is None:
            self.checkpointer.close()
        elif self.strategy.world_size == 1:  # with other ranks it might wait for one that is gone
            with contextlib.suppress(UserError):
                self.checkpointer.wait()

    def train(self) -> str | None:
        """Steps until the end or a reason to stop; then a checkpoint and a marker -> what stopped it, or None."""
        with self.signals.telling(self._answer) if self.signals else contextlib.nullcontext():
            return self._train()

    def _train(self):
        started = time.monotonic()
        self.evaluations.at_start(self.step, self.directory)
        self._note_data()
        stop = None
        with contextlib.closing(
            on_device(self.data.batches(self.step, self.end, self._asked_alone), self.strategy.device)
        ) as batches:
            while self.step < self.end and not stop:
                stop = self._next(batches)
        if self.step == 0:
            self.records.telemetry.note(f"stopped by {stop} before the first batch came: nothing was to save")
            return stop
        self.checkpointer.wait()
        self._note_complete_save()
        if stop and (self.step < self.end or self.evaluations.due(self.step)):
            self.directory.mark_interrupted(self.step, stop)
            never = self.config.run.resume == "never"
            again = "resume here with --run.resume auto" if never else "the same command resumes here"
            self.records.telemetry.note(f"stopped by {stop} after step {self.step:,}: {again}")
            return stop
        self.directory.mark_done(self.step)
        scores, seconds = self.evaluations.summary(self.step), time.monotonic() - started
        rows = summary(self.config, self.step, seconds, scores)
        self.records.telemetry.summary(f"{self.config.recipe}: done", rows)
        return None

    def _next(self, batches):
        """One step and what is due after it -> why to stop, or None."""
        began = time.monotonic()
        self.profiler.before_step()
        try:
            with self.records.telemetry.meter.waiting(), part("data"):
                batch = next(batches)
        except StoppedWaiting:
            if self.step != self.saved:
                self._save()
            return self._asked_alone()
        self._train_on(batch)
        self.profiler.after_step(is_last=self.step == self.end)
        self.requests.job_end.took("step", time.monotonic() - began)
        stop, save = self._agree(batch)
        if stop or save or self._save_is_due():
            self._save()
        # After the save, which an evaluation that fails must not cost; what stops a run does not wait for one:
        # the resumed run makes up for it.
        if not stop and self.evaluations.due(self.step):
            self.evaluations.run(self.step)
        return stop

    def _train_on(self, batch: Batch) -> None:
        """Hyper-parameters, switch, update, records."""
        assert batch.step == self.step, (batch.step, self.step)
        hp = hyper_parameters(self.schedule, self.step)
        self.health.before_step(self.step)
        if hp.is_switch:
            synchronise_key(self.strategy.module)
            self.bank.reset_velocity()
        micro_batches = MicroBatches(
            batch,
            self.data.micro_batch_size,
            self.augment,
            parameter_dtype(self.config),
            self.config.views,
            self.config.precision.channels_last,
        )
        result = train_step(self.strategy, self.bank, micro_batches, hp)
        self.step += 1
        self.records.trained_on(batch)
        self.skipped.count(self.step, result.moved)
        self.health.after_step(self.step)
        if self._logs(self.step):
            self._log(hp, result)

    def _logs(self, step):
        every = self.config.run.log_every
        return bool(every) and (step % every == 0 or step == self.end)

    def _log(self, hp: HyperParameters, result: StepResult) -> None:
        saved = self.checkpointer.completed
        figures = {
            "phase": "bank warm-up" if hp.in_warmup else hp.rule,
            "loss": result.loss,
            "lr": hp.lr,
            "bank_lr": hp.bank_lr,
            "key_momentum": hp.key_momentum,
            "positive_probability": result.positive_probability,
            **self.health.figures(result),
            "skipped": self.skipped.total,
            "corrupt": len(self.corrupt),
            **({"checkpoint_seconds": saved[1]} if saved else {}),
            **({f"data_{name}": self.read[name] for name in COUNTERS} if self.data.store.remote else {}),
        }
        self.records.telemetry.log(self.step, figures)

    def _agree(self, batch: Batch) -> tuple[str | None, bool]:
        """What any rank was told, every rank knows: requests, images that do not decode, a save that failed.

        Where none was told anything, which is most steps, that is all they exchange.

        Returns: why to stop (a signal's name, STOP, SLURM_JOB_END_TIME) or None; whether a checkpoint is asked for.
        """
        self._note_complete_save()
        own, failed = self.requests.look(self.evaluations.due(self.step)), self.checkpointer.failed
        counts = self.data.counters.take() if self._logs(self.step + 1) else {}  # what the next line shows
        told = bool(any(own) or batch.corrupt or failed or counts)
        seen = gather_if_any((own, batch.corrupt, failed, counts), told)
        if seen is None:
            return None, False
        requests, corrupt, failed, counters = zip(*seen, strict=True)
        if any(failed):
            self.checkpointer.wait()  # raises
        for counts in counters:
            self.read.update(counts)
        self.corrupt.record(self.step, chain(*corrupt))
        return next((stop for stop, _ in requests if stop), None), any(save for _, save in requests)

    def _answer(self, name: str, again: bool) -> None:
        """Says what a stop signal will do, or what a second Ctrl-C has cost. In a thread, or a signal's handler."""
        lost, complete = self.step - self._complete, f"the checkpoint of step {self._complete:,}"
        steps = f"{lost:,} step{'s' * (lost != 1)}"
        if again:
            cost = f"{steps} since {complete} are lost, the same command goes on from there"
            if not self._complete:
                cost = f"all {steps} are lost, for there is no checkpoint yet"
            if self.strategy.rank == 0:
                os.write(2, f"\nstopped at once by a second Ctrl-C: {cost}\n".encode())
            return
        after = "this kNN evaluation and a step" if self.evaluations.running else "this step"
        note = f"{name}: stopping after {after}, then saving"
        if name == "SIGINT":
            since = complete if self._complete else "the start"
            note += f"; a second Ctrl-C stops at once and loses {steps} since {since}"
        self.records.telemetry.note(note)

    @property
    def _complete(self):
        """The step of the newest complete checkpoint of this run, 0 where there is none."""
        return self.checkpointer.completed[0] if self.checkpointer.completed else self._began

    def _asked_alone(self) -> str | None:
        """The signal that asks the only process to stop, which need not wait for a batch; others agree in a step."""
        alone = self.strategy.world_size == 1 and self.signals is not None
        return self.signals.requested if alone else None

    def _note_data(self):
        """What is not checked of the data, and what will slow this run: the cache, shared memory, the augmentation."""
        config, store = self.config, self.data.store
        unchecked = {s.unchecked for s in (store, self.data.val_store) if s}
        left_out = (s.left_out for s in (store, self.data.val_store) if s)
        slow = augmentation_note(config, self.strategy.device)
        crowded = too_many_workers("data.workers", config.data.workers)
        for note in filter(None, (*unchecked, *left_out, self.data.room_note, slow, crowded)):
            self.records.telemetry.note(note)
        for line in misfits(config, self.data.order, self.strategy.world_size):
            self.records.telemetry.warn(line)
        sizes = [view.size for view in view_specs(config.views)]
        small = small_shared_memory(
            batch_bytes(self.data.batch_size, sizes, self.data.store.pixels), config.data.workers
        )
        if small:
            self.records.telemetry.note(small)
        if store.cache is not None and not cache_is_large_enough(store, self.data.order, self.step):
            self.records.telemetry.note(
                f"data.cache_bytes {store.cache.limit_bytes:,} is less than the shards in use at once: images are "
                "read one by one; a larger cache or a smaller data.window reads whole shards"
            )

    # Checkpoints

    def _save_is_due(self):
        every = self.config.run.save_every
        # Before an evaluation that a job's end might cut short, too.
        cut_short = self.requests.job_end.end is not None and self.evaluations.due(self.step)
        return self.step == self.end or cut_short or bool(every and self.step % every == 0)

    def _note_complete_save(self):
        if self.checkpointer.completed:
            self.requests.save_is_complete(*self.checkpointer.completed)

    def _save(self):
        """Stage the whole state and write it in the background; the records up to here are on disk first."""
        self.requests.save_begins(self.step)
        self.saved = self.step
        self.records.flush()
        values = {
            "step": self.step,
            "end": self.end,
            "branched_from": self.branched_from,
            "epoch": self.step / self.steps_per_epoch,
            "config": configuration.to_dict(configuration.with_absolute_places(self.config)),
            "fingerprint": self.data.fingerprint,
            "num_samples": self.data.order.num_samples,
        }
        if self.weights_sha256:
            values["weights_sha256"] = self.weights_sha256
        for saved_part in self.parts:
            values |= saved_part.state_dict()
        self.checkpointer.save(self.step, training_state(self.strategy, self.bank, values))
