"""An adapter's files from the Hugging Face Hub: fetched into the Hub's own cache, and every failure as one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress

PULLED = ["*.json", "*.safetensors", "*.md", "*/*.json", "*/*.safetensors"]  # no pickles, no code


def fetch_adapter(repo: str, revision: str | None = None, progress: Progress = SILENT) -> Path:
    """The snapshot of ``repo`` (owner/name) at ``revision`` in the Hub's cache, fetched where it is not there.

    Without a network, what was fetched before is as good; with ``HF_HUB_OFFLINE`` nothing else is looked at.

    Raises:
        RsgwmError: no such repository or revision, no network and nothing cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    progress.message(f"fetching {repo} from the Hugging Face Hub")
    with readable(f"{repo} could not be fetched from the Hub"):
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=PULLED))
        except HfHubHTTPError:
            raise
        except OSError as error:
            try:
                return Path(snapshot_download(repo, revision=revision, allow_patterns=PULLED, local_files_only=True))
            except OSError:
                raise error from None


@contextmanager
def readable(what: str, advice: str = "") -> Iterator[None]:
    """Every failure of the Hub's client as one line, without the access token that some messages repeat.

    Raises:
        RsgwmError: ``what`` could not be done, the first line of the reason, and what to do (``advice``).
    """
    try:
        yield
    except RsgwmError:
        raise
    except Exception as error:  # HTTP, network and login errors of several libraries, all told by their first line
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RsgwmError(
            f"{what}: {redacted(lines[0] if lines else type(error).__name__)}{advice and f'; {advice}'}"
        ) from None


def redacted(text: str) -> str:
    """``text`` without access tokens: the one in use, and whatever looks like one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name):
            text = text.replace(token, "(token)")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "(token)", text)
