"""The compared methods and the paper's training settings: one YAML file each, and the transform that expands them.

`variables.method` and `variables.setting` in a training config name a file of this folder or of `settings/`. Its keys
become defaults under the run's own keys: whatever the run sets itself stays. A file may extend another one.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_FOLDER = Path(__file__).parent
# The variables that name a file, and where the files are.
_FOLDERS = {"setting": _FOLDER / "settings", "method": _FOLDER}


def names(kind: str) -> list[str]:
    """The known methods (`kind="method"`) or settings (`kind="setting"`)."""
    return sorted(path.stem for path in _FOLDERS[kind].glob("*.yaml"))


def load(kind: str, name: str) -> DictConfig:
    """Read a method or setting, with what it extends.

    Raises:
        ValueError: If there is none of that name; the message lists the known ones.
    """
    if name not in names(kind):
        raise ValueError(f"variables.{kind}: {name!r} is not known; use one of {', '.join(names(kind))}.")
    config = OmegaConf.load(_FOLDERS[kind] / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    base = config.pop("extends", None)
    return OmegaConf.merge(load(kind, base), config) if base else config  # type: ignore[return-value]


def _check_data(config: dict[str, Any]) -> None:
    """Raise a ValueError if a loader's local folder is not there, which streaming says late and without the key."""
    # Before its transforms foundry moves an `eval_loader` that is a list to `eval_loaders`.
    for key in ("train_loader", "eval_loader", "eval_loaders"):
        loaders = config.get(key) or {}
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            dataset = loader.get("dataset") or {}
            local, split = dataset.get("local"), dataset.get("split") or ""
            if local is None or dataset.get("remote") or Path(local, split, "index.json").is_file():
                continue
            name = " ".join(filter(None, [key.removesuffix("s"), loader.get("label")]))
            variables = [f"variables.{variable}" for variable, value in config["variables"].items() if value == local]
            raise ValueError(
                f"{name}: there is no data in {Path(local, split)}; prepare it with `llmfoundry-wesar data {local} "
                "--source …`, as the first lines of the YAML and the README say, or change "
                f"{' or '.join(variables) or 'dataset.local'}."
            )


def expand(config: dict[str, Any], check_data: bool = True) -> dict[str, Any]:
    """Put the run's method and setting under its own keys; a config that names neither is returned as it is.

    Args:
        config: A training config as foundry hands it to its config transforms.
        check_data: Whether the local folders of its loaders must be there.

    Returns:
        The expanded config.

    Raises:
        ValueError: If the method or setting is not known, or a folder is not there.
    """
    variables = config.get("variables") or {}
    if not isinstance(variables, dict):
        raise ValueError(f"variables: {variables!r} is no mapping; write `variables: {{name: value}}`.")
    defaults = [load(kind, variables[kind]) for kind in _FOLDERS if variables.get(kind) is not None]
    if not defaults:
        return config
    merged = OmegaConf.to_container(OmegaConf.merge(*defaults, OmegaConf.create(config)), resolve=True)
    assert isinstance(merged, dict)
    expanded = {str(key): value for key, value in merged.items()}
    if check_data:
        _check_data(expanded)
    return expanded
