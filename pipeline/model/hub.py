"""Models on the Hugging Face hub, at a commit: fetched into the hub's own cache, small files first.

Never fetched: pickle weights, code, other formats. Works offline when the commit is in the cache.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ModelError
from pipeline.model import checks, weights

SMALL = [
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
]
WEIGHTS = ["model.safetensors", "model-*.safetensors"]
SUBFOLDERS = ["*/*"]


def fetch(repository: str, revision: str) -> tuple[Path, Path]:
    """The folder of that commit, and the cache folder that its links may point into.

    Raises ModelError with the remedy: accept a gated model's terms, log in, correct the name or the revision,
    get online.
    """
    folder = _download(repository, revision, SMALL)
    cache = folder.parent.parent
    not_yet_here = (checks.NO_WEIGHTS, weights.LOST)
    problems = [problem for problem in checks.problems(folder, cache) if not problem.what.startswith(not_yet_here)]
    if problems:  # raised before gigabytes are fetched
        raise ModelError(problems)
    return _download(repository, revision, [*SMALL, *WEIGHTS]), cache


def _download(repository: str, revision: str, patterns: list[str]) -> Path:
    import httpx
    from huggingface_hub import constants, errors, snapshot_download

    page = f"{constants.ENDPOINT}/{repository}"
    where = f"{repository}@{revision[:12]}"
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=SUBFOLDERS)
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            "is gated: its terms must be accepted first", file=where, key="base_model",
            remedy=f"accept them at {page}, then set HF_TOKEN to a token of that account",
        ) from error  # fmt: skip
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            "the commit doesn't exist", file=where, key="base_model_revision",
            remedy=f"copy a commit from {page}/commits/main",
        ) from error  # fmt: skip
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            "the model doesn't exist, or it is private", file=where, key="base_model",
            remedy=f"look at {page}; for a private model set HF_TOKEN",
        ) from error  # fmt: skip
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.TransportError) as error:
        raise ModelError(
            f"the hub can't be reached ({type(error).__name__}), and the model in the cache isn't complete",
            file=where,
            key="base_model",
            remedy="get online (and unset HF_HUB_OFFLINE), or copy the model here and name its folder",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "set HF_TOKEN to a valid token" if status in (401, 403) else "try again later"
        raise ModelError(
            f"the hub answered {status}", file=where, key="base_model", remedy=f"{advice}; see {page}"
        ) from error
