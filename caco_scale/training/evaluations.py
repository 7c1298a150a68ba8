"""The kNN accuracy of a run as it trains: when an evaluation is due, its figures, and what they compare with."""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from caco_scale.config import Config, with_absolute_places
from caco_scale.data.labels import lacking_classes, with_classes_of
from caco_scale.data.views import describe_crop
from caco_scale.distributed.collectives import gather_objects
from caco_scale.distributed.strategies.base import Strategy
from caco_scale.evaluate.knn import Measured, measure_knn
from caco_scale.evaluate.pixel_knn import measure_pixels, too_large
from caco_scale.evaluate.results import same_set, undecodable_line
from caco_scale.run.directory import RunDirectory
from caco_scale.run.scores import logged_scores
from caco_scale.run.stopping import JobEnd
from caco_scale.run.telemetry import Telemetry
from caco_scale.training.assemble import TrainingData, parameter_dtype


def is_due(config: Config, data: TrainingData, step: int, end: int) -> bool:
    """Whether the encoder after ``step`` of ``end`` steps is one to evaluate."""
    epoch, position = divmod(step, data.order.steps_per_epoch)
    every = config.eval.knn_every if data.val_store else 0
    return bool(every) and (step == end or (position == 0 and epoch % every == 0))


def logged_accuracy(directory: RunDirectory, step: int) -> dict[int | str, float]:
    """``{step: percent}`` where the run's metrics have an evaluation of that very step, else nothing.

    An evaluation follows its step's checkpoint, which does not know of it.
    """
    last, _ = directory.disk.call(lambda: logged_scores(directory.path, step))
    return {step: last["knn_top1"]} if last and last["step"] == step else {}


def owes_evaluation(
    config: Config, data: TrainingData, directory: RunDirectory, values: dict, end: int
) -> bool:
    """Whether the run whose newest checkpoint has these ``values`` was killed before an evaluation was over."""
    step = values["step"]
    known = {**dict(values["knn"]), **logged_accuracy(directory, step)}
    return is_due(config, data, step, end) and step not in known


def worse_than_before(
    knn: Mapping[int | str, float], step: int, untrained: str = "untrained", late: bool = True
) -> str | None:
    """A line where the kNN of ``step`` is below that of the encoder before training or of raw pixels; else None.

    Args:
        knn: as of :class:`Evaluations`.
        untrained: the word for the encoder of step 0.
        late: raw pixels are counted too; in the first half of a run a healthy one may be below them.
    """
    names = {0: f"the {untrained} encoder's"} | ({"pixels": "raw pixels'"} if late else {})
    above = [f"{name} {knn[at]:.2f}%" for at, name in names.items() if at in knn and knn[step] < knn[at]]
    if not above:
        return None
    return (
        f"step {step:,}: kNN top-1 {knn[step]:.2f}% is below {' and '.join(above)}: so far training has made it no "
        "better. If that stays so, try a longer bank warm-up (bank.warmup_epochs), a lower optim.lr with a longer "
        "optim.warmup_epochs, a smaller bank.size, or more epochs; check that the images and their classes are right"
    )


