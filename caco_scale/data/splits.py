"""Which folders are splits (train, val, ...) and which are classes: judged once, by names and by what lies in them.

A split that is taken for a class puts validation images among the training images without a word. So what is clear is
answered, and the rest is asked: :attr:`Splits.doubt` says why.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

# Kinds of splits in their usual order, each with its usual names. A number or a word of NOISE may stand beside them:
# train2017, val_images, TestSet.
KINDS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "dev", "devel", "minival"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
    "unlabeled": ("unlabeled", "unlabelled"),
    "extra": ("extra",),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
NOISE = {
    "set",
    "split",
    "data",
    "dataset",
    "image",
    "images",
    "img",
    "imgs",
    "folder",
    "full",
    "partial",
    "imagenet",
    "ilsvrc",
}
SPLITS = tuple(KIND_OF)
FEW_CLASSES = 2  # a lone folder "train" beside fewer others is no class among classes


def split_kind(name: str) -> str | None:
    """The kind of split that the name of a folder means, in any case; None: it is no usual name of a split."""
    words = _words(name)
    kinds = {KIND_OF[word] for word in words if word in KIND_OF}
    rest = [word for word in words if word not in KIND_OF and word not in NOISE]
    return kinds.pop() if len(kinds) == 1 and not rest else None


def split_rank(name: str) -> tuple[int, str]:
    """Sorts names: splits in their usual order, then by name."""
    kind = split_kind(name)
    return list(KINDS).index(kind) if kind else len(KINDS), name


def _words(name):
    words = re.findall(r"[^\W\d_]+", name.lower())
    # "trainset" is two words, as "train_set" is.
    return [part for word in words for part in _parts(word)]


def _parts(word):
    for noise in NOISE:
        if word.endswith(noise) and word[: -len(noise)] in KIND_OF:
            return [word[: -len(noise)], noise]
    return [word]


def _hinted_kind(name):
    """The kind that only the first or the last word of a name means: seg_train, test-images-of-cats."""
    words = _words(name) or [""]
    return KIND_OF.get(words[-1]) or KIND_OF.get(words[0])


@dataclass(frozen=True)
class Splits:
    """What the folders of a listing are.

    prefix: where the splits lie, "" or "imagenet/"; names: of those below it, in their usual order, none for a listing
    of classes; others: folders of images beside them, which are left out. doubt: why nobody can tell, else "";
    inside: the folder of the listing that the doubt is about, if it is not its top.
    """

    prefix: str = ""
    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    doubt: str = ""
    inside: str = ""


def find_splits(image_folders: Iterable[str], empty_folders: Iterable[str] = ()) -> Splits:
    """The splits among the folders that hold images (names with "/" between them; "" for the top), or a doubt.

    Folders around everything are passed through. empty_folders: further ones, without images: an empty ``val`` beside
    ``train`` is a split, too.
    """
    direct = set(image_folders)
    children = _children(direct)
    at = ""
    while at not in direct and len(below := children.get(at, ())) == 1 and not split_kind(min(below)):
        at = _join(at, min(below))
    prefix = at and at + "/"
    below = children.get(at, set())
    empty = {name[len(prefix) :] for name in empty_folders if name.startswith(prefix)}
    empty = {name for name in empty if name and "/" not in name and name not in below and split_kind(name)}
    names = sorted((name for name in below | empty if split_kind(name)), key=split_rank)
    if {split_kind(name) for name in names} == {"extra"}:
        names = []  # alone it may be anything
    others = tuple(sorted(below - set(names)))
    splits = Splits(prefix, tuple(names), others)
    kinds = {split_kind(name) for name in names}
    if names and not others:
        return splits
    if names:
        nested = any(_join(at, name) in children for name in names)
        plain = not nested and not {_hinted_kind(name) for name in others} & {"val", "test", "unlabeled"}
        if kinds == {"train"} and plain and len(others) >= FEW_CLASSES:
            return Splits()  # a class of vehicles
        return Splits(prefix, tuple(names), others, f"{some_names(names)} beside {some_names(others)}")
    if _both({_hinted_kind(name) for name in others}):
        hinted = sorted((name for name in others if _hinted_kind(name)), key=str)
        rest = tuple(sorted(set(others) - set(hinted)))
        return Splits(prefix, tuple(hinted), rest, some_names(hinted))
    for folder, inside in sorted(children.items()):
        if folder and _both({split_kind(name) for name in inside}):
            both = [_join(folder, name) for name in sorted(inside, key=split_rank)]
            return Splits(doubt=some_names(both), inside=folder)
    return Splits()


def held_out(names: Iterable[str]) -> tuple[str, str] | None:
    """(the training split, the first one to measure on) of some names of folders, where there is one of each."""
    kinds = {kind: [name for name in names if split_kind(name) == kind] for kind in ("train", "val", "test")}
    measured = kinds["val"] or kinds["test"]
    return (kinds["train"][0], measured[0]) if len(kinds["train"]) == 1 and measured else None


def _both(kinds):
    """Are there training images and such to measure on among some kinds?"""
    return "train" in kinds and len(kinds - {None, "extra"}) > 1


def _children(folders):
    """{folder: names of the folders in it that hold images, at any depth}."""
    children: dict[str, set[str]] = {}
    for folder in folders:
        while folder:
            parent, _, name = folder.rpartition("/")
            if name in (known := children.setdefault(parent, set())):
                break
            known.add(name)
            folder = parent
    return children


def _join(folder, name):
    return f"{folder}/{name}" if folder else name


def some_names(names: Collection[str], most: int = 3) -> str:
    """The first ``most`` of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
