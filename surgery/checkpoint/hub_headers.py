"""safetensors headers read from the Hub by range requests, to inspect a model without downloading its weights."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError
from huggingface_hub.file_download import repo_folder_name

from surgery.checkpoint.hub import refuse_escaping
from surgery.checkpoint.hub_errors import FETCH, HttpLibraryError, one_line
from surgery.checkpoint.layout import RECIPE, arrange
from surgery.checkpoint.resolve import Checkpoint, from_listing
from surgery.checkpoint.tensorfile import Header, parse_entries, read_header
from surgery.errors import SourceError

_REQUESTS = 8  # at once


def read_remote_headers(
    repo_id: str, *, revision: str | None, variant: str | None, token: str | None
) -> tuple[Checkpoint, dict[str, Header]] | None:
    """Return a checkpoint whose weights need not be here, and the header of each of its weight files.

    Files that are in the Hub's cache are read there. A header that came from the Hub has no `raw` bytes.

    Returns:
        None without a network.
    Raises:
        SourceError: no such repository, revision or access; weights that are pickles, which have no header.
    """
    what = f"{repo_id}@{revision}" if revision else repo_id
    with one_line(what, repo_id, FETCH):
        try:
            info = HfApi().model_info(repo_id, revision=revision, token=token)
        except HfHubHTTPError:
            raise
        except (OfflineModeIsEnabled, HttpLibraryError):
            return None
        names = [file.rfilename for file in info.siblings or ()]
        refuse_escaping(repo_id, names)
        commit = str(info.sha)
        cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
        for name in _small(names, variant, repo_id):
            hf_hub_download(repo_id, name, revision=commit, token=token)
        checkpoint = from_listing(cache / "snapshots" / commit, repo_id, commit, variant, names)
        files = [name for weight_set in checkpoint.layout.weights for name in weight_set.files]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            headers = pool.map(lambda name: _header(checkpoint, name, token), files)
            return checkpoint, dict(zip(files, headers, strict=True))


def _small(names: Collection[str], variant: str | None, repo_id: str) -> list[str]:
    """Name the files that tell which shards there are, whether they are quantized, and where they came from."""
    weights = arrange(names, variant=variant, what=repo_id).weights
    indexes = [weight_set.index for weight_set in weights if weight_set.index]
    configs = {(PurePosixPath(weight_set.folder) / "config.json").as_posix() for weight_set in weights}
    return [*indexes, *(name for name in names if name in configs or name == RECIPE)]


def _header(checkpoint: Checkpoint, name: str, token: str | None) -> Header:
    label = f"{checkpoint.id}/{name}"
    path = checkpoint.path(name)
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{label}: expected safetensors, whose header can be read alone, got a PyTorch pickle. "
            f"Run `hf download {checkpoint.id}`, and inspect the folder it prints."
        )
    if path.is_file():
        return read_header(path, label=label)
    try:
        found = HfApi().parse_safetensors_file_metadata(checkpoint.id, name, revision=checkpoint.commit, token=token)
        entries = {tensor: asdict(entry) for tensor, entry in found.tensors.items()}
        return Header(b"", parse_entries(entries, 0, label=label))
    except (SafetensorsParsingError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{label}: expected a valid safetensors file, got a malformed header. Report it.") from error
