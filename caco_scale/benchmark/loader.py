"""The loader against torchvision, with PIL images and with tensors (v2), on the same JPEGs, in one run.

What counts is images per second of CPU time, of which a training machine has too little; the median of the rounds. All
make the two views of the method from every image, and a row is compared with torchvision's of the same work: "crops"
are read, decoded, cut and resized to uint8, where the loader's workers stop, who leave the rest to the training device;
"all" is colour, blur and normalising on this CPU, too.
"""

import functools
import http.server
import io
import multiprocessing
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np

from caco_scale.benchmark.measure import Contender, Measured, Round, in_turn, median, significant
from caco_scale.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_IMAGES = 5_000  # they are copied
DRAWN_IMAGES, DRAWN_CLASSES, DRAWN_SIZE = 240, 8, (375, 500)


def measure(images: str | Path | None, rounds: int, batch: int, size: int) -> Measured:
    """``{"images": ..., "peers": {...}, "rows": [...]}`` of a folder of class folders (None: drawn), and notes."""
    from caco_scale.data.augment_cpu import absent
    from data_prep.build import build
    from data_prep.destination import scratch_folder

    with scratch_folder("benchmark") as folder:
        if images is None:
            images = draw_images(Path(folder, "images"))
        shards = Path(folder, "shards")
        _check_images(images, build(images, shards, dry_run=True) if os.path.isdir(images) else [])
        [(_, manifest, _)] = build(images, shards, samples_per_shard=64, workers=1)
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(str(shards), f"{folder}/port")
        )
        server.start()
        try:
            url = _address(f"{folder}/port", server)
            count = manifest.num_samples // batch * batch
            if not count:
                raise UserError(
                    f"{images} has {manifest.num_samples} images, fewer than one batch of {batch}"
                )
            ours = functools.partial(read_batches, batch=batch, size=size)
            theirs = functools.partial(read_image_folder, str(images), count=count, size=size)
            contenders = {
                "crops: torchvision, PIL": functools.partial(theirs, augmented=False),
                "crops: torchvision, v2": functools.partial(
                    read_tensors, str(images), count=count, size=size
                ),
                "crops: loader": functools.partial(ours, str(shards), "none"),
                "crops: loader, web, no cache": functools.partial(ours, url, "none"),
                "crops: loader, web, cold cache": functools.partial(ours, url, f"{folder}/cold", cold=True),
                "crops: loader, web, warm cache": functools.partial(ours, url, f"{folder}/warm"),
                "all: torchvision, PIL": theirs,
                "all: loader": functools.partial(ours, str(shards), "none", augmented=True),
            }
            makers = {name: functools.partial(_prepared, contender) for name, contender in contenders.items()}
            measured = in_turn(makers, rounds, values=False)
        finally:
            server.terminate()
            server.join()
        mean_bytes = round(manifest.num_bytes / manifest.num_samples)
    rows = [_row(name, count, rounds_of) for name, rounds_of in measured.items()]
    rates, peers = {row["what"]: row["images_per_cpu_second"] for row in rows}, _versions()
    for row in rows:
        work, _ = row["what"].split(":")
        row["ratio"] = round(row["images_per_cpu_second"] / rates[f"{work}: torchvision, PIL"], 2)
    result = {
        "images": count,
        "mean_bytes": mean_bytes,
        "size": size,
        "rounds": rounds,
        "peers": peers,
        "rows": rows,
    }
    notes = [
        f"{count:,} images of {mean_bytes:,} bytes on average, two views of {size} pixels, one thread",
        "ratio: to torchvision with PIL at the same work; " + ", ".join(f"{p} {v}" for p, v in peers.items()),
    ]
    return result, [*notes, *filter(None, [absent()])]


def _check_images(images: str | Path, plan: list[Any]) -> None:
    """UserError for what torchvision's ImageFolder does not read, and for more than is measured quickly."""
    if len(plan) != 1:
        what = f"has {len(plan)} splits" if plan else "is no folder"
        raise UserError(f"--images {images} {what}: give one folder of class folders, such as .../val")
    count = plan[0][1]
    if count > MOST_IMAGES:
        raise UserError(
            f"--images {images} has {count:,} images, which would be copied: give a folder of at most {MOST_IMAGES:,}"
        )


def _versions() -> dict[str, str]:
    import PIL
    import torchvision

    return {"torchvision": torchvision.__version__, "pillow": PIL.__version__}


def _prepared(contender: Contender) -> Contender:
    return contender


