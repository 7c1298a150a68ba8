"""Pre-train from Python, watch the figures as they come, and use the backbone.

    python -m caco_scale.examples.pretrain_from_python

In a notebook the body of main() is a cell: "interrupt" stops the run after a checkpoint, and the same cell goes on.
"""

import tempfile
from pathlib import Path
from typing import Any

import caco_scale
from caco_scale.examples.images import draw_folder


def show(record: dict[str, Any]) -> None:
    """Called with every record of metrics.jsonl."""
    if "loss" in record:
        print(f"step {record['step']:3}: {record['phase']}, loss {record['loss']:.3f}, lr {record['lr']:.3g}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        photos = draw_folder(Path(folder) / "photos", 256)
        run = caco_scale.pretrain(
            "demo",
            on_metrics=show,
            data__shards=photos,  # or a shard set, on a disk or in an object store
            data__val_shards="",
            data__global_batch_size=32,
            bank__size=128,
            bank__warmup_epochs=1,
            optim__epochs=3,
            optim__warmup_epochs=1,
            eval__baselines=False,
            run__log_every=8,
            run__dir=Path(folder) / "run",
        )
        print(run, "newest checkpoint:", run.checkpoint)

        steps, losses = run.curve("loss")  # plt.plot(*run.curve("loss"))
        print(
            f"the loss went from {losses[0]:.2f} at step {steps[0]} to {losses[-1]:.2f} at step {steps[-1]}"
        )

        backbone = run.load_backbone()
        photo = backbone.prepare(next(photos.glob("*/*.jpg")))
        print(f"features of one photo: {tuple(backbone(photo[None]).shape)}")


if __name__ == "__main__":
    main()
