"""The loop that trains, evaluates, saves, stops and resumes. Data and method meet here.

Checkpoints and metrics count finished steps: ``step_00000100`` and the metrics line of step 100 stand after 100
updates. The audit names a step by its place in the order, 0 for the first, as ``Order.batch`` does.
"""

import os
import socket
import time
from collections import Counter

from caco_scale import config as configuration
from caco_scale.checkpoint.contents import restore, training_state
from caco_scale.checkpoint.folder import latest, read_values
from caco_scale.checkpoint.resume import checkpoint_to_resume
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.data.loader import cache_is_large_enough, start_fork_server
from caco_scale.data.store import COUNTERS, repair_hint
from caco_scale.data.to_device import on_device
from caco_scale.distributed.collectives import all_max, assert_equal_on_all_ranks, gather_objects
from caco_scale.distributed.launch import launched_strategy, start_processes
from caco_scale.distributed.strategies.build import check_combination
from caco_scale.errors import UserError
from caco_scale.evaluate.features import pixels
from caco_scale.evaluate.knn import evaluate_knn
from caco_scale.method.bank import ShardedBank
from caco_scale.method.model import synchronise_key
from caco_scale.optim.build import state_bytes
from caco_scale.optim.schedule import hyper_parameters
from caco_scale.run.audit import AuditLog
from caco_scale.run.diagnostics import CollapseAlarm, embedding_std, rankme
from caco_scale.run.directory import RunDirectory
from caco_scale.run.environment import describe_environment
from caco_scale.run.files import JsonLines
from caco_scale.run.profiling import StepProfiler, part
from caco_scale.run.stopping import JOB_END, ControlFiles, JobEnd, check_job_end, job_end
from caco_scale.run.telemetry import Telemetry
from caco_scale.training.assemble import (
    MicroBatches,
    TrainingData,
    build_augment,
    build_schedule,
    build_strategy,
    parameter_dtype,
    resolve,
)
from caco_scale.training.step import train_step

MAX_RANKME_ROWS = 512  # of the global batch: a singular value decomposition of more takes longer than a step


def run(config, signals):
    """Train as ``config`` says until the schedule's end, ``run.max_steps``, or a reason to stop before.

    Args:
        config: :class:`~caco_scale.config.Config`.
        signals: :class:`~caco_scale.run.signals.Signals`, already installed.
    Raises:
        UserError: what the user can mend, before training where it can be known by then.
    """
    accelerator = start_processes(config.run.world_size, config.run.timeout_seconds)
    if accelerator.is_main_process:
        name = launched_strategy(os.environ)
        print(
            f"training sees {accelerator.num_processes} process(es), {accelerator.device}, {name}", flush=True
        )
    refuse_to_start(config, accelerator.is_main_process)
    config = resolve(config, accelerator)
    check_combination(launched_strategy(os.environ), parameter_dtype(config), config.precision.compile)
    if config.data.workers:
        start_fork_server()  # its imports overlap with building the model
    data = TrainingData(config, accelerator.process_index, accelerator.num_processes)
    schedule = build_schedule(config, data.order)
    directory = RunDirectory(config.run.dir, accelerator.is_main_process)
    end = min(schedule.total_steps, config.run.max_steps or schedule.total_steps)
    checkpointer = Checkpointer(directory.checkpoints, keep=config.run.keep_checkpoints)
    newest = checkpointer.latest()
    resumed = checkpoint_to_resume(config, newest, data.fingerprint, data.order.num_samples)
    step = read_values(resumed)["step"] if resumed else 0
    # One that was stopped after its last step still has its last evaluation before it.
    if resumed and step >= end and directory.interrupted_step() != step:
        if (
            resumed == newest and directory.done_step() is None
        ):  # killed between its last checkpoint and the marker
            directory.mark_done(step)
        accelerator.print(
            f"{config.run.dir} has finished its {end:,} steps: a larger --optim.epochs or --run.max_steps continues it"
        )
        return
    with Trainer(
        config, signals, accelerator, data, schedule, directory, checkpointer, end, resumed
    ) as trainer:
        trainer.train()


def refuse_to_start(config, is_main):
    """Raise on every rank what speaks against a start on any: the file STOP, a job's end that is none (UserError)."""
    complaint = None
    try:
        ControlFiles(config.run.dir, is_main).refuse_stop()
        if config.run.stop_before_end_seconds:
            check_job_end(os.environ)
    except UserError as error:
        complaint = str(error)
    assert_equal_on_all_ranks({}, "start", error=complaint)


