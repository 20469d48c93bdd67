import copy

import pytest
from llmfoundry.command_utils import train_from_yaml
from omegaconf import OmegaConf

from llmfoundry_wesar.methods import expand, load, names
from tests.distributed import REPOSITORY
from tests.test_foundry_yamls import IN_LAYERS

METHODS = [
    "embedding_detach",
    "embedding_norm",
    "he_init",
    "no_embedding_scaling",
    "residual_scaling_he",
    "residual_scaling_small",
    "sigma_reparam",
    "sigma_reparam_post_ln",
    "small_init",
    "weight_norm",
    "wesar",
    "wesar_adamw",
    "wesar_fixed",
    "wesar_small",
]


def test_every_row_of_the_paper_has_a_file():
    assert names("method") == METHODS
    assert names("setting") == ["quickstart", "rapid", "stable"]


@pytest.mark.parametrize(
    "config", [{}, {"variables": None}, {"variables": {"data": "x"}, "model": {"name": "mpt_causal_lm"}}]
)
def test_a_config_without_method_and_setting_is_not_touched(config):
    before = copy.deepcopy(config)
    assert expand(config) is config
    assert config == before


def test_the_runs_own_keys_win():
    config = {
        "variables": {"method": "wesar", "setting": "rapid"},
        "model": {"init_config": {"sigma": 0.02}},
        "optimizer": {"lr": 0.5},
    }
    expanded = expand(config)
    assert expanded["model"]["init_config"] == {"name": "wesar_", "sigma": 0.02, "backbone": "he"}
    assert expanded["optimizer"]["lr"] == 0.5
    assert expanded["optimizer"]["betas"] == [0.9, 0.95]


def test_a_method_replaces_what_the_setting_says_and_the_run_what_both_say():
    """In a method, `null` removes a key. A run's own null stays, because some keys of foundry's loaders accept null."""
    config = {"variables": {"method": "wesar_adamw", "setting": "rapid"}, "optimizer": {"max_norm": None}}
    expanded = expand(config)
    assert "algorithms" not in expanded and "fused" not in expanded["optimizer"]
    assert expanded["optimizer"]["name"] == "wesar_adamw" and expanded["optimizer"]["lr"] == 1e-3
    assert expanded["optimizer"]["max_norm"] is None
    assert expand({"variables": {"method": "wesar", "setting": "rapid"}})["optimizer"]["name"] == "adamw"


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (
            "small_init",
            {"fc_type": {"name": "wesar"}, "init_config": {"name": "wesar_", "sigma": 0.1, "backbone": "he"}},
            "than model.fc_type.name: wesar, model.init_config.name: wesar_, .* model.fc_type and model.init_config",
        ),
        (
            "weight_norm",
            {"fc_type": "wesar"},
            "than model.fc_type.name: wesar, which would win; remove model.fc_type, or",
        ),
        ("wesar", {"fc_type": "torch"}, "than model.fc_type.name: torch"),
        ("wesar_small", {"init_config": {"backbone": "he"}}, "than model.init_config.backbone: he"),
        ("wesar_adamw", {"init_config": {"name": "small_init_"}}, "than model.init_config.name: small_init_"),
    ],
)
def test_keys_of_another_method_are_refused(method, model, message):
    """Else a config with WeSaR's layers would train WeSaR under the name of every other method."""
    with pytest.raises(ValueError, match=rf"variables.method: {method} has other layers .* {message}"):
        expand({"variables": {"method": method}, "model": model})
    expand({"model": model})


def test_keys_that_a_method_has_too_are_its_own():
    model = OmegaConf.to_container(OmegaConf.create(IN_LAYERS).model)
    for method in ("wesar", "wesar_fixed"):
        expand({"variables": {"method": method}, "model": model}, check_keys=False)


def test_the_stock_models_tied_embeddings_are_refused_the_scale_of_one():
    config = {"variables": {"method": "wesar_adamw"}, "model": {"name": "mpt_causal_lm", "d_model": 768}}
    with pytest.raises(
        ValueError, match=r"emb_init_std: 1.0 is also .* be 27.7. .* `model.tie_word_embeddings: false`"
    ):
        expand(config)
    for fix in ({"tie_word_embeddings": False}, {"init_config": {"emb_init_std": None}}):
        expand(config | {"model": config["model"] | fix})


@pytest.mark.parametrize("variables", [{"method": "wesar_adamw"}, {"setting": "rapid"}])
def test_the_stock_hugging_face_model_takes_no_method_or_setting(variables):
    with pytest.raises(ValueError, match=r"model.name: 'hf_causal_lm' does not take .* set it to wesar_hf_causal_lm"):
        expand({"variables": variables, "model": {"name": "hf_causal_lm"}})


