import json
import math

import pytest
import torch
from llmfoundry.utils.builders import build_composer_model
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.inspection import inspect_config, load_config
from llmfoundry_wesar.methods import names
from llmfoundry_wesar.roles import find_role
from tests.test_hf_model import saved
from tests.tiny import build, within_sampling_error


@pytest.mark.parametrize(
    ("size", "millions", "d", "N"),
    [("130m", "134.1", 768, 12), ("1.3b", "1,339.1", 2048, 24), ("13b", "12,911.0", 5120, 40)],
)
def test_the_paper_sizes(size, millions, d, N):
    """Table 2's parameter counts and Table 1's gates, without allocating a weight."""
    inspection = inspect_config(load_config(f"yamls/{size}.yaml"))
    assert f"{inspection.parameters / 1e6:,.1f}" == millions
    rows = {matrix.role: matrix for matrix in inspection.matrices}
    assert [matrix.count for matrix in inspection.matrices] == [1, N, N, N, N, N, N, 1]
    assert rows["W_d"].shape == (d, 4 * d)
    assert rows["W_e"].gate == pytest.approx(158.1, abs=0.05)
    assert rows["W_o"].gate == pytest.approx(math.sqrt(1 / (2 * N * d)) / 0.0063245553)
    assert {matrix.std for matrix in rows.values()} == {0.0063245553}
    assert rows["W_u"].update_ratio == pytest.approx(1e-3 / 0.0063245553)


def test_weight_normalisation_adds_a_gain_a_row():
    """Table 6: 1,339.6M parameters, half a million more than the other methods."""
    inspection = inspect_config(load_config("yamls/1.3b.yaml", ["variables.method=weight_norm"]))
    assert f"{inspection.parameters / 1e6:,.1f}" == "1,339.6"


@pytest.mark.parametrize("method", names("method"))
def test_what_is_said_is_what_is_built(method):
    """The reported standard deviations, gates and parameter count agree with a model that is built."""
    overrides = [f"variables.method={method}", "model.vocab_size=500"]
    config = load_config("yamls/quickstart.yaml", overrides)
    inspection = inspect_config(config)
    model = build(method, d_model=128, n_layers=6, vocab_size=500).model
    assert inspection.parameters == sum(p.numel() for p in model.parameters())
    rows = {matrix.role: matrix for matrix in inspection.matrices}
    for module in model.modules():
        if not hasattr(module, "role"):
            continue
        row = rows[module.role.name]
        assert tuple(module.weight.shape) == row.shape
        # If the optimizer has the gate of a plain layer, the layer's weight is the virtual one.
        scale = row.gate if row.gate and not hasattr(module, "gate") else 1.0
        assert module.weight.std().item() == pytest.approx(scale * row.std, rel=0.05)
        virtual = module.virtual_weight() if hasattr(module, "virtual_weight") else module.weight
        # The tolerance is for ‖W‖₂ = σ(√rows + √columns), which holds only in the limit of large matrices.
        assert virtual.std().item() * getattr(module, "scale", 1) == pytest.approx(row.virtual_std, rel=0.08)
        if hasattr(module, "gate"):
            assert module.gate.mean().item() == pytest.approx(row.gate, rel=0.05)


HE = {"name": "he_init_", "emb_init_std": 1.0}
STOCK = {"loss_fn": "torch_crossentropy", "attn_config": {"attn_impl": "torch"}, "init_config": HE}
STOCK |= {"name": "mpt_causal_lm", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 97}
HF = {"name": "wesar_hf_causal_lm", "pretrained": False, "init_config": HE, "z_loss": 1e-4}


@pytest.mark.parametrize(
    ("section", "roles"),
    [
        ({**STOCK, "tie_word_embeddings": False}, "W_e W_pos W_qkv W_o W_u W_d W_p"),
        ({**STOCK, "init_config": {"name": "small_init_"}}, "W_e W_pos W_qkv W_o W_u W_d"),
        ({**HF, "pretrained_model_name_or_path": "Llama"}, "W_e W_q W_k W_v W_o W_g W_u W_d W_p"),
        (
            {**HF, "pretrained_model_name_or_path": "GPT2", "init_config": {"name": "he_init_"}},
            "W_e W_pos W_qkv W_o W_u W_d",
        ),
    ],
)
def test_a_plain_model_under_the_gated_optimizer(section, roles, tmp_path):
    """σ_• is that of the model that foundry builds, σ that of the optimizer, and the gate is σ_•/σ.

    torch draws foundry's untied lm_head after the init function has run. The reported σ_• takes that into account.
    """
    if family := section.get("pretrained_model_name_or_path"):
        section = {**section, "pretrained_model_name_or_path": saved(tmp_path, family)}
    inspection = inspect_config({"model": section, "optimizer": {"name": "wesar_adamw", "lr": 1e-3, "sigma": 0.01}})
    assert [matrix.role for matrix in inspection.matrices] == roles.split()
    rows = {matrix.role: matrix for matrix in inspection.matrices}
    torch.manual_seed(0)
    model = build_composer_model(section["name"], {k: v for k, v in section.items() if k != "name"}, None).model
    assert inspection.parameters == sum(p.numel() for p in model.parameters())
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            row = rows[find_role(name.removesuffix(".weight")).name]
            assert tuple(weight.shape) == row.shape
            assert within_sampling_error(weight, row.virtual_std), name
            assert (row.std, row.gate) == (0.01, pytest.approx(row.virtual_std / 0.01))
            assert row.update_ratio == pytest.approx(0.1)
    optimizer = {"name": "wesar_adamw", "lr": 1e-3, "gated": r"(down_proj|mlp.c_proj)\.weight$"}
    gates = {row.role: row.gate for row in inspect_config({"model": section, "optimizer": optimizer}).matrices}
    assert {role for role, gate in gates.items() if gate is not None} == {"W_d"}
    adamw = inspect_config({"model": section, "optimizer": {"name": "adamw", "lr": 1e-3}})
    assert [(row.std, row.gate) for row in adamw.matrices] == [(row.virtual_std, None) for row in inspection.matrices]


