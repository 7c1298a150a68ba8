"""``--to hf://USER/NAME[@BRANCH]``: a Hugging Face directory as one commit on the hub, through ``huggingface_hub``.

The token is the library's own: HF_TOKEN, or what ``hf auth login`` has kept. What the hub would refuse is asked
before the backbone is loaded. The commit is made upon the one that was seen then, or not at all: what somebody else has
put there meanwhile is not overwritten, and the history keeps what was replaced.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco_scale.errors import UserError
from caco_scale.weights.address import HubAddress
from caco_scale.weights.fetch import asking

TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Target:
    """A repository that may be written to. ``parent``: the commit of its branch, None where that is to be made.

    ``exists``: the repository; ``others``: files in the branch that will stay beside the new ones.
    """

    address: HubAddress
    exists: bool
    parent: str | None
    private: bool
    others: tuple[str, ...] = ()


def check_hub(address: HubAddress, written: tuple[str, ...], private: bool, force: bool) -> Target:
    """Ask the hub whether ``written``, names of files, may be put to an address.

    Raises:
        UserError: no or no valid token, one that may not write there, no network; files that are there already without
            ``force``; a public repository where a private one is wanted.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if address.is_pinned:
        raise UserError(f"{address} names a commit, which never changes: give a branch, or no @")
    api = HfApi()
    _check_token(api, address)
    with asking(address):
        try:
            of_all = api.model_info(address.repository)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Target(address, False, None, private)
        try:
            info = api.model_info(address.repository, revision=address.revision or "main")
        except RevisionNotFoundError:
            info = None
    if private and not of_all.private:
        raise UserError(
            f"{address} exists and is public: drop --private, or make it private in its settings on the hub"
        )
    if info is None:  # a new branch, in which nothing is replaced
        return Target(address, True, None, private)
    there = sorted(file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes")
    if there and not force:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise UserError(
            f"{address} has files already ({', '.join(there[:3])}{more}): give another name, a branch "
            f"(hf://{address.repository}@v2), or --force to replace {', '.join(written)} in a new commit"
        )
    return Target(address, True, info.sha, private, tuple(name for name in there if name not in written))


def _check_token(api, address):
    """UserError where there is no token, the hub does not know it, or it plainly may not write there."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            f"{address}: no token of the hub is here: run hf auth login, or set HF_TOKEN to one that may write "
            f"({TOKENS})"
        )
    with asking(address):
        who: dict[str, Any] = api.whoami()
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(
            f"{address}: the token {token.get('displayName', '')!r} may only read: make one that may write ({TOKENS})"
        )
    owners = [who.get("name"), *(org.get("name") for org in who.get("orgs") or ())]
    owners = [name for name in owners if name]
    user, _, name = address.repository.partition("/")
    if owners and user.casefold() not in {owner.casefold() for owner in owners}:
        raise UserError(
            f"{address}: the token is of {owners[0]}, who may not write for {user}: give "
            + " or ".join(f"hf://{owner}/{name}" for owner in owners)
        )


def upload(folder: Path, target: Target, message: str) -> HubAddress:
    """All files of a folder as one commit -> the address with it.

    Raises:
        UserError: the hub did not take it: then nothing of it is there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository = HfApi(), target.address.repository
    branch = target.address.revision or "main"
    files = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())]
    with asking(target.address):
        if not target.exists:
            api.create_repo(repository, private=target.private, exist_ok=True)
        if target.parent is None and branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        commit = api.create_commit(
            repository, files, commit_message=message, revision=branch, parent_commit=target.parent
        )
    return HubAddress(repository, commit.oid)


def page_of(address: HubAddress) -> str:
    """Where a browser sees a commit."""
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{address.repository}/tree/{address.revision}"
