"""``hf://USER/NAME``: exports to and weights from the Hugging Face hub.

Tested against a stand-in (``hub_server.py``), not the real hub: no test here has seen huggingface.co. What asks is the
real ``huggingface_hub``, with its cache, its locks and its own settings; Xet, which the stand-in has not, is off.
"""

import json
import sys
from pathlib import Path

import huggingface_hub.constants as settings
import huggingface_hub.file_download as file_download
import pytest
import timm
import torch
import yaml
from hub_server import OTHERS, READ, WRITE, HubServer
from launch import SMALL, by, finished, launch
from run_directories import make_config, save_run
from shard_sets import make_shard_set

import caco_scale
from caco_scale import config as configuration
from caco_scale.config import with_absolute_places
from caco_scale.errors import UserError
from caco_scale.export.__main__ import main as export_main
from caco_scale.export.write import export
from caco_scale.weights.address import HubAddress, hub_address
from caco_scale.weights.load import load_weights
from caco_scale.weights.start import pin_weights

REPOSITORY = "ada/waves"
PLACE = f"hf://{REPOSITORY}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "run"
    save_run(folder, "timm/test_resnet", "imagenet", numbers=(20,))
    return folder


@pytest.fixture(scope="module")
def directory(run, tmp_path_factory):
    """The files of a Hugging Face directory: name -> content."""
    folder = tmp_path_factory.mktemp("files") / "model"
    export(run, folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, with an empty cache and without a token."""
    with HubServer() as server:
        use(server.url, tmp_path, monkeypatch)
        yield server


def use(url, folder, monkeypatch, offline=False):
    """Have ``huggingface_hub``, which reads the environment at its import, ask this server."""
    monkeypatch.setattr(settings, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (settings, file_download):  # which before 1.0 has it by value
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(settings, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(settings, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", offline)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub_of_programs(hub, tmp_path, monkeypatch):
    """The same for programs that are started: the stand-in, by the environment."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    return hub


def features(backbone):
    with torch.no_grad():
        return backbone.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)))


# The address


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf://ada/waves", "ada/waves", ""),
        ("hf://timm/resnet18.a1_in1k@main", "timm/resnet18.a1_in1k", "main"),
        ("hf://ada/waves@refs/pr/3", "ada/waves", "refs/pr/3"),
        (Path("hf://ada/waves@v1.0"), "ada/waves", "v1.0"),
    ],
)
def test_an_address(text, repository, revision):
    assert hub_address(text) == HubAddress(repository, revision)
    assert hub_address(str(hub_address(text))) == hub_address(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf://waves", "hf://waves has no user: give hf://USER/waves"),
        ("https://huggingface.co/ada/waves/tree/main", "is a page for a browser: give hf://ada/waves$"),
        ("hf://", "is no address of a model: give hf://USER/NAME"),
        ("hf://ada/waves/model.safetensors", "is no address of a model: give hf://USER/NAME"),
        ("hf://ada/wa ves", "no model on the hub can have this name"),
        ("hf://ada/..", "no model on the hub can have this name"),
        ("hf://ada/waves@", "behind @ stands a branch, a tag or a commit"),
        ("hf://ada/waves@../../x", "behind @ stands a branch, a tag or a commit"),
    ],
)
def test_what_is_no_address_is_one_line(text, says):
    with pytest.raises(UserError, match=says):
        hub_address(text)


def test_a_path_is_no_address_and_an_address_no_path():
    assert hub_address("runs/hf") is None
    assert hub_address("./hf:ada/waves") is None
    config = configuration.replace(configuration.Config(), model__weights=PLACE)
    assert with_absolute_places(config).model.weights == PLACE


# Export


