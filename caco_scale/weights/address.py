"""``hf://USER/NAME[@REVISION]``: a model on the Hugging Face hub. Imports no torch, asks no network."""

import re
from typing import NamedTuple

from caco_scale.errors import UserError

PREFIX = re.compile(r"hf:/+")  # pathlib makes one slash of two
WORD = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*(?<![.-])", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]*", re.ASCII)  # of a branch, a tag, a commit
COMMIT = re.compile(r"[0-9a-f]{40}")
PAGE = re.compile(r"https?:/+(?:huggingface\.co|hf\.co)/+(?:models/)?([\w.-]+/[\w.-]+)", re.ASCII)
FORM = "hf://USER/NAME[@REVISION]"


class HubAddress(NamedTuple):
    """A model on the hub: ``repository`` as USER/NAME; ``revision``: a branch, tag or commit, empty for the default."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_pinned(self) -> bool:
        """Whether it names one commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None


def hub_address(place: object) -> HubAddress | None:
    """The address that a place is; None for a path.

    Raises:
        UserError: it begins as one and is none, or it is the page of a model.
    """
    text = str(place)
    if page := PAGE.match(text):
        raise UserError(f"{text} is a page for a browser: give hf://{page[1]}")
    if not (start := PREFIX.match(text)):
        return None
    repository, at, revision = text[start.end() :].partition("@")
    words = repository.split("/")
    if len(words) == 1 and words[0]:
        raise UserError(f"{text} has no user: give hf://USER/{words[0]}")
    if len(words) != 2:
        raise UserError(f"{text} is no address of a model: give {FORM}, without a file's name")
    if not all(WORD.fullmatch(word) and len(word) <= 96 for word in words) or words[1].endswith(".git"):
        raise UserError(
            f"{text}: no model on the hub can have this name: give {FORM}, of letters, digits, -, _ and ."
        )
    if at and not REVISION.fullmatch(revision):
        raise UserError(f"{text}: behind @ stands a branch, a tag or a commit, as in hf://{repository}@main")
    return HubAddress(repository, revision)
