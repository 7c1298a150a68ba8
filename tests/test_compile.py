"""``precision.compile``: where it is on; one graph for each size of view, and none for what comes after."""

import copy
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gloo import run_ranks
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from caco_scale import config as configuration
from caco_scale.data.augment import IMAGENET_STD, augment
from caco_scale.data.order import sample_keys
from caco_scale.data.views import ViewSpec, draw_colour
from caco_scale.distributed import compilation
from caco_scale.distributed.compilation import compile_encoders, lacking, reason_against
from caco_scale.distributed.strategies.build import build_strategy
from caco_scale.distributed.syncbn import convert_sync_batchnorm
from caco_scale.errors import UserError
from caco_scale.method.ema import ema_update
from caco_scale.method.model import Encoder, QueryKeyModel
from caco_scale.training import assemble, checks
from caco_scale.training.assemble import build_augment, resolve_precision
from caco_scale.training.checks import Start, check_precision

COMPILED = configuration.replace(configuration.load_recipe("demo"), precision__compile="true")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"strategy": "zero2"}, None),
        ({"device_type": "cpu"}, "only on CUDA"),
        ({"device_type": "mps"}, "only on CUDA"),
        ({"strategy": "zero3"}, "zero3 partitions the parameters"),
        ({"recomputes": True}, "model.checkpoint_activations"),
        ({"fp64": True}, "precision.compute fp64"),
        ({"lacks": "the package triton"}, "it needs the package triton"),
    ],
)
def test_auto_compiles_on_cuda_where_nothing_speaks_against_it(changed, expected):
    facts = {"device_type": "cuda", "strategy": "ddp", "recomputes": False, "fp64": False, "lacks": None}
    assert reason_against(**{**facts, **changed}) == expected


def test_it_is_settled_once_and_said_in_a_line_and_in_the_configuration(monkeypatch):
    auto = configuration.Config()
    assert auto.precision.compile == "auto"
    monkeypatch.setattr(assemble, "lacking", lambda device_type: None)
    for name in ("ddp", "zero1", "zero2", "fsdp2"):
        config, line = resolve_precision(auto, CUDA, name)
        assert line == "precision bf16, compiled: the first steps take minutes"
    saved = configuration.to_yaml(config)
    assert "compute: bf16\n  compile: 'true'\n" in saved
    assert resolve_precision(config, CPU) == (config, line)  # what is settled stays
    config, line = resolve_precision(auto, CPU)
    assert (config.precision.compile, line) == ("false", "precision fp32, not compiled (auto: only on CUDA)")
    given = configuration.replace(auto, precision__compile="false", precision__compute="fp32")
    assert resolve_precision(given, CUDA) == (given, "precision fp32, not compiled")
    monkeypatch.setattr(assemble, "lacking", lambda device_type: "a C compiler")
    config, line = resolve_precision(auto, CUDA)
    assert (config.precision.compile, line) == (
        "false",
        "precision bf16, not compiled (auto: it needs a C compiler)",
    )


def test_a_rank_without_a_compiler_decides_for_all(monkeypatch):
    monkeypatch.setattr(assemble, "lacking", lambda device_type: None)
    monkeypatch.setattr(assemble, "gather_objects", lambda own: [own, "a C compiler"])
    assert resolve_precision(configuration.Config(), CUDA)[0].precision.compile == "false"


def test_what_a_machine_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert "the package triton" in lacking("cuda")
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    for variable, kind in (("CC", "C"), ("CXX", "C++")):
        monkeypatch.setenv(variable, "no-such-compiler")
        device = "cuda" if variable == "CC" else "cpu"
        assert lacking(device).startswith(f"a {kind} compiler, and there is no no-such-compiler: install one")
        monkeypatch.setenv(variable, "sh")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert f"there is no {tmp_path}/Python.h" in lacking("cuda")
    (tmp_path / "Python.h").touch()
    assert lacking("cuda") == "a GPU of compute capability 7.0, and this one has 6.1"
    assert lacking("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert lacking("cuda") is None


def test_an_explicit_true_is_refused_where_it_cannot_be_had(monkeypatch):
    start = Start(COMPILED, "ddp", 0, 1, CPU)
    monkeypatch.setattr(checks, "lacking", lambda device_type: None)
    check_precision(start)
    with pytest.raises(UserError, match=r"precision.compile .*zero3"):
        check_precision(replace(start, strategy="zero3"))
    monkeypatch.setattr(checks, "lacking", lambda device_type: "a C compiler")
    with pytest.raises(UserError, match=r"needs a C compiler; or give --precision.compile false"):
        check_precision(start)


@pytest.mark.parametrize(
    ("old", "new"), [(True, "true"), (False, "false"), ("yes", "true"), ("auto", "auto")]
)
def test_booleans_of_old_configurations_are_read(old, new, tmp_path):
    words = configuration.from_dict({"precision": {"compile": old}}, "an old checkpoint")
    assert words.precision.compile == new
    assert not configuration.differences(words, configuration.Config())  # free at a resume
    (tmp_path / "old.yaml").write_text(f"precision:\n  compile: {str(old).lower()}\n")
    assert configuration.load_recipe(tmp_path / "old.yaml").precision.compile == new
    assert configuration.parse(["demo", f"--precision.compile={old}"]).precision.compile == new


@pytest.mark.parametrize("words", [[], ["--run.seed", "1"]])
def test_the_flag_is_a_switch_still(words):
    assert configuration.parse(["demo", "--precision.compile", *words]).precision.compile == "true"
    assert configuration.parse(["demo", "--no-precision.compile", *words]).precision.compile == "false"
    assert configuration.parse(["--precision.compile", "auto", "demo"]).precision.compile == "auto"
    assert configuration.parse(["--precision.compile", "demo_moco", *words]).recipe == "demo_moco"
    with pytest.raises(UserError, match=r"is 'perhaps': give one of auto, true, false"):
        configuration.parse(["demo", "--precision.compile", "perhaps"])


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


class Block(nn.Module):
    """Of one shape with others, and another number within: code that is compiled for one is wrong for the next."""

    def __init__(self, gain):
        super().__init__()
        self.conv, self.norm, self.gain = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), gain

    def forward(self, x):
        return x + self.gain * self.norm(self.conv(x)).tanh()


