"""Features in a file: equal bytes at any number of processes and after a kill, and exact neighbours and duplicates."""

import csv
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from feature_files import exact_cosines, write_file
from gloo import run_ranks, set_environment
from run_directories import make_config, save_checkpoint, trained_model, write_records
from safetensors.numpy import load_file
from shard_sets import encode, make_shard_set, smooth_image
from test_knn import NORMALISATION
from weight_files import authors_checkpoint, encoder, torchvision_state

from caco_scale import config as configuration
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.store import open_store
from caco_scale.embed import extract
from caco_scale.embed.__main__ import COMMANDS, main, with_command
from caco_scale.embed.duplicates import groups_above
from caco_scale.embed.files import open_features
from caco_scale.embed.neighbours import find_nearest
from caco_scale.embed.parts import part_ranges
from caco_scale.errors import UserError
from caco_scale.evaluate.features import extract_features
from caco_scale.flags.read import read_command
from data_prep.__main__ import main as data_prep

LOST = (3, 17, 56, 57, 58, 59, 60)  # the last part has no image that decodes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A set of 61 images, a folder of 36 with 6 near-duplicates, and two checkpoints."""
    folder = tmp_path_factory.mktemp("embed")
    make_shard_set(folder / "set", num_images=61, size=20, corrupt=LOST, seed=0)
    pair = encoder("tiny", "cifar"), encoder("tiny", "cifar", seed=2)
    torch.save(authors_checkpoint(*pair), folder / "caco.pth")
    torch.save(authors_checkpoint(*pair[::-1]), folder / "other.pth")
    torch.save(torchvision_state("resnet18").state_dict(), folder / "plain.pth")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(10):
            image = smooth_image(generator, 24, 24)
            (folder / f"photos/{name}/{number}.png").write_bytes(encode(image, "PNG"))
            if number < 2:
                near = (image.astype(int) + 1).clip(0, 255).astype(np.uint8)
                (folder / f"photos/{name}/{number}b.png").write_bytes(encode(near, "PNG"))
    return folder


def words(place, target, *more, data="set", weights="caco.pth"):
    options = ["--data", place / data, "--size", 16, "--workers", 0, "--images_at_once", 4, "--to", target]
    return [str(word) for word in (place / weights, *options, *more)]


def run_command(arguments):
    name, flags = read_command(COMMANDS, with_command(arguments), "embed", "")
    assert name == "extract"
    extract.run(flags)


def run_of_rank(rank, world_size, arguments):
    """For ``run_ranks``."""
    run_command(arguments)


