"""Weights from the Hugging Face hub, through ``huggingface_hub`` and its cache, one commit on every process.

Its own settings hold: HF_HOME or HF_HUB_CACHE (where files are kept), HF_TOKEN or the login (private models),
HF_ENDPOINT, HF_HUB_OFFLINE=1 (the cache alone). The network is asked once which commit a branch or tag is; the files of
a commit are fetched once for each cache, and a commit that the cache holds needs no network at all.
"""

import contextlib
import os
import sys
from collections.abc import Generator
from pathlib import Path

from caco_scale.distributed.collectives import assert_equal_on_all_ranks, from_rank_0, world_size
from caco_scale.distributed.environment import share_of_node
from caco_scale.errors import UserError, one_line
from caco_scale.weights.address import HubAddress, hub_address
from caco_scale.weights.hub import FILES, hub_metadata
from caco_scale.weights.place import CONFIG


def settled(place: str) -> str:
    """A place of weights that is the same on every rank; of an address on the hub its commit, fetched. Collective.

    Rank 0 alone asks which commit it is, and the first process of each node fetches it while the others wait. A path is
    given back as it is.

    Raises:
        UserError: on every rank: no such model, no network, no file of weights.
    """
    address = hub_address(place)
    if address is None:
        return place
    pinned = from_rank_0(lambda: commit_of(address))
    complaint = None
    if share_of_node(os.environ, world_size())[0] == 0:
        try:
            fetch(pinned)
        except UserError as error:
            complaint = str(error)
    assert_equal_on_all_ranks({}, "weights", error=complaint)
    return str(pinned)


def commit_of(address: HubAddress) -> HubAddress:
    """The address with the commit that its branch or tag is now; without a network, the one that the cache has.

    Raises:
        UserError: no such model or revision, no access to it, nothing in the cache without a network.
    """
    if address.is_pinned:
        return address
    from huggingface_hub import HfApi, constants, hf_hub_download

    with asking(address):
        here = constants.HF_HUB_OFFLINE
        try:
            if not here:
                HfApi().model_info(address.repository, revision=address.revision or None)
        except Exception as error:
            if not is_lost_network(error):
                raise
            here = True
            _say(f"the hub does not answer ({one_line(error)[:120]}): looking for {address} in the cache")
        path = hf_hub_download(
            address.repository, CONFIG, revision=address.revision or None, local_files_only=here
        )
    return HubAddress(address.repository, Path(path).parent.name)


def fetch(pinned: HubAddress) -> Path:
    """The directory in the cache with ``config.json`` and the weights of one commit.

    Raises:
        UserError: as :func:`commit_of`; the model is in another layout than timm's, or has no file of weights.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    repository, revision = pinned
    with asking(pinned):
        folder = Path(hf_hub_download(repository, CONFIG, revision=revision)).parent
    hub_metadata(folder, str(pinned))  # before gigabytes are fetched that nothing here reads
    known = {name: try_to_load_from_cache(repository, name, revision=revision) for name in FILES}
    if any(isinstance(path, str) for path in known.values()):
        return folder
    for name in FILES:
        if known[name] is _CACHED_NO_EXIST:
            continue
        with contextlib.suppress(EntryNotFoundError), asking(pinned):
            hf_hub_download(repository, name, revision=revision)
            return folder
    raise UserError(f"{pinned} has neither {' nor '.join(FILES)}: give a model that has one of them")


def is_lost_network(error: BaseException) -> bool:
    """Whether an exception of ``huggingface_hub`` says that nothing answered: its client's are not built-in ones."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return getattr(error, "response", None) is None and bool(
        names & {"TransportError", "ConnectionError", "Timeout", "ConnectTimeout", "OfflineModeIsEnabled"}
    )


@contextlib.contextmanager
def asking(address: HubAddress) -> Generator[None]:
    """What ``huggingface_hub`` raises as one line with a fix. A file that is not there stays EntryNotFoundError."""
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():  # in a log a bar is noise
        disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(
            f"{address} is gated: accept its terms on its page at the hub, and log in (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{address} is not on the hub, or is private and not yours: check the name, or log in (hf auth login, or "
            "HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{address}: the model has no branch, tag or commit {address.revision or 'main'!r}: give one of those "
            "that its page at the hub lists"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise UserError(_not_in_cache(address, error)) from None
    except errors.EntryNotFoundError as error:
        if CONFIG in str(error):
            raise UserError(
                f"{address} has no {CONFIG}, so nothing says what model it is: give one in timm's layout"
            ) from None
        raise
    except errors.HfHubHTTPError as error:
        raise UserError(_refused(address, error)) from None
    except Exception as error:  # of its client for HTTP, another one from version to version
        if is_lost_network(error):
            raise UserError(
                f"{address}: the hub does not answer ({one_line(error)[:160]}): check the network"
            ) from None
        if getattr(error, "response", None) is not None:
            raise UserError(_refused(address, error)) from None
        raise UserError(
            f"{address}: {type(error).__name__} of huggingface_hub: {one_line(error)[:300]}"
        ) from error


def _not_in_cache(address, error):
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        fix = "fetch it where there is a network"
        return f"{address} is not in the cache {HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: {fix}"
    reason = f" ({one_line(error.__cause__)[:160]})" if error.__cause__ else ""
    return f"{address} is not in the cache {HF_HUB_CACHE}, and the hub does not answer{reason}: check the network"


def _refused(address, error):
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{address}: the hub knows no such token: log in anew (hf auth login), or set HF_TOKEN to a valid one"
    if status == 403:
        return f"{address}: the token may not do this: give it the right at https://huggingface.co/settings/tokens"
    if status in (409, 412):
        return f"{address} has changed meanwhile: look at what is there now, and start the same command again"
    what = f"answered {status}" if status else one_line(error)[:200]
    return f"{address}: the hub {what}: start the same command again later"


def _say(line):
    print(line, file=sys.stderr, flush=True)