class Trainer:
    """The state of a run and its loop. Use as a context: leaving it ends loaders, writers and pending saves."""

    def __init__(self, config, signals, accelerator, data, schedule, directory, checkpointer, end, resumed):
        self.config, self.signals, self.data, self.schedule = config, signals, data, schedule
        self.directory, self.checkpointer, self.end = directory, checkpointer, end
        self.dtype = parameter_dtype(config)
        self.strategy = build_strategy(config, launched_strategy(os.environ), accelerator)
        self.device = self.strategy.device
        self.augment = build_augment(config)
        self.bank = ShardedBank(
            config.bank.size,
            config.model.embedding_dim,
            momentum=config.bank.momentum,
            device=self.device,
            dtype=self.dtype,
            seed=config.run.seed,
            exchange=config.bank.exchange,
            kernel=config.bank.kernel,
            kernel_inputs=config.bank.kernel_inputs,
        )
        self.branched_from = None  # the checkpoint of another run that this one began with
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.read = Counter()  # what the stores did since this start, over all ranks
        self.corrupt = {}  # key -> why it did not decode
        self.last_epoch_bank = None  # bank diagnostics of the last whole epoch
        self.knn = {}  # step -> percent
        self.switches = ControlFiles(config.run.dir, directory.is_main)
        before_end = config.run.stop_before_end_seconds
        self.job_end = JobEnd(job_end(os.environ) if before_end else None, before_end)
        self.profiler = StepProfiler(
            directory.path / "profile", config.run.profile_steps, self.device, self.strategy.rank
        )
        self.alarm = None  # made when the width of the features is known
        self.features = None  # of the step's first view and micro-batch, kept by a hook for RankMe
        self.strategy.module.query.backbone.register_forward_hook(self._keep_features)
        if resumed:
            self._restore(resumed)
        self._open_records(resumed, accelerator)

    def _keep_features(self, module, inputs, features):
        if self.features is None:
            self.features = features.detach()

    def _open_records(self, resumed, accelerator):
        """Run directory, telemetry and audit of this attempt."""
        config = self.config
        attempt = all_max(self.directory.next_attempt() or 0)
        self.audit = None
        if config.data.audit:  # the last that can fail by a user's mistake: nothing is changed before
            self.audit = AuditLog(
                config.data.audit,
                rank=self.strategy.rank,
                world_size=self.strategy.world_size,
                attempt=attempt,
            )
        # Where a run began is no part of the recipe, and the same file resumes it.
        self.directory.write_config(configuration.to_yaml(configuration.replace(config, run__resume="auto")))
        own_bytes = state_bytes(self.strategy.optimizer)
        places = gather_objects((str(self.device), socket.gethostname(), own_bytes))
        self.directory.write_environment(
            describe_environment(
                world_size=accelerator.num_processes,
                devices=[device for device, _, _ in places],
                hosts=[host for _, host, _ in places],
                strategy=self.strategy.name,
                optimizer_state_bytes=[num_bytes for _, _, num_bytes in places],
            )
        )
        self.directory.start_attempt(
            world_size=accelerator.num_processes, resumed_step=self.step if resumed else None
        )
        self.telemetry = Telemetry(
            self.directory,
            total_steps=self.end,
            steps_per_epoch=self.data.order.steps_per_epoch,
            images_per_step=config.data.global_batch_size,
            start_step=self.step,
        )
        if config.eval.knn_every and not self.data.val_store:
            self.telemetry.note("no kNN evaluation: data.val_shards is empty")
        self.telemetry.note(f"resumed from {resumed} at step {self.step:,}" if resumed else "fresh start")
        self.telemetry.note(f"{self.strategy.name}: {own_bytes / 1e6:,.2f} MB of optimizer state on rank 0")

    def __enter__(self):
        return self

    def __exit__(self, error_type, *_):
        self.telemetry.close()
        if error_type is None:
            self.profiler.close()  # stopped on a request before it had all its steps
        if self.audit:
            self.audit.close()
        if error_type is None:
            self.checkpointer.close()

    # The loop

    def train(self):
        """Steps until the end or a reason to stop; then a checkpoint, a marker and a summary."""
        started = time.monotonic()
        if self.step == 0 and self.config.eval.baselines and self.data.val_store:
            self._evaluate_baselines()
        if self.step and self._evaluation_is_due():
            self._evaluate_if_it_fits()
        batches = on_device(self.data.batches(self.step, self.end), self.device)
        stop = None
        self._note_small_cache()
        while self.step < self.end and not stop:
            began = time.monotonic()
            self.profiler.before_step()
            with self.telemetry.meter.waiting(), part("data"):
                batch = next(batches)
            self._train_on(batch)
            self._profiled()
            self.job_end.took("step", time.monotonic() - began)
            stop, save = self._agree(batch)
            if stop or save or self._save_is_due():
                self._save()
            # After the save, which an evaluation that fails must not cost; what stops a run does not wait for one:
            # the resumed run makes up for it.
            if not stop and self._evaluation_is_due():
                self._evaluate()
        self.checkpointer.wait()
        self._note_complete_save()
        if stop and (self.step < self.end or self._evaluation_is_due()):
            self.directory.mark_interrupted(self.step, stop)
            again = "the same command resumes here"
            if self.config.run.resume == "never":
                again = "resume here with --run.resume auto"
            self.telemetry.note(f"stopped by {stop} after step {self.step:,}: {again}")
        else:
            self.directory.mark_done(self.step)
            self._summarise(time.monotonic() - started)

    def _note_small_cache(self):
        store = self.data.store
        if store.cache is not None and not cache_is_large_enough(store, self.data.order, self.step):
            self.telemetry.note(
                f"data.cache_bytes {store.cache.limit_bytes:,} is less than the shards in use at once: images are "
                "read one by one; a larger cache or a smaller data.window reads whole shards"
            )

    def _profiled(self):
        """A step for the profiler; after its last one, or the run's, its table."""
        self.profiler.after_step()
        if self.step == self.end:
            self.profiler.close()
        if self.profiler.table:
            self.telemetry.note(f"{self.profiler.table}\ntrace and table: {self.directory.path / 'profile'}")
            self.profiler.table = None

    def _train_on(self, batch):
        """One step: hyper-parameters, switch, update, records."""
        assert batch.step == self.step, (batch.step, self.step)
        hp = hyper_parameters(self.schedule, self.step)
        if self.step % self.data.order.steps_per_epoch == 0:
            self.bank.reset_assignments()
        if hp.is_switch:
            synchronise_key(self.strategy.module)
            self.bank.reset_velocity()
        micro_batches = MicroBatches(
            batch, self.data.micro_batch_size, self.augment, self.dtype, self.config.views
        )
        self.features = None
        result = train_step(self.strategy, self.bank, micro_batches, hp)
        self.step += 1
        if self.audit:
            self.audit.append(batch.step, batch.epoch, batch.keys)
        self.telemetry.progress(self.step)
        self._count_skipped(result)
        if self.step % self.data.order.steps_per_epoch == 0:
            self.last_epoch_bank = self.bank.diagnostics()
        every = self.config.run.log_every
        if every and (self.step % every == 0 or self.step == self.end):
            self._log(hp, result)

    def _count_skipped(self, result):
        """A step that was not finite moved nothing; several in a row end the run."""
        if result.moved:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.telemetry.log_event(self.step, {"skipped_step": self.step, "skipped": self.skipped})
        self.telemetry.warn(f"step {self.step:,} was not finite and changed nothing")
        if self.skipped_in_a_row >= self.config.run.max_skipped:
            raise UserError(
                f"step {self.step}: {self.skipped_in_a_row} steps in a row were not finite (run.max_skipped "
                f"{self.config.run.max_skipped}): start again in another run.dir with a lower optim.lr, or with "
                "precision.compute fp32"
            )

    def _log(self, hp, result):
        std = embedding_std(result.queries)
        rank_of_features = rankme(self.features, max_rows=MAX_RANKME_ROWS)
        # Rows used and their entropy are counted over an epoch: the last whole one, or what there is of the first.
        bank = self.last_epoch_bank or self.bank.diagnostics()
        self.telemetry.log(
            self.step,
            {
                "phase": "bank warm-up" if hp.in_warmup else hp.rule,
                "loss": result.loss,
                "lr": hp.lr,
                "bank_lr": hp.bank_lr,
                "key_momentum": hp.key_momentum,
                "positive_probability": result.positive_probability,
                "bank_rows_used": bank["rows_used"],
                "bank_assignment_entropy": bank["assignment_entropy"],
                "bank_row_norm": bank["row_norm"],
                "embedding_std": std,
                "rankme": rank_of_features,
                "skipped": self.skipped,
                "corrupt": len(self.corrupt),
                **({"checkpoint_seconds": saved[1]} if (saved := self.checkpointer.completed) else {}),
                **({f"data_{name}": self.read[name] for name in COUNTERS} if self.data.store.remote else {}),
            },
        )
        if self.alarm is None:
            most = min(
                len(result.queries) * self.strategy.world_size, self.features.shape[1], MAX_RANKME_ROWS
            )
            self.alarm = CollapseAlarm(self.config.model.embedding_dim, max_rank=most)
        warning = self.alarm.check(std, rank_of_features)
        if warning:
            self.telemetry.warn(warning)

    def _agree(self, batch):
        """What any rank has seen, every rank knows: requests, images that do not decode, a save that failed.

        Returns: why to stop (a signal's name, STOP, SLURM_JOB_END_TIME) or None; whether a checkpoint is asked for.
        """
        self._note_complete_save()
        requests, counters = self._requests(), self.data.take_counters()
        seen = gather_objects((requests, batch.corrupt, self.checkpointer.failed, counters))
        if any(failed for _, _, failed, _ in seen):
            self.checkpointer.wait()
        for _, corrupt, _, counters in seen:
            self.read.update(counters)
            for entry in corrupt:
                self._record_corrupt(entry)
        limit = self.config.data.max_corrupt * self.data.order.num_samples
        if len(self.corrupt) > limit:
            shown = ", ".join(list(self.corrupt)[:10])
            raise UserError(
                f"{len(self.corrupt)} of {self.data.order.num_samples:,} images do not decode, more than "
                f"data.max_corrupt {self.config.data.max_corrupt:g}: {shown}{' ...' if len(self.corrupt) > 10 else ''}"
                f" (all in {self.directory.path / 'corrupt.jsonl'}): {repair_hint(self.config.data.shards)}, or raise "
                "the limit"
            )
        reasons = [reason for (reason, _), *_ in seen if reason]
        return reasons[0] if reasons else None, any(save for (_, save), *_ in seen)

    def _requests(self):
        """What this rank knows of: (why to stop or None, whether a checkpoint is asked for)."""
        stop, save = self.switches.look()
        if self.signals.requested:
            return self.signals.requested, save
        if stop:
            return self.switches.stop.name, save
        fits = self.job_end.leaves_time(for_evaluation=self._evaluation_is_due())
        return None if fits else JOB_END, save

    def _record_corrupt(self, entry):
        if entry["key"] in self.corrupt:
            return
        self.corrupt[entry["key"]] = entry["error"]
        if self.directory.is_main:
            lines = JsonLines(self.directory.path / "corrupt.jsonl")
            lines.append({"step": self.step, **entry})
            lines.close()
        self.telemetry.warn(
            f"{entry['key']} does not decode ({entry['error']}); trained on {entry['substitute']}"
        )

    # Evaluation

    def _evaluation_is_due(self):
        if not self.data.val_store or self.step in self.knn:
            return False
        every, (epoch, position) = (
            self.config.eval.knn_every,
            divmod(self.step, self.data.order.steps_per_epoch),
        )
        return bool(every) and (self.step == self.end or (position == 0 and epoch % every == 0))

    def _evaluate_if_it_fits(self):
        """At a start: an evaluation longer than the job is left out, or no job would ever train on."""
        if all(gather_objects(self.job_end.leaves_time(for_evaluation=True))):
            self._evaluate()
        else:
            self.telemetry.warn(f"step {self.step:,}: the job is too short for the kNN evaluation: left out")

    def _evaluate(self):
        began = time.monotonic()
        self.knn[self.step] = self._encoder_knn()
        seconds = time.monotonic() - began
        self.job_end.took("evaluation", seconds)
        epoch = self.step / self.data.order.steps_per_epoch
        figures = {"knn_top1": self.knn[self.step], "knn_seconds": seconds}
        self.telemetry.log_event(self.step, {"epoch": epoch, **figures})
        self.telemetry.note(f"step {self.step:,}: kNN top-1 {self.knn[self.step]:.2f}%")

    def _evaluate_baselines(self):
        """kNN of raw pixels and of the untrained encoder: what any later figure is to be compared with."""
        raw, untrained = self._knn(pixels, None), self._encoder_knn()
        self.telemetry.log_event(0, {"knn_top1": untrained, "knn_top1_raw_pixels": raw})
        self.telemetry.note(f"kNN top-1 before training: raw pixels {raw:.2f}%, encoder {untrained:.2f}%")
        self.knn |= {"pixels": raw, 0: untrained}

    def _encoder_knn(self):
        with self.strategy.evaluation_encoder() as encoder:
            return self._knn(encoder.features, encoder)

    def _knn(self, encode, module):
        """kNN of what ``encode``, of ``module``, makes of images: percent, the same on every rank."""
        config = self.config
        with self.telemetry.meter.paused():
            return evaluate_knn(
                encode,
                self.data.store,
                self.data.val_store,
                module=module,
                autocast_dtype=self.strategy.module.autocast_dtype,
                channels_last=self.strategy.module.channels_last,
                rank=self.strategy.rank,
                world_size=self.strategy.world_size,
                size=config.views.size,
                mean=config.views.mean,
                std=config.views.std,
                k=config.eval.knn_k,
                temperature=config.eval.knn_temperature,
                device=self.device,
                dtype=self.dtype,
                workers=config.data.workers,
            )

    # Checkpoints

    def _save_is_due(self):
        every = self.config.run.save_every
        # Before an evaluation that a job's end might cut short, too.
        cut_short = self.job_end.end is not None and self._evaluation_is_due()
        return self.step == self.end or cut_short or bool(every and self.step % every == 0)

    def _note_complete_save(self):
        if self.checkpointer.completed:
            step, seconds = self.checkpointer.completed
            self.job_end.took("save", seconds)
            self.switches.save_is_complete(step)

    def _save(self):
        """Stage the whole state and write it in the background; the records up to here are on disk first."""
        self.switches.save_begins(self.step)
        self.telemetry.flush()
        if self.audit:
            self.audit.flush()
        values = {
            "step": self.step,
            "end": self.end,
            "branched_from": self.branched_from,
            "epoch": self.step / self.data.order.steps_per_epoch,
            "config": configuration.to_dict(self.config),
            "fingerprint": self.data.fingerprint,
            "num_samples": self.data.order.num_samples,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "corrupt": self.corrupt,
            "last_epoch_bank": self.last_epoch_bank,
            "knn": [[step, value] for step, value in self.knn.items()],
            "seconds": self.job_end.seconds,
        }
        self.checkpointer.save(self.step, training_state(self.strategy, self.bank, values))

    def _restore(self, path):
        values = restore(path, self.strategy, self.bank)
        own = path.absolute().parent == self.directory.checkpoints.absolute()
        self.branched_from = values["branched_from"] if own else str(path.absolute())
        self.step = values["step"]
        self.skipped, self.skipped_in_a_row = values["skipped"], values["skipped_in_a_row"]
        self.corrupt, self.last_epoch_bank = values["corrupt"], values["last_epoch_bank"]
        self.knn = dict(values["knn"])
        self.job_end.seconds |= values.get("seconds", {})

    def _summarise(self, seconds):
        rows = [("steps", f"{self.step:,}"), ("minutes of this start", f"{seconds / 60:.1f}")]
        if self.step in self.knn:
            names = {"pixels": "kNN of raw pixels", 0: "kNN of the random encoder"}
            rows += [(name, f"{self.knn[step]:.2f}%") for step, name in names.items() if step in self.knn]
            rows.append(("kNN of the trained encoder", f"{self.knn[self.step]:.2f}%"))
        folder, more = self.config.run.dir, f"--optim.epochs {2 * self.config.optim.epochs}"
        if self.end < self.schedule.total_steps:
            more = f"--run.max_steps {2 * self.end}"
        rows += [
            ("checkpoint", str(latest(self.directory.checkpoints))),
            ("curves", f"tensorboard --logdir {folder}/tensorboard"),
            (
                "export",
                f"python -m caco_scale.export {folder} --to backbone.safetensors --format safetensors",
            ),
            ("train on", f"accelerate launch -m caco_scale.pretrain {folder}/config.yaml {more}"),
        ]
        if self.config.recipe == "demo" and self.config.bank.rule == "caco":
            rows.append(
                (
                    "compare with MoCo",
                    "accelerate launch -m caco_scale.pretrain demo --bank.rule moco --run.dir runs/moco",
                )
            )
        self.telemetry.summary(f"{self.config.recipe}: done", rows)
