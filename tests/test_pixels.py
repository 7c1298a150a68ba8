"""Images of one channel, of 16 bits and of many channels: to the last bit from a file over a built set to a batch."""

import io
import json

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from caco_scale import config as configuration
from caco_scale.data.augment import augment, normalise
from caco_scale.data.decode import decode, look
from caco_scale.data.in_memory import DecodedImages
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.order import sample_keys
from caco_scale.data.pixels import RGB8, CorruptSample, Pixels, as_picture, picture_note
from caco_scale.data.store import open_store
from caco_scale.data.views import centre_crop, crop_resize, draw_colour
from caco_scale.errors import UserError
from caco_scale.method.encoders import build_backbone, refuse_views, skeleton
from caco_scale.training.assemble import channel_notes, view_specs
from caco_scale.weights.load import Wanted
from caco_scale.weights.start import load_start
from data_prep.build import build
from data_prep.images import prepare_exact
from data_prep.repair import repair
from data_prep.verify import verify

RNG = np.random.default_rng(0)
G8, G16 = RNG.integers(0, 256, (12, 15), np.uint8), RNG.integers(0, 65536, (12, 15), np.uint16)
C8, C16 = RNG.integers(0, 256, (12, 15, 3), np.uint8), RNG.integers(0, 65536, (12, 15, 3), np.uint16)
M8, M16 = RNG.integers(0, 256, (12, 15, 5), np.uint8), RNG.integers(0, 65536, (12, 15, 5), np.uint16)
LA, RGBA16 = np.stack([G8, 255 - G8], axis=2), RNG.integers(0, 65536, (12, 15, 4), np.uint16)


