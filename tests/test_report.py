"""The report: one page that shows what a run's files say, whole or half, and opens in a real browser."""

import fcntl
import html
import html.parser
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from run_directories import (
    ROWS,
    make_config,
    metrics_lines,
    save_checkpoint,
    trained_model,
    write_lines,
    write_records,
    write_results,
)
from shard_sets import make_shard_set
from torch.nn import functional as F

from caco_scale import config as configuration
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.store import open_store
from caco_scale.data.thumbnails import data_uri
from caco_scale.embed.show import MOST_PICTURES, Picture, Row, write_page
from caco_scale.errors import UserError
from caco_scale.report import pictures
from caco_scale.report.__main__ import main, write_report
from caco_scale.report.curves import MAX_POINTS, write_number
from caco_scale.report.overview import Row as OverviewRow
from caco_scale.report.overview import to_page
from caco_scale.report.runs import incidents, read_run, read_runs

ROOT = Path(__file__).parent.parent
HOSTILE = "<script>alert(1)</script>\"'&"


class Page(html.parser.HTMLParser):
    """Charts by title, their data; images by alternative text; all visible text; all tags."""

    def __init__(self, path):
        super().__init__()
        self.charts, self.images, self.text, self.tags, self._open = {}, [], [], [], None
        self.feed(Path(path).read_text())
        self.text = " ".join(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if "data-chart" in attributes:
            self._open = json.loads(attributes["data-chart"])
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        words = " ".join(data.split())
        if words and self.tags[-1] == "b" and self._open:
            self.charts[words], self._open = self._open, None
        if words and self.tags[-1] not in ("style", "script"):
            self.text.append(words)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shard_set(folder / "train", num_images=64), make_shard_set(
        folder / "val", num_images=32, seed=1
    )


def make_run(folder, shards=("", ""), **options):
    config = make_config(data__shards=shards[0], data__val_shards=shards[1])
    write_records(folder, config, **options)
    save_checkpoint(
        folder, trained_model("tiny", "cifar"), 40, epoch=5.0, config=configuration.to_dict(config)
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    return make_run(tmp_path_factory.mktemp("report") / "first", shards, attempts=2)


@pytest.fixture(scope="module")
def page_path(run, tmp_path_factory):
    return write_report([run], tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def page(page_path):
    return Page(page_path)


# ----------------------------------------------------------------------------------------------------
# What the page says


@pytest.mark.parametrize(
    ("title", "figure", "factor"),
    [
        ("Loss", "loss", 1),
        ("kNN top-1", "knn_top1", 1),
        ("Learning rate", "lr", 1),
        ("Bank learning rate", "bank_lr", 1),
        ("Key momentum", "key_momentum", 1),
        ("Throughput", "images_per_second", 1),
        ("Data wait", "data_wait", 100),
        ("Rows used", "bank_rows_used", 100),
        ("Assignment entropy", "bank_assignment_entropy", 1),
        ("Row norm", "bank_row_norm", 1),
        ("Positive probability", "positive_probability", 1),
        ("Embedding spread", "embedding_std", 1),
        ("RankMe", "rankme", 1),
    ],
)
def test_every_curve_holds_the_figures_of_the_metrics(page, title, figure, factor):
    lines = [line for line in metrics_lines() if figure in line]
    (drawn,) = page.charts[title]["lines"]
    assert drawn["s"] == [line["step"] for line in lines]
    assert drawn["v"] == pytest.approx([factor * line[figure] for line in lines], rel=1e-6)
    assert drawn["e"] == pytest.approx([line["step"] / 8 for line in lines], rel=1e-4)


def test_the_page_says_how_the_run_stands_and_what_it_was(page):
    for words in (
        "done after 40 steps",
        "66%",
        "raw pixels 25.5%",
        "abc1234",
        "2.14.1",
        "global_batch_size",
        "resumed",
    ):
        assert words in page.text
    assert "start 2 resumed from the checkpoint of step 16" in page.text
    assert "2 processes after 1" in page.text


def test_the_page_loads_nothing(page_path, page):
    text = page_path.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert policy.startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    assert all(image["src"].startswith("data:image/") for image in page.images)
    for word in ("http://", "https://", 'src="/', "@import", "url(http"):
        assert word not in text.replace("http://www.w3.org", ""), word


def test_what_a_run_holds_is_text_and_never_markup(tmp_path):
    config = make_config()
    config = configuration.from_dict({**configuration.to_dict(config), "recipe": HOSTILE}, "test")
    environment = {
        "git_commit": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "command": [HOSTILE],
        "hosts": [HOSTILE] * 2,
    }
    lines = [*metrics_lines(), {"step": 40, HOSTILE: 1.0}, {"step": 38, HOSTILE: 2.0}]
    run = tmp_path / "<img src=x onerror=alert(1)>"
    write_records(run, config, lines, environment=environment, done=None)
    write_lines(run / "corrupt.jsonl", [{"step": 3, "key": HOSTILE, "error": HOSTILE, "substitute": HOSTILE}])
    (run / "INTERRUPTED").write_text(json.dumps({"step": 40, "reason": HOSTILE}))
    text = write_report([run], images=0).read_text()
    assert "alert(1)</script>" not in text
    assert "<img src=x" not in text
    page = Page(run / "report.html")
    assert page.tags.count("script") == 1
    assert HOSTILE in page.text


def test_a_long_run_is_drawn_by_means_with_a_band(tmp_path):
    steps = 3 * MAX_POINTS - 1
    write_records(tmp_path / "run", make_config(), metrics_lines(steps=steps, every=1, knn_every=steps + 1))
    page = Page(write_report([tmp_path / "run"], images=0))
    (drawn,) = page.charts["Loss"]["lines"]
    losses = np.array([line["loss"] for line in metrics_lines(steps=steps, every=1) if "loss" in line])
    assert len(drawn["v"]) == MAX_POINTS
    assert drawn["v"][5] == pytest.approx(losses[15:18].mean(), rel=1e-6)
    assert drawn["v"][-1] == pytest.approx(losses[3 * (MAX_POINTS - 1) :].mean(), rel=1e-6)
    assert drawn["s"][-1] == steps
    assert "means of up to 3 lines" in page.text


def test_a_gap_is_a_gap_and_a_figure_of_tomorrow_has_a_chart(tmp_path):
    lines = [
        {**line, "loss": None} if line["step"] == 20 and "loss" in line else line for line in metrics_lines()
    ]
    lines = [{**line, "evaluation_seconds": 0.1 * line["step"]} for line in lines]
    write_records(tmp_path / "run", make_config(), lines)
    page = Page(write_report([tmp_path / "run"], images=0))
    (drawn,) = page.charts["Loss"]["lines"]
    assert drawn["v"][drawn["s"].index(20)] is None
    assert page.charts["evaluation seconds"]["lines"][0]["v"][-1] == pytest.approx(4.0)


def test_several_runs_stand_side_by_side(tmp_path, shards):
    first, second = tmp_path / "a/run", tmp_path / "b/run"
    for number, folder in enumerate((first, second)):
        folder.parent.mkdir()
        make_run(folder, shards, metrics=metrics_lines(steps=40 + 16 * number))
    config = make_config(bank__rule="moco", bank__size=64, data__shards=shards[0], data__val_shards=shards[1])
    (second / "config.yaml").write_text(configuration.to_yaml(config))
    page = Page(write_report([first, second], tmp_path / "page.html", images=16))
    lines = page.charts["Loss"]["lines"]
    assert [line["s"][-1] for line in lines] == [40, 56]
    for words in ("2 runs side by side", "a/run", "b/run", "bank of 12 rows", "bank of 64 rows"):
        assert words in page.text
    assert not (second / "report.html").exists()


def rows_of(page, section):
    """The cells of the first table of a section of a page, row by row."""
    table = page.read_text().split(f'<section id="{section}">')[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    return [[html.unescape(cell) for cell in row] for row in rows]


def test_what_differs_between_the_configurations_of_runs_is_a_table(tmp_path):
    changes = [{}, {"bank__rule": "moco", "optim__lr": 0.03}, {"views__scale": (0.1, 1.0), "optim__lr": 0.03}]
    for number, change in enumerate(changes):
        write_records(tmp_path / f"run{number}", make_config(run__dir=f"runs/{number}", **change))
    runs = [tmp_path / f"run{number}" for number in range(3)]
    assert rows_of(write_report(runs, images=0), "differences") == [
        ["views.scale", "0.2 1", "0.2 1", "0.1 1"],
        ["bank.rule", "caco", "moco", "caco"],
        ["optim.lr", "0.3", "0.03", "0.03"],
    ]
    write_records(tmp_path / "same", make_config())
    text = Page(write_report([runs[0], tmp_path / "same"], tmp_path / "page.html", images=0)).text
    assert "None: all values are the same, but for the runs' folders" in text
    assert "Differences" not in Page(write_report(runs[:1], images=0)).text


def test_a_knn_names_its_step(tmp_path):
    write_records(tmp_path / "run", make_config())
    write_records(
        tmp_path / "young", make_config(), [{"step": 0, "knn_top1": 20.0}, {"step": 2, "loss": 3.0}]
    )
    text = Page(write_report([tmp_path / "run", tmp_path / "young"], images=0)).text
    assert "66% at step 32" in text
    assert "20% before training" in text


def test_runs_that_do_not_say_their_epochs_are_drawn_over_steps(tmp_path):
    without = [{name: value for name, value in line.items() if name != "epoch"} for line in metrics_lines()]
    write_records(tmp_path / "a", make_config(), without)
    write_records(tmp_path / "b", make_config())
    page = Page(write_report([tmp_path / "a", tmp_path / "b"], images=0))
    assert "Over steps" in page.text
    assert [line["e"][-1] for line in page.charts["Loss"]["lines"]] == [40, 40]
    alone = Page(write_report([tmp_path / "a"], images=0)).text
    assert "steps 40 main schedule 20 epochs" in alone


def test_figures_of_the_bank_that_0_1_wrote_before_it_had_any_are_left_out(tmp_path):
    lines = list(metrics_lines())
    for line in lines:
        if line["step"] <= 16 and "loss" in line:
            line.update(bank_rows_used=0.0, bank_assignment_entropy=0.0)
    write_records(tmp_path / "run", make_config(), lines)
    charts = Page(write_report([tmp_path / "run"], images=0)).charts
    for title in ("Rows used", "Assignment entropy"):
        assert charts[title]["lines"][0]["s"] == list(range(18, 41, 2))
    assert charts["Row norm"]["lines"][0]["s"] == list(range(2, 41, 2))
    write_records(tmp_path / "young", make_config(), lines[:6])
    young = Page(write_report([tmp_path / "young"], images=0))
    assert "Rows used" not in young.charts
    assert "bank rows used" not in young.text


def test_a_folder_whose_name_is_not_utf8_has_a_page(tmp_path):
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    write_records(run, make_config())
    assert "r?" in Page(write_report([run], tmp_path / "page.html", images=0)).text


@pytest.mark.long
def test_200_000_lines_become_curves_of_at_most_so_many_points(tmp_path):
    lines = ({"step": n, "epoch": n / 1000, "loss": 1 / n} for n in range(1, 200_001))
    write_records(tmp_path / "run", make_config(), lines)
    page = write_report([tmp_path / "run"], images=0)
    (drawn,) = Page(page).charts["Loss"]["lines"]
    assert len(drawn["v"]) == MAX_POINTS
    assert drawn["s"][-1] == 200_000
    assert drawn["greatest"][0] == 1
    assert drawn["least"][-1] == pytest.approx(1 / 200_000)
    assert page.stat().st_size < 500_000


def test_what_was_evaluated_afterwards_is_shown(tmp_path):
    write_records(tmp_path / "run", make_config())
    write_results(tmp_path / "run", step=32)
    for name, text in (
        ("cut", '{"settings": '),
        ("other", '{"settings": {"evaluation": 3}}'),
        ("list", "[]"),
    ):
        (tmp_path / "run/evaluate" / name).mkdir()
        (tmp_path / "run/evaluate" / name / "result.json").write_text(text)
    text = Page(write_report([tmp_path / "run"], images=0)).text
    assert (
        "71.25% kNN of the query encoder, step 32, on /other/val backbone, k 10, T 0.07 71.25% 70.00 to 72.50"
        in text
    )
    assert "73.50% linear of the query encoder, step 32, on /other/val lr 0.1 per 256 images 73.50%" in text


def test_numbers_are_written_for_people():
    written = [
        write_number(*arguments) for arguments in [(0.0, 4), (97.4, 4, "%"), (1234567.0, 4), (0.000012, 3)]
    ]
    assert written == ["0", "97.4%", "1,234,567", "1.20e-05"]


# ----------------------------------------------------------------------------------------------------
# Incidents, and how a run stands


def test_incidents_are_listed_with_their_steps(tmp_path):
    lines = list(metrics_lines())
    for line in lines:
        if "loss" in line:
            line.update(embedding_std=0.001, data_retries={10: 2, 20: 5, 30: 1}.get(line["step"], 0))
    lines.insert(5, {"step": 7, "skipped_step": 7, "skipped": 1})
    write_records(tmp_path / "run", make_config(), lines, attempts=3, done=None)
    corrupt = [{"step": 11, "key": f"0.tar/{n}", "error": "cut", "substitute": "0.tar/9"} for n in range(25)]
    write_lines(tmp_path / "run/corrupt.jsonl", corrupt)
    (tmp_path / "run/INTERRUPTED").write_text('{"step": 40, "reason": "SIGUSR1"}')
    found = incidents(read_run(tmp_path / "run"))
    assert [incident.step for incident in found] == sorted(incident.step for incident in found)
    texts = {kind: [i.text for i in found if i.kind == kind] for kind in {i.kind for i in found}}
    assert len(texts["resume"]) == 2
    assert "start 3 resumed from the checkpoint of step 16" in texts["resume"][1]
    assert [i.step for i in found if i.kind == "skip"] == [7]
    assert len(texts["corrupt"]) == 21
    assert texts["corrupt"][0] == "0.tar/0 does not decode (cut); trained on 0.tar/9"
    assert texts["corrupt"][-1].startswith("25 images in all")
    assert len(texts["collapse"]) == 1
    assert "standard deviation is 0.001" in texts["collapse"][0]
    assert texts["store"] == [
        "object store: 8 reads tried again by step 40"
    ]  # 2, then 5 and 1 of later starts
    assert texts["stop"] == ["stopped by SIGUSR1 after step 40; the same command resumes it"]


def test_figures_below_the_drawn_line_are_incidents_though_no_alarm_sounds(tmp_path):
    lines = list(metrics_lines())
    low = {4, 6, 8, 20, 22, 24, 26, 28, 30, 40}
    for line in lines:
        if line["step"] in low and "loss" in line:
            line["embedding_std"] = 0.001
    write_records(tmp_path / "run", make_config(), lines)
    found = [(i.step, i.kind, i.text.split(",")[0]) for i in incidents(read_run(tmp_path / "run"))]
    assert found[0] == (4, "low", "3 logged lines below the alarm's")
    assert [(step, kind) for step, kind, _ in found] == [(4, "low"), (28, "collapse"), (40, "low")]
    assert found[2][2] == "1 logged line below the alarm's"


def test_a_smooth_run_has_no_incidents(tmp_path):
    write_records(tmp_path / "run", make_config())
    assert incidents(read_run(tmp_path / "run")) == []
    assert "None: no resume" in Page(write_report([tmp_path / "run"], images=0)).text


def test_a_run_that_was_killed_and_one_that_trains_now_are_told_apart(tmp_path):
    write_records(tmp_path / "run", make_config(), done=None)
    assert read_run(tmp_path / "run").status()[0] == "ended"
    with open(tmp_path / "run/.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(tmp_path / "run").status()[0] == "training"
    assert read_run(tmp_path / "run").status()[0] == "ended"


def test_reading_changes_nothing_in_the_run(run, tmp_path):
    def listing():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    before = listing()
    write_report([run], tmp_path / "page.html", images=16)
    assert listing() == before


# ----------------------------------------------------------------------------------------------------
# Pictures


def crops_of(shards):
    store = open_store(shards)
    batches = evaluation_batches(store, 32, rank=0, world_size=1, batch_size=64, workers=0)
    return torch.cat([crops for _, crops, _ in batches])


def shards_of(run):
    data = configuration.load_recipe(run / "config.yaml").data
    return data.shards, data.val_shards


def features_of(encode, crops):
    """Unit-norm rows of ``encode``, by hand."""
    views = configuration.Views()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (views.mean, views.std))
    with torch.no_grad():
        return F.normalize(encode((crops.permute(0, 3, 1, 2).float() / 255 - mean) / std).double(), dim=1)


def assert_nearest(images, similarities):
    """Are these eight pictures those with the greatest similarities (n,), in order, up to fp32's rounding? -> ids."""
    ids = [int(image["alt"].split()[2]) for image in images]
    assert len(set(ids)) == 8
    assert [image["alt"] for image in images] == [
        f"training image {number} class{number % 4}" for number in ids
    ]
    found = similarities[ids]
    assert (found - similarities.topk(8).values).abs().max() < 1e-6
    assert [float(image["caption"]) for image in images] == pytest.approx(found.tolist(), abs=0.00501)
    return ids


def test_the_images_nearest_to_a_row_are_those_of_a_calculation_by_hand(run, shards):
    shown = pictures.draw_pictures(read_run(run)).rows
    keys = features_of(trained_model("tiny", "cifar").key.eval(), crops_of(shards[0]))
    rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1)).double()
    assert [row["title"] for row in shown] == [f"row {n}" for n in (0, 1, 2, 4, 5, 6, 10, 11)]
    assert shown[0]["note"] == "most used: 8 of 36 positives"
    assert shown[-1]["note"] == "least used: 0 of 36 positives"
    for row in shown:
        number = int(row["title"].split()[1])
        assert_nearest(row["images"], keys @ F.normalize(rows[number], dim=0))


def test_neighbours_are_those_of_a_calculation_by_hand_and_marked_by_class(run, shards):
    shown = pictures.draw_pictures(read_run(run)).neighbours
    encode = trained_model("tiny", "cifar").query.backbone.eval()
    train, val = (features_of(encode, crops_of(part)) for part in shards)
    assert [row["title"] for row in shown[:4]] == ["class0", "class1", "class2", "class3"]
    for number, row in enumerate(shown[:4]):  # the first image of class c is image c
        ids = assert_nearest(row["images"], train @ val[number])
        assert [image["same"] for image in row["images"]] == [other % 4 == number for other in ids]


def test_a_sample_of_a_set_is_spread_over_it():
    assert pictures.spread_ids(10, 20).tolist() == list(range(10))
    ids = pictures.spread_ids(1_281_167, 1000)
    assert len(ids) == 1000
    assert (np.diff(ids) > 0).all()
    assert ids[-1] > 1_281_167 * 15 / 16
    assert len(np.flatnonzero(np.diff(ids) > 1)) == pictures.BLOCKS - 1


def test_a_sample_holds_the_images_of_its_numbers(run, shards):
    images = pictures.read_images(read_run(run), shards[0], 20)
    wanted = pictures.spread_ids(64, 20)
    assert images.ids.tolist() == wanted.tolist()
    assert images.total == 64
    assert torch.equal(images.crops, crops_of(shards[0])[wanted])
    assert images.labels.tolist() == (wanted % 4).tolist()


def test_images_of_any_size_become_small_pictures():
    small, large = (data_uri(np.zeros((s, s, 3), np.uint8)) for s in (32, 224))
    assert small.startswith("data:image/png;base64,")
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 4000


def test_the_map_is_by_the_best_method_that_is_installed_and_needs_none(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    if importlib.util.find_spec("sklearn"):
        assert pictures.draw_pictures(read_run(run)).map["method"] == "t-SNE"
        monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    drawn = pictures.draw_pictures(read_run(run))
    assert drawn.notes == []
    assert drawn.map["method"] == "PCA"
    assert drawn.map["svg"].count("h0") == 32
    assert [name for _, name in drawn.map["classes"]] == ["class0", "class1", "class2", "class3"]


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)], ids=["tall", "wide"])
def test_principal_components_are_those_of_a_singular_value_decomposition(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.linspace(3, 1, shape[1])
    centred = (rows - rows.mean(dim=0)).double().numpy()
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    wanted = directions[:2] * np.sign([row[np.abs(row).argmax()] for row in directions[:2]])[:, None]
    places, shares = pictures.principal_components(rows)
    assert places == pytest.approx(centred @ wanted.T, abs=1e-5)
    assert shares == pytest.approx(spread[:2] ** 2 / (spread**2).sum(), rel=1e-5)
    turned, _ = pictures.principal_components(
        torch.cat([rows[1:], rows[:1]])
    )  # the same rows in another order
    assert turned[-1] == pytest.approx(places[0], abs=1e-5)


def test_equal_features_have_a_map_of_one_point():
    places, shares = pictures.principal_components(torch.ones(20, 3))
    assert np.abs(places).max() == 0
    assert shares.tolist() == [0, 0]


def test_the_map_says_how_much_of_the_variance_its_axes_hold(run, tmp_path):
    main([str(run), "--to", str(tmp_path / "p.html"), "--map", "pca"])
    page = Page(tmp_path / "p.html")
    features = features_of(trained_model("tiny", "cifar").query.backbone.eval(), crops_of(shards_of(run)[1]))
    _, spread, _ = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    shares = (spread**2 / (spread**2).sum()).tolist()
    for name, share in zip(("first", "second"), shares, strict=False):
        assert f"{name} component: {share:.1%} of the variance" in page.text
    assert "Both axes have one scale" in page.text


@pytest.mark.parametrize(
    ("method", "module", "package"), [("tsne", "sklearn", "scikit-learn"), ("umap", "umap", "umap-learn")]
)
def test_a_map_that_is_asked_for_and_wants_a_package_says_which(
    run, tmp_path, monkeypatch, capsys, method, module, package
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == module else found(name, *more)
    )
    with pytest.raises(SystemExit) as caught:
        main([str(run), "--to", str(tmp_path / "p.html"), "--map", method])
    assert caught.value.code == 2
    line = f"error: --map {method} needs {package}: pip install {package}, or give --map pca\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "p.html").exists()


def no_checkpoint(run):
    shutil.rmtree(run / "checkpoints")


def damaged_checkpoint(run):
    path = run / "checkpoints/step_00000040/__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def diverged(run):
    model = trained_model("tiny", "cifar")
    with torch.no_grad():
        model.query.backbone.conv1.weight.fill_(math.nan)
    config = configuration.load_recipe(run / "config.yaml")
    save_checkpoint(run, model, 41, config=configuration.to_dict(config))


def move_data(**fields):
    """The run's config names other shard sets; a field's value None stands for a set that is there."""

    def change(run):
        config = configuration.load_recipe(run / "config.yaml")
        (run / "config.yaml").write_text(configuration.to_yaml(configuration.replace(config, **fields)))

    return change


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        (no_checkpoint, "No pictures: the run has no complete checkpoint yet"),
        (damaged_checkpoint, "No pictures: checkpoint"),
        (diverged, "tensors are not finite (conv1.weight)"),
        (
            move_data(data__shards="/nowhere/train"),
            "No pictures: data.shards /nowhere/train does not exist",
        ),
        (
            move_data(data__val_shards="/nowhere/val"),
            "No neighbours of validation images: data.val_shards /nowhere/val does not exist",
        ),
        (move_data(data__val_shards=""), "No neighbours of validation images: data.val_shards is empty"),
    ],
    ids=[
        "no checkpoint",
        "damaged checkpoint",
        "NaN weights",
        "data away",
        "validation data away",
        "no validation data",
    ],
)
def test_what_cannot_be_shown_is_a_note_in_the_page_and_no_failure(run, tmp_path, fault, note, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    fault(copy)
    main([str(copy), "--images", "16"])
    page = Page(copy / "report.html")
    assert note in page.text
    assert note in capsys.readouterr().err
    assert "Loss" in page.charts


def test_relative_shards_count_from_where_the_run_was_started(run, shards, tmp_path):
    copy = tmp_path / "here/runs/mine"
    shutil.copytree(run, copy)
    shutil.copytree(shards[0], tmp_path / "here/data/train")
    move_data(run__dir="runs/mine", data__shards="data/train")(copy)
    assert pictures.data_address(read_run(copy), "data/train") == str(tmp_path / "here/data/train")
    assert pictures.data_address(read_run(copy), "data/none") == "data/none"
    assert pictures.data_address(read_run(copy), "s3://bucket/train") == "s3://bucket/train"


# ----------------------------------------------------------------------------------------------------
# Half a run, and mistakes


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("environment.json", None),
        ("environment.json", b'{"versions": '),
        ("environment.json", b"[1, 2]"),
        ("environment.json", b'{"versions": 3, "hosts": "one", "command": null}'),
        ("attempts.jsonl", None),
        ("attempts.jsonl", b'{"attempt": 1}\n{"attempt": 2, "resumed_step": "x"}\n{"atte'),
        ("corrupt.jsonl", b'{"step": null}\n{"key": 3}\n\xff\n'),
        ("DONE", b"yes"),
        ("DONE", b'{"step": null}'),
        ("INTERRUPTED", b'{"reason": 4}'),
        (
            "metrics.jsonl",
            b'{"step": 4, "loss": 1.0}\n{"step": 5, "loss": NaN, "lr": Infinity, "rankme": "x"}\n{"st',
        ),
        (
            "metrics.jsonl",
            b'{"step": 4, "loss": 1.0}\n[3]\n{"step": 1e400, "loss": 1}\n{"step": 5, "lr": 1'
            + b"0" * 400
            + b"}\n",
        ),
        ("metrics.jsonl", b'{"step": 0, "loss": 1.0, "epoch": 0}\n'),
        (
            "metrics.jsonl",
            b'{"step": 0, "knn_top1": NaN}\n{"step": 5, "loss": 1, "embedding_std": 0.4, "rankme": "x"}\n',
        ),
        (
            "metrics.jsonl",
            b'{"step": 0, "knn_top1": null}\n{"step": 5, "loss": 1, "knn_top1": 3, "bank_rows_used": "x"}\n',
        ),
        ("corrupt.jsonl", b"".join(b'{"step": null, "key": %d}\n' % n for n in range(30))),
        (
            "metrics.jsonl",
            b'{"step": 4, "epoch": 0.5, "loss": 1e-300, "phase": [3]}\n{"step": 3, "loss": -1e299}\n',
        ),
    ],
)
def test_what_is_half_or_strange_in_a_run_is_passed_over(tmp_path, name, data):
    run = tmp_path / "run"
    write_records(run, make_config(), done=None)
    (run / name).unlink(missing_ok=True)
    if data is not None:
        (run / name).write_bytes(data)
    main([str(run), "--images", "0"])
    assert "Loss" in Page(run / "report.html").charts


