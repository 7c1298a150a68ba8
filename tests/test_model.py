"""Query and key encoder as one module: what trains, what does not, number formats, and several ranks."""

import pytest
import torch
from gloo import run_ranks
from timm.layers import EvoNorm2dB0
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from caco_scale.benchmark.step import draw_batch
from caco_scale.config import Config, replace
from caco_scale.config.fields import Data, Views
from caco_scale.data.augment import augment
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.method.encoders import build_backbone, takes_views_at_once
from caco_scale.method.model import Encoder, QueryKeyModel, synchronise_key
from caco_scale.method.projector import build_predictor, build_projector
from caco_scale.training.assemble import MicroBatches, parameter_dtype


def make_model(dtype=torch.float32, arch="tiny", **options):
    torch.manual_seed(0)
    backbone, num_features = build_backbone(arch, "cifar")
    return QueryKeyModel(Encoder(backbone, build_projector(num_features, 24, 16)), **options).to(dtype)


def make_views(sizes=(16, 16), batch=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, size, size, dtype=dtype, generator=generator) for size in sizes]


def test_queries_of_every_view_and_keys_of_the_global_ones():
    model = make_model()
    queries, keys = model(make_views((16, 16, 8, 8)))
    assert [tuple(q.shape) for q in queries] == [(6, 16)] * 4
    assert [tuple(k.shape) for k in keys] == [(6, 16)] * 2
    for embeddings in queries + keys:
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    assert all(q.requires_grad for q in queries)
    assert not any(k.requires_grad for k in keys)


def test_encoder_is_backbone_then_projector():
    model = make_model().eval()
    (view,) = make_views((16,))
    features = model.query.features(view)
    assert features.shape == (6, 128)
    embeddings = model.query.projector(features)
    torch.testing.assert_close(model.query(view), embeddings / embeddings.norm(dim=1, keepdim=True))


def test_key_starts_as_a_copy_and_never_takes_gradients():
    model = make_model()
    pairs = list(zip(model.query.named_parameters(), model.key.named_parameters(), strict=True))
    for (query_name, q), (key_name, k) in pairs:
        assert query_name == key_name
        assert torch.equal(q, k)
        assert q.data_ptr() != k.data_ptr()
        assert (q.requires_grad, k.requires_grad) == (True, False)
    queries, keys = model(make_views())
    sum(((q - k) ** 2 * torch.arange(16)).sum() for q, k in zip(queries, keys[::-1], strict=True)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("key."), name
        if p.grad is not None:
            assert p.grad.abs().sum() > 0, name


def test_a_predictor_is_the_querys_alone():
    plain, views = make_model(torch.float64), make_views(dtype=torch.float64)
    model = QueryKeyModel(
        Encoder(plain.query.backbone, plain.query.projector, build_predictor(16, 24))
    ).double()
    (queries, keys), (plain_queries, plain_keys) = model(views), plain(views)
    assert all(torch.equal(key, expected) for key, expected in zip(keys, plain_keys, strict=True))
    assert not torch.allclose(queries[0], plain_queries[0])
    torch.testing.assert_close(queries[0].norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert model.key.predictor is None
    before = {name: p.clone() for name, p in model.query.named_parameters()}
    for parameter in model.key.parameters():
        parameter.data.add_(1)
    synchronise_key(model)
    assert all(torch.equal(p, before[name]) for name, p in model.key.named_parameters())


def test_key_runs_in_train_mode_with_statistics_of_its_own():
    model = make_model()
    views = make_views((16, 16, 16))
    queries, keys = model(views)
    # Same parameters and batches, so the same embeddings; the query's BatchNorm has seen a third view.
    assert torch.equal(queries[0], keys[0])
    assert torch.equal(queries[1], keys[1])
    query, key = model.query.backbone.bn1, model.key.backbone.bn1
    assert (query.num_batches_tracked, key.num_batches_tracked) == (3, 2)
    assert not torch.equal(query.running_mean, key.running_mean)


def test_every_view_is_a_forward_of_its_own():
    model, alone = make_model(), make_model()
    small, large = make_views((16, 16))
    large = 5 * large + 3
    queries, _ = model([small, large])
    assert torch.equal(queries[0], alone([small, small])[0][0])
    assert not torch.allclose(queries[0], alone.query(torch.cat([small, large]))[:6])


def test_synchronise_key_copies_parameters_and_no_buffers():
    model = make_model()
    model(make_views((16, 16, 16)))
    with torch.no_grad():
        for p in model.query.parameters():
            p.add_(torch.randn_like(p))
    buffers = [b.clone() for b in model.key.buffers()]
    synchronise_key(model)
    assert all(
        torch.equal(q, k) for q, k in zip(model.query.parameters(), model.key.parameters(), strict=True)
    )
    assert all(torch.equal(b, a) for b, a in zip(model.key.buffers(), buffers, strict=True))


def test_bf16_autocast_computes_in_bf16_and_returns_fp32_unit_norm():
    model, exact = make_model(autocast_dtype=torch.bfloat16), make_model()
    seen = []
    for layer in (model.query.projector, model.key.projector):
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    views = make_views()
    queries, keys = model(views)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 4
    for embeddings in queries + keys:
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    assert not torch.is_autocast_enabled("cpu")
    queries[0][:, 0].sum().backward()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.query.parameters())
    reference = exact(views)[0][0]
    assert torch.nn.functional.cosine_similarity(queries[0], reference).min() > 0.99
    assert not torch.equal(queries[0], reference)


def test_fp64_stays_fp64():
    queries, keys = make_model(torch.float64)(make_views(dtype=torch.float64))
    for embeddings in queries + keys:
        assert embeddings.dtype == torch.float64
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6).double(), rtol=1e-14, atol=0)


