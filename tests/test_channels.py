"""A 16-bit set of one channel and a set of five: built, trained on two processes, resumed, exported, embedded."""

import numpy as np
import pytest
import tifffile
import torch
from evaluation_cases import run_of_rank
from launch import SMALL, final_state, launch
from PIL import Image
from safetensors.torch import save_file
from weight_files import noise

from caco_scale.data.loader import train_batches
from caco_scale.data.order import Order
from caco_scale.data.pixels import Pixels
from caco_scale.data.store import open_store
from caco_scale.data.views import ViewSpec
from caco_scale.embed import extract
from caco_scale.embed.__main__ import COMMANDS, with_command
from caco_scale.embed.files import open_features
from caco_scale.errors import UserError
from caco_scale.export.write import export
from caco_scale.flags.read import read_command
from caco_scale.method.encoders import build_backbone
from caco_scale.weights.load import load_weights
from data_prep.build import build
from data_prep.verify import verify


def images(pixels):
    rng = np.random.default_rng(0)
    shape = (32, 12, 12, pixels.channels)
    return rng.integers(0, 2**pixels.bits, shape).astype(pixels.dtype)


@pytest.mark.parametrize(
    "pixels", [Pixels(1, 16), pytest.param(Pixels(5, 8), marks=pytest.mark.long)], ids=str
)
def test_from_a_folder_to_features(tmp_path, pixels):
    source = images(pixels)
    (tmp_path / "src" / "a").mkdir(parents=True)
    for number, image in enumerate(source):
        options = {"photometric": "minisblack", "planarconfig": "contig"} if pixels.channels > 1 else {}
        tifffile.imwrite(
            tmp_path / f"src/a/{number:02d}.tif", image if options else image[:, :, 0], **options
        )
    build(tmp_path / "src", tmp_path / "set", workers=0)
    verify(tmp_path / "set", full=True, workers=0)
    store = open_store(tmp_path / "set", pixels=pixels)
    # A view of the whole image at its own size, with nothing done to it, is the source's to the last bit.
    whole = ViewSpec(12, (1, 1), (1, 1), jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
    order = Order([32], seed=0, global_batch_size=8)
    parts = {"rank": 0, "world_size": 1, "start_step": 0, "num_steps": 4, "seed": 0, "workers": 0}
    seen = {}
    for batch in train_batches(store, order, [whole], **parts):
        names = [
            store.read_sample(0, store.index(0).keys.index(key.split("/")[1]))["json"] for key in batch.keys
        ]
        seen |= {bytes(name): crop.numpy() for name, crop in zip(names, batch.crops[0], strict=True)}
    assert len(seen) == 32
    for name, crop in seen.items():
        np.testing.assert_array_equal(crop, source[int(name.split(b"a/")[1][:2])])

    flags = {**SMALL, "data.shards": tmp_path / "set", "views.size": 12, "run.dir": tmp_path / "run"}
    flags |= {"precision.compute": "fp32", "optim.epochs": 5, "run.max_steps": 8}
    flags |= {"data.channels": pixels.channels, "data.bits": pixels.bits}
    assert "greyscale and solarization are off" in launch(flags, 2)
    launch({**flags, "run.max_steps": 12})
    state, values = final_state(tmp_path / "run")
    assert values["step"] == 12
    assert state["query.backbone.conv1.weight"].shape[1] == pixels.channels

    to, features = tmp_path / "backbone.safetensors", tmp_path / "features.npz"
    export(tmp_path / "run", to, "safetensors")
    words = [to, "--data", tmp_path / "set", "--to", features, "--workers", 0]
    extract.run(read_command(COMMANDS, with_command([str(word) for word in words]), "embed", "")[1])
    weights = load_weights(to)
    assert weights.pixels == pixels
    with open_features(features) as file:
        found = np.concatenate(list(file.features()))
        numbers = [int(name.split("a/")[1][:2]) for name in file.texts("source")]
    with torch.no_grad():
        scaled = torch.from_numpy(source.astype(np.float32) / (2**pixels.bits - 1)).permute(0, 3, 1, 2)
        wanted = weights.backbone((scaled - 0.5) / 0.5)
    torch.testing.assert_close(torch.from_numpy(found), wanted[numbers], atol=1e-5, rtol=1e-4)


def test_weights_that_do_not_say_their_bits_take_those_of_the_set(tmp_path, capsys):
    """A folder, which has no manifest, and a built set: an encoder is given the range of either as 0 to 1."""
    source = images(Pixels(1, 16))[:8]
    for number, image in enumerate(source):
        place = tmp_path / f"src/{'ab'[number % 2]}/{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(place)
    build(tmp_path / "src", tmp_path / "set", workers=0)
    backbone = noise(build_backbone("tiny", "cifar", channels=1)[0], 3)
    torch.save(backbone.state_dict(), tmp_path / "bare.pth")
    with torch.no_grad():
        scaled = torch.from_numpy(source.astype(np.float32) / 65535).permute(0, 3, 1, 2)
        wanted = backbone((scaled - 0.5) / 0.5)
    of_images = ["--size", "12", "--workers", "0"]
    for place in ("src", "set"):
        words = [
            tmp_path / "bare.pth",
            "--data",
            tmp_path / place,
            "--to",
            tmp_path / f"{place}.npz",
            *of_images,
        ]
        extract.run(read_command(COMMANDS, with_command([str(word) for word in words]), "embed", "")[1])
        assert (
            "the file does not say the bits of its images: 16, as those of the set have"
            in capsys.readouterr().out
        )
        with open_features(tmp_path / f"{place}.npz") as file:
            found = np.concatenate(list(file.features()))
            numbers = [int(name[2:4]) for name in file.texts("source")]
        torch.testing.assert_close(torch.from_numpy(found), wanted[numbers], atol=1e-5, rtol=1e-4)
    sets = ["--data", str(tmp_path / "set"), "--val", str(tmp_path / "src"), *of_images]
    knn = ["knn", str(tmp_path / "bare.pth"), *sets, "--k", "1", "--to", str(tmp_path / "knn")]
    assert run_of_rank(0, 1, knn)["settings"]["bits"] == 16

    said = {"arch": "tiny", "stem": "cifar", "channels": "1", "bits": "8"}
    save_file(backbone.state_dict(), tmp_path / "said.safetensors", metadata=said)
    with pytest.raises(
        UserError, match="have 1 channel of 16 bits, not 1 channel of 8 bits: give images such as"
    ):
        run_of_rank(0, 1, ["knn", str(tmp_path / "said.safetensors"), *sets])
