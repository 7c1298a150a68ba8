"""``evaluate knn`` as a command: exact figures, the same on any number of processes, on shards and on folders."""

import json
import sys

import numpy as np
import pytest
import torch
from evaluation_cases import run_of_rank
from gloo import run_ranks
from launch import SMALL, by, finished, launch
from shard_sets import encode, make_shard_set, smooth_image
from test_knn import NORMALISATION, brute_force
from weight_files import authors_checkpoint, encoder

from caco_scale.data.loader import evaluation_batches
from caco_scale.data.store import open_store
from caco_scale.data.store.folder import FolderStore
from caco_scale.data.store.subset import Subset
from caco_scale.evaluate import run_knn
from caco_scale.evaluate.__main__ import main, parse
from caco_scale.evaluate.features import extract_features
from caco_scale.evaluate.results import interval
from caco_scale.run.files import read_json_lines


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shard sets of 61 and 30 images, and a checkpoint in the authors' format of tiny random ResNets."""
    folder = tmp_path_factory.mktemp("knn")
    make_shard_set(folder / "train", num_images=61, size=20, seed=0)
    make_shard_set(folder / "val", num_images=30, size=20, seed=1)
    torch.save(
        authors_checkpoint(encoder("tiny", "cifar"), encoder("tiny", "cifar", seed=2)),
        folder / "caco.pth.tar",
    )
    return folder


def words(place, *more):
    options = [
        "--data",
        place / "train",
        "--val",
        place / "val",
        "--size",
        16,
        "--workers",
        0,
        "--images_at_once",
        7,
    ]
    return [str(word) for word in ("knn", place / "caco.pth.tar", *options, *more)]


def test_every_figure_is_brute_forces_and_the_same_on_1_2_and_3_processes(place, tmp_path):
    more = ("--k", 1, 5, 20, "--temperature", 0.07, 0.2)
    results = [
        run_ranks(run_of_rank, ranks, words(place, *more, "--to", tmp_path / str(ranks)))
        for ranks in (1, 2, 3)
    ]
    figures = [result["results"] for ranks in results for result in ranks]
    assert all(found == figures[0] for found in figures)
    assert json.loads((tmp_path / "3/result.json").read_text())["results"] == json.loads(
        json.dumps(figures[0])
    )

    model, arrays = encoder("tiny", "cifar"), {}
    for name in ("train", "val"):
        batches = evaluation_batches(
            open_store(place / name), 16, rank=0, world_size=1, batch_size=100, workers=0
        )
        for feature, encode_images in (("features", model.backbone), ("embeddings", model)):
            batches = list(batches)
            arrays[feature, name] = extract_features(encode_images, batches, device="cpu", **NORMALISATION)
    for row in figures[0]:
        train, val = arrays[row["feature"], "train"], arrays[row["feature"], "val"]
        parts = [part.numpy() for part in (*train[:2], *val[:2])]
        expected = brute_force(*parts, row["k"], row["temperature"])
        assert row["top1"] == pytest.approx(expected, abs=1e-9), row
    assert {(row["feature"], row["k"]) for row in figures[0]} == {
        (feature, k) for feature in ("features", "embeddings") for k in (1, 5, 20)
    }


