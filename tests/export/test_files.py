"""Files: from the trainer's checkpoints to folders that other programs load, and back into the trainer."""

import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import torch
import torch.nn.functional as F
from llmfoundry.command_utils import train_from_yaml
from llmfoundry.models.mpt.modeling_mpt import ComposerMPTCausalLM
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.export.checkpoints import find_checkpoint
from llmfoundry_wesar.export.conversion import to_hf
from llmfoundry_wesar.export.files import export, load, reparameterize
from tests.test_hf_model import LLAMA_YAML
from tests.trained import EXPRESSIBLE, INEXPRESSIBLE, LENGTH, TEXT, assert_same_logits, logits, text_ids, train
from tests.transformers5 import fine_tune_in_transformers5, load_in_transformers5

FLOAT32 = 1e-5  # same reason as in test_conversion
_HF_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
COMMANDS = [["export"], ["export", "--format", "gguf"], ["export", "--format", "mpt"], ["reparameterize"]]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for case in EXPRESSIBLE:
        export(trained[case].folder, folder / case)
    export(trained["wesar"].folder, folder / "bfloat16", dtype="bfloat16")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def elsewhere(exported, trained, tmp_path_factory) -> dict[str, dict]:
    """Load the exported folders in transformers ≥ 5 and compute with them."""
    ids = trained["wesar"].ids
    return load_in_transformers5(exported, ids, TEXT[:500], tmp_path_factory.mktemp("transformers5") / "job.pt")


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_transformers_5_computes_what_the_trained_model_does(case, elsewhere, trained):
    """In one of its own classes. No weight is missing and none is left over, so the file has no gate."""
    there = elsewhere[case]
    name = "llama.modeling_llama.LlamaForCausalLM" if case == "glu" else "arcee.modeling_arcee.ArceeForCausalLM"
    assert there["class"] == f"transformers.models.{name}"
    assert there["missing"] == there["unexpected"] == []
    assert there["dtype"] == torch.float32
    assert_same_logits(there["logits"], trained[case].logits, FLOAT32)


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_transformers_5_generates_with_its_cache(case, elsewhere, trained):
    """Greedy generation is the same with and without a cache, and each token is the trained model's prediction."""
    cached = elsewhere[case]["cached"]
    assert torch.equal(cached, elsewhere[case]["uncached"])
    assert cached.shape == (4, 8 + 16)
    model, _ = load(trained[case].folder)
    assert torch.equal(logits(model, cached)[:, 7:-1].argmax(-1), cached[:, 8:])


def test_the_tokenizer_goes_along(elsewhere, trained):
    _, tokenizer = load(trained["wesar"].folder)
    assert elsewhere["wesar"]["ids"] == tokenizer(TEXT[:500]).input_ids


def test_bfloat16_is_rounded_once(exported, elsewhere, trained):
    """The model is merged in float32 and then rounded to the 8 bits of bfloat16. Its logits differ by at most 2%."""
    rounded = load_file(exported["bfloat16"] / "model.safetensors")
    for name, weight in load_file(exported["wesar"] / "model.safetensors").items():
        assert torch.equal(rounded[name], weight.bfloat16()), name
    assert elsewhere["bfloat16"]["dtype"] == torch.bfloat16
    assert_same_logits(elsewhere["bfloat16"]["logits"], trained["wesar"].logits, 2e-2)


def test_generation_starts_and_ends_with_the_tokenizers_tokens(exported, trained):
    _, tokenizer = load(trained["wesar"].folder)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported["wesar"] / name).read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_the_stock_model_computes_what_the_trained_model_does(case, trained, tmp_path):
    """`mpt_causal_lm` is built from the written section, and loads the written checkpoint with strict=True."""
    export(trained[case].folder, tmp_path / "mpt", format="mpt")
    section = OmegaConf.to_container(OmegaConf.load(tmp_path / "mpt" / "model.yaml").model)
    assert section.pop("name") == "mpt_causal_lm"
    stock = ComposerMPTCausalLM(**section, loss_fn="torch_crossentropy")
    stock.load_state_dict(torch.load(tmp_path / "mpt" / "checkpoint.pt")["state"]["model"])
    assert_same_logits(logits(stock.model, trained[case].ids), trained[case].logits, FLOAT32)


