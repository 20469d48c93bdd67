"""Values that pass through a command line, YAML, OmegaConf and Composer's launcher on their way to the trainer.

The trainer's part is foundry's own code. The launcher's part is `expandvars` of `expanduser` of each argument.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig, make_dataclass_and_log_config
from omegaconf import OmegaConf
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.inspection import load_config, yaml_line
from llmfoundry_wesar.runs.compare import plan
from tests.fuzz.profile import examples

QUICKSTART = str(Path(__file__).parents[1] / "yamls/quickstart.yaml")
NASTY = "my #1 dir: {a=b}, [~] ${HOME} $HOME \\${x} \\ 'q' \"é😀\" 100% & *|"
# An argument of a process has no null character. YAML has no lone surrogates, which stand for bytes that are not UTF-8.
ARGUMENTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def read_by_trainer(config: str, *overrides: str) -> dict[str, Any]:
    """Return the config with which `llmfoundry train` builds everything."""
    loaded: Any = OmegaConf.merge(OmegaConf.load(config), OmegaConf.from_cli(list(overrides)))
    _, read = make_dataclass_and_log_config(loaded, TrainConfig, TRAIN_CONFIG_KEYS, transforms="all")
    return vars(read)


def launched(argument: str) -> str:
    return os.path.expandvars(os.path.expanduser(argument))


@examples(100)
@given(value=ARGUMENTS | st.dictionaries(ARGUMENTS, st.lists(ARGUMENTS, max_size=2), max_size=2))
@example(value={"a": 1, "b": [None, True, 0.1, 1e-300, NASTY]})
@example(value="1e3")
@example(value="null")
@example(value="\x7f\x85\u2028\ufeff")
def test_any_value_is_written_as_one_line_that_is_read_as_this_value(value):
    line = launched(f"key={yaml_line(value)}")
    assert "\n" not in line
    assert OmegaConf.to_container(OmegaConf.from_cli([line]))["key"] == value  # type: ignore[index]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config that foundry reads in a millisecond."""
    file = tmp_path_factory.mktemp("configs") / "small.yaml"
    needed = {key: {} for key in ("model", "tokenizer", "optimizer", "scheduler", "train_loader")}
    needed |= {"max_duration": "1ba", "eval_interval": 1, "max_seq_len": 8, "seed": 1, "global_train_batch_size": 1}
    needed |= {"device_eval_batch_size": 1, "device_train_microbatch_size": 1, "variables": {"method": "wesar"}}
    OmegaConf.save(needed, file)  # type: ignore[arg-type]
    return str(file)


@examples(100)
@given(text=ARGUMENTS)
@example(text="my #1 dir")
@example(text="#1")
@example(text="{a: b} # c")
@example(text="\\${max_duration}")
@example(text="\\\\\\${max_duration} \\\\\\\\\\\\\\${seed}")
@example(text="${seed}")
@example(text="0x_")
@example(text="=")
@example(text="0\t")
@example(text="0\t#")
def test_what_a_user_types_is_refused_or_read_as_the_trainer_reads_it(small, text):
    try:
        read = load_config(small, [f"variables.note={text}"])
    except ValueError:
        return
    assert read["variables"]["note"] == read_by_trainer(small, f"variables.note={text}")["variables"]["note"]
    if isinstance(read["variables"]["note"], str) and "$" not in text and not set(text) & set("&!'\"|>\\"):
        assert read["variables"]["note"].split() == text.split()


@pytest.mark.parametrize("nproc", [None, 2])
def test_compare_hands_any_path_and_value_to_the_trainer(nproc, dataset, tmp_path):
    values = {"note": NASTY, "list": ["$HOME", {"$HOME": 1e-3}], "seed": "${seed}"}
    overrides = [f"variables.data={dataset}", *(f"variables.{key}={yaml_line(value)}" for key, value in values.items())]
    overrides[1] = overrides[1].replace("\\x24{HOME}", "").replace("\\x24{x}", "")  # in an override an interpolation
    overrides[3] = "variables.seed=${seed}"
    out = tmp_path / f"{NASTY} $"
    (run,) = plan(QUICKSTART, ["wesar"], [3], out, ["variables.varied=$HOME"], overrides, nproc=nproc)
    assert "\n" not in " ".join(run.command)
    arguments = run.command[run.command.index(QUICKSTART) + 1 :]
    arguments = arguments if nproc is None else [launched(argument) for argument in arguments]
    read = read_by_trainer(QUICKSTART, *arguments)
    assert read["loggers"]["tensorboard"]["log_dir"] == f"{out}/tensorboard"
    note = NASTY.replace("${HOME}", "").replace("${x}", "")
    expected = {"note": note, "list": values["list"], "seed": 3, "varied": "$HOME", "method": "wesar"}
    assert read["variables"] == expected | {"setting": "quickstart", "data": str(dataset)}
    assert load_config(QUICKSTART, list(run.overrides))["variables"] == read["variables"]


def test_a_varied_value_cannot_lead_out_of_the_folder(tmp_path):
    """It is a part of the names of a log and of folders. A file name has at most 255 bytes."""
    for value in ("../../above", "/absolute", "..", "é" * 300):
        (run,) = plan(QUICKSTART, ["wesar"], [1], tmp_path, [f"variables.varied={value}"])
        assert Path(run.name).name == run.name and len(f"{run.name}.txt".encode()) <= 255


@pytest.mark.parametrize("character", "#?;{}")
def test_a_folder_in_which_composer_cannot_save_is_refused(character, tmp_path):
    """Composer reads a save_folder as a URI and as a format string, and would save to another folder."""
    with pytest.raises(ValueError, match=rf"--out .*Composer cannot save checkpoints below a folder with \{character}"):
        plan(QUICKSTART, ["wesar"], [1], tmp_path / f"a {character}1", overrides=["save_folder=x"])


STORES = [
    "export x s3://b/c",
    "data s3://b/c --source stdlib",
    "plot x --out oci://b/c.png",
    "evaluate x --out gs://b/c",
]
STORES += [f"compare {QUICKSTART} --methods wesar --seeds 1 --out s3://b/c", "reparameterize x s3://b/c"]


@pytest.mark.parametrize("line", STORES)
def test_an_output_in_an_object_store_is_refused(line, tmp_path, monkeypatch):
    """As a path it would be a local folder with the name s3:."""
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, line.split())
    assert run.exit_code == 1 and "this is in an object store; give a local path" in run.stderr
    assert list(tmp_path.iterdir()) == []