def pil(image, kind, **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def tiff(pixels, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **({"photometric": "minisblack"} | options))
    return out.getvalue()


def npy(array, **options):
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def first_axis(image):
    return np.moveaxis(image, 2, 0).copy()


EXACT = {
    "PNG grey": (pil(G8, "PNG"), G8[:, :, None]),
    "PNG grey 16": (pil(G16, "PNG"), G16[:, :, None]),
    "PNG RGB 16": (imagecodecs.png_encode(C16), C16),
    "PNG RGBA 16": (imagecodecs.png_encode(RGBA16), RGBA16),
    "PNG grey and alpha": (pil(LA, "PNG"), LA),
    "PNG 1 bit": (pil(Image.fromarray(G8 > 127), "PNG"), ((G8 > 127) * 255).astype(np.uint8)[:, :, None]),
    "TIFF grey": (tiff(G8), G8[:, :, None]),
    "TIFF grey 16": (tiff(G16), G16[:, :, None]),
    "TIFF grey 16, big-endian": (tiff(G16, byteorder=">"), G16[:, :, None]),
    "TIFF grey 16, white is zero": (tiff(65535 - G16, photometric="miniswhite"), G16[:, :, None]),
    "TIFF 1 bit": (tiff(G8 > 127), ((G8 > 127) * 255).astype(np.uint8)[:, :, None]),
    "TIFF RGB 16, LZW": (tiff(C16, photometric="rgb", compression="lzw", predictor=True), C16),
    "TIFF RGB 16, planes": (tiff(first_axis(C16), photometric="rgb", planarconfig="separate"), C16),
    "TIFF 5": (tiff(M8, planarconfig="contig", metadata=None), M8),
    "TIFF 5, 16 bits": (tiff(M16, planarconfig="contig"), M16),
    "TIFF of 5 pages": (tiff(first_axis(M16), metadata=None), M16),
    "TIFF of ImageJ": (tiff(first_axis(M16), imagej=True, metadata={"axes": "CYX"}), M16),
    "TIFF of OME": (tiff(first_axis(M16), ome=True, metadata={"axes": "CYX"}), M16),
    "npy of (H, W)": (npy(G16), G16[:, :, None]),
    "npy 5": (npy(M8), M8),
    "npy 5, 16 bits, big-endian": (npy(M16.astype(">u2")), M16),
    "npy in Fortran's order": (npy(np.asfortranarray(M16)), M16),
    "npy RGB": (npy(C8), C8),
}
OBJECTS = npy(np.array([[{"of": "Python"}]], object), allow_pickle=True)
FLIPPED = bytearray(EXACT["PNG RGB 16"][0])
FLIPPED[len(FLIPPED) // 2] ^= 1
REFUSED = {
    "npy of fractions": (npy(M16.astype(np.float32)), 5, "float32, of which nobody knows"),
    "npy of signed numbers": (npy(M16.astype(np.int16)), 5, "int16, of which nobody knows"),
    "npy of truths": (npy(G8 > 127), 1, "bool"),
    "npy of objects": (OBJECTS, 1, "Python objects, which is never unpickled: save uint8 or uint16"),
    "npy of 4 axes": (npy(M16[None]), 5, r"shape \(1, 12, 15, 5\)"),
    "npy cut": (npy(M16)[:-9], 5, "1,800 bytes with 1,791"),
    "npy channels first": (npy(first_axis(M16)), 5, "15 channels of 16 bits, not 5"),
    "TIFF of fractions": (tiff(G16.astype(np.float32)), 1, "float32, of which nobody knows"),
    "TIFF of 3 pages": (tiff(np.stack([G16] * 3), metadata=None), 1, "3 pages .* whether they are channels"),
    "TIFF cut": (tiff(G16)[:-50], 1, "."),
    "PNG cut": (EXACT["PNG grey 16"][0][:-60], 1, "."),
    "PNG flipped": (bytes(FLIPPED), 3, "."),
    "PNG of other channels": (EXACT["PNG RGB 16"][0], 1, "3 channels of 16 bits, not 1 channel of 16 bits"),
    "PNG of other bits": (pil(G8, "PNG"), 1, "1 channel of 8 bits, not 1 channel of 16 bits"),
    "CMYK": (pil(Image.fromarray(C8).convert("CMYK"), "JPEG"), 4, "3 channels of 8 bits, not 4"),
    "PGM of 12 bits": (
        b"P5 15 12 4095\n" + (G16 >> 4).astype(">u2").tobytes(),
        1,
        "not read to the last bit",
    ),
    "no image": (b"abc" * 50, 1, "not an image"),
}


def kind_of(image):
    return Pixels(image.shape[2], 8 * image.itemsize)


@pytest.mark.parametrize("name", EXACT)
def test_every_value_of_a_file_arrives(name):
    data, image = EXACT[name]
    kind = kind_of(image)
    found = decode(data, kind)
    assert found.dtype == kind.dtype
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, image)
    assert look(data).fits(kind) or kind == RGB8
    extension, stored, _ = prepare_exact(data, kind)
    assert extension == ("png" if kind.channels in (1, 3) else "npy")
    np.testing.assert_array_equal(decode(stored, kind), image)
    if data.startswith(b"\x89PNG") and kind.channels in (1, 3):
        assert stored == data


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name):
    data, channels, why = REFUSED[name]
    with pytest.raises(CorruptSample, match=why):
        decode(data, Pixels(channels, 8 if name == "CMYK" else 16))


def test_resizing_keeps_bits_and_channels():
    rows, columns, channels = np.ogrid[:40, :50, :5]
    smooth = (1000 + 900 * rows + 300 * columns + 50 * channels).astype(np.uint16)
    extension, stored, reason = prepare_exact(npy(smooth), Pixels(5, 16), short_side=20)
    small = decode(stored, Pixels(5, 16))
    assert (extension, reason, small.shape) == ("npy", "50 x 40 made 25 x 20", (20, 25, 5))
    halves = smooth.reshape(20, 2, 25, 2, 5).mean(axis=(1, 3))
    assert np.abs(small[5:-5, 5:-5] - halves[5:-5, 5:-5]).max() < 5
    # The views' resizes: of 16 bits as of 8, which torch's own kernel makes, but in finer steps.
    as_bytes = crop_resize((smooth >> 8).astype(np.uint8)[:, :, :3], (2, 3, 30, 30), 16)
    deep = crop_resize(smooth, (2, 3, 30, 30), 16)
    assert deep.dtype == np.uint16
    assert np.abs(as_bytes - deep[:, :, :3] / 256).max() < 2
    assert centre_crop(smooth, 16).shape == (16, 16, 5)
    np.testing.assert_array_equal(centre_crop(smooth[:16, :16], 16), smooth[:16, :16])


def put(folder, name, data):
    folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
    folder.joinpath(name).write_bytes(data)