WRITTEN = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


@pytest.mark.parametrize("variables", [{}, {"method": "wesar"}])
@pytest.mark.parametrize("mixed", [None, "DEFAULT", "pure", {**WRITTEN, "buffer_dtype": "bf16"}])
def test_an_fsdp1_that_rounds_buffers_is_refused(variables, mixed, monkeypatch):
    """Composer's DEFAULT casts RoPE's frequencies to bfloat16 under FSDP1. FSDP2 casts no buffers."""
    model = {"name": "wesar_mpt_causal_lm"}
    config = {"variables": variables, "precision": "amp_bf16", "model": model, "fsdp_config": {}}
    rounding = config | {
        "fsdp_config": {"state_dict_type": "full"} | ({} if mixed is None else {"mixed_precision": mixed})
    }
    with pytest.raises(
        ValueError, match=r"fsdp_config\.mixed_precision: .* write mixed_precision: \{param_dtype: bf16"
    ):
        expand(rounding, check_keys=False)
    for right in (config, rounding | {"precision": "fp32"}, rounding | {"model": {"name": "mpt_causal_lm"}}):
        expand(right, check_keys=False)
    for written in (WRITTEN, "FULL"):
        expand(config | {"fsdp_config": {"mixed_precision": written}}, check_keys=False)
    monkeypatch.setenv("FSDP_VERSION", "2")
    expand(rounding, check_keys=False)


@pytest.mark.parametrize(("kind", "known"), [("method", "wesar_small"), ("setting", "rapid, stable")])
def test_an_unknown_name_lists_the_known_ones(kind, known):
    with pytest.raises(ValueError, match=rf"variables\.{kind}: 'wezar' is not known; use one of .*{known}"):
        expand({"variables": {kind: "wezar"}})


def test_variables_that_are_no_mapping_are_refused():
    with pytest.raises(ValueError, match="variables: 'wesar' is not a mapping"):
        expand({"variables": "wesar"})


@pytest.mark.parametrize(
    ("missing", "loader"),
    [
        ("data", "train_loader: .*/train"),
        ("wikitext", "eval_loader wikitext: .*/val"),
        ("lambada", "eval_loader lambada: .*/val"),
    ],
)
def test_a_folder_that_is_not_there_is_named_by_the_trainer(missing, loader, dataset, tmp_path):
    """The error names the key, its variable and the command that makes the folder, before anything is built."""
    folders = {"data": dataset, "wikitext": dataset, "lambada": dataset, missing: tmp_path / "none"}
    variables = [f"variables.{name}={folder}" for name, folder in folders.items()]
    words = (
        rf"{loader}; prepare it with `llmfoundry-wesar data {tmp_path}/none --source .* change variables\.{missing}\."
    )
    with pytest.raises(ValueError, match=words):
        train_from_yaml(str(REPOSITORY / "yamls/130m.yaml"), variables)


@pytest.mark.parametrize("data", [{"remote": "s3://bucket"}, {"streams": {}, "local": None}])
def test_data_that_is_not_in_one_local_folder_is_left_to_streaming(data):
    loader = {"name": "text", "dataset": {"local": "none", "split": "train", **data}}
    expand({"variables": {"method": "wesar"}, "train_loader": loader, "eval_loader": [{"label": "x", **loader}]})


def test_tables_3_and_11():
    """Batch in tokens at context 2048, learning rate, warm-up, and the values that both settings share."""
    rapid, stable = load("setting", "rapid"), load("setting", "stable")
    assert (rapid.global_train_batch_size * 2048, stable.global_train_batch_size * 2048) == (2**20, 2**22)
    assert (rapid.optimizer.lr, stable.optimizer.lr) == (1e-3, 5e-4)
    assert (rapid.scheduler.t_warmup, stable.scheduler.t_warmup) == ("100ba", "2000ba")
    for setting in (rapid, stable):
        assert setting.precision == "amp_bf16"
        assert list(setting.optimizer.betas) == [0.9, 0.95]
        assert setting.optimizer.weight_decay == 0.01
        assert setting.algorithms.gradient_clipping.clipping_threshold == 1.0
        assert setting.model.z_loss == 1e-4


def test_table_6_sigmas():
    """σ² of each reparameterisation, to the digits that the files have."""
    sigmas = {"wesar": 4e-5, "weight_norm": 16e-5, "sigma_reparam": 64e-5, "sigma_reparam_post_ln": 16e-5}
    for method, variance in sigmas.items():
        assert load("method", method).model.init_config.sigma ** 2 == pytest.approx(variance, rel=1e-8)
