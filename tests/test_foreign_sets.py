"""Sets of other programs: index, verify, doctor and loader agree on what a sample and its image are."""

import hashlib
import shlex
import warnings
from dataclasses import replace

import numpy as np
import pytest
import webdataset as wds
from shard_sets import encode, index_shard, smooth_image, write_manifest, write_tar

from caco_scale.config import load_recipe
from caco_scale.config import replace as with_fields
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.samples import NoImage, image_of, key_and_extension, label_of
from caco_scale.data.shards import MANIFEST_NAME
from caco_scale.data.store import open_store
from caco_scale.doctor.checks import check_loader, check_samples
from caco_scale.errors import UserError
from caco_scale.training.assemble import TrainingData
from data_prep.__main__ import main
from data_prep.index import index
from data_prep.repair import repair
from data_prep.verify import verify

RANDOM = np.random.default_rng(0)
JPEG = encode(smooth_image(RANDOM, 24, 24), quality=80)
PNG = encode(smooth_image(RANDOM, 24, 24), "PNG")


def write(path, files, **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    return write_tar(path, files, **options)


def pairs(name="{:06d}", image="jpg", label="cls", count=6, data=JPEG):
    """Images and labels, file after file."""
    return [
        pair
        for i in range(count)
        for pair in ((f"{name.format(i)}.{image}", data), (f"{name.format(i)}.{label}", b"%d" % (i % 2)))
    ]


def read_by_webdataset(path):
    """The keys of webdataset's samples, each with its extensions."""
    samples = wds.WebDataset(str(path), shardshuffle=False)
    return [(s["__key__"], sorted(k for k in s if not k.startswith("__"))) for s in samples]


READABLE = {
    "plain": pairs(),
    "upper case": pairs(image="JPEG", label="CLS"),
    "jfif": pairs(image="jfif"),
    "jpe": pairs(image="jpe"),
    "a png named jpg": pairs(data=PNG),
    "a dotted extension": pairs(image="image.jpg"),
    "both dotted": pairs(image="image.jpg", label="label.cls"),
    "a folder with dots": pairs(name="v1.0/x/{:04d}"),
    "mask beside it": sorted([*pairs(), *[(f"{i:06d}.seg.png", PNG) for i in range(6)]]),
    "a text between": sorted([*pairs(), *[(f"{i:06d}.txt", b"cat") for i in range(6)]]),
    "files of no sample": [("LICENSE", b"x"), ("README.md", b"x"), ("__meta__/a.json", b"{}"), *pairs()],
    "a file without extension within a sample": [("1.jpg", JPEG), ("NOTE", b"x"), ("1.cls", b"0"), *pairs()],
}


@pytest.mark.parametrize("kind", READABLE)
def test_what_index_takes_is_verified_trained_on_and_as_webdataset_groups_it(kind, tmp_path, capsys):
    write(tmp_path / "set/a.tar", READABLE[kind])
    place, manifest = index(tmp_path / "set")
    theirs = [s for s in read_by_webdataset(tmp_path / "set/a.tar") if any(_is_image(e) for e in s[1])]
    store = open_store(place)
    ours = store.index(0)
    assert [(k, sorted(e for e, _, _ in ours.members(i))) for i, k in enumerate(ours.keys)] == theirs
    assert verify(place, full=True, workers=1) == verify(place) == [(place, manifest)]
    assert [finding.status for finding in check_samples(store)] == ["ok"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as for an image that is left out
        options = {"rank": 0, "world_size": 1, "batch_size": 16, "workers": 0}
        ((_, crops, labels),) = evaluation_batches(store, 8, **options)
    assert len(crops) == manifest.num_samples == len(theirs)
    assert labels.tolist()[-6:] == [0, 1, 0, 1, 0, 1]


def _is_image(extension):
    try:
        return image_of([extension]) == extension
    except NoImage:
        return False


REFUSED = {
    "all images, then all labels": (
        sorted(pairs(), key=lambda file: file[0][7:], reverse=True),
        r"files of 6 samples do not follow one another \(000000, 000001, 000002 and 3 more\).*tar --sort=name",
    ),
    "all labels, then all images": (
        sorted(pairs(), key=lambda file: file[0][7:]),
        "files of 6 samples do not follow one another",
    ),
    "one label of many astray": (
        [*pairs(), ("x.jpg", JPEG), ("000003.json", b"{}")],
        "files of 1 samples do not",
    ),
    "dotted keys": (
        pairs(name="img.{:04d}"),
        r"sample 'img' has 6 images \(0000\.jpg, .* and 3 more\).*first dot",
    ),
    "dotted keys without end": (
        pairs(name="img.{:04d}", count=600),
        "sample 'img' has more than 1,000 files",
    ),
    "two images of a sample": (
        sorted([*pairs(image="rgb.png"), *pairs(image="depth.png", label="y")]),
        r"sample '000000' has 2 images \(depth\.png, rgb\.png\).*--image depth\.png",
    ),
    "one name twice": ([("1.jpg", JPEG), ("1.JPG", JPEG)], "two files '1.JPG' in one sample"),
    "no image": (
        [("README.md", b"x"), ("1.cls", b"1")],
        r"no sample with an image in 1 tars: 2 files of no sample",
    ),
    "nothing": ([], "no sample with an image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_numbers(kind, tmp_path):
    files, words = REFUSED[kind]
    write(tmp_path / "set/a.tar", files)
    with pytest.raises(UserError, match=words) as refusal:
        index(tmp_path / "set")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "set" / MANIFEST_NAME).exists()


def test_joined_tars_are_refused_and_not_read_in_part(tmp_path):
    one, two = (write(tmp_path / name, pairs(f"{name[0]}{{}}")).read_bytes() for name in ("a.tar", "b.tar"))
    joined = tmp_path / "set/c.tar"
    joined.parent.mkdir()
    for data in (one + two, one + b"\1"):
        joined.write_bytes(data)
        with pytest.raises(UserError, match=r"goes on for [\d,]+ bytes behind its end mark, after 12 files"):
            index(joined.parent)
    joined.write_bytes(one + bytes(1 << 21))  # only empty
    assert index(joined.parent)[1].num_samples == 6


def test_what_is_left_out_is_told_with_numbers(tmp_path, capsys):
    files = [
        ("README.md", b"x"),
        ("LICENSE", b"y"),
        ("d/._1.jpg", b"z"),
        *pairs(),
        ("7.jpg", JPEG),
        ("7.cls", b"cat"),
    ]
    files += [("8.jpg", JPEG), ("8.png", PNG), ("labels/1.cls", b"0"), *pairs(count=2)]
    write(tmp_path / "set/a.tar", files)
    write(tmp_path / "set/b.tar", [("info.json", b"{}")])
    main(["index", str(tmp_path / "set")])
    said = capsys.readouterr().out
    for words in (
        "3 files of no sample with an image (first a.tar: README.md)",
        "2 files that are no sample's by their names (first a.tar: LICENSE)",
        "1 samples whose label is no number from 0, and which so have none (first a.tar: 7.cls)",
        "1 samples with several images, of which .jpg is read (first a.tar: 8)",
        "2 keys that come several times, as a sample each (first a.tar: 000000)",
        "1 tars without a sample (first b.tar)",
        "10 samples (8 with a label) in 2 shards",
    ):
        assert words in said.replace(f"{tmp_path}/set/", "")
    verify(tmp_path / "set", full=True, workers=1)


def test_the_image_to_read_can_be_named(tmp_path):
    files = sorted([*pairs(image="rgb.png", data=PNG), *[(f"{i:06d}.depth.png", b"depth") for i in range(6)]])
    write(tmp_path / "set/a.tar", files)
    place, manifest = index(tmp_path / "set", image=".RGB.png")
    assert manifest.build["image"] == "rgb.png"
    assert [e for e, _, _ in open_store(place).index(0).members(0)] == ["cls", "rgb.png"]
    verify(place, full=True, workers=1)
    with pytest.raises(UserError, match="--image cls is no image's extension"):
        index(tmp_path / "set", image="cls")


def old_set(folder, files):
    """A set as an index that knew nothing of images would have made it: each file a sample."""
    write(folder / "000000.tar", [(f"{i}.jpg", data) for i, (_, data) in enumerate(files)])
    info = index_shard(folder, "000000.tar", len(files))
    path = folder / info.index_name
    wrong = path.read_bytes().replace(b'"jpg"', b'"txt"')
    path.write_bytes(wrong)
    sha256 = hashlib.sha256(wrong).hexdigest()
    write_manifest(folder, [replace(info, index_sha256=sha256)], ("0",), (0,))
    manifest = (folder / MANIFEST_NAME).read_text().replace('"build": {}', '"build": {"foreign": true}')
    (folder / MANIFEST_NAME).write_text(manifest)
    return str(folder)


def test_doctor_and_verify_refuse_samples_without_an_image_and_advise_what_works(tmp_path):
    place = old_set(tmp_path / "it's a set", pairs())
    advice = f"remove {place}/manifest.json and run `python -m data_prep index {shlex.quote(place)}`"
    for full in (False, True):
        with pytest.raises(UserError) as refusal:
            verify(place, full=full, workers=1)
        assert advice in str(refusal.value)
        assert "repair" not in str(refusal.value)
    (finding,) = check_samples(open_store(place))
    assert finding.status == "FAIL"
    assert "000000.tar: sample 0 has no image file (jpg, jpeg, png, webp, ...) but txt" in finding.text
    assert advice in finding.text
    with pytest.raises(UserError) as refusal:
        repair(tmp_path, place)
    assert advice in str(refusal.value)


def test_the_command_that_makes_an_index_anew_is_the_one_that_made_it(tmp_path):
    write(tmp_path / "tars/a-0.tar", pairs(image="x.png", data=PNG))
    place, _ = index(f"{tmp_path}/tars/a-{{0..0}}.tar", to=tmp_path / "index", image="x.png")
    command = f"python -m data_prep index '{tmp_path}/tars/a-{{0..0}}.tar' --to {place} --image x.png`"
    assert command in open_store(place).repair_hint


@pytest.mark.parametrize(("bad", "status"), [(0, []), (1, ["FAIL"]), (6, ["FAIL"])])
def test_the_doctor_counts_images_that_do_not_decode(bad, status, tmp_path):
    files = pairs(count=12)
    for i in range(bad):
        files[2 * i] = (files[2 * i][0], b"no image")
    write(tmp_path / "set/a.tar", files)
    place, _ = index(tmp_path / "set")
    config = with_fields(
        load_recipe("demo"), data__shards=place, data__val_shards="", data__global_batch_size=4
    )
    findings = check_loader(config, TrainingData(config, 0, 1), {})[1:]
    assert [finding.status for finding in findings] == status
    for finding in findings:
        assert f"{bad} of 12 images that were read do not decode" in finding.text
        assert "verify --full" in finding.text


def test_keys_extensions_images_and_labels():
    assert key_and_extension("a.b/0001.image.JPG") == ("a.b/0001", "image.jpg")
    for name in ("LICENSE", "a/b", "__x__/1.jpg", ".DS_Store", "._1.jpg", "a/._1.jpg", "__MACOSX/1.jpg"):
        assert key_and_extension(name) is None, name
    assert key_and_extension("./1.jpg") == ("./1", "jpg")
    assert image_of(["png", "cls", "jpg"]) == "jpg"
    assert image_of(["seg.png", "jpg"]) == "jpg"
    assert image_of(["json", "0.jpeg"]) == "0.jpeg"
    for kinds in ([], ["cls"], ["a.jpg", "b.jpg"], ["jpgx"]):
        with pytest.raises(NoImage):
            image_of(kinds)
    assert label_of(["jpg", "cls"]) == label_of(["a.cls", "cls"]) == "cls"
    assert label_of(["jpg", "label.cls"]) == "label.cls"
    assert label_of(["jpg"]) is label_of(["a.cls", "b.cls"]) is None