def source(folder, encoded, count=6):
    for number in range(count):
        put(folder, f"{'ab'[number % 2]}/{number}.x".replace("x", encoded[0]), encoded[1](number))
    return folder


def sample(number, channels, bits):
    values = np.random.default_rng(number).integers(0, 2**bits, (12 + number, 15, channels))
    return values.astype(np.uint8 if bits == 8 else np.uint16)


@pytest.mark.parametrize(
    ("ending", "channels", "bits", "write"),
    [
        ("png", 1, 16, lambda image: pil(image[:, :, 0], "PNG")),
        ("tif", 1, 8, lambda image: tiff(image[:, :, 0])),
        ("tif", 3, 16, lambda image: tiff(image, photometric="rgb")),
        ("npy", 5, 8, npy),
    ],
)
def test_a_set_keeps_its_source_to_the_last_bit(tmp_path, ending, channels, bits, write):
    lines, kind = [], Pixels(channels, bits)
    src = source(tmp_path / "src", (ending, lambda number: write(sample(number, channels, bits))))
    ((path, manifest, _),) = build(src, tmp_path / "set", samples_per_shard=4, workers=0, tell=lines.append)
    assert (manifest.build["channels"], manifest.build["bits"]) == (channels, bits)
    assert f"images of {kind}, kept to the last bit; train on them with {kind.flags}" in lines[-1]
    assert ("--rgb" in lines[-1]) == (ending != "npy")  # of which nobody knows how to show them
    verify(path, full=True, workers=0)
    store = open_store(path, pixels=kind)
    for shard, info in enumerate(manifest.shards):
        for position in range(info.num_samples):
            stored = store.read_sample(shard, position)
            number = int(json.loads(stored["json"])["source"].split("/")[1].split(".")[0])
            image = decode(stored["png" if channels in (1, 3) else "npy"], kind)
            np.testing.assert_array_equal(image, sample(number, channels, bits))
    crops = [c for _, c, _ in evaluation_batches(store, 12, rank=0, world_size=1, batch_size=4, workers=0)]
    assert torch.cat(crops).shape == (6, 12, 12, channels)
    # A damaged shard is found and built again, the same to the last byte.
    shard = tmp_path / "set" / manifest.shards[0].name
    before = bytearray(shard.read_bytes())
    shard.write_bytes(before[:700] + bytes([before[700] ^ 1]) + before[701:])
    with pytest.raises(UserError, match="1 of 2 shards are bad"):
        verify(path, full=True, workers=0)
    assert repair(src, path, workers=0)[1] == [manifest.shards[0].name]
    assert shard.read_bytes() == before
    # Other flags, and a folder of the same images.
    with pytest.raises(UserError, match=f"have {kind}, not 3 channels of 8 bits: give {kind.flags}"):
        open_store(path, pixels=RGB8)
    open_store(src, pixels=kind).check()
    folder = open_store(src, pixels=Pixels(7, 16))
    with pytest.raises(UserError, match=f"have {kind}, not 7 channels of 16 bits: give {kind.flags}"):
        folder.check()
    if (channels, bits) != (1, 8):  # grey photographs may be read as RGB, deep images not
        with pytest.raises(UserError, match=f"give {kind.flags}") as error:
            open_store(src, pixels=RGB8).check()
        assert ("or make 8-bit RGB of them with" in str(error.value)) == (channels <= 4)


def test_a_mixture_is_an_error_or_a_flag(tmp_path):
    src = source(tmp_path / "src", ("png", lambda number: pil(sample(number, 1, 16)[:, :, 0], "PNG")))
    put(src, "b/photo.png", pil(C8, "PNG"))
    with pytest.raises(
        UserError, match=r"mixes photographs \(b/photo.png\) and 1 channel of 16 bits .*--rgb"
    ):
        build(src, tmp_path / "set", workers=0)
    with pytest.raises(UserError, match=r"b/photo\.png has 3 channels of 8 bits, not 1 channel of 16 bits"):
        build(src, tmp_path / "set", workers=0, channels=1, bits=16)
    ((_, manifest, _),) = build(src, tmp_path / "set", workers=0, rgb=True)
    assert manifest.num_samples == len(manifest.fixed) == 7
    assert "channels" not in manifest.build
    with pytest.raises(UserError, match="leave out --channels and --bits"):
        build(src, tmp_path / "set", workers=0, rgb=True, channels=1)