def refused(capsys, *arguments):
    """The one line of a mistake."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in arguments])
    output = capsys.readouterr()
    assert (caught.value.code, output.err.count("\n")) == (2, 1), output.err
    return output.err


# ---- extraction


def test_one_two_and_three_processes_write_the_same_bytes_and_every_row_is_the_encoders(place, tmp_path):
    for ranks in (1, 2, 3):
        run_ranks(run_of_rank, ranks, words(place, tmp_path / f"{ranks}.parquet"))
    files = [(tmp_path / f"{ranks}.parquet").read_bytes() for ranks in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
    assert sorted(os.listdir(tmp_path)) == ["1.parquet", "2.parquet", "3.parquet"]

    store, lost = open_store(place / "set"), []
    batches = evaluation_batches(store, 16, rank=0, world_size=1, batch_size=61, workers=0, undecodable=lost)
    features, labels, ids = extract_features(
        encoder("tiny", "cifar").backbone, batches, device="cpu", unit_norm=False, **NORMALISATION
    )
    table = pq.read_table(tmp_path / "1.parquet")
    assert table["key"].to_pylist() == store.names(ids)
    assert table["index"].to_pylist() == ids.tolist() == [i for i in range(61) if i not in LOST]
    assert table["label"].to_pylist() == labels.tolist()
    found = np.stack(table["features"].to_numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, features.numpy(), rtol=1e-4, atol=1e-5)
    with open_features(tmp_path / "1.parquet") as file:
        assert file.about["undecodable"]["count"] == len(LOST)
        assert [key for key, _ in file.about["undecodable"]["named"]] == store.names(list(LOST))
        assert file.about["classes"] == list(store.manifest.classes)


def test_all_forms_hold_the_same_rows_also_of_the_projector_in_half_precision(place, tmp_path):
    more = "--layer", "projector", "--dtype", "fp16"
    for kind in ("parquet", "npz", "safetensors"):
        run_command(words(place, tmp_path / f"f.{kind}", *more, data="photos"))
    table = pq.read_table(tmp_path / "f.parquet")
    archive, tensors = np.load(tmp_path / "f.npz"), load_file(tmp_path / "f.safetensors")
    rows = np.stack(table["embeddings"].to_numpy())
    assert (rows.dtype, rows.shape) == (np.float16, (36, 12))
    for found in (archive["embeddings"], tensors["embeddings"]):
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, rows)
    for name in ("label", "index"):
        assert table[name].to_pylist() == archive[name].tolist() == tensors[name].tolist()
    sources = table["source"].to_pylist()
    assert sorted(sources)[:3] == ["ant/0.png", "ant/0b.png", "ant/1.png"]
    assert archive["source"].tolist() == sources
    ends = [0, *tensors["source_ends"].tolist()]
    text = tensors["source"].tobytes()
    assert [text[a:b].decode() for a, b in itertools.pairwise(ends)] == sources
    for kind in ("parquet", "npz", "safetensors"):
        with open_features(tmp_path / f"f.{kind}") as file:
            np.testing.assert_array_equal(np.concatenate(list(file.features())), rows)
            assert list(file.texts("source")) == sources
            assert list(file.texts("key")) == table["key"].to_pylist()
            assert file.integers("index").tolist() == list(range(36))
            assert file.about["request"]["layer"] == "projector"


def die_after(parts, arguments, environment):
    """In a process of its own: kill -9 before the next part is written."""
    set_environment(environment)
    written, write_part = [], extract.write_part

    def write(path, *columns):
        if len(written) == parts:
            path.with_name(f"{path.name}.1.tmp").write_bytes(b"half a part")
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write_part(path, *columns)

    extract.write_part = write
    torch.set_num_threads(1)
    run_command(arguments)


def killed(parts, arguments):
    process = multiprocessing.get_context("forkserver").Process(
        target=die_after, args=(parts, arguments, dict(os.environ))
    )
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.long
def test_after_kills_any_number_of_processes_goes_on_and_writes_the_same_bytes(place, tmp_path, capsys):
    whole, target = tmp_path / "whole.npz", tmp_path / "f.npz"
    run_ranks(run_of_rank, 1, words(place, whole))
    for parts in (3, 2):
        killed(parts, words(place, target))
    assert not target.exists()
    there = sorted((tmp_path / "f.npz.parts").glob("*.safetensors"))
    assert len(there) == 5
    first = there[0].stat().st_mtime_ns

    line = refused(capsys, *words(place, target, "--dtype", "fp16"))
    assert "f.npz.parts holds another extraction (dtype: float32 -> float16): give another --to" in line
    assert "weights: " in refused(capsys, *words(place, target, weights="other.pth"))
    assert "images: " in refused(capsys, *words(place, target, data="photos"))
    assert there[0].stat().st_mtime_ns == first

    run_ranks(run_of_rank, 2, words(place, target))
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["f.npz", "whole.npz"]


def test_the_same_command_again_finds_its_file_and_another_does_not_touch_it(place, tmp_path, capsys):
    target = tmp_path / "f.safetensors"
    arguments = words(place, target, data="photos")
    run_command(arguments)
    before = target.read_bytes()
    capsys.readouterr()
    parts = tmp_path / "f.safetensors.parts"  # a kill between the file's appearance and the end of its parts
    parts.mkdir()
    with open_features(target) as file:
        (parts / "settings.json").write_text(json.dumps(file.about["request"]))
    run_command(arguments)
    assert "was there already, written by the same command" in capsys.readouterr().out
    assert not parts.exists()
    line = refused(capsys, *arguments, "--layer", "projector")
    assert "f.safetensors holds other features (layer: backbone -> projector; projector: None -> " in line
    assert target.read_bytes() == before
    target.write_text("mine")
    assert "f.safetensors is no whole file of features of this program" in refused(capsys, *arguments)
    assert target.read_text() == "mine"


@pytest.mark.parametrize(("images", "batch"), [(1, 256), (61, 4), (5000, 256), (10**6, 256), (10**5, 5000)])
def test_parts_are_whole_batches_of_all_images(images, batch):
    parts = part_ranges(images, batch)
    assert (parts[0].start, parts[-1].stop) == (0, images)
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert all(len(part) % batch == 0 for part in parts[:-1])
    assert max(map(len, parts)) <= max(2048, batch)


def test_parts_that_a_half_removed_folder_has_left_are_never_those_of_another_request(place, tmp_path):
    target = tmp_path / "f.npz"
    killed(3, words(place, target))
    (tmp_path / "f.npz.parts/settings.json").unlink()
    run_command(words(place, target, "--layer", "projector"))
    run_command(words(place, tmp_path / "g.npz", "--layer", "projector"))
    assert target.read_bytes() == (tmp_path / "g.npz").read_bytes()


# ---- neighbours


def tied_features(count=40, width=6, seed=0, dtype=np.float32):
    """Features among which many are equal, some are multiples of others, and one is zero."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, width)).astype(dtype)
    features[5], features[17], features[30] = features[2], 4 * features[2], features[2]
    features[21], features[22] = features[20], 0
    return features


