"""Shards in Azure's blob storage: built, verified, read and repaired through Microsoft's own emulator, Azurite."""

import base64
import fcntl
import hashlib
import hmac
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from email.utils import formatdate

import pytest
from s3_server import cache_of_tests, end_processes, end_with_parent, free_port
from test_data_prep import command, write_tree

from caco_scale.data.object_store import Remote
from caco_scale.data.store import open_store
from caco_scale.errors import UserError
from data_prep.build import build
from data_prep.verify import verify

ACCOUNT, CONTAINER = "devstoreaccount1", "shards"
# Azurite's published key, which every installation has.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def azurite():
    """The emulator's program, installed once from npm; skips with the reason where it cannot be had."""
    if not shutil.which("npm"):
        pytest.skip("no Azurite: npm is not installed")
    folder = cache_of_tests() / "azurite"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "azurite.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "azurite"]
            done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=600)
            if done.returncode:
                pytest.skip(f"no Azurite: npm install failed: {done.stderr.strip()[-200:]}")
            (folder / "complete").touch()
    return folder / "node_modules/.bin/azurite-blob"


def make_container(endpoint):
    """PUT with Azure's shared-key signature."""
    date = formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    lines = ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())]
    lines += [f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}", "restype:container"]
    digest = hmac.new(base64.b64decode(KEY), "\n".join(lines).encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    request = urllib.request.Request(
        f"{endpoint}/{CONTAINER}?restype=container", method="PUT", headers=headers
    )
    urllib.request.urlopen(request, timeout=20).close()


@pytest.fixture
def container(tmp_path, monkeypatch):
    """The address of an empty container; the environment names the emulator and its key."""
    program, port = azurite(), free_port()
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(tmp_path / "azurite")]
    options += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([str(program), *options], preexec_fn=end_with_parent)
    try:
        endpoint, deadline = f"http://127.0.0.1:{port}/{ACCOUNT}", time.monotonic() + 120
        while True:
            try:
                make_container(endpoint)
                break
            except urllib.error.HTTPError:
                raise
            except OSError:
                assert process.poll() is None, "Azurite ended"
                assert time.monotonic() < deadline, "Azurite does not start"
                time.sleep(0.2)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
        yield f"az://{CONTAINER}"
    finally:
        end_processes([process])


@pytest.mark.slow
def test_a_set_in_azure_is_built_read_verified_and_repaired(container, tmp_path):
    tree, url = write_tree(tmp_path / "images"), f"{container}/set"
    [(local, manifest, _)] = build(tree, tmp_path / "set", samples_per_shard=8, workers=1)
    done = command("build", tree, url, "--samples-per-shard", 8, "--workers", 2)
    assert done.returncode == 0, done.stderr
    remote = Remote(url)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir() if path.is_file()}
    assert {name: remote.read_whole(name) for name in remote.listing()} == expected
    assert verify(url, full=True, workers=1) == [(url, manifest)]
    for cache in ("none", str(tmp_path / "cache")):
        store, on_disk = open_store(url, cache), open_store(local)
        for shard in range(len(manifest.shards)):
            for start in (0, 512, 3_000):
                assert store.read(shard, start, 700) == on_disk.read(shard, start, 700)
    remote.write("000001.tar", expected["000001.tar"][:-1] + b"?")
    with pytest.raises(UserError, match=r"1 of \d+ shards are bad"):
        verify(url, full=True, workers=1)
    done = command("repair", tree, url, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert remote.read_whole("000001.tar") == expected["000001.tar"]
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        open_store(f"{container}/nothing", "none")
