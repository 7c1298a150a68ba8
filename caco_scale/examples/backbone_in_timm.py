"""A backbone that was pre-trained here, in timm: the same features, a classifier on top. Needs ``pip install timm``.

python -m caco_scale.examples.backbone_in_timm
"""

import sys
import tempfile
from pathlib import Path

import torch

import caco_scale
from caco_scale.examples.images import CLASSES, draw_folder
from caco_scale.export.write import export


def main() -> None:
    try:
        import timm
    except ImportError:
        sys.exit("error: this example shows timm, which is not installed: pip install timm")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = draw_folder(folder / "photos", 64, size=64)
        run = caco_scale.pretrain(
            "demo",
            data__shards=photos,
            data__val_shards="",
            data__global_batch_size=16,
            views__size=64,
            model__arch="resnet18",
            model__stem="imagenet",
            bank__size=64,
            bank__warmup_epochs=0,
            optim__epochs=2,
            optim__warmup_epochs=1,
            eval__baselines=False,
            run__log_every=4,
            run__dir=folder / "run",
        )
        file = folder / "backbone.safetensors"
        export(run.path, file, "timm")
        model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(file)).eval()
        backbone = run.load_backbone()

        images = torch.stack([backbone.prepare(photo) for photo in sorted(photos.glob("*/*.jpg"))[:8]])
        with torch.no_grad():
            difference = (model(images) - backbone(images)).abs().max()
        print(f"timm's features differ from the trained backbone's by {difference:.1e} at most")
        assert difference < 1e-5

        classifier = timm.create_model(  # to be fine-tuned, by timm's own train.py or any loop
            "resnet18", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, num_classes=CLASSES
        )
        assert torch.equal(classifier.state_dict()["conv1.weight"], model.state_dict()["conv1.weight"])
        print(f"with a new classifier: {tuple(classifier(images).shape)}")


if __name__ == "__main__":
    main()