def rank_fsdp2(rank, world_size):
    """Three steps on two sizes of view, eager and compiled by block -> whether all is equal, and what was compiled."""
    accelerator = SimpleNamespace(device=CPU, process_index=rank, num_processes=world_size)
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3), Block(0.5), Block(2.0), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    encoder = convert_sync_batchnorm(Encoder(backbone, nn.Linear(4, 4)), alone=True)
    counter, found = CompileCounterWithBackend("aot_eager"), []
    torch.manual_seed(rank)
    views = [torch.randn(3, 3, side, side, dtype=torch.float64) for side in (8, 8, 6, 6)]
    sgd = lambda query: torch.optim.SGD(query.parameters(), lr=0.1, momentum=0.9)
    for compiled in (False, True):
        model = QueryKeyModel(copy.deepcopy(encoder), crops_at_once=True).double()
        names = list(model.state_dict())
        strategy = build_strategy("fsdp2", accelerator, model, sgd, compiled, counter)
        assert list(strategy.module.state_dict()) == names
        losses = []
        for _ in range(3):
            queries, keys = strategy(views)
            loss = sum((query * key).sum().exp() for query in queries for key in keys) / world_size
            strategy.backward(loss)
            assert strategy.step(loss, 0.1)
            ema_update(strategy.module.query, strategy.module.key, 0.9)
            losses.append(loss.detach())
        with strategy.evaluation_encoder() as whole, torch.no_grad():
            features = whole.eval().features(views[0])
        state = {n: p.full_tensor() for n, p in strategy.module.named_parameters()}
        velocity = [s["momentum_buffer"].full_tensor() for s in strategy.optimizer.state.values()]
        found.append([*losses, *state.values(), *strategy.module.buffers(), *velocity, features])
    assert len(found[0]) == len(found[1])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    return counter.frame_count


def test_fsdp2_compiles_by_block_and_trains_the_same():
    """In fp64, with local crops and synchronised BatchNorm; of each block two sizes for the query, one for the key."""
    assert run_ranks(rank_fsdp2, 2) == [2 * 3] * 2


def test_code_that_is_compiled_too_often_is_a_warning_by_the_fields_name(capsys, monkeypatch):
    monkeypatch.setattr(compilation._at_the_limit, "said", False)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        compilation._expect(56)
        assert torch._dynamo.config.recompile_limit == 64
        torch._dynamo.config.recompile_limit = 1
        for function in (lambda x: x + 1, lambda x: x + 2):
            compiled = torch.compile(function, backend="eager", dynamic=False)
            for size in (1, 2, 3):
                compiled(torch.ones(size))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "precision.compile: '<lambda>'" in warnings[0]
    assert "was compiled 1 times (torch's recompile_limit)" in warnings[0]


def test_a_failure_of_the_compiler_says_how_to_train_without_it():
    def fails(graph, inputs):
        raise RuntimeError("a bug")

    with pytest.raises(Exception, match="a bug") as caught, compilation.failures_explained():
        torch.compile(torch.sin, backend=fails)(torch.ones(2))
    assert caught.value.__notes__ == ["torch.compile has failed: --precision.compile false trains without it"]
    with pytest.raises(ValueError, match="other") as caught, compilation.failures_explained():
        raise ValueError("other")
    assert not hasattr(caught.value, "__notes__")


def test_compiled_code_is_kept_beside_the_run_unless_the_user_has_said_where(tmp_path, monkeypatch):
    folder, place = tmp_path / "run" / "compile_cache", compilation.PLACE
    monkeypatch.delenv(place, raising=False)
    for _ in range(2):  # the second time inductor's own place is named already
        with compilation.code_kept_in(folder) as line:
            assert os.environ[place] == cache_dir() == str(folder)
            assert folder.is_dir()
            assert line == f"compiled code is kept in {folder}, for later starts"
        assert os.environ[place] == cache_dir() == default_cache_dir()
    monkeypatch.setattr(compilation.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    with compilation.code_kept_in(folder) as line:
        assert "no locks" in line
        assert os.environ[place] == default_cache_dir()
    monkeypatch.setenv(place, "/somewhere")
    with compilation.code_kept_in(folder) as line:
        assert line == f"compiled code is kept in /somewhere ({place})"
    assert os.environ[place] == "/somewhere"


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