def test_the_command_by_the_launcher_prints_k_temperature_and_feature_beside_every_figure(place, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", *by("ddp", 2)["launcher"]]
    command += ["-m", "caco_scale.evaluate", *words(place, "--world-size", 2, "--to", tmp_path)]
    done = finished(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 process(es), cpu; query encoder" in done.stdout
    assert "left out: k = 100, 200, more than the 61 training images" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["environment"]["world_size"] == 2
    assert result["weights"]["kind"] == "checkpoint of CaCo's authors"
    assert "encoder_k.conv1.weight" in result["weights"]["unmatched"]
    for row in result["results"]:
        cells = [row["feature"], str(row["k"]), f"{row['temperature']:g}", f"{row['top1']:.2f}"]
        lines = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
        assert any(line[1:5] == cells for line in lines), (cells, done.stdout)


def test_the_same_command_again_shows_the_former_result_and_another_refuses_its_folder(
    place, tmp_path, capsys
):
    options = words(place, "--k", 3, "--to", tmp_path / "here")
    main(options)
    before = (tmp_path / "here/result.json").stat().st_mtime_ns
    capsys.readouterr()
    main(options)
    assert "evaluated before" in capsys.readouterr().out
    assert (tmp_path / "here/result.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as caught:
        main([*options, "--size", "18"])
    assert caught.value.code == 2
    assert "holds another evaluation (resize: 16 -> 18; size: 16 -> 18)" in capsys.readouterr().err


def image_folder(path, per_class=5, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    for number in range(classes):
        (path / f"class{number}").mkdir(parents=True)
        for image in range(per_class):
            data = encode(smooth_image(generator, 24, 20), "PNG" if image == 0 else "JPEG")
            (path / f"class{number}" / f"{image}.JPEG").write_bytes(data)
    return path


def test_a_folder_of_class_folders_is_read_in_place(tmp_path):
    store = FolderStore(image_folder(tmp_path / "images"))
    assert (store.manifest.classes, store.manifest.class_counts) == (
        ("class0", "class1", "class2"),
        (5, 5, 5),
    )
    seen = {}
    for rank in range(2):
        batches = evaluation_batches(store, 16, rank=rank, world_size=2, batch_size=4, workers=1)
        for ids, crops, labels in batches:
            assert crops.shape[1:] == (16, 16, 3)
            seen |= dict(zip(ids.tolist(), labels.tolist(), strict=True))
    index = store.index(0)
    assert seen == {i: int(key[5]) for i, key in enumerate(index.keys)}
    assert sorted(index.keys) != list(index.keys), "the files stand in a random order"


def test_a_subset_of_a_set_gives_its_own_images(place):
    store = open_store(place / "train")
    ids = np.array([0, 3, 17, 18, 40, 60])

    def crops_of(source):
        batches = evaluation_batches(source, 16, rank=0, world_size=1, batch_size=4, workers=0)
        return [torch.cat([torch.as_tensor(part) for part in parts]) for parts in zip(*batches, strict=True)]

    whole, some = crops_of(store), crops_of(Subset(store, ids))
    assert torch.equal(some[1], whole[1][ids])
    assert torch.equal(some[2], whole[2][ids])
    assert Subset(store, ids).manifest.num_samples == 6


def test_train_and_val_in_one_folder_need_one_flag(place, tmp_path):
    image_folder(tmp_path / "set/train"), image_folder(tmp_path / "set/val", seed=1)
    arguments = [
        "knn",
        place / "caco.pth.tar",
        "--data",
        tmp_path / "set",
        "--size",
        16,
        "--workers",
        0,
        "--k",
        3,
    ]
    result = run_knn.run(parse([*map(str, arguments), "--to", str(tmp_path / "out")]))
    assert result["data"]["val"] == {"url": str(tmp_path / "set/val"), "images": 15, "classes": 3}


def test_the_interval_is_wilsons():
    for correct, total in ((0, 40), (1, 40), (39, 40), (300, 400), (1996, 2000)):
        low, high = (bound / 100 for bound in interval(correct, total))
        for bound in (low, high):  # where the score test of this p just rejects at 5%
            if 0 < bound < 1:
                assert abs(correct / total - bound) / np.sqrt(bound * (1 - bound) / total) == pytest.approx(
                    1.959964
                )
    assert interval(2000, 2000) == (pytest.approx(99.808, abs=0.001), 100.0)
    assert interval(0, 40) == (0.0, pytest.approx(8.762, abs=0.001))


@pytest.mark.parametrize(("total", "share"), [(40, 0.02), (40, 0.5), (40, 0.95), (300, 0.998), (2000, 0.97)])
def test_the_interval_covers_what_it_says(total, share):
    outcomes = np.random.default_rng(0).binomial(total, share, 4000)
    inside = [low <= 100 * share <= high for low, high in (interval(int(n), total) for n in outcomes)]
    assert 0.9 < np.mean(inside) < 0.99


def test_a_runs_own_figures_are_the_commands_and_their_cost_is_in_the_metrics(tmp_path):
    sets = {
        name: make_shard_set(tmp_path / name, num_images=n, size=32, corrupt=corrupt)
        for name, n, corrupt in (("train", 96, ()), ("val", 40, (7,)))
    }
    run = tmp_path / "run"
    flags = {**SMALL, "data.shards": sets["train"], "data.val_shards": sets["val"], "run.dir": run}
    output = launch({**flags, "eval.knn_every": 1, "eval.knn_k": 5, "eval.knn_temperature": 0.1})
    assert "kNN: 1 of 40 validation images does not decode, counted as wrong: 000000.tar/00000007" in output
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if "knn_top1" in line]
    assert [line["step"] for line in lines] == [12, 15]
    assert all(line["knn_seconds"] > 0 and line["knn_undecodable"] == 1 for line in lines)
    options = ["knn", str(run), "--k", "5", "--temperature", "0.1", "--precision", "fp64", "--workers", "0"]
    result = run_knn.run(parse(options))
    assert [row["top1"] for row in result["results"] if row["feature"] == "features"] == [
        lines[-1]["knn_top1"]
    ]
    assert result["weights"]["metadata"]["step"] == 15
    assert len(list((run / "evaluate").glob("knn-step_00000015-query-*/result.json"))) == 1
