"""Merged models during training, on one process and under FSDP2."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmfoundry_wesar.export.files import export, load
from tests.trained import (
    CASES,
    EXPRESSIBLE,
    INEXPRESSIBLE,
    SHARDED,
    Trained,
    assert_same_logits,
    logits,
    merged_saves,
    train,
    train_case,
)


def _train(data: Path, folder: Path, case: str, *overrides: str, precision: str = "float32") -> Trained:
    return train_case(data, folder, *CASES[case], merged_saves(folder, precision), *overrides)


def _assert_saved(run: Trained) -> None:
    saved = run.folder / "huggingface"
    assert sorted(path.name for path in saved.iterdir()) == ["ba2", "ba4"]
    assert not [name for name in load_file(saved / "ba4" / "model.safetensors") if name.endswith((".gate", ".left"))]
    model, _ = load(saved / "ba4")
    assert_same_logits(logits(model, run.ids), run.logits, 1e-5)  # same reason as in test_conversion
    earlier, _ = load(saved / "ba2")
    assert not torch.allclose(logits(earlier, run.ids), run.logits, rtol=1e-2)


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_one_process_saves_what_it_trained(case, trained):
    _assert_saved(trained[case])


@pytest.mark.parametrize("case", SHARDED)
def test_two_fsdp2_processes_save_what_they_trained(case, sharded):
    _assert_saved(sharded[case])


def test_it_writes_what_export_does_and_rounds_once(text_data, tmp_path):
    """The same files as from `export`, except for folder names: merged in float32 and then rounded to bfloat16.

    In a URI the folder would end before `#`.
    """
    train_case(text_data, tmp_path, merged_saves(tmp_path / "ck #1?;" / "{run_name}", "bfloat16"))
    export(tmp_path, tmp_path / "out", dtype="bfloat16")
    saved = tmp_path / "ck #1?;" / "tiny" / "huggingface" / "ba4"
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer.json"):
        assert (saved / name).read_text() == (tmp_path / "out" / name).read_text()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in load_file(saved / "model.safetensors").items():
        assert torch.equal(weight, weights.pop(name)), name
    assert not weights


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_a_model_that_cannot_be_exported_is_refused_before_it_is_trained(case, text_data, tmp_path):
    with pytest.raises(ValueError, match=rf"ArceeForCausalLM cannot express model\.{INEXPRESSIBLE[case]}: "):
        _train(text_data, tmp_path, case)
    assert not list(tmp_path.iterdir())


def test_a_stock_model_has_nothing_to_merge(text_data, tmp_path):
    with pytest.raises(ValueError, match=r"needs model\.name: wesar_mpt_causal_lm\. .* use hf_checkpointer"):
        _train(text_data, tmp_path, "small_init", "model.name=mpt_causal_lm", "model.loss_fn=torch_crossentropy")


@pytest.mark.parametrize("name", ["..", ".", "", "../..", "/absolute", "ba{batch}/..", "{run_name}"])
def test_a_name_that_is_no_folder_below_is_refused_before_training(name, text_data, tmp_path):
    """The run is called `..`. Such a name once removed everything in the folder, with the run's checkpoints."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "mine").write_text("mine")
    named = f"callbacks.merged_hf_checkpointer.huggingface_folder_name='{name}'"
    with pytest.raises(
        ValueError, match=r"callbacks\.merged_hf_checkpointer\.huggingface_folder_name: .* is not a folder"
    ):
        train(text_data, "run_name=..", merged_saves(tmp_path), named)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "mine",
        "huggingface",
        "huggingface/mine",
    }


def test_names_that_foundrys_checkpointer_accepts_are_accepted(text_data, tmp_path):
    """A trailing slash, a folder in a folder, and a name without a number, which is written again and again.

    Files that somebody else put into a folder stay when it is written again.
    """
    (tmp_path / "huggingface" / "latest").mkdir(parents=True)
    (tmp_path / "huggingface" / "latest" / "mine").write_text("mine")
    for name in ("ba{batch}/", "latest", "{run_name}/#{batch}"):
        named = f"callbacks.merged_hf_checkpointer.huggingface_folder_name='{name}'"
        train(text_data, merged_saves(tmp_path), named)
    folders = {"ba2", "ba4", "latest", "latest.1", "tiny"}
    assert {path.name for path in (tmp_path / "huggingface").iterdir()} == folders
    assert (tmp_path / "huggingface" / "latest.1" / "mine").read_text() == "mine"
    weights = load_file(tmp_path / "huggingface" / "ba4" / "model.safetensors")
    for name in ("latest", "tiny/#4"):
        for key, weight in load_file(tmp_path / "huggingface" / name / "model.safetensors").items():
            assert torch.equal(weight, weights[key])
