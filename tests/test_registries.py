"""Foundry's own builders find every name that a user writes in a YAML, without an import of our package."""

import re
import subprocess
import sys
from collections import defaultdict
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
LLAMA = {"pretrained_model_name_or_path": "yamls/llama-160m", "pretrained": False, "init_device": "meta"}
MODELS = {
    "wesar_mpt_causal_lm": model_config("wesar"),
    "wesar_hf_causal_lm": {**LLAMA, "init_config": {"name": "he_init_"}},
}


@pytest.mark.parametrize(("kind", "name"), REGISTERED)
def test_every_registered_name_builds(kind, name):
    model = nn.Linear(4, 4)
    build = {
        "attention_classes": lambda: build_attention_layer(name, {"d_model": 8, "n_heads": 2}),
        "fcs": lambda: build_fc(name, 4, 6, {"name": name, "bias": False}),
        "callbacks": lambda: build_callback(name, {"save_folder": "x", "save_interval": "1ba"} if "hf" in name else {}),
        "models": lambda: build_composer_model(name, MODELS[name], None),
        "optimizers": lambda: build_optimizer(model, name, {"lr": 0.1}),
        "config_transforms": lambda: registry.config_transforms.get(name)({}) == {},
        "module_init_fns": lambda: registry.module_init_fns.get(name)(model, init_fn_=nn.init.zeros_) is False,
        "param_init_fns": lambda: registry.param_init_fns.get(name)(nn.LayerNorm(4), 1, 4, **KEYS[name]) is None,
    }[kind]
    assert build()


def test_the_list_is_the_one_in_the_docs():
    """The table has all registered names and no others.

    `;` separates registries, and `:` or `=` precedes an explanation.
    """
    table = Path("docs/tools.md").read_text().partition("## What is registered")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    listed = []
    for kinds, names in rows:
        for kind, part in zip(re.findall(r"`(\w+)`", kinds), names.split(";"), strict=True):
            listed += [(kind, name) for name in re.findall(r"`(\w+)`", re.split("[:=]", part)[0])]
    assert sorted(listed) == sorted(REGISTERED)


def test_foundrys_command_shows_them():
    """`llmfoundry registry get` in a fresh interpreter, at once for all registries that we add to."""
    script = "from llmfoundry.cli.cli import app; app(['registry', 'get'])"
    environment = {"COLUMNS": "300", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    options, kind = defaultdict(str), ""
    for line in run.stdout.splitlines():
        if line.startswith("│"):  # a cell of several lines continues in rows with an empty name
            name, _, cell = (part.strip() for part in line.strip("│").split("│"))
            kind = name or kind
            options[kind] += f"{cell} "
    for kind, name in REGISTERED:
        assert name in re.findall(r"\w+", options[f"llmfoundry.{kind}"]), (kind, name)