def advice(call):
    """The words of a UserError that say what to do, all but what is wrong."""
    with pytest.raises(UserError) as error:
        call()
    return str(error.value).partition(": ")[2]


@pytest.mark.parametrize(
    ("other", "can_be_rgb"), [(pil(C8, "PNG"), True), (EXACT["npy 5"][0], False)], ids=["RGB", "5 channels"]
)
def test_rgb_is_advised_where_it_can_be_made(tmp_path, monkeypatch, other, can_be_rgb):
    """Of a mixture all images must open so: in a build that finds it at once, late or against flags, and in place."""
    src = source(tmp_path / "src", ("png", lambda number: EXACT["PNG grey 16"][0]))
    put(src, "b/other.png", other)
    sixteen, kind = {"channels": 1, "bits": 16}, Pixels(1, 16)
    made = tmp_path / "set"
    found = [
        advice(lambda: build(src, made, workers=0)),
        advice(lambda: build(src, made, workers=0, **sixteen)),
        advice(lambda: open_store(src, pixels=kind).check()),
    ]
    monkeypatch.setattr("data_prep.kinds.LOOKED_AT", 1)
    found.append(advice(lambda: build(src, made, workers=0)))
    assert [("--rgb" in words) for words in found] == [can_be_rgb] * 4
    assert ["alone" in words for words in found] == [True] * 4
    if can_be_rgb:
        assert f"`python -m data_prep build --rgb {src} SHARDS`" in found[2]
        assert "to another DST" in found[3]
        ((place, _, _),) = build(src, tmp_path / "other", workers=0, rgb=True)
        assert open_store(place, pixels=RGB8).manifest.num_samples == 7


def test_a_built_set_is_built_again_as_rgb_where_its_source_was_png(tmp_path):
    for name, data in (("png", EXACT["PNG grey 16"][0]), ("npy", EXACT["npy of (H, W)"][0])):
        src = source(tmp_path / name, (name, lambda number, data=data: data), count=2)
        ((place, _, _),) = build(src, tmp_path / "set" / name, workers=0)
        words = advice(lambda place=place: open_store(place, pixels=RGB8))
        assert words.startswith("give --data.channels 1 --data.bits 16")
        assert ("build it again from its source with --rgb" in words) == (name == "png")


def test_one_that_is_met_late_ends_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.kinds.LOOKED_AT", 2)  # the first and the last
    for wrong, right in (
        (EXACT["PNG grey 16"][0], pil(C8, "PNG")),
        (pil(C8, "PNG"), EXACT["PNG grey 16"][0]),
    ):
        folder = tmp_path / str(len(right))
        src = source(
            folder, ("png", lambda number, wrong=wrong, right=right: wrong if number == 1 else right)
        )
        with pytest.raises(UserError, match=r"the source mixes .* \(b/1.png\): build each kind alone"):
            build(src, tmp_path / "set" / folder.name, workers=0)


def test_photographs_and_what_lies_beside_them_are_built_as_ever(tmp_path):
    src = tmp_path / "src"
    put(src, "a/rgb.png", pil(C8, "PNG"))
    put(src, "a/grey.png", pil(G8, "PNG"))
    put(src, "a/mask.npy", npy(M8))
    lines = []
    ((path, manifest, _),) = build(src, tmp_path / "set", workers=0, tell=lines.append)
    assert (manifest.num_samples, list(manifest.build)[4:]) == (2, [])
    assert [note["source"] for note in manifest.rejected] == ["a/mask.npy"]
    assert not any("kept" in line for line in lines)
    assert open_store(path).pixels == RGB8
    # Grey JPEGs are photographs; of those alone one channel is kept on request, and RGB of 8 bits without loss.
    for name, kind, flags in (("grey", G8, {"channels": 1}), ("rgb", C8, {"channels": 3, "bits": 8})):
        put(tmp_path / name, f"a/{name}.jpg", pil(kind, "JPEG"))
        ((path, manifest, _),) = build(tmp_path / name, tmp_path / f"{name} set", workers=0, **flags)
        stored = open_store(path).read_sample(0, 0)
        assert stored["jpg"] == (tmp_path / name / f"a/{name}.jpg").read_bytes()
        assert decode(stored["jpg"], manifest.pixels).shape == (12, 15, flags["channels"])


