"""Small run directories for tests, as training writes them, without training."""

import json

import torch
import yaml

from caco_scale import config as configuration
from caco_scale.checkpoint import sums
from caco_scale.checkpoint.state import State
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.method.encoders import build_backbone
from caco_scale.method.model import Encoder, QueryKeyModel
from caco_scale.method.projector import build_projector

HIDDEN, EMBEDDING, ROWS = 8, 4, 12  # of the projector and the bank


def trained_model(arch, stem, dtype=torch.float32, seed=0):
    """A model whose parameters and buffers are all different from a fresh one's, and its key from its query."""
    torch.manual_seed(seed)
    backbone, num_features = build_backbone(arch, stem)
    model = QueryKeyModel(Encoder(backbone, build_projector(num_features, HIDDEN, EMBEDDING))).to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.rand_like(tensor))
            else:
                tensor.add_(17)
    return model


def save_checkpoint(folder, model, step, **values):
    """A complete checkpoint of a model and a bank of ROWS rows, of which the last four were never a positive."""
    tensors = {
        "bank.rows": torch.randn(ROWS, EMBEDDING, generator=torch.Generator().manual_seed(1)),
        "bank.assignments": torch.arange(ROWS).sub(3).clamp(min=0).flip(0),
    }
    for side in ("query", "key"):
        module = getattr(model, side)
        tensors.update({f"{side}.{name}": p for name, p in module.named_parameters()})
        tensors.update({f"{side}_buffer.{name}": b for name, b in module.named_buffers()})
    Checkpointer(folder / "checkpoints").save(step, State(tensors, values), wait=True)


def sign(checkpoint):
    """Write the hashes of a checkpoint's files again, as after a change that is to be found by another check."""
    files = [file for file in checkpoint.iterdir() if file.name != sums.NAME]
    sums.write_sums(checkpoint, {file.name: sums.file_sha256(file) for file in files})


def change_values(checkpoint, **changes):
    """Give values.json of a checkpoint other fields (None: without it), and sign it."""
    path = checkpoint / "values.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    sign(checkpoint)


def make_config(**changes):
    """A config that fits :func:`trained_model`; ``changes`` are ``section__field=value``."""
    changes = {
        "views__size": 32,
        "model__arch": "tiny",
        "model__stem": "cifar",
        "model__projector_hidden": HIDDEN,
        "model__embedding_dim": EMBEDDING,
        "bank__size": ROWS,
        "data__global_batch_size": 16,
        "optim__epochs": 20,
        **changes,
    }
    return configuration.replace(configuration.Config(), **changes)


def metrics_lines(steps=40, every=2, steps_per_epoch=8, knn_every=16):
    """What a run of so many steps logs: step 0's evaluation, figures that move, evaluations in between."""
    yield {"step": 0, "knn_top1": 20.0, "knn_top1_raw_pixels": 25.5}
    for step in range(every, steps + 1, every):
        yield {
            "step": step,
            "epoch": step / steps_per_epoch,
            "phase": "bank warm-up" if step <= steps // 4 else "caco",
            "loss": 12 / step**0.2,
            "lr": 0.1 * (1 - step / steps) + 0.001,
            "bank_lr": 3.0 * (step > steps // 4),
            "key_momentum": 0.99 + 0.01 * step / steps,
            "positive_probability": step / steps / 5,
            "bank_rows_used": 0.25 + 0.5 * step / steps,
            "bank_assignment_entropy": 0.9,
            "bank_row_norm": 1.0 + step / steps,
            "embedding_std": 0.4,
            "rankme": 12.0 + step / 10,
            "skipped": 0,
            "corrupt": 0,
            "images_per_second": 100.0 + step % 7,
            "data_wait": 0.01,
        }
        if step % knn_every == 0:
            yield {"step": step, "epoch": step / steps_per_epoch, "knn_top1": 50 + step / 2}


def write_records(folder, config, metrics=None, attempts=1, environment=None, done=40):
    """config.yaml, environment.json, attempts.jsonl, metrics.jsonl and DONE of a run; the folder is made."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(configuration.to_yaml(config))
    command = ["pretrain.py", "demo", "--run.dir", str(folder)]
    facts = {"versions": {"torch": "2.14.1"}, "git_commit": "abc1234", "command": command, "world_size": 1}
    facts |= {"devices": ["cpu"], "hosts": ["node1"], "strategy": "ddp"}
    (folder / "environment.json").write_text(json.dumps(facts if environment is None else environment))
    starts = [
        {
            "attempt": n,
            "time": f"2026-01-0{n}T00:00:00+00:00",
            "world_size": n,
            "resumed_step": 16 if n > 1 else None,
        }
        for n in range(1, attempts + 1)
    ]
    write_lines(folder / "attempts.jsonl", starts)
    write_lines(folder / "metrics.jsonl", metrics_lines() if metrics is None else metrics)
    if done:
        (folder / "DONE").write_text(json.dumps({"step": done, "time": "2026-01-02T00:00:00+00:00"}))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def save_run(folder, arch="tiny", stem="imagenet", numbers=(30,), dtype=torch.float32):
    """A run directory as far as export looks: config, environment, checkpoints that differ by their first layer."""
    model = trained_model(arch, stem, dtype)
    folder.mkdir()
    config = {"recipe": "demo", "model": {"arch": arch, "stem": stem}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text('{"git_commit": "abc1234", "command": ["pretrain.py", "demo"]}')
    for step in numbers:
        with torch.no_grad():
            model.query.backbone.conv1.weight.add_(0.5) if step != numbers[0] else None
        save_checkpoint(folder, model, step, epoch=2)
    return model


def write_results(run, step):
    """What ``evaluate knn`` and ``evaluate linear`` leave in a run's directory, as far as others read it."""
    weights = {"encoder": "query", "metadata": {"step": step}}
    data = {"val": {"url": "/other/val", "images": 100, "classes": 4}}
    knn = {"feature": "backbone", "k": 10, "temperature": 0.07, "top1": 71.25, "interval": [70.0, 72.5]}
    linear = {"lr": 0.1, "top1": 73.5, "top1_interval": [72.0, 75.0], "top5": 90.0}
    for name, result in (("knn", {"results": [knn]}), ("linear", linear)):
        folder = run / "evaluate" / f"{name}-step"
        folder.mkdir(parents=True)
        content = {**result, "settings": {"evaluation": name}, "weights": weights, "data": data}
        (folder / "result.json").write_text(json.dumps(content))