def _row(name: str, count: int, measured: list[Round]) -> dict[str, Any]:
    figures = {
        "images_per_cpu_second": count / median(measured, "cpu_seconds"),
        "images_per_second": count / median(measured, "seconds"),
        "peak_mb": median(measured, "peak_bytes") / 1e6,
    }
    return {"what": name, **{figure: significant(value) for figure, value in figures.items()}}


def read_image_folder(folder: str, count: int, size: int, augmented: bool = True) -> int:
    """Two views of ``count`` images as the usual training script makes them, or their crops alone, uint8."""
    from PIL import ImageFilter, ImageOps
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    blur = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    solarize = transforms.Lambda(ImageOps.solarize)

    def view(blur_p, solarize_p):
        if not augmented:
            return transforms.Compose(
                [transforms.RandomResizedCrop(size, (0.2, 1.0)), transforms.PILToTensor()]
            )
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, (0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                transforms.RandomGrayscale(0.2),
                transforms.RandomApply([blur], blur_p),
                transforms.RandomApply([solarize], solarize_p),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    first, second = view(1.0, 0.0), view(0.1, 0.2)
    data = ImageFolder(folder, transform=lambda image: (first(image), second(image)))
    for number in random.sample(range(len(data)), count):
        data[number]
    return count


def read_tensors(folder: str, count: int, size: int) -> int:
    """The crops of two views of ``count`` images by torchvision's v2 transforms of tensors, uint8."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    view = v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True)
    data = ImageFolder(
        folder,
        transform=lambda image: (view(image), view(image)),
        loader=functools.partial(decode_image, mode=ImageReadMode.RGB),
    )
    for number in random.sample(range(len(data)), count):
        data[number]
    return count


def read_batches(
    url: str, cache_dir: str, *, batch: int, size: int, augmented: bool = False, cold: bool = False
) -> int:
    """Two views of one epoch from a shard set, in this process. ``cold``: the cache directory is emptied before."""
    from caco_scale.data.augment import augment
    from caco_scale.data.loader import train_batches
    from caco_scale.data.order import Order
    from caco_scale.data.store import open_store
    from caco_scale.data.views import ViewSpec

    if cold:
        shutil.rmtree(cache_dir, ignore_errors=True)
    store = open_store(url, cache_dir)
    if not cold:
        for shard in range(len(store.manifest.shards)):
            store.fetch(shard)
    order = Order(store.manifest.shards.counts, seed=0, global_batch_size=batch)
    views = [
        ViewSpec(size, (0.2, 1.0), blur_p=1.0),
        ViewSpec(size, (0.2, 1.0), blur_p=0.1, solarize_p=0.2),
    ]
    topology: dict[str, Any] = {"rank": 0, "world_size": 1, "workers": 0, "seed": 0}
    count = 0
    for made in train_batches(store, order, views, start_step=0, num_steps=order.steps_per_epoch, **topology):
        count += len(made.keys)
        if augmented:
            for crops, params in zip(made.crops, made.params, strict=True):
                augment(crops, params, MEAN, STD)
    return count


def draw_images(folder: Path) -> Path:
    """An image folder of drawn JPEGs with the size and detail of photographs (about 100 kB each)."""
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = DRAWN_SIZE
    for number in range(DRAWN_IMAGES):
        place = folder / f"class{number % DRAWN_CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3)).astype(np.uint8))
        image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        image = np.clip(image + rng.normal(0, 14, image.shape), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=88)
        (place / f"{number:04d}.jpg").write_bytes(out.getvalue())
    return folder


# ----------------------------------------------------------------------------------------------------
# A web server on this machine stands for the object store


def serve(folder: str, port_file: str) -> None:
    """Serve the files of a folder, ranges included, until terminated; writes its port to ``port_file``."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, format, *args):
            pass

        def do_GET(self):
            part, path = self.headers.get("Range"), self.translate_path(self.path)
            if not part or not os.path.isfile(path):
                return super().do_GET()
            first, last = (int(number) for number in part.removeprefix("bytes=").split("-"))
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), last - first + 1, first)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{os.path.getsize(path)}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", self.date_time_string(os.path.getmtime(path)))
            self.end_headers()
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Path(port_file + ".new").write_text(str(server.server_address[1]))
    os.replace(port_file + ".new", port_file)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server.serve_forever()


def _end_with_parent():
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _address(port_file: str, process: multiprocessing.process.BaseProcess) -> str:
    while not os.path.exists(port_file):
        process.join(0.05)
        if process.exitcode is not None:
            raise UserError("the web server of the benchmark did not start")
    return f"http://127.0.0.1:{Path(port_file).read_text()}"
