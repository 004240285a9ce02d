"""Finding a model: the shipped demo, a checkpoint's directory, a hub repository, or random weights of a known size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..defaults import DEMO as DEMO
from ..defaults import DUMMY as DUMMY
from ..demo import DEMO_DIR
from ..memory.device import gpu_capability, gpu_name
from ..plan.formats import DTYPE_BYTES
from ..plan.json_file import JsonError, read_object
from .config import ModelConfig, ModelError, checkpoint_dtype
from .family import config_by_name
from .family import read_config as read_fields

NUMPY_TABLE = "decoder.embed_tokens.weight"  # a file of this name is in every directory of FlexGen's numpy weights
WEIGHTS = ("*.safetensors", "*.bin")
HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found: its configuration, its name, and its directory (None: random weights)."""

    name: str
    config: ModelConfig
    directory: Path | None
    dtype: str  # of the checkpoint, by its own config

    @property
    def is_stored(self) -> bool:
        """True if its weights can be read where they lie; else a store of our own takes as much of the disk again."""
        return self.directory is not None and any(self.directory.glob("*.safetensors"))


def find_model(model: str, path: str | None = None) -> ModelSource:
    """Find a model: the shipped demo, a directory, a hub id, or (`path` `_DUMMY_`) random weights of a known size.

    `path` is a checkpoint's directory, or one that has the model in a directory of its name; where it has neither, the
    model's own name says where it is, as FlexGen's `~/opt_weights` need not exist.
    Raises ModelError or OSError with one sentence when there is no such model.
    """
    if path == DUMMY:
        config = config_by_name(model)
        if config is None and (Path(model) / "config.json").is_file():
            return replace(_from_directory(Path(model)), directory=None)
        if config is None:
            raise ModelError(f"{model!r} is no known size, so no random weights can be made for it")
        return ModelSource(model.rsplit("/", 1)[-1], config, None, "float16")
    directory = find_local(model, path)
    if directory is not None:
        return _from_directory(directory)
    hub = hub_name(model)
    if path is not None and (found := _unreadable(model, Path(path).expanduser())):
        _pass_over(found, model, hub)
    if hub is None:
        raise ModelError(
            f"{_not_there(model, path)}{model} is not a directory; "
            f"give a checkpoint's directory, a hub id or --path {DUMMY}"
        )
    return replace(_from_directory(_download(hub, _not_there(model, path))), name=hub.rsplit("/", 1)[-1])


def find_local(model: str, path: str | None = None) -> Path | None:
    """The directory that has the model here: `path`, one of the model's name in it, the demo's, or the model itself."""
    if path is not None:
        for directory in (Path(path).expanduser(), Path(path).expanduser() / model.rsplit("/", 1)[-1]):
            if (directory / "config.json").is_file():
                return directory
    if model == DEMO:
        return DEMO_DIR
    directory = Path(model).expanduser()
    if directory.exists() or model.startswith((".", "/", "~")):
        return directory
    return None


def find_sizes(model: str, path: str | None = None) -> ModelSource:
    """Find a model of which only the sizes are needed: a published one that is not here is not fetched for them."""
    by_name = path != DUMMY and config_by_name(model) is not None and find_local(model, path) is None
    return find_model(model, DUMMY if by_name else path)


def hub_name(model: str) -> str | None:
    """The hub id of "facebook/opt-30b" or "opt-30b"; None for what can be no hub id."""
    if "/" not in model and config_by_name(model) is not None:
        return f"facebook/{model.lower()}"
    return model if model.count("/") == 1 and not model.startswith((".", "/", "~")) else None


def _not_there(model: str, path: str | None) -> str:
    return "" if path is None else f"{path} has no config.json, nor has {path}/{model.rsplit('/', 1)[-1]}; "


def _unreadable(model: str, path: Path) -> str:
    """Sentence on the weights that `path` has in a form that is not read here; "" where there are none."""
    for directory in (path / f"{model.rsplit('/', 1)[-1]}-np", path):
        if (directory / NUMPY_TABLE).is_file():
            return f"{directory} has FlexGen's numpy weights, one array a file, which cannot be read here"
    found = next((f for pattern in WEIGHTS for f in path.glob(pattern)), None)
    return f"{path} has {found.name} but no config.json, which a Hugging Face checkpoint has" if found else ""


def _pass_over(found: str, model: str, hub: str | None) -> None:
    """Warn that the hub's copy is used where it was fetched before; else raise ModelError, lest 60 GB come twice."""
    if hub is not None and _is_cached(hub):
        warnings.warn(f"{found}; the copy of {model} that was fetched from the hub before is used", stacklevel=3)
        return
    raise ModelError(f"{found}; give another path, and {model} is looked for on the hub")


def _is_cached(hub: str) -> bool:
    """Return True if a hub repository's configuration and weights were fetched before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub, local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return False
    return (directory / "config.json").is_file() and any(f for pattern in WEIGHTS for f in directory.glob(pattern))


def _from_directory(directory: Path) -> ModelSource:
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory; give a checkpoint's directory, a hub id or --path {DUMMY}")
    config_path = directory / "config.json"
    if not config_path.exists():
        raise ModelError(f"{directory} has no config.json; a Hugging Face checkpoint directory has one")
    return read_config(config_path, directory.resolve().name, directory)


def read_config(path: Path, name: str, directory: Path | None) -> ModelSource:
    """The model that a config.json describes; raises ModelError, with the file's name."""
    try:
        config = read_object(path)
    except JsonError as error:
        raise ModelError(f"{error}; download it again") from error
    try:
        return ModelSource(name, read_fields(config), directory, checkpoint_dtype(config))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _download(model: str, not_there: str = "") -> Path:
    """Fetch a hub repository, honouring HF_HOME and HF_HUB_OFFLINE; safetensors where there are any, else `.bin`.

    `not_there` begins the sentence that says why there is no such model.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            safe = any(name.endswith(".safetensors") for name in list_repo_files(model))
        except (OfflineModeIsEnabled, OSError):
            return Path(snapshot_download(model, local_files_only=True))
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS + ([] if safe else ["pytorch_model*.bin"])))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{not_there}{model} is neither a directory here nor to be had from the hub: {_reason(error)}"
        ) from error


def _reason(error: OSError) -> str:
    """The reason that a repository cannot be had, without the advice on huggingface_hub's own arguments."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "it was not fetched before, and the hub cannot be reached from here (or HF_HUB_OFFLINE forbids it)"
    return next(iter(str(error).splitlines()), type(error).__name__)


def choose_dtype(asked: str, source: ModelSource) -> str:
    """The dtype to run in: as asked, or ("auto") the checkpoint's own."""
    dtype = source.dtype if asked == "auto" else asked
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPE_BYTES)}")
    return dtype


def check_device(dtype: str, device: torch.device) -> None:
    """Raise ModelError where the device cannot compute in `dtype`."""
    if device.type != "cuda" or dtype != "bfloat16":
        return
    major, minor = gpu_capability(device)
    if major < 8:
        name = gpu_name(device)
        raise ModelError(
            f"bfloat16 needs a GPU of compute capability 8.0, {name} has {major}.{minor}; use --dtype float16"
        )
