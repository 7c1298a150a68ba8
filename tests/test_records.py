"""The pages' measured figures have records, and both say the same."""

import re

from launch import ROOT
from pages import PAGES

BENCHMARKS = ROOT / "tests/benchmarks"


def test_every_record_is_there_and_its_words_stand_on_a_page():
    pages = (*PAGES, "caco_scale/recipes/caco_vitb16_300ep.yaml")
    text = " ".join(" ".join((ROOT / page).read_text().replace("\n#", "\n").split()) for page in pages)
    rows = re.findall(
        r'^\| ("[^\n]*") \| ([^\n]*) \|$', (BENCHMARKS / "RECORDS.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 10
    said = [words.replace("\\|", "|") for quoted, _ in rows for words in re.findall('"([^"]+)"', quoted)]
    assert [words for words in said if words not in text] == []
    kept = {name for _, record in rows for name in re.findall(r"`([\w.-]+\.(?:json|md))`", record)}
    assert {name for name in kept if not (BENCHMARKS / name).exists()} == set()
    assert {path.name for path in BENCHMARKS.glob("*.json")} - kept == set()