def write(name, data):
    """A change of a run: a file with these bytes, or None for none."""

    def change(run):
        path = run / name
        path.unlink(missing_ok=True)
        if isinstance(data, str):
            path.write_text(data)

    return change


def make_folder(name):
    def change(run):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return change


def change_config(old, new):
    return lambda run: (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(old, new, 1)
    )


# name: (what is done to the run, words of the command line, what the line says). RUN stands for the run.
MISTAKES = {
    "no run": (None, "none", "no run at none"),
    "a file as run": (None, "mine", "mine is a file"),
    "a name that no file can have": (None, "x" * 300, "no run at xxx"),
    "a directory without a run": (None, "empty", "empty is not a run directory: it has no config.yaml"),
    "a checkpoint as run": (None, "checkpoint", "checkpoint is a checkpoint: give its run directory"),
    "no argument": (None, "", "give RUN [RUN ...]: python -m caco_scale.report --help"),
    "a second run that is none": (None, "RUN none", "no run at none"),
    "a run twice": (None, "RUN RUN", "named twice"),
    "too many runs": (None, "RUN RUN RUN RUN RUN RUN RUN", "7 runs are more than can be told apart"),
    "a typo": (None, "RUN --too page.html", "unknown flag --too (did you mean --to?)"),
    "an abbreviated flag": (None, "RUN --imag 3", "unknown flag --imag (did you mean --images?)"),
    "no target": (None, "RUN --to", "--to has no value"),
    "images below zero": (None, "RUN --images -1", "--images"),
    "images in words": (None, "RUN --images all", "--images"),
    "a directory as target": (None, "RUN --to empty", "empty is a directory"),
    "a target in no directory": (None, "RUN --to none/page.html", "there is no directory none"),
    "a target below a file": (None, "RUN --to mine/page.html", "there is no directory mine"),
    "a device as target": (None, "RUN --to /dev/full", "is no ordinary file"),
    "no config": (write("config.yaml", None), "RUN", "it has no config.yaml"),
    "a config that is a directory": (make_folder("config.yaml"), "RUN", "it has no config.yaml"),
    "a config that is no YAML": (write("config.yaml", "{"), "RUN", "is not a YAML file"),
    "an empty config of another program": (write("config.yaml", "- 1"), "RUN", "holds no sections"),
    "a config with an unknown field": (
        write("config.yaml", "bank: {sise: 3}"),
        "RUN",
        "did you mean bank.size",
    ),
    "a config with a wrong type": (write("config.yaml", "bank: {size: many}"), "RUN", "bank.size is 'many'"),
    "a config with an impossible value": (
        change_config("embedding_dim: 4", "embedding_dim: 0"),
        "RUN",
        "embedding_dim is 0",
    ),
    "no metrics": (write("metrics.jsonl", None), "RUN", "has no metrics to show"),
    "empty metrics": (write("metrics.jsonl", ""), "RUN", "after 50 steps (run.log_every)"),
    "metrics that are not": (write("metrics.jsonl", "loss 3\nloss 2\n"), "RUN", "has no metrics to show"),
    "metrics without a step": (write("metrics.jsonl", '{"loss": 3}\n'), "RUN", "has no metrics to show"),
    "metrics without a loss": (
        write("metrics.jsonl", '{"step": 0, "knn_top1": 3}\n'),
        "RUN",
        "holds no loss",
    ),
    "metrics of a loss in words": (
        write("metrics.jsonl", '{"step": 1, "loss": "3"}\n'),
        "RUN",
        "holds no loss",
    ),
    "metrics that are a directory": (make_folder("metrics.jsonl"), "RUN", "metrics.jsonl is a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, name):
    fault, words, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/values.json").write_text("{}")
    write_records(tmp_path / "run", make_config())
    if fault:
        fault(tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        main(words.replace("RUN", "run").split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.rglob("*.html*"))
    assert (tmp_path / "mine").read_text() == "mine"


def test_without_matplotlib_the_line_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "caco_scale.report.curves", raising=False)
    monkeypatch.delitem(sys.modules, "caco_scale.report.page", raising=False)
    with pytest.raises(UserError, match=r"needs matplotlib: pip install matplotlib"):
        write_report([run], tmp_path / "page.html")


def test_the_command(tmp_path):
    write_records(tmp_path / "run", make_config())
    command = [sys.executable, "-m", "caco_scale.report", "run", "--images", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote run/report.html (")
    assert "Loss" in Page(tmp_path / "run/report.html").charts


def test_runs_of_one_name_get_as_much_of_their_paths_as_tells_them_apart(tmp_path):
    for name in ("a/x/run", "b/x/run"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_records(tmp_path / name, make_config())
    assert [r.name for r in read_runs([tmp_path / "a/x/run", tmp_path / "b/x/run"])] == ["a/x/run", "b/x/run"]
    assert [r.name for r in read_runs([tmp_path / "a/x/run"])] == ["run"]


def test_pictures_by_a_backbone_of_ones_own_come_where_it_is_named(shards, tmp_path, capsys):
    arch, folder = "own_nets:net", tmp_path / "run"
    config = make_config(
        data__shards=shards[0], data__val_shards=shards[1], model__arch=arch, model__stem="imagenet"
    )
    write_records(folder, config)
    values = {"epoch": 5.0, "config": configuration.to_dict(config)}
    save_checkpoint(folder, trained_model(arch, "imagenet"), 40, **values)
    main([str(folder), "--images", "16"])
    assert f"code of its own: give --arch {arch} to run it" in capsys.readouterr().err
    assert not Page(folder / "report.html").images
    main([str(folder), "--images", "16", "--arch", arch])
    assert "No pictures" not in capsys.readouterr().err
    assert len(Page(folder / "report.html").images) > 100


# ----------------------------------------------------------------------------------------------------
# In a real browser

# What lies outside of the window, or of the drawing that it is part of, and cannot be scrolled to.
CUT_OFF = """
(() => {
  const width = document.documentElement.clientWidth, found = [];
  const scrolls = (e) => e && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
  for (const e of document.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1) && !scrolls(e)) found.push(e.tagName + " " + e.className);
    if (!(e instanceof SVGElement) && !scrolls(e) && e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
      found.push("wider inside: " + e.tagName + " " + e.className);
  }
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
    const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.top >= frame.top - 1;
    if (!inside || box.bottom > frame.bottom + 1) found.push("cut in a chart: " + text.textContent);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if program is None:
        give_up = pytest.fail if os.environ.get("CACO_REQUIRE_CHROMIUM") else pytest.skip
        give_up("no Chromium found: install the package chromium, or name one with CACO_CHROMIUM")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(page_path, run, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    long_name = folder / "a_run_whose_name_is_longer_than_any_telephone_is_wide_without_a_single_blank"
    make_run(long_name, shards, metrics=metrics_lines(steps=56), attempts=3)
    both = write_report([run, long_name], folder / "both.html", images=16)
    return {"one run": page_path, "two runs": both, "first": run, "second": long_name}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["one run", "two runs"])
def test_the_page_opens_whole_in_a_real_browser(browser, pages, which, width, dark):
    browser.open(pages[which], width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CUT_OFF) == []
    sizes = browser.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(sizes) >= 100
    assert min(sizes) == 32
    assert min(browser.evaluate("[...document.images].map((image) => image.width)")) >= 32  # CSS pixels
    charts = browser.evaluate(
        "[...document.querySelectorAll('.chart svg')].map((e) => e.getBoundingClientRect().height)"
    )
    assert len(charts) == 13
    assert min(charts) > 100
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background[4:-1].split(",")) / 3
    assert brightness < 60 if dark else brightness > 200
    assert [url for url in browser.requests if not url.startswith("data:")] == [
        Path(pages[which]).absolute().as_uri()
    ]
    assert browser.errors == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_of_rows_of_pictures_opens_whole_in_a_real_browser(browser, tmp_path, width):
    uri = data_uri(np.zeros((32, 32, 3), np.uint8))
    name = "a folder, älter/" + "x" * 120 + ".jpg"
    pictures = [Picture(name, f"{1 - i / 100:.4f}", uri, i % 2 == 1) for i in range(MOST_PICTURES + 1)]
    path = tmp_path / "near.html"
    write_page(
        path, f"Nearest images in {name}", [f"Among images of {name}."], [Row(name, name, pictures)] * 2
    )
    browser.open(path, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CUT_OFF) == []
    assert min(browser.evaluate("[...document.images].map((image) => image.width)")) >= 64  # CSS pixels
    ends = "[document.querySelector('main').getBoundingClientRect().bottom, document.body.scrollHeight]"
    last, page = browser.evaluate(ends)
    assert last < page - 20  # the last row does not touch the end of the page
    assert browser.errors == []


def test_pointing_at_a_chart_reads_its_figures(browser, pages):
    browser.open(pages["one run"], 1280)
    x, y = browser.evaluate(
        "(() => { const b = document.querySelector('.plot').getBoundingClientRect();"
        " return [b.left + 0.97 * b.width, b.top + b.height / 2]; })()"
    )
    reading = "document.querySelector('.reading').textContent"
    assert "last" in browser.evaluate(reading)
    browser.move_to(x, y)
    assert "epoch 5, step 40" in browser.evaluate(reading)
    assert write_number(12 / 40**0.2, 4) in browser.evaluate(reading)
    browser.move_to(5, 5)
    assert "last" in browser.evaluate(reading)
    assert browser.errors == []


def test_the_page_of_runs_is_sorted_by_the_keyboard(browser, tmp_path):
    rows = [
        OverviewRow("a", "failed", best_knn=50.0),
        OverviewRow("b", "finished"),
        OverviewRow("c" * 200, "running", best_knn=70.0),
    ]
    (tmp_path / "runs.html").write_bytes(to_page(rows, "3 runs"))
    browser.open(tmp_path / "runs.html", 1280)
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    names = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent[0]).join('')"
    while browser.evaluate("document.activeElement.textContent") != "best kNN":
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.tagName") in ("BUTTON", "DIV")
    for order, wanted in (("descending", "cab"), ("ascending", "acb")):
        browser.press("Enter", text="\r")
        assert browser.evaluate(names) == wanted
        assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == order
    assert browser.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
    for width in (1280, 390):
        browser.open(tmp_path / "runs.html", width, dark=True)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.errors == []


# Texts whose colour is too near to what is behind them, by WCAG 2's contrast: 4.5, and 3 for large ones.
LOW_CONTRAST = """
(() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);
  const behind = (e) => {
    if (!e) return [255, 255, 255];
    const colour = parse(getComputedStyle(e).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(e.parentElement));
  };
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || !e.getClientRects().length || style.visibility === "hidden") continue;
    if (e.closest("script, style")) continue;
    texts += 1;
    const colour = parse(e instanceof SVGElement ? style.fill : style.color);
    const below = behind(e.closest("svg")?.parentElement ?? e);
    const [a, b] = [light(over(colour, below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const isLarge = parseFloat(style.fontSize) >= 24;
    const words = walker.currentNode.data.trim().slice(0, 30);
    if (ratio < (isLarge ? 3 : 4.5)) found.add(`${ratio.toFixed(2)} ${e.tagName} ${e.getAttribute("class")}: ${words}`);
  }
  return texts > 100 ? [...found] : [`only ${texts} texts`];
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("which", ["one run", "two runs"])
def test_texts_stand_out_from_what_is_behind_them(browser, pages, which, dark):
    browser.open(pages[which], 1280, dark=dark)
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")  # unfolds what is folded
    assert browser.evaluate(LOW_CONTRAST) == []


def table(text):
    return [line.split("\t") for line in text.splitlines()]


@pytest.mark.parametrize("clipboard", ["the browser's", "none, as in a page of http", "one that refuses"])
def test_the_data_of_a_chart_is_copied_by_the_keyboard(browser, pages, clipboard):
    browser.open(pages["two runs"], 1280)
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    instead = {
        "none, as in a page of http": "undefined",
        "one that refuses": "{ writeText: () => Promise.reject(new DOMException('no', 'NotAllowedError')) }",
    }
    if clipboard in instead:
        value = instead[clipboard]
        browser.evaluate(f"Object.defineProperty(navigator, 'clipboard', {{ value: {value} }}) && 0")
    browser.evaluate("document.querySelector('nav a:last-child').focus()")
    while browser.evaluate("document.activeElement.className") != "copy":
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.tagName") in ("SUMMARY", "BUTTON")
    assert browser.evaluate("document.activeElement.getAttribute('aria-label')") == "copy data of Loss"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", text="\r")
    said = "new Promise((done) => setTimeout(() => done(document.querySelector('.said')?.textContent), 200))"
    assert browser.evaluate(said) == "48 lines copied"
    assert browser.evaluate("document.querySelector('.said').getAttribute('role')") == "status"
    assert browser.evaluate("document.activeElement.getAttribute('aria-label')") == "copy data of Loss"
    assert browser.evaluate("document.querySelectorAll('.copying').length") == 0
    copied = table(browser.pasted())
    names = [run.name for run in read_runs([Path(pages["first"]), Path(pages["second"])])]
    assert copied[0] == ["run", "epoch", "step", "loss"]
    assert {row[0] for row in copied[1:]} == set(names)
    losses = {line["step"]: line["loss"] for line in metrics_lines() if "loss" in line}
    first = [row for row in copied[1:] if row[0] == names[0]]
    assert [int(row[2]) for row in first] == list(losses)
    assert [float(row[3]) for row in first] == pytest.approx(list(losses.values()), rel=1e-6)
    assert [float(row[1]) for row in first] == pytest.approx([step / 8 for step in losses], rel=1e-4)
    assert browser.errors == []


def test_where_nothing_may_be_copied_the_data_lies_ready_to_be_copied_by_hand(browser, pages):
    browser.open(pages["one run"], 390)
    browser.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined }) && 0")
    browser.evaluate("(document.execCommand = () => false, document.querySelector('.copy').click())")
    shown = "(() => { const t = document.querySelector('.copying'); const b = t.getBoundingClientRect();"
    shown += " return [t.selectionEnd - t.selectionStart, t.value.length, t === document.activeElement,"
    shown += " b.left >= 0, b.right]; })()"
    selected, length, is_active, begins, right = browser.evaluate(shown)
    assert selected == length > 100
    assert is_active
    assert begins
    assert right <= 390
    assert browser.evaluate("document.querySelector('.said').textContent") == "press Ctrl+C to copy"
    browser.evaluate("document.activeElement.blur()")
    assert browser.evaluate("document.querySelectorAll('.copying, .said').length") == 0


def test_the_data_of_the_map_is_copied_with_images_and_classes(browser, run, tmp_path):
    path = write_report([run], tmp_path / "p.html", map_method="pca")
    browser.open(path, 1280)
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    browser.evaluate("document.querySelector('.mapped .copy').focus()")
    browser.press("Enter", text="\r")
    said = "new Promise((done) => setTimeout(() => done(document.querySelector('.said')?.textContent), 200))"
    assert browser.evaluate(said) == "32 lines copied"
    head, *rows = table(browser.pasted())
    assert head[:2] == ["image", "class"]
    assert head[2].startswith("first component: ")
    assert [row[:2] for row in rows] == [[str(n), f"class{n % 4}"] for n in range(32)]
    places, _ = pictures.principal_components(
        features_of(trained_model("tiny", "cifar").query.backbone.eval(), crops_of(shards_of(run)[1])).float()
    )
    assert [float(row[2]) for row in rows] == pytest.approx(places[:, 0].tolist(), rel=1e-2, abs=1e-4)


A4_WIDTH, A4_HEIGHT = 703, 1016  # CSS pixels between the margins


@pytest.mark.parametrize("which", ["one run", "two runs"])
def test_on_paper_the_page_is_light_whole_and_without_controls(browser, pages, which):
    browser.open(pages[which], 1280, dark=True)
    browser.print_media(A4_WIDTH)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate(LOW_CONTRAST) == []
    assert (
        browser.evaluate(
            "[...document.querySelectorAll('nav, .copy, .cursor')].filter((e) => e.getClientRects().length).length"
        )
        == 0
    )
    assert browser.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= A4_WIDTH
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate("getComputedStyle(document.documentElement).printColorAdjust") == "exact"
    figures = browser.evaluate(
        "[...document.querySelectorAll('.chart, .row, .mapped, .tiles > div')].map((e) =>"
        " [e.getBoundingClientRect().height, getComputedStyle(e).breakInside])"
    )
    assert len(figures) > 25
    assert {inside for _, inside in figures} == {"avoid"}
    assert max(height for height, _ in figures) < A4_HEIGHT / 2
    browser.evaluate("dispatchEvent(new Event('afterprint'))")
    sizes = set(re.findall(rb"/MediaBox\s*\[([^\]]*)\]", browser.pdf()))
    assert len(sizes) == 1
    assert [float(number) for number in sizes.pop().split()] == pytest.approx([0, 0, 595.3, 841.9], abs=1)
    assert browser.errors == []
