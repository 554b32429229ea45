"""Finds a checkpoint by its name on the hub in the local cache of Hugging Face's libraries.

Nothing is downloaded. In `models--OWNER--NAME/` of the cache, `refs/REVISION` holds a commit, and
`snapshots/COMMIT/` the files that some library has fetched.
"""

import os
import re
from pathlib import Path

from himo.errors import HimoError
from himo.files import open_regular

_PREFIX = "hf-hub:"  # as in open_clip
# OWNER/NAME, then perhaps a file of it, then perhaps @revision: a branch, a tag or a commit.
_NAME = re.compile(r"([\w-][\w.-]*)/([\w-][\w.-]*)((?:/[\w-][\w.-]*)*)(?:@([\w-][\w.-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def located(name: str) -> str:
    """The path of a checkpoint: `name` itself, or its place in the cache if it is a hub's name.

    A name is OWNER/NAME, OWNER/NAME/FILE or either with @REVISION, perhaps after `hf-hub:`. A path
    that exists is always a path.

    Raises:
        HimoError: the name is not in the cache; the message has the command that fetches it.
    """
    explicit = name.startswith(_PREFIX)
    if not explicit and os.path.lexists(name):
        return name
    found = _NAME.fullmatch(name.removeprefix(_PREFIX))
    if found is None:
        if explicit:
            raise HimoError(f"{name}: expected {_PREFIX}OWNER/NAME")
        return name
    owner, repository, file, revision = found.groups()
    folder = _cache() / f"models--{owner}--{repository}"
    if file and not explicit and not folder.is_dir():
        return name  # a path of several folders, which is not there
    commit = _commit(folder, revision or "main")
    path = folder / "snapshots" / commit / file.lstrip("/")
    if not commit or not path.exists():
        command = f"hf download {owner}/{repository}"
        command += f" {file.lstrip('/')}" if file else ""
        command += f" --revision {revision}" if revision else ""
        looked = path if commit else folder / "refs" / (revision or "main")
        raise HimoError(
            f"{name}: no such file, and not in the hub's local cache ({looked}); nothing is "
            f"downloaded here: `{command}` fetches it"
        )
    return str(path)


def _cache() -> Path:
    """Where Hugging Face's libraries keep what they fetch."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser() / "hub"


def _commit(folder: Path, revision: str) -> str:
    """The commit of a revision; "" where the cache has none."""
    if _COMMIT.fullmatch(revision):
        return revision
    reference = folder / "refs" / revision
    if not reference.is_file():
        return ""
    with open_regular(reference) as file:
        commit = file.read(41).decode(errors="replace").strip()
    return commit if _COMMIT.fullmatch(commit) else ""