def test_channels_last_is_the_layout_of_what_passes_and_never_of_weights():
    model, seen = make_model(torch.float64), []
    for conv in (module for module in model.query.backbone.modules() if isinstance(module, nn.Conv2d)):
        conv.register_forward_hook(
            lambda _, inputs, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    views = make_views(dtype=torch.float64)
    plain, _ = model(views)
    assert not any(seen)
    seen.clear()
    queries, _ = model([view.contiguous(memory_format=torch.channels_last) for view in views])
    assert seen
    assert all(seen)
    assert all(p.is_contiguous() for p in model.parameters())
    torch.testing.assert_close(queries[0], plain[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("compute", "wanted", "laid_out"), [("fp32", True, True), ("fp32", False, False), ("fp64", True, False)]
)
def test_views_are_written_as_convolutions_want_them(compute, wanted, laid_out):
    config = Config(data=Data(global_batch_size=4), views=Views(size=32, local_size=16, num_local_crops=2))
    batch, dtype = draw_batch(config), parameter_dtype(replace(config, precision__compute=compute))
    views = next(iter(MicroBatches(batch, 2, augment, dtype, config.views, wanted)))
    plain = next(iter(MicroBatches(batch, 2, augment, dtype, config.views)))
    for view, other in zip(views, plain, strict=True):
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last) == laid_out
        assert other.is_contiguous()
        assert torch.equal(view, other)


def multi_crop_loss(queries, keys):
    """A mean over samples that ties every query to both keys."""
    weights = torch.linspace(-1, 1, 16, dtype=torch.float64)
    return sum((i + 1) * ((q - k) ** 2 * weights).sum(1).mean() for i, q in enumerate(queries) for k in keys)


def gradients_and_buffers(model):
    gradients = {name: p.grad.clone().numpy() for name, p in model.query.named_parameters()}
    return gradients, {name: b.clone().numpy() for name, b in model.named_buffers()}


def train_forward_backward(rank, world_size):
    model = convert_sync_batchnorm(make_model(torch.float64))
    engine = DistributedDataParallel(model, broadcast_buffers=False)
    views = [view.chunk(world_size)[rank] for view in make_views((16, 16, 8), dtype=torch.float64)]
    for _ in range(2):  # the second pass sees the reducer's rebuilt buckets
        engine.zero_grad()
        queries, keys = engine(views)
        multi_crop_loss(queries, keys).backward()
    return gradients_and_buffers(model)


@pytest.mark.parametrize("world_size", [2])
def test_ranks_compute_the_gradients_and_buffers_of_one_process(world_size):
    model = make_model(torch.float64)
    for _ in range(2):
        model.zero_grad()
        multi_crop_loss(*model(make_views((16, 16, 8), dtype=torch.float64))).backward()
    expected = gradients_and_buffers(model)
    for result in run_ranks(train_forward_backward, world_size):
        for tensors, reference in zip(result, expected, strict=True):
            assert tensors.keys() == reference.keys()
            for name, tensor in tensors.items():
                error = abs(tensor - reference[name]).max()
                assert error <= 1e-11 * max(abs(reference[name]).max(), 1), (name, error)


def train_crops(rank, world_size, at_once, arch="tiny", steps=4, size=16):
    """Losses, parameters and buffers of steps with six local crops, at once or each in a forward of its own."""
    torch.manual_seed(0)
    backbone, num_features = build_backbone(arch)
    encoder = Encoder(backbone, build_projector(num_features, 24, 16), build_predictor(16, 24))
    if at_once:
        convert_sync_batchnorm(encoder, alone=True)
    model = convert_sync_batchnorm(QueryKeyModel(encoder.double(), crops_at_once=at_once))
    engine = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    optimizer, losses = torch.optim.SGD(model.query.parameters(), 0.1, momentum=0.9), []
    views = make_views((32, 32, *[size] * 6), dtype=torch.float64)
    for step in range(steps):
        optimizer.zero_grad()
        queries, keys = engine([(view * (1 + step)).chunk(world_size)[rank] for view in views])
        loss = multi_crop_loss(queries, keys)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return losses, {name: x.detach().numpy() for name, x in tensors.items()}


def assert_equal_runs(found, expected, tolerance=1e-12):
    for name, reference in expected[1].items():
        error = abs(found[1][name] - reference).max()
        assert error <= tolerance * max(abs(reference).max(), 1), (name, error)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)