def test_pages_are_channels_when_their_number_is_given(tmp_path):
    src = source(
        tmp_path / "src", ("tif", lambda number: tiff(first_axis(sample(number, 5, 16)), metadata=None))
    )
    with pytest.raises(
        UserError, match="5 pages of 1 channel of 16 bits: give --channels 5 if they are channels"
    ):
        build(src, tmp_path / "set", workers=0)
    ((_, manifest, _),) = build(src, tmp_path / "set", workers=0, channels=5)
    assert manifest.pixels == Pixels(5, 16)
    open_store(src, pixels=Pixels(5, 16)).check()


def test_a_manifest_with_pixels_that_no_image_has_is_damaged(tmp_path):
    src = source(tmp_path / "src", ("npy", lambda number: npy(sample(number, 5, 8))), 1)
    ((path, _, _),) = build(src, tmp_path / "set", workers=0)
    file = tmp_path / "set" / "manifest.json"
    good = file.read_text()
    for wrong in ('"channels": 0', '"channels": "5"', '"channels": 10000000000', '"channels": true'):
        file.write_text(good.replace('"channels": 5', wrong))
        with pytest.raises(UserError, match="damaged"):
            open_store(path)


def test_decoded_images_of_any_kind_stay_in_memory():
    for image in (G16[:, :, None], M8, M16, C8):
        held = DecodedImages(2, 2 * image.nbytes, kind_of(image))
        held.put(1, image)
        np.testing.assert_array_equal(held.get(1), image)


def test_views_of_any_channels_are_those_of_grey():
    """A view of five equal channels has five times the view of one; three equal ones, of colour, the same."""
    views = configuration.Views(size=16, grayscale_p=0.0, solarize_p=(0.0, 0.0), jitter=(0.4, 0.4, 0.0, 0.0))
    spec = view_specs(views, 5)[0]
    keys = sample_keys(0, 0, np.arange(64), 0)
    params = {name: torch.from_numpy(value) for name, value in draw_colour(spec, keys).items()}
    grey = torch.randint(0, 65536, (64, 16, 16, 1), dtype=torch.int32)
    outputs = {}
    for channels in (1, 3, 5):
        crops = grey.expand(-1, -1, -1, channels).to(torch.uint16)
        outputs[channels] = augment(crops, params, [0.5] * channels, [0.5] * channels, torch.float64)
        assert outputs[channels].shape == (64, channels, 16, 16)
    for channels in (3, 5):
        torch.testing.assert_close(
            outputs[channels], outputs[1].expand_as(outputs[channels]), atol=2e-3, rtol=0
        )
    plain = normalise(grey.to(torch.uint16), [0.5], [0.5])
    assert (outputs[1] - plain).abs().amax(dim=(1, 2, 3)).gt(1e-3).sum() > 32
    torch.testing.assert_close(plain, (grey.permute(0, 3, 1, 2) / 65535 - 0.5) / 0.5)


def test_what_needs_colours_is_off_and_said():
    config = configuration.parse(["demo", "--data.channels", "5", "--data.bits", "16"])
    for spec in view_specs(config.views, 5):
        assert (spec.grayscale_p, spec.solarize_p, spec.jitter[2:]) == (0, 0, (0, 0))
    assert view_specs(config.views)[0].grayscale_p > 0
    assert channel_notes(config) == [
        "data.channels 5: saturation, hue, greyscale and solarization are off in the views",
        "views.mean and views.std are 0.5 for each of 5 channel(s)",
    ]
    assert config.views.mean == config.views.std == (0.5,) * 5
    assert channel_notes(configuration.parse(["demo"])) == []
    given = configuration.parse(["demo", "--data.channels", "1", "--views.mean", "0.3"])
    assert (given.views.mean, given.views.std) == ((0.3,), (0.5,))
    for words, error in (
        (
            ["--data.channels", "5", "--views.mean", "0.3", "0.4"],
            "views.mean has 2 numbers and data.channels is 5",
        ),
        (["--views.std", "1"], "views.std has 1 number and data.channels is 3: give 3 numbers"),
        (["--data.bits", "12"], "data.bits is 12: give 8 or 16"),
        (["--data.channels", "0"], "data.channels is 0"),
    ):
        with pytest.raises(UserError, match=error):
            configuration.parse(["demo", *words])