def test_an_export_is_one_commit_that_timm_loads(run, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITE)
    export_main([str(run), "--to", PLACE, "--which", "key", "--private"])
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    _, commit = repository.branches["main"]  # of the repository itself, and ours
    assert set(repository.commits[commit]) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert repository.messages[1] == "timm/test_resnet, key encoder of demo, step 20"
    said = capsys.readouterr().out
    assert f"wrote {PLACE}@{commit} (1.5 MB, huggingface) and {hub.url}/{REPOSITORY}/tree/{commit}" in said
    assert "features equal bit for bit" in said
    card = repository.commits[commit]["README.md"].decode()
    assert f'timm.create_model("hf-hub:{REPOSITORY}", pretrained=True, num_classes=0)' in card
    model = timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True, num_classes=0)
    assert torch.equal(features(model), features(load_weights(run, "key").backbone))


def test_a_commit_is_not_overwritten_but_by_force(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE)
    other = hub.add(REPOSITORY, {"README.md": b"mine", "notes.txt": b"mine too"})
    line = r"has files already \(README.md, notes.txt\): give another name, a branch \(hf://ada/waves@v2\), or --force"
    with pytest.raises(UserError, match=line):
        export(run, PLACE)
    repository = hub.repositories[REPOSITORY]
    assert repository.branches == {"main": [other]}
    export(run, f"{PLACE}@v2")  # another branch: nothing is lost
    assert repository.branches["main"] == [other]
    assert repository.branches["v2"][0] == other
    export(run, PLACE, force=True)
    first, newest = repository.branches["main"]
    assert first == other
    assert repository.commits[first]["README.md"] == b"mine"
    assert repository.commits[newest]["notes.txt"] == b"mine too"
    assert repository.commits[newest]["README.md"].startswith(b"---\nlibrary_name: timm\n")


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(run, hub, monkeypatch):
    import caco_scale.export.write as write

    monkeypatch.setenv("HF_TOKEN", WRITE)
    hub.add(REPOSITORY, {"README.md": b"first"})
    load = write.load_weights
    monkeypatch.setattr(
        write, "load_weights", lambda *words: (hub.add(REPOSITORY, {"README.md": b"theirs"}), load(*words))[1]
    )
    with pytest.raises(UserError, match="has changed meanwhile"):
        export(run, PLACE, force=True)
    repository = hub.repositories[REPOSITORY]
    assert repository.commits[repository.find("main")] == {"README.md": b"theirs"}


@pytest.mark.parametrize(
    ("token", "options", "says"),
    [
        (None, {}, "no token of the hub is here: run hf auth login, or set HF_TOKEN to one that may write"),
        ("hf_old", {}, "the hub knows no such token: log in anew"),
        (READ, {}, "the token 'laptop' may only read: make one that may write"),
        (OTHERS, {}, "the token is of bob, who may not write for ada: give hf://bob/waves"),
        (WRITE, {"to": f"{PLACE}@{'0' * 40}"}, "names a commit, which never changes: give a branch"),
        (WRITE, {"file_format": "timm"}, "is of format huggingface: drop --format timm"),
        (WRITE, {"to": "waves", "private": True}, "--private is for the hub: give --to hf://USER/waves"),
        (WRITE, {"to": "hf://ada/public", "private": True}, "exists and is public: drop --private"),
    ],
)
def test_what_the_hub_would_refuse_is_said_before_the_work(token, options, says, hub, monkeypatch):
    """The run is not even there: nothing of it has been looked at."""
    hub.add("ada/public", {})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=says):
        export("no-such-run", **{"to": PLACE, **options})
    assert list(hub.repositories) == ["ada/public"]
    assert not hub.asked("POST")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (("POST .*/commit/", 403), "the token may not do this"),
        (("POST .*/preupload/", 500), "the hub answered 500: start the same command again later"),
        (("GET /api/whoami", 503), "the hub answered 503"),
    ],
)
def test_what_the_hub_refuses_later_is_one_line(answer, says, run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the library, between its tries
    hub.answers.append(answer)
    with pytest.raises(UserError, match=says):
        export(run, PLACE)
    assert all(len(r.branches["main"]) == 1 for r in hub.repositories.values())


def test_no_network_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys):
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    with pytest.raises(SystemExit) as end:
        export_main([str(run), "--to", PLACE])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {PLACE}: the hub does not answer (")
    assert said.count("\n") == 1


# Loading


def test_weights_are_fetched_once_and_then_need_no_network(hub, directory, run, tmp_path, monkeypatch):
    commit = hub.add(REPOSITORY, directory)
    backbone = caco_scale.load_backbone(PLACE)
    assert torch.equal(features(backbone), features(load_weights(run).backbone))
    assert load_weights(PLACE).path == f"{PLACE}@{commit}"
    assert hub.asked("GET /lfs/") == 1
    before = len(hub.requests)
    load_weights(f"{PLACE}@{commit}")
    assert len(hub.requests) == before, "a commit never changes"
    use(hub.url, tmp_path, monkeypatch, offline=True)
    assert load_weights(PLACE).path == f"{PLACE}@{commit}"
    assert len(hub.requests) == before
    with pytest.raises(UserError, match=r"hf://ada/other is not in the cache .* and HF_HUB_OFFLINE is set"):
        load_weights("hf://ada/other")


def test_where_the_network_is_gone_the_cache_is_used_and_said(hub, directory, tmp_path, monkeypatch, capsys):
    commit = hub.add(REPOSITORY, directory)
    load_weights(PLACE)
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert load_weights(PLACE).path == f"{PLACE}@{commit}"
    assert "the hub does not answer" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"hf://ada/other is not in the cache .* and the hub does not answer"):
        load_weights("hf://ada/other")