@pytest.mark.parametrize("kind", ["parquet", "npz", "safetensors"])
def test_neighbours_are_brute_forces_with_the_lowest_row_first_among_equals(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("caco_scale.embed.files.BLOCK_ROWS", 7)
    features = tied_features(dtype=np.float16 if kind == "npz" else np.float32)
    others = np.concatenate([features[:3] + features[9:12], features[20:21]]).astype(np.float32)
    own = [*range(len(features)), *[-1] * len(others)]
    queries = np.concatenate([features.astype(np.float32), others])
    exact = exact_cosines(queries, features)
    with open_features(write_file(tmp_path / f"f.{kind}", features)) as file:
        for k in (1, 4, 39):
            cosines, rows = find_nearest(file, torch.from_numpy(queries), k, own)
            for query, mine in enumerate(own):
                expected = sorted((-c, row) for row, c in enumerate(exact[query].tolist()) if row != mine)[:k]
                assert rows[query].tolist() == [row for _, row in expected]
                assert (cosines[query] * 2.0**50).astype(np.int64).tolist() == [-c for c, _ in expected]


def test_neighbours_of_a_key_of_a_source_and_of_image_files_as_a_table_and_a_page(place, tmp_path, capsys):
    target = tmp_path / "f.parquet"
    run_command(words(place, target, data="photos"))
    shutil.copy(place / "photos/cat/7.png", tmp_path / "mine.png")
    with open_features(target) as file:
        key = list(file.texts("key"))[list(file.texts("source")).index("bee/1.png")]
    query = ["ant/0.png", key, tmp_path / "mine.png", place / "photos/cat"]
    outputs = [tmp_path / "near.csv", tmp_path / "near.html"]
    capsys.readouterr()
    main([str(w) for w in ("neighbours", target, "--query", *query, "--k", 3, "--to", *outputs)])
    with open(outputs[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (3 + 12)
    best = {row["query"]: row for row in rows if row["place"] == "1"}
    assert best["ant/0.png"]["source"] == "ant/0b.png"
    assert best[key]["source"] == "bee/1b.png"
    assert best[str(tmp_path / "mine.png")]["source"] == "cat/7.png"
    assert best["7.png"]["class"] == "cat"
    assert float(best["7.png"]["cosine"]) > 0.999999
    page = outputs[1].read_text()
    assert page.count("data:image/png;base64") == 4 * 15
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    main(["neighbours", str(target), "--query", "ant/0.png", "--k", "1"])
    assert "ant/0b.png" in capsys.readouterr().out


def test_image_files_are_encoded_by_a_backbone_of_ones_own_where_it_is_named(place, tmp_path, capsys):
    arch = "own_nets:net"
    config = make_config(model__arch=arch, model__stem="imagenet", views__size=16)
    write_records(tmp_path / "run", config)
    values = {"epoch": 5.0, "config": configuration.to_dict(config)}
    save_checkpoint(tmp_path / "run", trained_model(arch, "imagenet"), 40, **values)
    target, query = tmp_path / "f.npz", place / "photos/cat/7.png"
    run_command(words(place, target, "--arch", arch, data="photos", weights=tmp_path / "run"))
    near = ("neighbours", target, "--query", query, "--k", 1)
    line = refused(capsys, *near)
    assert f"is the backbone of {arch}, code of its own: give --arch {arch} to run it" in line
    main([str(word) for word in (*near, "--arch", arch, "--to", tmp_path / "near.csv")])
    with open(tmp_path / "near.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["source"], float(row["cosine"]) > 0.999999) == ("cat/7.png", True)
    line = refused(capsys, *near, "--arch", "own_nets:Unused")
    assert "f.npz" in line or "own_nets:Unused" in line


# ---- duplicates


@pytest.mark.parametrize("block", [7, 16, 1000])
def test_groups_are_the_components_of_all_pairs_above(block):
    generator = np.random.default_rng(3)
    features = tied_features(60, width=3, seed=1)
    features[40] = features[2] + 0.05 * generator.normal(size=3)  # in a row with others
    exact = exact_cosines(features)
    pairs = np.sort(exact[np.triu_indices(60, 1)])
    # The exact cosine of a pair is in; the next number is not.
    for above in (0.9, 0.99, *(pairs[[-200, -100, -50]] / 2.0**50), np.nextafter(pairs[-100] / 2.0**50, 1)):
        first = list(range(60))
        for a, b in np.argwhere(exact >= above * 2.0**50).tolist():
            old, new = max(first[a], first[b]), min(first[a], first[b])
            first = [new if group == old else group for group in first]
        assert groups_above(features, above, block_rows=block).tolist() == first
        assert 1 < len(set(first)) < 60


def test_a_curated_set_in_three_commands(place, tmp_path, capsys):
    photos, paths = (
        place / "photos",
        {name: tmp_path / name for name in ("f.npz", "list.txt", "g.csv", "g.html")},
    )
    run_command(words(place, paths["f.npz"], data="photos"))
    capsys.readouterr()
    with open_features(paths["f.npz"]) as file:
        order = list(file.texts("source"))
    more = ["--above", 0.9999, "--to", paths["list.txt"], "--groups", paths["g.csv"], paths["g.html"]]
    main([str(word) for word in ("duplicates", paths["f.npz"], *more)])
    output = capsys.readouterr().out
    assert "6 groups of 12 images at a cosine of 0.9999 or more: 6 of 36 images in" in output
    assert f"data_prep build {photos} SHARDS --without {paths['list.txt']}" in output
    listed = paths["list.txt"].read_text().splitlines()
    pairs = [(f"{c}/{i}.png", f"{c}/{i}b.png") for c in ("ant", "bee", "cat") for i in (0, 1)]
    assert listed == sorted((max(pair, key=order.index) for pair in pairs), key=order.index)
    with open(paths["g.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kept"] for row in rows] == ["yes", "no"] * 6
    assert {row["source"] for row in rows if row["kept"] == "no"} == set(listed)
    assert paths["g.html"].read_text().count("data:image/png;base64") == 12

    data_prep(
        ["build", str(photos), str(tmp_path / "set"), "--without", str(paths["list.txt"]), "--workers", "0"]
    )
    store = open_store(tmp_path / "set")
    assert store.manifest.num_samples == 30
    rejected = {note["source"]: note["reason"] for note in store.manifest.rejected}
    assert rejected == dict.fromkeys(listed, "left out by a list")
    # And the features of the built set know what the images were called.
    run_command(words(place, tmp_path / "again.npz", data=tmp_path / "set"))
    with open_features(tmp_path / "again.npz") as file:
        assert sorted(file.texts("source")) == sorted(set(order) - set(listed))


# ---- mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target": "f.pt"}, "ends in none of .parquet, .npz, .safetensors"),
        ({"target": "none/f.npz"}, "there is no directory {target.parent}: mkdir -p "),
        ({"target": "folder.npz"}, "is a directory: give the name of a file in it"),
        ({"target": "s3://bucket/f.npz"}, "is an address"),
        ({"data": "nowhere"}, "--data {place}/nowhere does not exist"),
        ({"data": "empty"}, "it is not a shard set, and no folder of images either"),
        ({"weights": "nowhere.pth"}, "does not exist: give a run directory"),
        (
            {"weights": "plain.pth", "more": ("--layer", "projector")},
            "has no projector of ours: drop --layer",
        ),
        ({"more": ("--layer", "head")}, "--layer is 'head': give one of backbone, projector"),
    ],
)
def test_what_cannot_be_extracted_is_one_line(place, tmp_path, capsys, more, message):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "empty").mkdir()
    target = more.get("target", "f.npz")
    target = target if "://" in target else tmp_path / target
    data = tmp_path / "empty" if more.get("data") == "empty" else more.get("data", "photos")
    arguments = words(
        place, target, *more.get("more", ()), data=data, weights=more.get("weights", "caco.pth")
    )
    assert message.format(place=place, target=target) in refused(capsys, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["empty", "folder.npz"]


def test_images_of_which_none_decodes_and_features_that_fp16_cannot_hold(place, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1.jpg").write_bytes(b"no image")
    line = refused(capsys, *words(place, tmp_path / "f.npz", data=tmp_path / "bad"))
    assert f"none of the 1 images of {tmp_path}/bad decodes; 000000/1.jpg: not an image" in line
    assert not (tmp_path / "f.npz").exists()
    large = encoder("tiny", "cifar")
    for parameter in large.backbone.parameters():
        parameter.data.mul_(100)
    torch.save(authors_checkpoint(large, large), tmp_path / "large.pth")
    arguments = words(place, tmp_path / "g.npz", "--dtype", "fp16", weights=tmp_path / "large.pth")
    assert "more than fp16 can hold: give --dtype fp32" in refused(capsys, *arguments)


def test_parquet_without_pyarrow_says_what_to_install_and_npz_needs_none(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    line = refused(capsys, *words(place, tmp_path / "f.parquet"))
    assert "needs pyarrow: pip install pyarrow, or give a file that ends in .npz" in line
    run_command(words(place, tmp_path / "f.npz", data="photos"))


def test_what_cannot_be_looked_for_is_one_line(place, tmp_path, capsys):
    target = write_file(tmp_path / "f.npz", tied_features()[:6], sources=[f"cat/{i}.jpg" for i in range(6)])
    near = ("neighbours", target, "--query")
    assert f"{tmp_path}/x.npz does not exist: python -m caco_scale.embed RUN" in refused(
        capsys, "neighbours", tmp_path / "x.npz", "--query", "a"
    )
    line = refused(capsys, *near, "cat/9.jpg", "--k", 2)
    assert "--query cat/9.jpg is no key and no source in" in line
    assert "did you mean cat/" in line
    assert "--k 6 needs as many other images" in refused(capsys, *near, "cat/1.jpg", "--k", 6)
    assert "neither .csv (a table) nor .html" in refused(capsys, *near, "cat/1.jpg", "--to", "near.txt")
    (tmp_path / "near.csv").write_text("mine")
    assert "near.csv exists: rm " in refused(capsys, *near, "cat/1.jpg", "--to", tmp_path / "near.csv")
    assert "--query has no value" in refused(capsys, *near)
    (tmp_path / "text.png").write_text("no image")
    line = refused(capsys, *near, tmp_path / "text.png", "--k", 2)
    assert "--weights says where the encoder" in line
    assert "'neighbors' is no command (did you mean neighbours?)" in refused(capsys, "neighbors", target)


def test_query_images_want_the_encoder_of_the_file(place, tmp_path, capsys):
    target = tmp_path / "f.safetensors"
    run_command(words(place, target, data="photos"))
    capsys.readouterr()
    near = ("neighbours", target, "--k", 2, "--query")
    line = refused(capsys, *near, place / "photos/cat/1.png", "--weights", place / "other.pth")
    assert "other.pth is not the encoder of" in line
    (tmp_path / "text.png").write_text("no image")
    assert "is no image that can be read" in refused(capsys, *near, tmp_path / "text.png")


def test_what_has_no_duplicates_list_is_one_line(tmp_path, capsys, monkeypatch):
    target = write_file(tmp_path / "f.npz", tied_features()[:6])
    for above in (0, 1, -0.5, "nan"):
        line = refused(capsys, "duplicates", target, "--above", above, "--to", tmp_path / "l.txt")
        assert "give a number above 0, at most 0.999999" in line
    assert "give --above" in refused(capsys, "duplicates", target, "--to", tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("mine")
    assert "l.txt exists: rm " in refused(
        capsys, "duplicates", target, "--above", 0.9, "--to", tmp_path / "l.txt"
    )
    damaged = tmp_path / "d.npz"
    damaged.write_bytes(target.read_bytes()[:-300])
    assert "is no whole file of features" in refused(
        capsys, "duplicates", damaged, "--above", 0.9, "--to", tmp_path / "m.txt"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is the work of one process" in refused(
        capsys, "duplicates", target, "--above", 0.9, "--to", tmp_path / "m.txt"
    )


def test_a_page_without_its_images_says_why(tmp_path, capsys):
    target = write_file(tmp_path / "f.npz", tied_features()[:6], size=16, resize=16)
    main(
        [
            str(w)
            for w in (
                "neighbours",
                target,
                "--query",
                "000000.tar/00000001",
                "--k",
                2,
                "--to",
                tmp_path / "n.html",
            )
        ]
    )
    page = (tmp_path / "n.html").read_text()
    assert "No pictures: --data nowhere does not exist" in page
    assert "data:image" not in page


def test_patch_tokens_of_a_vit_are_rows_of_the_file(place, tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit")
    torch.save(vit.state_dict(), place / "vit.pth")
    flags = words(
        place,
        tmp_path / "p.npz",
        "--layer",
        "patches",
        "--arch",
        "timm/test_vit",
        weights="vit.pth",
        data="photos",
    )
    flags[flags.index("--size") + 1] = "32"
    run_command(flags)
    with open_features(tmp_path / "p.npz") as file:
        assert file.about["patches"] == [4, 64]
        found = np.concatenate(list(file.features())).reshape(-1, 4, 64)
    batches = evaluation_batches(
        open_store(place / "photos"), 32, rank=0, world_size=1, batch_size=4, workers=0
    )
    with torch.no_grad():
        vit = timm.create_model("test_vit", dynamic_img_size=True)
        vit.load_state_dict(torch.load(place / "vit.pth", weights_only=True))
        encode = lambda images: vit.eval().forward_features(images)[:, 1:].flatten(1)
        wanted = extract_features(encode, batches, **NORMALISATION, device="cpu", unit_norm=False)[0]
    assert np.allclose(found.reshape(len(found), -1), wanted.numpy(), atol=1e-5)
    with pytest.raises(UserError, match=r"plain.pth is a resnet18, which has no tokens of patches"):
        run_command(words(place, tmp_path / "q.npz", "--layer", "patches", weights="plain.pth"))