@pytest.mark.parametrize(
    ("arch", "stem", "layer", "channels"),
    [
        ("tiny", "cifar", "conv1", 1),
        ("resnet18", "cifar", "conv1", 5),
        ("squeezenet1_1", "imagenet", "features.0", 5),
        ("timm/test_vit", "imagenet", "patch_embed.proj", 5),
    ],
)
def test_backbones_get_the_right_first_layer(arch, stem, layer, channels):
    wide, num_features = skeleton(arch, stem, (), channels)
    narrow, others = skeleton(arch, stem)
    assert num_features == others
    shapes = {name: p.shape for name, p in narrow.named_parameters()}
    changed = {name: p.shape[1] for name, p in wide.named_parameters() if p.shape != shapes[name]}
    names = [name for name in changed if name.startswith(layer)]
    assert [changed[name] for name in names] == [channels] == list(changed.values())
    refuse_views(arch, wide, [64], channels)


def test_a_new_first_layer_has_the_spread_of_the_old_one():
    torch.manual_seed(0)
    old = build_backbone("resnet18")[0].conv1.weight.std()
    for channels in (1, 12):
        new = build_backbone("resnet18", channels=channels)[0].conv1.weight
        assert new.shape[1] == channels
        assert abs(new.std() * (channels / 3) ** 0.5 / old - 1) < 0.1


class TwoEyes(nn.Module):
    """Two convolutions read the images."""

    def __init__(self):
        super().__init__()
        self.far, self.near = nn.Conv2d(3, 4, 5, 2), nn.Conv2d(3, 4, 3, 2, bias=False)

    def forward(self, images):
        return torch.cat([self.far(images).mean((2, 3)), self.near(images).mean((2, 3))], dim=1)


class Flat(nn.Module):
    """Nothing of it can be replaced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images):
        return self.linear(images.mean((2, 3)))


def test_a_callable_is_adapted_or_says_that_it_cannot_be():
    backbone, num_features = build_backbone("test_pixels:TwoEyes", channels=5)
    assert (backbone.far.weight.shape[1], backbone.near.weight.shape[1], num_features) == (5, 5, 8)
    with pytest.raises(
        UserError, match="Flat takes no images of 5 channels and has no first convolution of 3"
    ):
        build_backbone("test_pixels:Flat", channels=5)


def test_pictures_of_any_image():
    for image in (C8, G8[:, :, None], G16[:, :, None], LA, M16):
        shown = as_picture(image)
        assert (shown.shape, shown.dtype) == ((12, 15, 3), np.uint8)
    assert as_picture(C8) is C8
    assert (as_picture(G8[:, :, None]) == G8[:, :, None]).all()
    assert (as_picture(G16[:, :, None]).min(), as_picture(G16[:, :, None]).max()) == (0, 255)
    assert picture_note(RGB8) == ""
    assert "the first three of 5 channels of 16 bits" in picture_note(Pixels(5, 16))


def test_starting_weights_of_three_channels_are_adapted(tmp_path):
    narrow, _ = build_backbone("tiny")
    torch.save(narrow.state_dict(), tmp_path / "three.pth")
    grey = torch.rand(2, 1, 16, 16)
    wanted = narrow.eval()(grey.expand(-1, 3, -1, -1))
    for channels in (1, 6):  # kernels are summed, or repeated and divided: equal channels give equal features
        start = load_start(str(tmp_path / "three.pth"), Wanted("tiny", "imagenet", (), channels))
        wide, _ = build_backbone("tiny", channels=channels)
        start.fill(wide)
        torch.testing.assert_close(wide.eval()(grey.expand(-1, channels, -1, -1)), wanted)
        assert f"of 3 channels to {channels} (timm's adapt_input_conv" in "\n".join(
            start.lines(start.weights.mean, start.weights.std)
        )
    torch.save(wide.state_dict(), tmp_path / "six.pth")
    again = load_start(str(tmp_path / "six.pth"), Wanted("tiny", "imagenet", (), 6))
    assert again.adapted() is None
    assert again.weights.pixels.channels == 6
    with pytest.raises(UserError):
        load_start(str(tmp_path / "six.pth"), Wanted("tiny", "imagenet", (), 5))