def _first_loss(data: Path, checkpoint: Path, **options: Path) -> float:
    """Return the cross-entropy of the first batch after the stock trainer has loaded a checkpoint."""
    resumed = [f"load_path={checkpoint}", "load_weights_only=true", "max_duration=1ba"]
    return train(data, *resumed, **options).state.train_metrics["LanguageCrossEntropy"].compute().item()


def test_the_stock_trainer_continues_from_either_format(text_data, trained, exported, tmp_path):
    """The plain model as `mpt_causal_lm`, the same under `wesar_adamw`, and `reparameterize` of the Hugging Face model.

    The first batch has the same loss as with the trained checkpoint. 1e-5 for the rounding of the merged matrices.
    """
    checkpoint = find_checkpoint(trained["wesar"].folder)
    loss = _first_loss(text_data, checkpoint)
    export(checkpoint, tmp_path / "mpt", format="mpt")
    model = OmegaConf.load(tmp_path / "mpt" / "model.yaml")
    stock = OmegaConf.merge(OmegaConf.load("yamls/quickstart.yaml"), {"variables": {"method": None}})
    stock.model = {**model.model, "loss_fn": "torch_crossentropy"}
    OmegaConf.save(stock, tmp_path / "stock.yaml")
    assert _first_loss(text_data, tmp_path / "mpt" / "checkpoint.pt", yaml=tmp_path / "stock.yaml") == pytest.approx(
        loss, rel=1e-5
    )
    stock.optimizer = {"name": "wesar_adamw", "lr": 1e-3}
    OmegaConf.save(stock, tmp_path / "optimizer.yaml")
    assert _first_loss(
        text_data, tmp_path / "mpt" / "checkpoint.pt", yaml=tmp_path / "optimizer.yaml"
    ) == pytest.approx(loss, rel=1e-5)
    reparameterize(exported["wesar"], tmp_path / "gated.pt")
    assert _first_loss(text_data, tmp_path / "gated.pt") == pytest.approx(loss, rel=1e-5)


