"""Compiled encoders: one graph for each size of view, and none for what comes after."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from caco_scale.distributed.strategy import compile_encoders
from caco_scale.method.model import Encoder, QueryKeyModel


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
