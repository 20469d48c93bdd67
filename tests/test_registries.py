"""What a user writes in a YAML is found by foundry's own builders, with nothing of ours imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlib_metadata import entry_points
from llmfoundry import registry
from llmfoundry.models.layers.layer_builders import build_attention_layer, build_fc
from llmfoundry.utils.builders import build_callback, build_composer_model, build_optimizer
from torch import nn

from tests.tiny import model_config

OURS = [e for e in entry_points() if e.dist is not None and e.dist.name.replace("-", "_") == "llmfoundry_wesar"]
REGISTERED = [(e.group.removeprefix("llmfoundry_"), e.name) for e in OURS if e.group.startswith("llmfoundry_")]
KEYS = {"wesar_": {"sigma": 0.1}, "he_init_": {}}


@pytest.mark.parametrize(("kind", "name"), REGISTERED)
def test_every_registered_name_builds(kind, name):
    model = nn.Linear(4, 4)
    build = {
        "attention_classes": lambda: build_attention_layer(name, {"d_model": 8, "n_heads": 2}),
        "fcs": lambda: build_fc(name, 4, 6, {"name": name, "bias": False}),
        "callbacks": lambda: build_callback(name, {"save_folder": "x", "save_interval": "1ba"} if "hf" in name else {}),
        "models": lambda: build_composer_model(name, model_config("wesar"), None),
        "optimizers": lambda: build_optimizer(model, name, {"lr": 0.1}),
        "config_transforms": lambda: registry.config_transforms.get(name)({}) == {},
        "module_init_fns": lambda: registry.module_init_fns.get(name)(model, init_fn_=nn.init.zeros_) is False,
        "param_init_fns": lambda: callable(registry.param_init_fns.get(name)),
    }[kind]
    assert build()


def test_the_list_is_the_one_in_the_readme():
    readme = Path("README.md").read_text()
    for _, name in REGISTERED:
        assert f"`{name}`" in readme, name
    assert len(REGISTERED) >= 13


def test_foundrys_command_shows_them():
    """`llmfoundry registry get` in a fresh interpreter, for all registries that we add to at once."""
    script = "from llmfoundry.cli.cli import app; app(['registry', 'get'])"
    environment = {"COLUMNS": "300", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    for kind, name in REGISTERED:
        if kind not in ("module_init_fns",):
            assert name in run.stdout, (kind, name)