def _loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_lora_goes_on_from_the_export_and_wesar_from_lora(exported, trained, text_data, tmp_path):
    """In export → peft → gates → trainer each loss continues from the last one, within 1e-5, and falls."""
    case = trained["wesar"]
    losses = fine_tune_in_transformers5(exported["wesar"], case.ids, 10, tmp_path / "tuned")
    assert losses[0] == pytest.approx(_loss(load(case.folder)[0], case.ids), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
    reparameterize(tmp_path / "tuned", tmp_path / "gated.pt")
    gated, _ = load(tmp_path / "gated.pt")
    assert _loss(gated, case.ids) == pytest.approx(losses[-1], rel=1e-5)
    # A step so small that the model hardly moves shows that the trainer has loaded this model.
    options = [f"load_path={tmp_path / 'gated.pt'}", "load_weights_only=true", "max_duration=1ba", "optimizer.lr=1e-9"]
    again = train(text_data, *options).state.model.model
    assert _loss(again, case.ids) == pytest.approx(losses[-1], rel=1e-5)


def test_every_way_round_ends_at_the_same_function(trained, exported, tmp_path):
    """Checkpoint of another method → either format → gates → plain model again."""
    export(trained["weight_norm"].folder, tmp_path / "mpt", format="mpt")
    for name, folder in {"hf": exported["weight_norm"], "mpt": tmp_path / "mpt"}.items():
        section = reparameterize(folder, tmp_path / f"{name}.pt", "wesar")
        assert section["name"] == "wesar_mpt_causal_lm" and section["fc_type"] == {"name": "wesar"}
        export(tmp_path / f"{name}.pt", tmp_path / f"{name}_again")
        model, tokenizer = load(tmp_path / f"{name}_again")
        assert_same_logits(logits(model, trained["weight_norm"].ids), trained["weight_norm"].logits, FLOAT32)
        assert tokenizer is not None


def test_a_llama_with_tied_embeddings_goes_every_way(text_data, tmp_path):
    """Composer saves the one matrix under two names, `save_pretrained` under one. Each file has its function."""
    overrides = ["model.config_overrides.vocab_size=300", "model.config_overrides.tie_word_embeddings=true"]
    overrides += ["model.init_config.emb_init_std=null", f"save_folder={tmp_path / 'run'}", "save_interval=1dur"]
    overrides += ["loggers=null", "callbacks=null", "python_log_level=error", "optimizer.lr=1e-2"]
    overrides += [f"max_seq_len={LENGTH}", f"variables.data={text_data}"]
    trainer = train_from_yaml("yamls/llama-160m.yaml", [*LLAMA_YAML, *overrides])
    trainer.close()
    llama = trainer.state.model.model
    assert isinstance(llama, LlamaForCausalLM) and llama.lm_head.weight is llama.model.embed_tokens.weight
    ids = text_ids(load(tmp_path / "run")[1])
    expected = logits(llama, ids)
    llama.save_pretrained(tmp_path / "folder")
    for format in ("hf", "gguf", "mpt"):
        export(tmp_path / "run", tmp_path / format, format)
    reparameterize(tmp_path / "run", tmp_path / "gated.pt")
    for path in ("run", "folder", "hf", "mpt", "gated.pt"):
        assert_same_logits(logits(load(tmp_path / path)[0], ids), expected, FLOAT32)


def _run(*arguments: str | Path) -> str:
    """Run the command line, which must fail, and return its one-line error."""
    # The answer is yes if it asks whether to run code.
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input="y\n")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_an_existing_output_is_never_touched(command, trained, tmp_path):
    for out in (tmp_path / "folder", tmp_path / "file"):
        out.mkdir() if out.name == "folder" else out.write_text("mine")
        assert "exists; choose another name or remove it" in _run(*command, trained["wesar"].folder, out)
    # This is found before the checkpoint is read.
    line = _run(*command, tmp_path / "none", tmp_path / "file" / "a" / "b")
    assert line.endswith(f"/b: {tmp_path / 'file'} is not a folder in which you may write.")
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_read_or_expressed_leaves_nothing(command, trained, exported, tmp_path):
    """Each error is one line that names the file and the fault."""
    damaged = shutil.copytree(exported["wesar"], tmp_path / "damaged")
    with open(damaged / "model.safetensors", "r+b") as file:
        file.truncate(100_000)
    configs = {tmp_path / name: text for name, text in (("list", b"[]"), ("text", b'"x"'), ("latin", b'{"a": "\xff"}'))}
    for path, text in configs.items():
        shutil.copytree(exported["wesar"], path)
        (path / "config.json").write_bytes(text)
    pickled = shutil.copytree(exported["wesar"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    partial = shutil.copytree(exported["wesar"], tmp_path / "partial")
    (partial / "config.json").write_text((partial / "config.json").read_text().replace('layers": 2', 'layers": 3'))
    for name, sizes in {"zero": {"num_attention_heads": 0}, "huge": {"num_hidden_layers": 10**9}}.items():
        path = shutil.copytree(exported["wesar"], tmp_path / name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    coded = shutil.copytree(exported["wesar"], tmp_path / "coded")
    (coded / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (coded / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    )
    foreign = shutil.copytree(exported["wesar"], tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "gpt2"}')
    inexpressible = next(iter(INEXPRESSIBLE))
    for path, words in {
        damaged: "damaged/model.safetensors: damaged (",
        **{path: f"{path.name}/config.json: damaged (" for path in configs},
        pickled: "no .safetensors file; pickled weights are not read",
        partial: "weights are missing, such as transformer.blocks.2",
        tmp_path / "zero": "zero: num_attention_heads: 0 is not a whole number ≥ 1",
        tmp_path / "huge": "huge: num_hidden_layers: 1000000000 is too large for the",
        coded: "its tokenizer needs code of its own, which is not run; replace it, or remove tokenizer_config.json",
        foreign: "model_type: gpt2 must be arcee, llama or mpt",
        trained[inexpressible].folder: f"cannot express model.{INEXPRESSIBLE[inexpressible]}",
        tmp_path / "nothing": "no such file or folder",
    }.items():
        assert words in _run(*command, path, tmp_path / "out" / "model")
        assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_code_and_paths_in_a_config_or_a_run_name_are_only_text(trained, exported, tmp_path):
    """A config may name code for transformers to run. A run may be called like a folder above this one."""
    folder = shutil.copytree(exported["wesar"], tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    reparameterize(folder, tmp_path / "gated.pt")
    checkpoint = torch.load(find_checkpoint(trained["wesar"].folder), weights_only=False)
    checkpoint["state"]["run_name"] = "../../above"
    torch.save(checkpoint, tmp_path / "named.pt")
    for format in ("hf", "gguf", "mpt"):
        export(tmp_path / "named.pt", tmp_path / format / "model", format)
        assert [path.name for path in (tmp_path / format).iterdir()] == ["model"]
    left = ["coded", "gated.pt", "gguf", "hf", "mpt", "named.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert not (tmp_path.parent / "above").exists() and not (tmp_path.parents[1] / "above").exists()


@contextmanager
def _full_disk(size: int):
    """Let no file grow beyond this number of bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_nothing(command, trained, tmp_path):
    """The disk is full in the middle of the weights, after smaller files were written."""
    with _full_disk(20_000):
        assert "writing failed, and no part is left" in _run(*command, trained["wesar"].folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("llmfoundry_wesar.export.files.find_spec", lambda name: None)
    line = _run("export", trained["wesar"].folder, tmp_path / "out", "--format", "gguf")
    assert "the package gguf is missing: pip install gguf." in line


def test_unknown_options_are_named(trained, tmp_path):
    assert "--format onnx: not one of hf, gguf, mpt" in _run(
        "export", trained["wesar"].folder, tmp_path / "out", "--format", "onnx"
    )
    assert "--dtype q8_0: with --format hf it must be one of float32, bfloat16, float16" in _run(
        "export", trained["wesar"].folder, tmp_path / "out", "--dtype", "q8_0"
    )
    assert "--dtype int8" in _run("export", trained["wesar"].folder, tmp_path / "out", "--dtype", "int8")
    assert "'nope' is not known; use one of" in _run(
        "reparameterize", trained["wesar"].folder, tmp_path / "out", "--method", "nope"
    )


def test_the_command_line_prints_the_section_to_train_with(exported, tmp_path):
    result = CliRunner().invoke(app, ["reparameterize", str(exported["grouped"]), str(tmp_path / "gated.pt")])
    assert result.exit_code == 0, result.output
    section = OmegaConf.create(result.stdout).model
    assert section.init_config == {"name": "wesar_", "sigma": pytest.approx(4e-5**0.5), "backbone": "he"}
    assert section.attn_config.kv_n_heads == 2 and section.max_seq_len == LENGTH


def _sharded_folder(exported: dict[str, Path], folder: Path) -> Path:
    """Save the exported model again with transformers, in several files with an index."""
    shutil.copytree(exported["wesar"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    to_hf(load(exported["wesar"])[0]).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_a_folder_in_several_files_is_read_by_its_index(exported, trained, tmp_path, caplog):
    """Other files in the folder do not belong to the model, whatever names their tensors have. A message names them."""
    folder = _sharded_folder(exported, tmp_path / "sharded")
    assert_same_logits(logits(load(folder)[0], trained["wesar"].ids), trained["wesar"].logits, FLOAT32)
    assert "ignored:" not in caplog.text
    stale = {name: torch.zeros_like(w) for name, w in load_file(exported["wesar"] / "model.safetensors").items()}
    save_file(stale, folder / "z-stale.safetensors")
    assert_same_logits(logits(load(folder)[0], trained["wesar"].ids), trained["wesar"].logits, FLOAT32)
    assert "ignored: z-stale.safetensors" in caplog.text
    shutil.copy(folder / "z-stale.safetensors", copied := shutil.copytree(exported["wesar"], tmp_path / "copied"))
    assert_same_logits(logits(load(copied)[0], trained["wesar"].ids), trained["wesar"].logits, FLOAT32)
    assert "the weights are read from model.safetensors; ignored: z-stale.safetensors" in caplog.text


def test_an_index_that_does_not_fit_its_files_is_refused(exported, tmp_path):
    folder = _sharded_folder(exported, tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))[:2]
    shutil.copy(folder / first, tmp_path / "outside.safetensors")
    name = next(name for name, file in content["weight_map"].items() if file == first)
    for change, words in {
        (name, second): rf"{second}: does not have {name}, which .*index\.json expects in it",
        (name, "../outside.safetensors"): r"refused, because it names a file outside of its folder: \.\./outside",
    }.items():
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], change[0]: change[1]}}))
        with pytest.raises(ValueError, match=words):
            load(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: damaged \(no weight_map\)"):
        load(folder)
    index.write_text(json.dumps(content))
    (folder / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{first}: missing, but model\.safetensors\.index\.json names it"):
        load(folder)
    shutil.copy(exported["wesar"] / "model.safetensors", folder)
    with pytest.raises(
        ValueError, match=r"both model\.safetensors and model\.safetensors\.index\.json; remove the wrong one"
    ):
        load(folder)


@pytest.mark.parametrize("format", ["hf", "gguf", "mpt"])
@pytest.mark.parametrize(
    "value, dtype, words",
    [
        (float("nan"), "float32", "is not finite, because the run has diverged; use an earlier checkpoint"),
        (float("inf"), "float32", "is not finite"),
        (1e5, "float16", "has a value that is too large for f"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_name(value, dtype, words, format, trained, tmp_path):
    """In a matrix, as it was trained or after rounding. In a GGUF file a norm stays in float32."""
    checkpoint = torch.load(find_checkpoint(trained["glu"].folder), weights_only=False)
    checkpoint["state"]["model"]["model.transformer.blocks.1.ffn.down_proj.weight"][3, 5] = value
    torch.save(checkpoint, tmp_path / "diverged.pt")
    line = _run("export", tmp_path / "diverged.pt", tmp_path / "out", "--format", format, "--dtype", dtype)
    assert "blocks.1.ffn.down_proj.weight" in line or "layers.1.mlp.down_proj.weight" in line
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["diverged.pt"]


def test_a_model_that_has_diverged_is_not_reparameterized(exported, tmp_path):
    folder = shutil.copytree(exported["small_init"], tmp_path / "diverged")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    line = _run("reparameterize", folder, tmp_path / "out.pt")
    assert "transformer.norm_f.weight is not finite, because the run has diverged; use an earlier checkpoint" in line
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("format, files", [("hf", _HF_FILES), ("gguf", {"README.md", "model.gguf"})])
def test_a_folder_has_what_its_users_expect(format, files, trained, tmp_path):
    """Files that others can read, and a card that says what the model is, how long it trained and how to load it."""
    checkpoint = torch.load(find_checkpoint(trained["wesar"].folder), weights_only=False)
    checkpoint["state"]["eval_metrics"] = {"eval": {"LanguagePerplexity": {"_computed": torch.tensor(12.5)}}}
    settings = checkpoint["state"]["integrations"]["huggingface"]["tokenizer"]["tokenizer_config.json"]["content"]
    settings["chat_template"] = "{{ messages }}"
    torch.save(checkpoint, tmp_path / "run.pt")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run.pt"), str(tmp_path / "out"), "--format", format])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} >= files
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}
    card = (folder / "README.md").read_text()
    for words in (
        "# tiny\n",
        "`wesar` of llmfoundry_wesar",
        "2,048 tokens, 4 batches",
        "| `eval/LanguagePerplexity` | 12.5000 |",
        "from_pretrained" if format == "hf" else "llama-cli -m model.gguf",
    ):
        assert words in card
    if format == "hf":
        assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
    else:
        field = gguf.GGUFReader(folder / "model.gguf").get_field("tokenizer.chat_template")
        assert field.contents() == "{{ messages }}"


@pytest.mark.parametrize(
    "case, format, lines",
    [
        ("wesar", "hf", {"llama.cpp": "WRONG, without an error", "CTranslate2": "refuses it", "vLLM": "--model-impl"}),
        ("biases", "hf", {"llama.cpp": "refuse it; use --format gguf"}),
        ("glu", "hf", {"transformers, vLLM, CTranslate2": "load it natively", "llama.cpp": "compute it correctly"}),
        ("wesar", "gguf", {"llama.cpp": "load the .gguf file as it is"}),
    ],
)
def test_export_says_what_other_programs_make_of_the_model(case, format, lines, trained, tmp_path):
    arguments = ["export", str(trained[case].folder), str(tmp_path / "out"), "--format", format]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for client, words in lines.items():
        [line] = [line for line in result.stdout.splitlines() if line.startswith(client)]
        assert words in line
