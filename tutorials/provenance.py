"""Which software a result comes from."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_gs import __version__

__all__ = ["Provenance", "key_of", "provenance_of"]


@dataclass(frozen=True)
class Provenance:
    """The software behind a result.

    Attributes:
        version: Of the package.
        commit: The last one that changed the code, with ``+`` and a hash of what has changed since, if anything has;
            empty outside of a repository.
        torch: Version of torch.
    """

    version: str
    commit: str
    torch: str


@functools.cache
def provenance_of(*code: str) -> Provenance:
    """That of the software as it lies here; looked up once.

    Args:
        code: Files whose changes make another version of it, as patterns of Git from the top of the repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *code]
        folder = Path(__file__).resolve().parents[1]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changes = git("log", "-1", "--format=%h"), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        commit = changes = ""
    if changes:
        commit += "+" + hashlib.sha1(changes.encode()).hexdigest()[:8]
    return Provenance(__version__, commit, torch.__version__)


def key_of(settings: Mapping[str, Any], software: Provenance) -> str:
    """A short name of settings and software, the same on every machine: 16 hexadecimal digits."""
    return hashlib.sha1(json.dumps({**settings, **asdict(software)}, sort_keys=True).encode()).hexdigest()[:16]
