"""Checkpoint files of other programs, as they write them, with random numbers."""

import argparse

import torch
import torchvision

from caco_scale.method.encoders import build_backbone
from caco_scale.method.model import Encoder
from caco_scale.method.projector import build_projector


def noise(module, seed):
    """Every parameter and buffer another number, variances positive; returns the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("num_batches_tracked"):
                tensor.fill_(seed)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def encoder(arch="resnet18", stem="imagenet", hidden=24, embedding_dim=12, seed=1):
    """A backbone with a projector, all its numbers random."""
    torch.manual_seed(seed)
    backbone, num_features = build_backbone(arch, stem)
    return noise(Encoder(backbone, build_projector(num_features, hidden, embedding_dim)), seed)


def under(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def authors_checkpoint(query, key, bank_size=40, embedding_dim=12):
    """What training/main_worker.py of CaCo's authors saves: the projector is ``fc``, the bank is (D, K)."""
    state = {}
    for prefix, model in (("module.encoder_q.", query), ("module.encoder_k.", key)):
        state |= under(model.backbone.state_dict(), prefix)
        state |= under(model.projector.state_dict(), f"{prefix}fc.")
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return {
        "epoch": 200,
        "arch": "resnet18",
        "best_acc": torch.tensor(61.5),
        "knn_acc": 55.25,
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "Memory_Bank": {
            "W": torch.randn(embedding_dim, bank_size),
            "v": torch.zeros(embedding_dim, bank_size),
        },
    }


def moco_v2_checkpoint(query):
    """As facebookresearch/moco: encoder_q alone with a head of two layers with biases."""
    width = query.backbone.layer4[-1].bn2.num_features
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 16))
    state = under(query.backbone.state_dict(), "module.encoder_q.") | under(
        head.state_dict(), "module.encoder_q.fc."
    )
    return {"epoch": 200, "arch": "resnet18", "state_dict": state}


def moco_v3_checkpoint(query, key):
    """As facebookresearch/moco-v3: base and momentum encoder and a predictor."""
    state = under(query.backbone.state_dict(), "module.base_encoder.")
    state |= under(key.backbone.state_dict(), "module.momentum_encoder.")
    state |= under(torch.nn.Linear(4, 4).state_dict(), "module.predictor.0.")
    return {"epoch": 300, "arch": "resnet18", "state_dict": state, "scaler": {"scale": 65536.0}}


def dino_checkpoint(student, teacher):
    """As facebookresearch/dino's full checkpoint, its argparse record included."""
    return {
        "student": under(student.backbone.state_dict(), "module.backbone.")
        | under(torch.nn.Linear(4, 4).state_dict(), "module.head.mlp.0."),
        "teacher": under(teacher.backbone.state_dict(), "backbone.")
        | under(torch.nn.Linear(4, 4).state_dict(), "head.mlp.0."),
        "epoch": 100,
        "args": argparse.Namespace(arch="resnet18", lr=0.0005),
    }


def torchvision_state(arch="resnet18", seed=1):
    """torchvision's own model, classifier included."""
    torch.manual_seed(seed)
    return noise(torchvision.models.get_model(arch, weights=None), seed)


class Bomb:
    """Pickles as a call of ``os.system``: unpickling it would make the file ``target``."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.target}",)
