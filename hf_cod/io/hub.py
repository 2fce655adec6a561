"""Quick look-ups on the Hub: one attempt each, where the libraries below retry for most of a minute."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from hf_cod.io.display import first_line, one_line

TIMEOUT = 5.0  # seconds
# Errors of a machine that reaches no server; of a slow or busy server there are others, after which a retry may help.
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")


def on_hub(repo_id: str) -> bool:
    """Whether a Hub repository is available: in the local cache, or online."""
    if try_to_load_from_cache(repo_id, "config.json"):
        return True
    try:
        HfApi().model_info(repo_id, timeout=TIMEOUT)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return False
    except Exception as error:
        if _of_connection(error):
            return False
        raise
    return True


def why_unreachable(
    repo_id: str, file: str = "config.json", revision: str | None = None, kind: str = "model"
) -> str | None:
    """The reason why a repository that is not in the local cache cannot be looked up; None if it can, or is there.

    Args:
        repo_id: a Hub id.
        file: name of a file of it, by which it is recognised in the cache.
        revision: revision on the Hub.
        kind: "model" or "dataset".
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None  # nothing is retried
    try:
        if try_to_load_from_cache(repo_id, file, revision=revision, repo_type=kind) is None:
            HfApi().repo_info(repo_id, revision=revision, repo_type=kind, timeout=TIMEOUT)
    except (HfHubHTTPError, HFValidationError, OSError):
        return None  # the answer of the Hub; the look-up itself explains it
    except Exception as error:
        if not _of_connection(error):
            raise
        return one_line(error) if type(error).__name__ in _UNREACHABLE else None
    return None


def upload_space(repo_id: str, directory: str | Path, files: Sequence[str]) -> str:
    """Uploads files of a directory to a static Space, which is created if it does not exist; returns its address.

    Raises:
        OSError: no network, no token, or no permission; the message gives the command for another attempt.
    """
    try:
        api = HfApi()
        address = api.create_repo(repo_id, repo_type="space", space_sdk="static", exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=directory, repo_type="space", allow_patterns=list(files))
    except Exception as error:
        if not isinstance(error, OSError) and not _of_connection(error):
            raise
        command = shlex.join(["hf", "upload", repo_id, str(directory), "--repo-type", "space"])
        raise OSError(
            f"space: expected to upload to {repo_id!r}, got: {first_line(error)}; the directory is complete: {command}"
        ) from error
    return str(address)


def _of_connection(error: Exception) -> bool:
    """Whether it is an error of httpx, which huggingface_hub does not wrap and which we do not import."""
    kind: type[Any] = type(error)
    return kind.__module__.startswith("httpx")
