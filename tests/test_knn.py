"""kNN against a float64 calculation in numpy, on 1, 2 and 3 ranks; extraction that leaves no trace."""

import itertools
import random

import numpy as np
import pytest
import torch
from gloo import run_ranks
from shard_sets import make_shard_set
from torch import nn

from caco_scale.data.loader import evaluation_batches
from caco_scale.data.store import open_store
from caco_scale.errors import UserError
from caco_scale.evaluate import pixel_knn
from caco_scale.evaluate.features import extract_features, pixels
from caco_scale.evaluate.knn import best_columns, evaluate_knn, knn_accuracy, measure_knn, on_grid
from caco_scale.evaluate.pixel_knn import measure_pixels, too_large

NUM_CLASSES = 10
KS, TEMPERATURES = [1, 10, 20, 200], [0.07, 0.1, 0.2]


def clusters(num_images, seed, width=24):
    """Overlapping classes: accuracies far from 0 and 100, different for every k and temperature."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(NUM_CLASSES, width))
    labels = rng.integers(0, NUM_CLASSES, num_images)
    features = centres[labels] + 2.0 * rng.normal(size=(num_images, width))
    return features.astype(np.float32), labels


def brute_force(train_features, train_labels, features, labels, k, temperature):
    """Wu et al., all N x M cosines in float64, a full sort per image."""
    train = train_features.astype(np.float64)
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    correct = 0
    for feature, label in zip(features.astype(np.float64), labels, strict=True):
        similarities = train @ (feature / np.linalg.norm(feature))
        nearest = np.argsort(-similarities, kind="stable")[:k]
        votes = np.bincount(
            train_labels[nearest], np.exp(similarities[nearest] / temperature), minlength=NUM_CLASSES
        )
        correct += votes.argmax() == label
    return 100 * correct / len(labels)


def rank_part(arrays, bounds, rank):
    return [torch.from_numpy(array[bounds[rank] : bounds[rank + 1]]) for array in arrays]


def knn_of_rank(rank, world_size, train, val, train_bounds, val_bounds, options):
    return knn_accuracy(
        *rank_part(train, train_bounds, rank),
        *rank_part(val, val_bounds, rank),
        num_classes=NUM_CLASSES,
        **options,
    )


def test_equals_brute_force_in_float64():
    train, val = clusters(2000, seed=1), clusters(500, seed=2)
    result = knn_accuracy(
        *map(torch.from_numpy, train),
        *map(torch.from_numpy, val),
        k=KS,
        temperature=TEMPERATURES,
        num_classes=NUM_CLASSES,
        chunk=300,
    )
    expected = {(k, t): brute_force(*train, *val, k, t) for k, t in itertools.product(KS, TEMPERATURES)}
    assert result == expected
    assert len(set(expected.values())) > 3
    assert all(20 < value < 95 for value in expected.values())


@pytest.mark.parametrize(
    ("train_bounds", "val_bounds"),
    [
        ([0, 1999, 2000], [0, 0, 500]),
        ([0, 3, 3, 2000], [0, 450, 500, 500]),
    ],
)
def test_ranks_with_uneven_and_empty_parts_give_the_identical_number(train_bounds, val_bounds):
    train, val = clusters(2000, seed=1), clusters(500, seed=2)
    options = {"k": [20, 200], "temperature": [0.07, 0.2], "chunk": 700}
    alone = knn_of_rank(0, 1, train, val, [0, 2000], [0, 500], options)
    ranks = run_ranks(knn_of_rank, len(train_bounds) - 1, train, val, train_bounds, val_bounds, options)
    assert all(result == alone for result in ranks)
    assert alone[20, 0.2] == brute_force(*train, *val, 20, 0.2)


def test_similarities_on_the_grid_do_not_depend_on_the_order_of_summation():
    features = torch.from_numpy(clusters(400, seed=1, width=200)[0])
    shuffled = features[:, torch.randperm(200, generator=torch.manual_seed(0))]
    assert torch.equal(on_grid(features) @ on_grid(features).T, on_grid(shuffled) @ on_grid(shuffled).T)
    off_grid = [nn.functional.normalize(x.double(), dim=1) for x in (features, shuffled)]
    assert not torch.equal(off_grid[0] @ off_grid[0].T, off_grid[1] @ off_grid[1].T)
    assert (on_grid(features) - off_grid[0]).abs().max() <= 2**-26


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_numbers():
    train, val = clusters(2000, seed=1), clusters(500, seed=2)
    options = {"k": KS, "temperature": TEMPERATURES, "chunk": 700}
    alone = knn_of_rank(0, 1, train, val, [0, 2000], [0, 500], options)
    assert knn_of_rank(0, 1, train, val, [0, 2000], [0, 500], {**options, "device": "cuda"}) == alone


def tied_images():
    """40 copies each of 12 training features, labels at random: the k-th place is a tie for every image."""
    rng = np.random.default_rng(5)
    distinct = rng.normal(size=(12, 16)).astype(np.float32)
    train = np.tile(distinct, (40, 1)), rng.integers(0, NUM_CLASSES, 480)
    return train, (distinct.copy(), rng.integers(0, NUM_CLASSES, 12))


def knn_of_shuffled_rank(rank, world_size, train, val, k):
    """Rank r holds every world_size-th training image, descending: ids, not positions, settle ties."""
    ids = np.arange(len(train[1]))[rank::world_size][::-1].copy()
    return knn_accuracy(
        torch.from_numpy(train[0][ids]),
        torch.from_numpy(train[1][ids]),
        *rank_part(val, [0, 5, 12, 12], rank),
        train_ids=torch.from_numpy(ids),
        k=k,
        num_classes=NUM_CLASSES,
        chunk=50,
    )


def test_ties_take_the_lowest_id_on_any_number_of_ranks():
    (train_features, train_labels), val = tied_images()
    expected = {}
    for k in (3, 15):
        # Copies of image j have the ids j, j + 12, j + 24, ...; all votes weigh the same.
        votes = [np.bincount(train_labels[j::12][:k], minlength=NUM_CLASSES).argmax() for j in range(12)]
        expected[k, 0.2] = pytest.approx(100 * np.mean(np.array(votes) == val[1]), abs=1e-12)
    train = train_features, train_labels
    assert run_ranks(knn_of_shuffled_rank, 3, train, val, [3, 15]) == [expected] * 3
    alone = knn_accuracy(
        *map(torch.from_numpy, train),
        *map(torch.from_numpy, val),
        k=[3, 15],
        num_classes=NUM_CLASSES,
        chunk=50,
    )
    assert alone == expected


def test_best_columns_prefers_low_columns_among_equals():
    similarities = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]], dtype=torch.float64)
    columns = best_columns(similarities, 2)
    assert columns.tolist() == [[1, 0], [4, 3]]


def test_temperature_decides_between_one_near_and_two_far_neighbours():
    angles = torch.tensor([0.1, 0.8, -0.8])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    image = torch.tensor([[1.0, 0.0]])
    result = knn_accuracy(
        train, torch.tensor([0, 1, 1]), image, torch.tensor([0]), k=3, temperature=[0.07, 5.0], num_classes=2
    )
    assert result == {(3, 0.07): 100.0, (3, 5.0): 0.0}


def features_and_labels(num_images):
    features, labels = clusters(num_images, seed=3)
    return torch.from_numpy(features), torch.from_numpy(labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 31}, "k = 31 needs as many training images, but there are 30"),
        ({"k": 0}, "k >= 1"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"num_classes": 5}, "label from 0 to C - 1"),
    ],
)
def test_wrong_settings_are_one_line(change, message):
    train, val = features_and_labels(30), features_and_labels(8)
    with pytest.raises(UserError, match=message):
        knn_accuracy(*train, *val, **{"k": 5, "num_classes": NUM_CLASSES, **change})


def test_wrong_data_is_one_line():
    (features, labels), nothing = features_and_labels(30), features_and_labels(0)
    with pytest.raises(UserError, match="no validation images"):
        knn_accuracy(features, labels, *nothing, k=5, num_classes=NUM_CLASSES)
    unlabelled = labels.clone()
    unlabelled[:4] = -1
    with pytest.raises(UserError, match="4 of 60 have none"):
        knn_accuracy(features, unlabelled, features, labels, k=5, num_classes=NUM_CLASSES)
    broken = features.clone()
    broken[7, 3] = torch.nan
    with pytest.raises(UserError, match="features of 1 of 60 images are not finite"):
        knn_accuracy(features, labels, broken, labels, k=5, num_classes=NUM_CLASSES)
    with pytest.raises(UserError, match="got 12 and 24"):
        knn_accuracy(features[:, :12], labels, features, labels, k=5, num_classes=NUM_CLASSES)


def refusal_of_rank(rank, world_size):
    features, labels = features_and_labels(10)
    if rank == 1:
        features[0, 0] = torch.inf
    try:
        knn_accuracy(features, labels, features, labels, k=3, num_classes=NUM_CLASSES)
    except UserError as error:
        return str(error)


def test_a_rank_with_bad_features_stops_every_rank_with_the_same_line():
    lines = run_ranks(refusal_of_rank, 2)
    assert lines[0] == lines[1]
    assert "features of 2 of 40 images are not finite" in lines[0]


class Net(nn.Module):
    """BatchNorm, dropout and a part that is frozen in eval mode while the rest trains."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.frozen = nn.BatchNorm1d(8 * 36)

    def forward(self, images):
        return self.frozen(self.body(images))


