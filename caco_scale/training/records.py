"""What one start of a run leaves behind: its number, configuration and environment, metrics, and the audit."""

import socket
from collections.abc import Callable
from pathlib import Path

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import latest
from caco_scale.data.loader import Batch
from caco_scale.distributed.collectives import all_max, gather_objects
from caco_scale.distributed.strategies.base import Strategy
from caco_scale.errors import quoted
from caco_scale.optim.build import state_bytes
from caco_scale.run.audit import AuditLog
from caco_scale.run.directory import RunDirectory
from caco_scale.run.environment import describe_environment
from caco_scale.run.telemetry import Telemetry
from caco_scale.run.trackers import Trackers


class Records:
    """The records of an attempt, opened: from here on the run directory speaks of this start. Collective.

    Args:
        step: finished steps of the checkpoint ``resumed``; 0 without one.
        of_another: that checkpoint is another run's: records here, if there are any, are of steps before it.
        end: the run's last step.
        on_metrics: called on the main rank with every record of metrics.jsonl.
    Attributes:
        telemetry: what the parts of the run write metrics with, and speak through.
    Raises:
        UserError: an audit log of another run, before anything is changed; a tracker that does not start.
    """

    def __init__(
        self,
        config: configuration.Config,
        directory: RunDirectory,
        strategy: Strategy,
        *,
        steps_per_epoch: int,
        step: int,
        end: int,
        resumed: Path | None,
        of_another: bool,
        on_metrics: Callable[[dict], object] | None,
    ):
        attempt = all_max(directory.next_attempt() or 0)
        self._audit = None
        if config.data.audit:  # the last that can fail by a user's mistake
            self._audit = AuditLog(
                config.data.audit,
                rank=strategy.rank,
                world_size=strategy.world_size,
                attempt=attempt,
                disk=directory.disk.of(config.data.audit),
            )
        # Where a run began is no part of the recipe, and the same file resumes it.
        kept = configuration.with_absolute_places(configuration.replace(config, run__resume="auto"))
        trackers = Trackers(
            config.run.trackers,
            directory,
            configuration.flatten(kept),
            kept_step=step if resumed and not of_another else None,
        )
        directory.write_config(configuration.to_yaml(kept))
        own_bytes = state_bytes(strategy.optimizer)
        devices, hosts, num_bytes = zip(
            *gather_objects((str(strategy.device), socket.gethostname(), own_bytes)), strict=True
        )
        directory.write_environment(
            describe_environment(
                world_size=strategy.world_size,
                devices=devices,
                hosts=hosts,
                strategy=strategy.name,
                optimizer_state_bytes=list(num_bytes),
            )
        )
        directory.start_attempt(
            world_size=strategy.world_size, resumed_step=step if resumed else None, of_another=of_another
        )
        self.telemetry = Telemetry(
            directory,
            total_steps=end,
            steps_per_epoch=steps_per_epoch,
            images_per_step=config.data.global_batch_size,
            start_step=step,
            kept_step=0 if of_another else step,
            on_metrics=on_metrics,
            trackers=trackers,
        )
        self.telemetry.note(f"resumed from {resumed} at step {step:,}" if resumed else "fresh start")
        self.telemetry.note(f"{strategy.name}: {own_bytes / 1e6:,.2f} MB of optimizer state on rank 0")

    def trained_on(self, batch: Batch) -> None:
        """A step is finished: the samples of this rank's share of it."""
        if self._audit:
            self._audit.append(batch.step, batch.epoch, batch.keys)
        self.telemetry.progress(batch.step + 1)

    def flush(self) -> None:
        """All of this rank so far is on the disk when this returns: before a checkpoint is complete."""
        self.telemetry.flush()
        if self._audit:
            self._audit.flush()

    def close(self) -> None:
        self.telemetry.close()
        if self._audit:
            self._audit.close()


def summary(
    config: configuration.Config, step: int, seconds: float, scores: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Rows for the table at a run's end: what was done, its ``scores``, and where it is."""
    folder = config.run.dir
    return [
        ("steps", f"{step:,}"),
        ("minutes of this start", f"{seconds / 60:.1f}"),
        *scores,
        ("checkpoint", str(latest(Path(folder, "checkpoints")))),
        ("curves", f"tensorboard --logdir {quoted(f'{folder}/tensorboard')}"),
    ]