@pytest.mark.parametrize("key", ["emb_init_std", "emb_init_uniform_lim"])
def test_the_embeddings_own_init_is_told(key):
    """With foundry's keys for W_e, the reported σ is the drawn one, and embedding scaling makes σ_• equal to 1."""
    config = load_config("yamls/quickstart.yaml", ["variables.method=small_init", f"model.init_config.{key}=0.3"])
    row = inspect_config(config).matrices[0]
    drawn = build("small_init", vocab_size=500, init_config={key: 0.3}).model.transformer.wte
    # 16,000 draws: one standard error of the standard deviation is 0.6% of it.
    assert row.std == pytest.approx(drawn.weight.std().item(), rel=0.03)
    assert row.virtual_std == pytest.approx(1)


def test_the_command(tmp_path):
    run = CliRunner().invoke(app, ["inspect", "yamls/130m.yaml", "variables.method=he_init", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["parameters"] == 134105856
    assert report["matrices"][0] == {
        "role": "W_e",
        "shape": [32000, 768],
        "count": 1,
        "layer": "ScaledEmbedding",
        "virtual_std": pytest.approx(1.0),
        "std": pytest.approx(math.sqrt(1 / 768)),
        "gate": None,
        "update_ratio": pytest.approx(1e-3 * math.sqrt(768)),
    }


def refused(*arguments: str) -> str:
    run = CliRunner().invoke(app, ["inspect", *arguments])
    assert isinstance(run.exception, SystemExit) and run.exit_code == 1
    [line] = run.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("yamls/none.yaml", "No such file"),
        ("pyproject.toml", "pyproject.toml"),
        ("results/quickstart.png", "results/quickstart.png"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(file, message):
    assert message in refused(file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("variables.method=wezar", "variables.method: 'wezar'"),
        ("model.name=hf_causal_lm", "model.name: 'hf_causal_lm'"),
        ("model.name=mpt_causal_lm", "Set `model.name: wesar_mpt_causal_lm`"),
        ("model.name=wesar_hf_causal_lm", "wesar_hf_causal_lm has no such key"),
        (
            "optimizer.name=wesar_adamw optimizer.sigma=0 variables.method=he_init",
            "optimizer.sigma: 0 is not a positive number",
        ),
        ("model.init_config.sigma=0", "sigma: 0 is not a positive number"),
        ("model.zloss=0", "model.zloss: 0 has no effect"),
        ("model.attn_config.rope_impl=dail", "flash_attn"),
        ("optimizer=null", "optimizer.lr is missing"),
        ("modle.d_model=512", "did you mean model?"),
        ("foo=512", "under `variables`"),
        ("model.d_model", "'model.d_model' is not an override"),
        ("optimizer.betas=[0.9", "optimizer.betas=[0.9"),
        ("variables.data=#1", """'#1' for a comment; quote the value: 'variables.data="#1"'"""),
        ("variables.data=${nothing}", "Interpolation key 'nothing' not found"),
        ("variables.data=${", "variables.data=${: "),
        ("variables.data=${oc.env:HOME}", "Unsupported interpolation type oc.env"),
        ("optimizer.lr=null", "optimizer.lr: None is not a number ≥ 0"),
        ("optimizer.lr=-1", "optimizer.lr: -1 is not a number ≥ 0"),
        ("model.d_model=abc", "model.d_model: 'abc' is not a whole number"),
        ("model.n_heads=null", "model.n_heads: None is not a whole number"),
        ("model.ffn_config=mptglu", "mptglu"),
        ("model.init_config=wesar_", "init_config"),
        ("model.init_config.sigma=.inf", "sigma: inf is not a positive number"),
        ("model.init_config.init_div_is_residual=-2", "-2 is neither a boolean nor a positive"),
        ("model.init_config.init_div_is_residual=abc", "'abc' is neither a boolean nor a positive"),
        ("model.z_loss=true", "model.z_loss: True is not a number"),
        ("model.residual_scaling=none", "model.residual_scaling: 'none' is not one of true, false"),
        ("model.fc_type.trainable=abc", "model.fc_type.trainable: 'abc' is not one of"),
        ("model.loss_fn=fused_crossentropy", "model.loss_fn: fused_crossentropy has no z-loss"),
        ("model.fused_loss=true model.use_train_metrics=true", "set model.use_train_metrics"),
        ("variables.method=small_init model.init_config.sigma=0.1", "sigma: 0.1 is not used by small_init_"),
    ],
)
def test_a_wrong_config_is_one_line(overrides, message):
    assert message in refused("yamls/130m.yaml", *overrides.split())


def test_the_help_keeps_what_stands_in_brackets():
    text = " ".join(CliRunner().invoke(app, ["data", "--help"]).output.split())
    assert "hf:NAME[:CONFIG][@SPLIT]" in text and "[default: 32000]" in text
