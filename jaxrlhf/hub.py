"""Models of the Hugging Face hub, by id: only the files that are read here, and which commit they are of."""

from __future__ import annotations

import re
from pathlib import Path

from jaxrlhf.files import UserError

ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
# Matched against whole paths: weights of other frameworks, of subfolders and doubles of these are left there.
WANTED = (
    "*.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "tokenizer.model",
    "spiece.model",
    "*.txt",
    "*.jinja",
)
UNWANTED = ("*/*",)
LOGIN = "`hf auth login`, or set HF_TOKEN"


def directory_of(name: str, key: str) -> Path:
    """The directory of that name, or the hub's snapshot of that id, fetched where it is not in the local cache.

    Raises:
      UserError: neither is to be had; names the config's `key`.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise UserError(f"{key}={name!r}: is a file; name the directory that it lies in")
    if not ID.fullmatch(name):
        raise UserError(f"{key}={name!r}: no such directory, and no hub id (OWNER/NAME)")
    from huggingface_hub import errors, snapshot_download

    start = f"{key}={name!r}: no such directory, and not to be had from the hub"
    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except errors.GatedRepoError:
        raise UserError(f"{start}: it is gated; ask for access on its page, then {LOGIN}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{start}: no model of that id, or a private one; check the id, or {LOGIN}") from None
    except (OSError, ValueError) as error:  # all that the hub's client raises for want of a network, a right, a file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{start} ({reason})") from None


def commit_of(directory: Path) -> str:
    """The commit of a snapshot that the hub's client fetched; "" of any other directory."""
    snapshot = directory.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", directory.name)
    return directory.name if snapshot else ""
