"""Addresses of data: what is a path, what names an object store, and what is never one."""

import os
import re

from caco_scale.errors import UserError

SCHEMES = ("s3", "gs", "az", "http", "https")
ADDRESS = r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)"


def is_remote(url: str) -> bool:
    """Is it an address, and no path? UserError for one like ``s3:/bucket``, which nobody means as a folder."""
    if re.match(rf"({'|'.join(SCHEMES)}):/(?!/)", url):
        raise UserError(f"{url}: a slash is missing: {url.replace(':/', '://', 1)}")
    return bool(re.match(ADDRESS, url)) and not url.startswith("file://")


def check_address(url: str) -> tuple[str, str]:
    """``(scheme, rest)`` of the address of an object store. UserError: unknown kind, a secret or a query in it."""
    match = re.fullmatch(ADDRESS, url, re.DOTALL)
    if not match:
        raise UserError(f"{url} is not an address like s3://bucket/folder")
    scheme, rest = match[1], match[2]
    if scheme not in SCHEMES:
        raise UserError(
            f"{url}: unknown kind of address {scheme}://: give a directory or one of "
            f"{', '.join(s + '://' for s in SCHEMES)}"
        )
    place = rest.split("/")[0]
    if "@" in place:
        raise UserError(f"{scheme}://...@{place.split('@')[-1]}: put no password into an address")
    if not place or any(c in rest for c in "?#|\\") or ".." in rest.split("/") or not rest.isprintable():
        raise UserError(f"{url} is not an address like {scheme}://bucket/folder")
    return scheme, rest


def local_path(url: str) -> str:
    """The absolute path of a local set, given as a path, with ``~``, or as ``file://``."""
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