class Evaluations:
    """``knn``: finished steps -> percent; 0 is the untrained encoder, and "pixels" the images themselves.

    Args:
        end: the run's last step, after which an evaluation is due in any case.
        job_end: told what an evaluation takes; a start asks it whether one fits.
    """

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        strategy: Strategy,
        end: int,
        job_end: JobEnd,
        telemetry: Telemetry,
    ):
        self._config, self._data, self._strategy, self._end = config, data, strategy, end
        self._job_end, self._telemetry = job_end, telemetry
        self.knn: dict[int | str, float] = {}
        self.running = False  # an evaluation is under way
        self._warned: set[str] = set()
        if config.eval.knn_every and not data.val_store:
            telemetry.note("no kNN evaluation: data.val_shards is empty")
        if data.val_store:
            telemetry.note(f"images for kNN: {describe_crop(config.views.size, config.eval.resize)}")
            if absent := lacking_classes(with_classes_of(data.store, data.val_store, "kNN")):
                telemetry.note(f"kNN: {absent}")
            places = with_absolute_places(config).data
            if places.val_shards == places.shards:
                telemetry.warn(same_set("data.shards", "data.val_shards"))

    def due(self, step: int) -> bool:
        """Whether the encoder after ``step`` steps is to be evaluated, and has not been."""
        return is_due(self._config, self._data, step, self._end) and step not in self.knn

    def at_start(self, step: int, directory: RunDirectory) -> None:
        """Of a fresh run the baselines; of a stopped one what it still owes. Collective, as :meth:`run`.

        An evaluation longer than the job is left out, or no job would ever train on.
        """
        self.knn |= gather_objects(logged_accuracy(directory, step))[0]
        if step == 0:
            self._run_baselines()
        elif self.due(step):
            if all(gather_objects(self._job_end.leaves_time(for_evaluation=True))):
                self.run(step)
            else:
                self._telemetry.warn(f"step {step:,}: the job is too short for the kNN evaluation: left out")

    def run(self, step: int) -> None:
        """Evaluate the query encoder. Collective."""
        began = time.monotonic()
        measured = self._encoder_knn()
        self.knn[step] = self._top1(measured)
        seconds = time.monotonic() - began
        self._job_end.took("evaluation", seconds)
        epoch = step / self._data.order.steps_per_epoch
        figures = {"knn_top1": self.knn[step], "knn_seconds": seconds}
        self._telemetry.log_event(step, {"epoch": epoch, **figures, **self._undecodable(measured)})
        self._telemetry.note(f"step {step:,}: kNN top-1 {self.knn[step]:.2f}%")
        if worse := worse_than_before(self.knn, step, self._untrained(), late=2 * step >= self._end):
            self._telemetry.warn(worse)

    def _run_baselines(self):
        """Raw pixels and the untrained encoder, what any later figure is to be compared with."""
        if not self._config.eval.baselines or not self._data.val_store:
            return
        raw, measured = self._pixels_knn(), self._encoder_knn()
        untrained = self._top1(measured)
        figures = {"knn_top1": untrained} | ({} if raw is None else {"knn_top1_raw_pixels": raw})
        self._telemetry.log_event(0, {**figures, **self._undecodable(measured)})
        words = "" if raw is None else f"raw pixels {raw:.2f}%, "
        self._telemetry.note(
            f"kNN top-1 before training: {words}{self._untrained()} encoder {untrained:.2f}%"
        )
        self.knn |= ({} if raw is None else {"pixels": raw}) | {0: untrained}

    def summary(self, step: int) -> list[tuple[str, str]]:
        """Rows for the table at a run's end, beside one another what was measured before and after."""
        if step not in self.knn:
            return []
        names = {
            "pixels": "kNN of raw pixels",
            0: f"kNN of the {self._untrained()} encoder",
            step: "kNN of the trained encoder",
        }
        return [(name, f"{self.knn[at]:.2f}%") for at, name in names.items() if at in self.knn]

    def _untrained(self):
        return "starting" if self._config.model.weights else "untrained"

    def _encoder_knn(self) -> Measured:
        """kNN of the query encoder's features, the same on every rank."""
        with self._strategy.evaluation_encoder() as encoder:
            return self._knn(encoder.features, encoder)

    def _knn(self, encode, module) -> Measured:
        """kNN of what ``encode``, of ``module``, makes of images, the same on every rank."""
        train, val = self._data.store, self._data.val_store
        assert val is not None, "no evaluation is due without a set for it"
        autocast_dtype = self._strategy.module.autocast_dtype
        with self._telemetry.meter.paused(), self._under_way():
            return measure_knn(
                encode, train, val, module=module, autocast_dtype=autocast_dtype, **self._how()
            )

    def _pixels_knn(self) -> float | None:
        """Of the images themselves, in percent; None where that would take too long, which is said."""
        train, val, how = self._data.store, self._data.val_store, self._how()
        assert val is not None, "no evaluation is due without a set for it"
        if line := too_large(train, val, how["size"], how["device"], how["world_size"]):
            self._telemetry.note(line)
            return None
        with self._telemetry.meter.paused(), self._under_way():
            return self._top1(measure_pixels(train, val, say=self._telemetry.note, **how))

    def _how(self) -> dict[str, Any]:
        """What every kNN of this run is measured with."""
        config, strategy = self._config, self._strategy
        return {
            "channels_last": config.precision.channels_last,
            "rank": strategy.rank,
            "world_size": strategy.world_size,
            "size": config.views.size,
            "resize": config.eval.resize,
            "mean": config.views.mean,
            "std": config.views.std,
            "k": [config.eval.knn_k],
            "temperature": [config.eval.knn_temperature],
            "device": strategy.device,
            "dtype": parameter_dtype(config),
            "workers": config.data.workers,
        }

    @contextlib.contextmanager
    def _under_way(self):
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def _top1(self, measured):
        evaluation = self._config.eval
        return measured.counts["features"].top1(evaluation.knn_k, evaluation.knn_temperature)

    def _undecodable(self, measured):
        """Warn, once a start, of images that do not decode -> how many of the validation's count as wrong, if any."""
        assert self._data.val_store is not None, "it was measured"
        stores = {"train": self._data.store, "val": self._data.val_store}
        for which, images in measured.undecodable.items():
            if images and which not in self._warned:
                self._warned.add(which)
                total = stores[which].manifest.num_samples
                named = [(image.name, image.error) for image in images]
                self._telemetry.warn(f"kNN: {undecodable_line(which, named, total)}")
        wrong = len(measured.undecodable["val"])
        return {"knn_undecodable": wrong} if wrong else {}

    def state_dict(self) -> dict:
        return {"knn": [[step, value] for step, value in self.knn.items()]}

    def load_state_dict(self, values: dict) -> None:
        self.knn = dict(values["knn"])
