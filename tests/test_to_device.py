"""Batches come to the training device unchanged, in order, one ahead, and no stream reads what another still writes."""

import contextlib

import numpy as np
import pytest
import torch

from caco_scale.data import to_device
from caco_scale.data.loader import Batch

COMPUTING, COPYING = "computing", "copying"


def make_batches(num, asked=None):
    """``num`` batches of two views; ``asked`` grows by the number of each as it is taken."""
    rng = np.random.default_rng(0)
    for step in range(num):
        if asked is not None:
            asked.append(step)
        crops = [torch.from_numpy(rng.integers(0, 256, (4, s, s, 3), dtype=np.uint8)) for s in (8, 6)]
        params = [{"flip": torch.rand(4) < 0.5, "order": torch.randint(4, (4, 4))} for _ in crops]
        yield Batch(step, 0, [f"{step}/{i}" for i in range(4)], crops, params, [])


def tensors(batch):
    return [*batch.crops, *(values for params in batch.params for values in params.values())]


class Streams:
    """Stands for torch.cuda: its two streams write down what they do."""

    def __init__(self):
        self.done, self.current = [], COMPUTING

    def named(self, name):
        stream = type("Stream", (), {"name": name})()
        stream.wait_stream = lambda other: self.done.append((name, "waits for", other.name))
        return stream

    def Stream(self):
        return self.named(COPYING)

    def current_stream(self):
        return self.named(self.current)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        self.done.append((stream.name, "copies"))
        yield
        self.current = before


def test_on_a_cpu_batches_pass_as_they_are():
    batches = list(make_batches(3))
    passed = list(to_device.on_device((b for b in batches), torch.device("cpu")))
    assert all(a is b for a, b in zip(batches, passed, strict=True))


@pytest.mark.parametrize("num", [0, 1, 4])
def test_copies_are_one_batch_ahead_and_each_stream_waits_for_the_other(num, monkeypatch):
    streams, asked = Streams(), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    torch.manual_seed(0)
    expected = list(make_batches(num))
    torch.manual_seed(0)
    for i, batch in enumerate(to_device._copied_ahead(make_batches(num, asked), torch.device("cpu"))):
        assert batch.step == i
        assert asked == list(range(min(i + 2, num)))  # the next one is under way
        for a, b in zip(tensors(batch), tensors(expected[i]), strict=True):
            assert torch.equal(a, b)
        streams.done.append(f"step {i}")
    # Before a batch is used its copies are waited for; before memory is written, what was queued to read it.
    copies = [(COPYING, "waits for", COMPUTING), (COPYING, "copies")]
    steps = [
        [(COMPUTING, "waits for", COPYING), *(copies if i + 1 < num else []), f"step {i}"] for i in range(num)
    ]
    first = [(COMPUTING, "waits for", COPYING), *(copies if num else [])]
    assert streams.done == [*first, *(event for step in steps for event in step)]


def test_closing_it_closes_the_loader():
    closed = []

    def batches():
        try:
            yield from make_batches(3)
        finally:
            closed.append(True)

    moved = to_device.on_device(batches(), torch.device("cpu"))
    next(moved)
    moved.close()
    assert closed == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_numbers_arrive():
    torch.manual_seed(0)
    expected = list(make_batches(8))
    torch.manual_seed(0)
    for batch, on_cpu in zip(
        to_device.on_device(make_batches(8), torch.device("cuda")), expected, strict=True
    ):
        for a, b in zip(tensors(batch), tensors(on_cpu), strict=True):
            assert a.is_cuda
            assert torch.equal(a.cpu(), b)
