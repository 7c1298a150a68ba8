"""The pages of the project: which there are, and the blocks of commands and of Python in them."""

import re
from typing import NamedTuple

from launch import ROOT

FOLDERS = ("caco_scale", "data_prep", "ds_configs", "slurm", "tests")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / folder).rglob("README.md")),
]
# Pages without commands of their own, whose links and words are looked at, too.
OTHERS = ["CHANGELOG.md", *(f"tests/benchmarks/{name}.md" for name in ("RECORDS", "STUDIES", "TRIED"))]
PYTHON = "caco caco-shards python python3 accelerate torchrun pip pytest pre-commit jupyter"
PROGRAMS = rf"{PYTHON} bash cp docker apptainer enroot srun sbatch slurm/\S+".split()
SHELL = re.compile(rf"(?:\w+=\S+ )*(?:{'|'.join(PROGRAMS)})\s")
MARK = re.compile(r"<!-- (.*) -->")


class Block(NamedTuple):
    """A block of a page. ``mark``: what the comment above it says, "" where there is none."""

    page: str
    language: str  # sh, python, or what else stands there
    mark: str
    text: str

    @property
    def runs(self) -> bool:
        return re.match("runs\\b", self.mark) is not None

    @property
    def needs(self) -> str:
        """What it takes that is not here: "a bucket"."""
        return self.mark.removeprefix("needs: ") if self.mark.startswith("needs: ") else ""

    def as_run(self) -> str:
        """The text with the replacements of its mark, ``<!-- runs: OLD => NEW; OLD => NEW -->``."""
        text = self.text
        for pair in filter(None, self.mark.removeprefix("runs").removeprefix(": ").split("; ")):
            old, new = pair.split(" => ")
            assert old in text, f"{self.page}: {old!r} is not in the block that it is to be replaced in"
            text = text.replace(old, new)
        return text

    def commands(self) -> list[str]:
        """The command lines of a block of a shell, as it runs, without comments."""
        text = re.sub(r" *\\\n *", " ", self.as_run() if self.runs else self.text)
        lines = (re.sub(r"(^| +)# .*", "", line).strip() for line in text.splitlines())
        return [line for line in lines if line]


def blocks(page: str) -> list[Block]:
    """Every block of a page, between fences or of four spaces, in its order."""
    found, mark, lines = [], "", (ROOT / page).read_text().splitlines()
    while lines:
        line = lines.pop(0)
        if line.startswith("```"):
            end = lines.index("```")
            found.append(Block(page, line[3:], mark, "\n".join(lines[:end]) + "\n"))
            del lines[: end + 1]
        elif line.startswith("    "):
            end = next(
                (n for n, more in enumerate(lines) if more and not more.startswith("    ")), len(lines)
            )
            text = "\n".join(part[4:] for part in [line, *lines[:end]]).strip() + "\n"
            found.append(Block(page, "sh" if SHELL.match(text) else "text", mark, text))
            del lines[:end]
        elif not line:
            continue
        note = MARK.fullmatch(line)
        mark = note[1] if note else ""
    return found