def test_the_weights_of_a_branch_are_those_of_now(hub, directory):
    first = hub.add(REPOSITORY, directory)
    assert load_weights(PLACE).path.endswith(first)
    second = hub.add(REPOSITORY, {"README.md": b"a better card"})
    assert load_weights(PLACE).path.endswith(second)
    assert load_weights(f"{PLACE}@{first[:40]}").path.endswith(first)
    assert hub.asked("GET /lfs/") == 1  # the file of both


def test_a_torch_file_is_read_where_there_is_no_other(hub, directory, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.bin")
    config = json.dumps({"architecture": "test_resnet"}).encode()
    hub.add(REPOSITORY, {"config.json": config, "pytorch_model.bin": (tmp_path / "w.bin").read_bytes()})
    assert load_weights(PLACE).arch == "timm/test_resnet"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "hf://ada/waves is not on the hub, or is private and not yours"),
        ({"model.safetensors": b"x"}, "hf://ada/waves has no config.json"),
        (
            {"config.json": b'{"architecture": "test_resnet"}'},
            "has neither model.safetensors nor pytorch_model.bin",
        ),
        (
            {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x" * 20_000},
            r"^hf://ada/waves@\w{40} is in the layout of another library than timm \(bert\)",
        ),
        (
            {"config.json": b'{"architecture": "resnet19"}', "model.safetensors": b"x"},
            r"^hf://ada/waves@\w{40}/config.json: timm .* has no model 'resnet19'",
        ),
    ],
)
def test_what_the_hub_has_not_is_one_line(hub, files, says):
    if files is not None:
        hub.add(REPOSITORY, files)
    with pytest.raises(UserError, match=says):
        load_weights(PLACE)
    assert not hub.asked("GET .*/(model.safetensors|lfs/)"), "nothing large is fetched in vain"


def test_private_gated_and_unknown_revisions(hub, directory, monkeypatch):
    hub.add("ada/secret", directory, private=True)
    hub.add("ada/gated", directory, gated=True)
    hub.add(REPOSITORY, directory)
    with pytest.raises(UserError, match=r"is not on the hub, or is private and not yours: .* log in"):
        load_weights("hf://ada/secret")
    with pytest.raises(UserError, match="hf://ada/gated is gated: accept its terms"):
        load_weights("hf://ada/gated")
    with pytest.raises(UserError, match="has no branch, tag or commit 'v9'"):
        load_weights(f"{PLACE}@v9")
    with pytest.raises(
        UserError, match="--step chooses one of a run's checkpoints, but hf://ada/waves is none"
    ):
        load_weights(PLACE, step=3)
    monkeypatch.setenv("HF_TOKEN", READ)
    assert load_weights("hf://ada/secret").encoder == "query"


