"""Which checkpoint a start goes on from, and whether its configuration may go on from it."""

from pathlib import Path

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import checkpoint_of, latest, read_values, step_of
from caco_scale.checkpoint.sums import file_sha256
from caco_scale.checkpoint.values import check_run
from caco_scale.errors import UserError


def goes_on_from(config: configuration.Config) -> Path | None:
    """The checkpoint that a start would go on from, looked for before the run directory is taken; None: a fresh start.

    What is refused of it: :func:`checkpoint_to_resume`.
    """
    newest = latest(Path(config.run.dir, "checkpoints")) if config.run.resume != "never" else None
    if newest is None and config.run.resume not in ("auto", "never"):
        return checkpoint_of(config.run.resume)
    return newest


def checkpoint_to_resume(
    config: configuration.Config, newest: Path | None, fingerprint: str, num_samples: int
) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Args:
        newest: the newest complete checkpoint of the run directory, if there is one.
        fingerprint, num_samples: of the training data's order, which the checkpoint must have, too, unless
            ``data.relist`` makes it a new data set.
    Raises:
        UserError: a checkpoint that this config cannot continue, with what differs.
    """
    path = _find(config.run.resume, config.run.dir, newest)
    if path is None:
        return None
    values = read_values(path)
    check_run(values, path)
    if newest and step_of(newest) > values["step"]:
        raise UserError(
            f"run.resume goes back to step {values['step']} but {config.run.dir} already holds {newest.name}: "
            "give another run.dir for the branch, or remove the newer checkpoints"
        )
    saved = configuration.from_dict(values["config"], f"{path} config")
    changed = configuration.differences(saved, config)
    if values["step"] >= values["end"] and config.optim.epochs > saved.optim.epochs:  # finished, now extended
        changed = [change for change in changed if not change.startswith("optim.epochs:")]
    if _is_file_of(config.model.weights, values.get("weights_sha256")):  # moved, or by another name
        changed = [change for change in changed if not change.startswith("model.weights:")]
    if changed:
        raise UserError(
            f"{path} was trained with other values ({'; '.join(changed)}): give these, or another run.dir"
        )
    if values["fingerprint"] != fingerprint and not config.data.relist:
        raise UserError(
            f"{path} was trained on another data set ({values['num_samples']:,} images, order "
            f"{values['fingerprint'][:12]}; {config.data.shards or 'data.mix'} has {num_samples:,}, "
            f"{fingerprint[:12]}): give its shards, or another run.dir"
        )
    return path


def _is_file_of(place, sha256):
    return bool(sha256) and Path(place).is_file() and file_sha256(Path(place)) == sha256


def _find(resume, run_dir, newest):
    """What ``run.resume`` names, as it is on the disk now."""
    if resume == "never":
        if newest:
            raise UserError(
                f"run.resume is never but {run_dir} holds {newest.name}: give another run.dir or remove it"
            )
        return None
    if resume == "auto":
        return newest
    path = checkpoint_of(resume)
    began = read_values(newest).get("branched_from") if newest and newest != path else None
    # A run's newest checkpoint may be another one than when the branch began.
    of_the_run = bool(began) and Path(began).parent == Path(resume, "checkpoints").absolute()
    if began == str(path.absolute()) or of_the_run:
        return newest  # the branch has gone on since: the same command resumes it
    return path
