"""Finding a model: the shipped demo, a checkpoint's directory, a hub repository, or random weights of a known size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .defaults import DEMO as DEMO
from .defaults import DUMMY as DUMMY
from .demo import DEMO_DIR
from .models.config import ModelError, checkpoint_dtype
from .models.opt import OPTConfig, config_by_name
from .plan.json_file import JsonError, read_object
from .plan.spec import DTYPE_BYTES

HUB_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found: its configuration, its name, and its directory (None: random weights)."""

    name: str
    config: OPTConfig
    directory: Path | None
    dtype: str  # of the checkpoint, by its own config

    @property
    def is_stored(self) -> bool:
        """Whether its weights can be read where they lie; else a store of our own takes as much of the disk again."""
        return self.directory is not None and any(self.directory.glob("*.safetensors"))


def find_model(model: str, path: str | None = None) -> ModelSource:
    """Find a model: the shipped demo, a directory, a hub id, or (`path` `_DUMMY_`) random weights of a known size.

    Raises ModelError or OSError with one sentence when there is no such model.
    """
    if path == DUMMY:
        config = config_by_name(model)
        if config is None and (Path(model) / "config.json").is_file():
            return replace(_from_directory(Path(model)), directory=None)
        if config is None:
            raise ModelError(f"{model!r} is no known OPT size, so no random weights can be made for it")
        return ModelSource(model.rsplit("/", 1)[-1], config, None, "float16")
    if model == DEMO and path is None:
        return _from_directory(DEMO_DIR)
    directory = Path(path or model).expanduser()
    if directory.exists() or path or model.startswith((".", "/", "~")) or model.count("/") != 1:
        return _from_directory(directory)
    return replace(_from_directory(_download(model)), name=model.rsplit("/", 1)[-1])


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
        return ModelSource(name, OPTConfig.from_json(config), directory, checkpoint_dtype(config))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _download(model: str) -> Path:
    """Fetch a hub repository, honouring HF_HOME and HF_HUB_OFFLINE; safetensors where there are any, else `.bin`."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            safe = any(name.endswith(".safetensors") for name in list_repo_files(model))
        except (OfflineModeIsEnabled, OSError):
            return Path(snapshot_download(model, local_files_only=True))
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS + ([] if safe else ["pytorch_model*.bin"])))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model} is neither a directory here nor to be had from the hub: {error}") from error


def choose_dtype(asked: str, source: ModelSource) -> str:
    """The dtype to run in: as asked, or ("auto") the checkpoint's own."""
    dtype = source.dtype if asked == "auto" else asked
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPE_BYTES)}")
    return dtype


def choose_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one; raises ValueError for one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = "cuda or cpu" if count else "cpu"
    try:
        device = torch.device(name or ("cuda" if count else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device; use {there}") from error
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= (count if device.type == "cuda" else 1):
        raise ValueError(f"--device {name}: there is no such device here; use {there}")
    return device


def check_device(dtype: str, device: torch.device) -> None:
    """Raise ModelError where the device cannot compute in `dtype`."""
    if device.type != "cuda" or dtype != "bfloat16":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise ModelError(
            f"bfloat16 needs a GPU of compute capability 8.0, {name} has {major}.{minor}; use --dtype float16"
        )
