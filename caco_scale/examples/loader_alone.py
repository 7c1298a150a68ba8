"""The loader in a training loop of one's own: augmented views, in an order that the seed alone decides.

python -m caco_scale.examples.loader_alone
"""

import tempfile
from pathlib import Path

import torch

import caco_scale
from caco_scale.examples.images import draw_folder


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        photos = draw_folder(Path(folder), 96)
        views = caco_scale.Views(size=32, num_local_crops=2, local_size=16)
        loader = caco_scale.batches(photos, global_batch_size=16, views=views, epochs=2, workers=1)
        print(
            f"{loader.num_samples} images, {loader.steps_per_epoch} steps an epoch, {len(loader)} steps in all"
        )
        seen = {}
        for batch in loader:
            seen[batch.step] = batch
            shapes = ", ".join(f"{tuple(view.shape)}" for view in batch.views)
            print(f"step {batch.step:2}, epoch {batch.epoch}: {shapes}; first image {batch.keys[0]}")

        # Resume in the middle of the second epoch, with another number of workers: the very same views.
        resumed = caco_scale.batches(
            photos, global_batch_size=16, views=views, epochs=2, start_step=9, workers=0
        )
        for batch in resumed:
            assert batch.keys == seen[batch.step].keys
            assert all(map(torch.equal, batch.views, seen[batch.step].views))
        print(f"resumed at step 9: the same {len(resumed)} batches, bit for bit")


if __name__ == "__main__":
    main()
