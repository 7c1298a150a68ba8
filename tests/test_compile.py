"""Compiled encoders and augmentation: one graph for each size of view, and none for what comes after."""

import copy
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from caco_scale import config as configuration
from caco_scale.data.augment import IMAGENET_STD, augment
from caco_scale.data.order import sample_keys
from caco_scale.data.views import ViewSpec, draw_colour
from caco_scale.distributed.strategies.build import compile_encoders
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.method.model import Encoder, QueryKeyModel
from caco_scale.training.assemble import build_augment

COMPILED = configuration.replace(configuration.load_recipe("demo"), precision__compile=True)


def test_multi_crop_compiles_each_encoder_once_for_each_size():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = QueryKeyModel(Encoder(backbone, nn.Linear(4, 4)))
    counter = CompileCounter()
    compile_encoders(model, backend=counter)
    views = [torch.rand(2, 3, side, side) for side in (16, 16, 9, 9)]
    model(views)
    assert counter.frame_count == 3  # the query encoder for 16 and 9 pixels, the key encoder for 16
    for _ in range(2):
        model(views)
    assert counter.frame_count == 3


def test_crops_at_once_compile_once_too_and_give_the_same():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = convert_sync_batchnorm(Encoder(backbone, nn.Linear(4, 4)), alone=True)
    models = [QueryKeyModel(copy.deepcopy(encoder), crops_at_once=at_once) for at_once in (False, True)]
    counter = CompileCounter()
    compile_encoders(models[1], backend=counter)
    views = [torch.rand(2, 3, side, side) for side in (16, 16, 9, 9, 9)]
    for _ in range(3):
        eager, compiled = (torch.stack(model(views)[0]) for model in models)
        torch.testing.assert_close(compiled, eager)
    assert counter.frame_count == 3
    for before, after in zip(*(model.buffers() for model in models), strict=True):
        torch.testing.assert_close(after, before)


def drawn(side, seed):
    params = draw_colour(ViewSpec(side, (0.2, 1.0), solarize_p=0.3), sample_keys(seed, 0, np.arange(8), 0))
    crops = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (8, side, side, 3), np.uint8))
    return crops, {name: torch.from_numpy(values) for name, values in params.items()}


def test_the_augmentation_compiles_once_for_each_size_whatever_is_drawn():
    counter = CompileCounter()
    compiled = build_augment(COMPILED, backend=counter)
    for seed in range(3):
        for side in (16, 12):
            compiled(*drawn(side, seed))
    assert counter.frame_count == 2
    assert build_augment(configuration.load_recipe("demo")) is augment


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
def test_compiled_code_augments_as_the_eager_one():
    compiled = build_augment(COMPILED)
    for seed in range(2):
        torch.testing.assert_close(
            compiled(*drawn(32, seed)), augment(*drawn(32, seed)), rtol=0, atol=1e-5 / min(IMAGENET_STD)
        )