# Training


def config_of(run_dir, weights=PLACE, **more):
    return configuration.replace(make_config(), run__dir=str(run_dir), model__weights=weights, **more)


def test_a_run_keeps_the_commit_that_it_began_with(hub, directory, tmp_path):
    """In its configuration, also where it was ended before its first checkpoint, also without the hub."""
    first = hub.add(REPOSITORY, directory)
    config, line = pin_weights(config_of(tmp_path))
    assert config.model.weights == f"{PLACE}@{first}"
    assert line == f"model.weights: {PLACE} is commit {first[:12]}, which this run keeps"
    facts = {"asked": PLACE, "path": config.model.weights}
    (tmp_path / "weights.json").write_text(json.dumps(facts))
    second = hub.add(REPOSITORY, {"README.md": b"a better card"})
    again, line = pin_weights(config_of(tmp_path))
    assert again == config
    assert line.endswith("as in this run's first start")
    assert pin_weights(config_of(tmp_path, run__resume="never"))[0].model.weights == f"{PLACE}@{second}"
    assert pin_weights(config_of(tmp_path, f"{PLACE}@main"))[0].model.weights == f"{PLACE}@{second}"
    exact = config_of(tmp_path, f"{PLACE}@{first}")
    assert pin_weights(exact) == (exact, "")


@pytest.mark.long
def test_a_training_from_the_hub_resumes_by_its_commit(hub_of_programs, directory, tmp_path):
    """On two processes, of which one alone fetches; later the branch has moved on, and then there is no network."""
    hub = hub_of_programs
    commit = hub.add(REPOSITORY, directory)
    make_shard_set(tmp_path / "train", 96)
    flags = {
        **SMALL,
        "data.shards": tmp_path / "train",
        "data.val_shards": "",
        "model.arch": "timm/test_resnet",
    }
    flags |= {"model.stem": "imagenet", "views.size": 32, "run.max_steps": 6, "run.save_every": 3}
    more = {"cwd": tmp_path}
    two = by("ddp", 2)
    said = launch({**flags, "model.weights": PLACE, "run.dir": "a"}, **two, **more)
    assert f"model.weights: {PLACE} is commit {commit[:12]}, which this run keeps" in said
    assert f"starting weights: {PLACE}@{commit} (" in said
    assert hub.asked("GET /lfs/") == 1
    assert hub.asked("GET /api/models/") == 1
    assert yaml.safe_load((tmp_path / "a/config.yaml").read_text())["model"]["weights"] == f"{PLACE}@{commit}"
    facts = json.loads((tmp_path / "a/weights.json").read_text())
    assert (facts["asked"], facts["path"]) == (PLACE, f"{PLACE}@{commit}")

    hub.add(REPOSITORY, {"README.md": b"a better card"})
    before = len(hub.requests)
    longer = {**flags, "run.max_steps": 8, "run.dir": "a"}
    said = launch({**longer, "model.weights": PLACE}, **more)
    assert "as in this run's first start" in said
    assert len(hub.requests) == before, "a run that goes on asks no network"
    said = launch({**longer, "model.weights": f"{PLACE}@main"}, code=2, **more)
    assert f"model.weights: {PLACE}@{commit}" in said
    assert len(hub.requests) == before


@pytest.mark.long
def test_an_evaluation_on_two_processes_asks_once(hub_of_programs, directory, tmp_path):
    hub = hub_of_programs
    commit = hub.add(REPOSITORY, directory)
    for name in ("train", "val"):
        make_shard_set(tmp_path / name, 24)
    launcher = ["-m", "accelerate.commands.launch", *by("ddp", 2)["launcher"]]
    words = ["-m", "caco_scale.evaluate", "knn", PLACE, "--data", "train", "--val", "val", "--size", "32"]
    words = [sys.executable, *launcher, *words, "--world_size", "2", "--workers", "0"]
    done = finished(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"query encoder of {PLACE}@{commit} (" in done.stdout
    assert hub.asked("GET /lfs/") == 1
    assert hub.asked("GET /api/models/") == 1
