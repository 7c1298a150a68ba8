"""README and guides: links lead somewhere, Python compiles, commands exist, and what takes seconds is run."""

import ast
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import yaml
from launch import ROOT, environment, finished
from pages import OTHERS, PAGES, blocks
from pages import SHELL as STARTS
from PIL import Image

from caco_scale.config import parse
from caco_scale.evaluate.__main__ import COMMANDS
from caco_scale.examples.images import draw_images
from caco_scale.flags import read as flags

EVERY = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in EVERY if block.language == "sh"]
RUN = sorted({block.page for block in EVERY if block.runs})

# What makes a training run of a page short; a flag that the page gives wins.
SMALL = {
    "data.global_batch_size": 16,
    "data.workers": 0,
    "views.size": 32,
    "bank.size": 64,
    "bank.warmup_epochs": 0,
    "bank.warmup_ramp_steps": 2,
    "model.projector_hidden": 16,
    "model.embedding_dim": 8,
    "optim.epochs": 2,
    "optim.warmup_epochs": 0,
    "eval.knn_every": 0,
    "eval.baselines": False,
    "run.max_steps": 3,
    "run.log_every": 1,
    "run.finish": "none",
}
SETS = {"data.shards": "data/mine/train", "data.val_shards": "data/mine/val"}  # the demo's, smaller


# ---- what every page must be


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES + OTHERS)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in found:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_guide_is_reached_from_the_first_page():
    seen, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in re.findall(r"\]\(([^)\s#]+\.md)[)#]", (ROOT / page).read_text()):
            if "://" not in link:
                waiting.append(str(((ROOT / page).parent / link).resolve().relative_to(ROOT)))
    assert set(PAGES) - seen == set()


def test_the_first_page_is_one_screen_and_its_pictures_are_small():
    assert len((ROOT / "README.md").read_text().split()) <= 1300
    sizes = {path.name: path.stat().st_size for path in (ROOT / ".github/pictures").iterdir()}
    assert set(sizes) == {"step.svg", "report.png"}
    assert max(sizes.values()) < 300_000


@pytest.mark.parametrize("page", PAGES)
def test_a_block_says_what_it_is_and_what_it_needs(page):
    for block in blocks(page):
        assert block.language in ("sh", "python", "text"), block
        assert block.mark == "" or block.runs or block.needs, block
        if block.language == "sh" and not block.runs:
            far = re.search(
                r"s3://|\bsrun\b|\bsbatch\b|slurm/submit|--num_processes (8|16)\b|--gpus\b", block.text
            )
            assert not far or block.needs or "estimate" in far.string, block


@pytest.mark.parametrize("page", PAGES)
def test_python_on_a_page_compiles(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)
            block.runs and ast.parse(block.as_run())


# ---- commands: the trainer's and the others' are read by test_cli.py


def test_every_line_starts_a_program_that_is_known():
    for block in SHELL:
        for line in block.commands():
            assert STARTS.match(f"{line} "), line
            for name in re.findall(r"(?<![\w/.])(?:slurm|ds_configs|tests|\.ci)/[\w./-]*\w", line):
                assert (ROOT / name).exists() or name == "slurm/site.sh", line


def test_the_job_scripts_get_flags_that_there_are():
    read = 0
    for block in SHELL:
        for line in block.commands():
            call = re.match(r"(?:\w+=\S+ )*((?:sbatch|slurm/submit\.sh) .*)", line)
            if not call:
                continue
            script, *words = shlex.split(call[1])
            if script == "sbatch":
                name, *words = words
                assert (ROOT / name).is_file(), line
            if "linear" in line:
                flags.read(COMMANDS["linear"], words, "linear")
            elif "build_shards" not in line:
                after = words[words.index("--") + 1 :] if "--" in words else words
                parse(["demo", *after] if script == "sbatch" or "--" in words else ["demo"])
            read += 1
    assert read > 3


# ---- and what takes seconds is run


def photographs(folder, count=32, seed=0):
    pixels, labels = draw_images(count, seed=seed)
    names = np.array(["cat", "dog", "owl", "yak"])[labels]
    for number, (image, name) in enumerate(zip(pixels, names, strict=True)):
        path = folder / name / f"{number // 4 + 1}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=95)
    return sorted(folder.rglob("*.jpg"))


def say(words, home):
    done = finished([sys.executable, *words], home, env=environment())
    assert done.returncode == 0, f"{shlex.join(map(str, words))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def as_flags(given):
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def first_home(tmp_path_factory):
    """A user's folder: photographs, a list, parquet files, scans, built sets, and two short runs."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    home = tmp_path_factory.mktemp("home")
    files = photographs(home / "photos")
    photographs(home / "more", seed=1)
    for seed, split in enumerate(("train", "val"), start=2):
        photographs(home / "pictures" / split, seed=seed)
    shutil.copy(home / "photos/dog/1.jpg", home / "dog.jpg")
    rows = [f"{path.relative_to(home)},{path.parent.name}" for path in files]
    (home / "images.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    (home / "beans").mkdir()
    table = pa.table({"image": images, "labels": [len(path.parent.name) % 3 for path in files]})
    pq.write_table(table, home / "beans/train-00000-of-00001.parquet")
    (home / "scans/plate").mkdir(parents=True)
    for number in range(32):
        scan = np.random.default_rng(number).integers(0, 2**16, (40, 40), np.uint16)
        Image.fromarray(scan).save(home / f"scans/plate/{number:02d}.png")
    (home / "ds_configs").symlink_to(ROOT / "ds_configs")
    say(["-m", "data_prep", "build", "pictures", "data/mine", "--samples-per-shard", "20"], home)
    for name, recipe in (("demo", "demo"), ("resnet", "own_images_small")):
        given = as_flags({**SMALL, **SETS, "run.dir": f"runs/{name}"})
        say(["-m", "caco_scale.pretrain", recipe, *given], home)
    study = {"recipe": "demo", "flags": SMALL, "runs": {"caco": {}, "moco": {"bank.rule": "moco"}}}
    (home / "study.yaml").write_text(yaml.safe_dump(study))
    return home


def as_words(line, home):
    """A line of a page as a process's words after ``python``: this user's folders, and short where it trains."""
    line = re.sub(r"(?<=[ =])~/", f"{home}/", line)
    line = re.sub(r"(?<=[ =])/data/", "data/", line)
    line = re.sub(r'"\$\(caco path ([\w./]+)\)"', rf"{ROOT}/\1", line)
    program, *words = shlex.split(line)
    words = {
        "caco": ["-m", "caco_scale"],
        "caco-shards": ["-m", "data_prep"],
        "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
        "python": [],
    }[program] + words
    if "pretrain" in words or "caco_scale.pretrain" in words:
        sets = {} if "--data.shards" in words or "--data.mix" in words else SETS
        words += as_flags({name: v for name, v in (SMALL | sets).items() if f"--{name}" not in words})
    return words


@pytest.mark.long
@pytest.mark.parametrize("page", RUN)
def test_what_a_page_shows_runs(page, first_home, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(first_home, home, symlinks=True)
    if any("pictures /data/mine" in block.text for block in blocks(page)):
        shutil.rmtree(home / "data/mine")
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "python":
            say(["-c", f"SMALL = {SMALL!r}\n{block.as_run()}"], home)
            continue
        for line in block.commands():
            say(as_words(line, home), home)