def image_batches(num_images, batch_size, draw=False):
    """As evaluation_batches; ``draw``: consumes random numbers, as a DataLoader does when it starts."""
    crops = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8))
    for ids in torch.arange(num_images).split(batch_size):
        if draw:
            torch.empty((), dtype=torch.int64).random_()
            random.random()
            np.random.rand()
        yield ids, crops[ids], ids % NUM_CLASSES


NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def test_extraction_leaves_training_state_and_random_numbers_alone():
    torch.manual_seed(3)
    net = Net().train()
    net.frozen.eval()
    net(torch.randn(4, 3, 8, 8))
    modes = [part.training for part in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    features, labels, ids = extract_features(
        net, image_batches(10, 4, draw=True), module=net, device="cpu", **NORMALISATION
    )

    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert random.getstate() == random_state[1]
    assert np.array_equal(np.random.get_state()[1], random_state[2])
    assert features.shape == (10, 288)
    assert not features.requires_grad
    assert torch.allclose(features.norm(dim=1), torch.ones(10))
    assert ids.tolist() == list(range(10))
    assert torch.equal(labels, ids % NUM_CLASSES)


def test_extraction_uses_running_statistics_and_restores_modes_after_an_error():
    net = Net().train()
    whole, *_ = extract_features(net, image_batches(10, 10), module=net, device="cpu", **NORMALISATION)
    single, *_ = extract_features(net, image_batches(10, 1), module=net, device="cpu", **NORMALISATION)
    assert torch.allclose(whole, single, atol=1e-6)

    def broken(images):
        raise RuntimeError("no encoder")

    with pytest.raises(RuntimeError, match="no encoder"):
        extract_features(broken, image_batches(10, 4), module=net, device="cpu", **NORMALISATION)
    assert all(part.training for part in net.modules())


def test_extraction_computes_in_the_asked_type():
    seen = []

    def encode(images):
        seen.append((images.dtype, nn.functional.linear(images.flatten(1), images.new_ones(2, 192)).dtype))
        return images.flatten(1)

    options = {"device": "cpu", **NORMALISATION}
    extract_features(encode, image_batches(2, 2), autocast_dtype=torch.bfloat16, **options)
    features, *_ = extract_features(encode, image_batches(2, 2), dtype=torch.float64, **options)
    assert seen == [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
    assert features.dtype == torch.float32


def test_raw_pixels_are_normalised_images_of_unit_norm():
    features, *_ = extract_features(pixels, image_batches(3, 2), device="cpu", **NORMALISATION)
    crops = torch.cat([crops for _, crops, _ in image_batches(3, 2)]).double() / 255
    expected = (crops - torch.tensor(NORMALISATION["mean"]).double()) / torch.tensor(
        NORMALISATION["std"]
    ).double()
    expected = nn.functional.normalize(expected.permute(0, 3, 1, 2).flatten(1), dim=1)
    assert torch.allclose(features.double(), expected, atol=1e-6)


def test_no_images_give_no_features():
    features, labels, ids = extract_features(pixels, iter(()), device="cpu", **NORMALISATION)
    assert len(features) == len(labels) == len(ids) == 0


def pixel_knn_of_rank(rank, world_size, train, val):
    return evaluate_knn(
        pixels,
        open_store(train),
        open_store(val),
        size=16,
        k=[1, 5],
        rank=rank,
        world_size=world_size,
        batch_size=7,
        **NORMALISATION,
    )


def test_shard_sets_on_several_ranks_give_the_brute_force_figure(tmp_path):
    sets = [
        make_shard_set(tmp_path / "train", num_images=61, size=16, seed=0),
        make_shard_set(tmp_path / "val", num_images=30, size=16, seed=1),
    ]
    arrays = []
    for path in sets:
        batches = evaluation_batches(open_store(path), 16, rank=0, world_size=1, batch_size=100, workers=0)
        features, labels, _ = extract_features(pixels, batches, device="cpu", **NORMALISATION)
        arrays += [features.numpy(), labels.numpy()]
    expected = {(k, 0.2): pytest.approx(brute_force(*arrays, k, 0.2), abs=1e-12) for k in (1, 5)}
    assert run_ranks(pixel_knn_of_rank, 2, *sets) == [expected, expected]


def streamed_and_whole_of_rank(rank, world_size, train, val, k):
    """(streamed, of all features at once): right images by class for each k, images by class, undecodable names."""
    how = {"size": 16, "k": k, "temperature": [0.07, 0.2], "rank": rank, "world_size": world_size}
    stores = open_store(train), open_store(val)
    blocks, plain = [], pixel_knn.on_grid
    pixel_knn.on_grid = lambda features: blocks.append(len(features)) or plain(features)
    try:
        streamed = measure_pixels(*stores, batch_size=7, say=str, **how, **NORMALISATION)
    finally:
        pixel_knn.on_grid = plain
    assert max(blocks) <= 7  # rows that are numbers at once
    found = []
    for measured in (streamed, measure_knn(pixels, *stores, batch_size=7, **how, **NORMALISATION)):
        counts = measured.counts["features"]
        right = {pair: values.tolist() for pair, values in counts.right.items()}
        names = {which: [image.name for image in images] for which, images in measured.undecodable.items()}
        found.append((right, counts.images.tolist(), names))
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_streamed_pixels_give_the_counts_of_all_at_once(num_ranks, tmp_path):
    train = make_shard_set(tmp_path / "train", num_images=61, size=16, seed=0, corrupt=(5,))
    val = make_shard_set(tmp_path / "val", num_images=30, size=16, seed=1, corrupt=(3, 29))
    for streamed, whole in run_ranks(streamed_and_whole_of_rank, num_ranks, train, val, [1, 5, 60]):
        assert streamed == whole
        assert sum(streamed[1]) == 30
        assert [len(names) for names in streamed[2].values()] == [1, 2]


def test_streamed_pixels_refuse_what_the_others_refuse(tmp_path):
    train = make_shard_set(tmp_path / "train", num_images=16, size=16, classes=4)
    with pytest.raises(UserError, match="kNN with k = 17 needs as many training images, but there are 16"):
        streamed_and_whole_of_rank(0, 1, train, train, [17])


def test_pixels_of_large_sets_are_left_out_with_a_line(tmp_path, monkeypatch):
    store = open_store(make_shard_set(tmp_path / "set", num_images=16, size=16))
    assert too_large(store, store, 160, "cpu") is None
    monkeypatch.setitem(pixel_knn.MOST_PRODUCTS, "cpu", 10**6)
    line = too_large(store, store, 160, torch.device("cpu"), world_size=2)
    assert line == (
        "kNN of raw pixels left out: 16 x 16 images of 76,800 values are 9.8e+06 products for each process, more than "
        "1e+06"
    )


def test_sets_of_other_classes_are_one_line(tmp_path):
    train = make_shard_set(tmp_path / "train", num_images=16, size=16, classes=2)
    val = make_shard_set(tmp_path / "val", num_images=16, size=16, classes=4)
    with pytest.raises(UserError, match=r"2 of the 4 classes of .*val are not among the 2 of .*train"):
        pixel_knn_of_rank(0, 1, train, val)