def test_crops_at_once_are_crops_apart():
    apart, at_once = (train_crops(0, 1, way) for way in (False, True))
    assert_equal_runs(at_once, apart)
    tracked = at_once[1]["query.backbone.bn1.num_batches_tracked"]
    assert tracked == apart[1]["query.backbone.bn1.num_batches_tracked"] == 4 * 8


@pytest.mark.parametrize("world_size", [2, 3])
def test_crops_at_once_are_crops_apart_on_every_rank(world_size):
    expected = train_crops(0, 1, False)
    for found in run_ranks(train_crops, world_size, True):
        assert_equal_runs(([], found[1]), ([], expected[1]))


@pytest.mark.parametrize(
    "arch",
    ["mobilenet_v3_small", "timm/test_efficientnet", "timm/test_vit", "timm/test_convnext"],
)
def test_crops_at_once_in_other_libraries_networks(arch):
    assert takes_views_at_once(arch, (), build_backbone(arch)[0])
    apart, at_once = (train_crops(0, 1, way, arch, steps=1, size=32) for way in (False, True))
    # Their norms of six 1x1 maps each make rounding larger by ten; shared statistics would be off by parts in ten.
    assert_equal_runs(at_once, apart, 1e-9)


def test_what_looks_across_samples_or_draws_numbers_passes_crop_by_crop():
    def known(arch, *options):
        return takes_views_at_once(arch, options, build_backbone(arch, "imagenet", options)[0])

    assert known("resnet18", "zero_init_residual=true")
    assert not known("timm/test_vit", "drop_path_rate=0.1")
    assert not known("convnext_tiny", "stochastic_depth_prob=0.2")
    assert not known("own_nets:net")
    for norm in (nn.InstanceNorm2d(4, track_running_stats=True), EvoNorm2dB0(4)):
        assert not takes_views_at_once("timm/any", (), nn.Sequential(nn.Conv2d(3, 4, 1), norm))


def test_single_process_keeps_plain_batchnorm():
    assert any(type(m) is nn.BatchNorm2d for m in convert_sync_batchnorm(make_model()).modules())
