"""The `llmfoundry-wesar` command. Each subcommand calls one function of the package."""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer, echo

app = Typer(
    help="Tools for llm-foundry runs with WeSaR: data, inspection, comparison, plots, export and evaluation.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # rich would take [@SPLIT] for markup and remove it
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a user's error in one line, without a traceback, and exit with code 1."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        echo(f"llmfoundry-wesar: {' '.join(str(error).split())}", err=True)
        raise Exit(1) from None


def _local(path: Any) -> Any:
    """Refuse an output in an object store, which would become a local folder named s3:."""
    with one_line_errors():
        if path is not None and re.match(r"(?i)[a-z]+\d*:/", str(path)):
            raise ValueError(f"{path}: this is in an object store; give a local path, and copy the result there")
    return path


@contextmanager
def _few_remarks() -> Iterator[None]:
    """Hide the warnings that foundry and transformers print for every model."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@app.command()
def inspect(
    config: Annotated[str, Argument(help="A training YAML.")],
    overrides: Annotated[list[str] | None, Argument(help="key=value, as for the trainer.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
    gpus: Annotated[
        int | None,
        Option(min=1, help="Number of GPUs. Also estimate the memory that training needs on each; only for MPT."),
    ] = None,
) -> None:
    """Show the initial scale of each matrix and the number of parameters, without allocating the model.

    σ_• is the scale in the forward pass, σ that of the stored weight, gate their quotient, and lr/σ the update ratio of
    a first Adam step at the full learning rate.
    """
    with one_line_errors(), _few_remarks():
        from llmfoundry_wesar.inspection import inspect_config, load_config
        from llmfoundry_wesar.memory import estimate

        loaded = load_config(config, overrides)
        inspection = inspect_config(loaded)
        memory = None if gpus is None else estimate(loaded, inspection.parameters, gpus)
    if as_json:
        echo(json.dumps(inspection.to_dict() | ({} if memory is None else {"memory": memory.to_dict()}), indent=2))
    else:
        echo(str(inspection) if memory is None else f"{inspection}\n\n{memory}")


@app.command()
def plot(
    runs: Annotated[list[str], Argument(help="TensorBoard folders of runs, or CSV files from --csv.", metavar="RUN…")],
    out: Annotated[str, Option(callback=_local, help="The picture: .png, .svg or .pdf.")],
    figure: Annotated[
        str,
        Option(
            help="The paper's figure: 1 (loss, update ratios of W_d and W_u), 2 (loss), 3 (norms of both), "
            "8 (gradient norms in a block), 9 (update ratios in a block, also for 10 to 12); or gates, roles (update "
            "ratios of each role), heat (the last update ratios of all matrices, and the curves of the roles)."
        ),
    ] = "1",
    layer: Annotated[
        int | None, Option(help="The block, counted from 0. [default: the last one; for gates all]")
    ] = None,
    label: Annotated[
        list[str] | None, Option(help="The name of a run. Give it once for each run, in their order.")
    ] = None,
    smooth: Annotated[int, Option(help="Number of points in the moving average that is drawn.")] = 1,
    x: Annotated[str, Option(help="step or tokens.")] = "step",
    csv: Annotated[
        str | None, Option(callback=_local, help="Also write the values to this file. It can be a RUN later.")
    ] = None,
    table: Annotated[
        bool,
        Option("--table", help="Print each run's final and held-out loss, and W_d's update ratio divided by W_u's."),
    ] = False,
) -> None:
    """Draw the paper's figures from the logs of runs."""
    from llmfoundry_wesar.runs import plot as plotting

    with one_line_errors():
        summed_up = plotting.plot(runs, out, figure, layer, label or (), smooth, x, csv, table)
        if summed_up is not None:
            echo(summed_up)


def token_count(text: str) -> int:
    """Read a number with an optional K, M or B."""
    from streaming.base.util import number_abbrev_to_int

    return number_abbrev_to_int(text)


@app.command()
def data(
    out: Annotated[
        Path, Argument(callback=_local, help="A new folder, or the folder of an interrupted run with the same options.")
    ],
    source: Annotated[
        list[str],
        Option(
            help="stdlib (the source of this Python's standard library); a .txt, .jsonl, .raw or .tokens file, or one "
            "with .xz, .zst, .gz or .bz2; a folder of such files; or hf:NAME[:CONFIG][@SPLIT] (a Hugging Face data "
            "set, streamed; the default split is train). Can be given several times."
        ),
    ],
    sequence_length: Annotated[int, Option(help="Tokens in a sequence.")] = 2048,
    vocab_size: Annotated[
        int | None, Option(help="Entries of the BPE tokenizer that is trained. [default: 32000]")
    ] = None,
    tokenizer: Annotated[str | None, Option(help="Name or folder of a Hugging Face tokenizer to use.")] = None,
    max_tokens: Annotated[
        int | None,
        Option(help="Largest number of training tokens, such as 10M or 30B.", parser=token_count, metavar="COUNT"),
    ] = None,
    val_fraction: Annotated[float, Option(help="Fraction of the documents in the val split, from 0 to 1.")] = 0.01,
    seed: Annotated[int, Option(help="Seed of the order and of the choice of the val split.")] = 17,
    shuffle: Annotated[bool, Option(help="Read files in random order, and documents through a shuffle buffer.")] = True,
    text_key: Annotated[str, Option(help="Field of a .jsonl line or Hugging Face row with the text.")] = "text",
) -> None:
    """Turn text into a tokenizer and token shards for foundry's text loader.

    Training text: llmfoundry-wesar data OUT --source hf:tiiuae/falcon-refinedweb --text-key content --max-tokens 30B
    --val-fraction 0.0005. An evaluation set: llmfoundry-wesar data LAMBADA --source
    hf:EleutherAI/lambada_openai:default@test --tokenizer OUT/tokenizer --val-fraction 1 --no-shuffle
    """
    from llmfoundry_wesar.data.shards import prepare

    with one_line_errors():
        splits = prepare(
            out,
            source,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            val_fraction=val_fraction,
            seed=seed,
            shuffle=shuffle,
            text_key=text_key,
        )
    for split, sequences in splits.items():
        echo(f"{out / split}: {sequences:,} sequences of {sequence_length}, {sequences * sequence_length:,} tokens")


@app.command()
def spikes(run: Annotated[str, Argument(help="The folder of a run that had spike_recorder, or one above it.")]) -> None:
    """List the spikes of the loss that spike_recorder wrote, each with the matrix that moved first."""
    with one_line_errors():
        from llmfoundry_wesar.spikes import find_reports, summarise

        for report in find_reports(run):
            echo(f"{summarise(report)} {report}")


@app.command()
def compare(
    config: Annotated[str, Argument(help="A training YAML.")],
    methods: Annotated[str, Option(help="Values of variables.method, separated by commas.")],
    seeds: Annotated[str, Option(help="Values of seed (weights and data order), separated by commas.")],
    out: Annotated[Path, Option(callback=_local, help="A new folder, or the folder of a series to continue.")],
    overrides: Annotated[list[str] | None, Argument(help="key=value for all runs, as for the trainer.")] = None,
    vary: Annotated[
        list[str] | None, Option(help="key=v1,v2,… runs each method and seed with each value. Can be repeated.")
    ] = None,
    nproc: Annotated[
        int | None, Option(min=1, help="Number of processes of a run, by Composer's launcher. [default: no launcher]")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print which runs are done and which are not.")] = False,
) -> None:
    """Train methods under equal conditions, one run after the other, and summarise them.

    The same command continues an interrupted series: it keeps finished and diverged runs, and repeats failed ones.
    """
    import shlex

    with one_line_errors(), _few_remarks():
        from llmfoundry_wesar.runs.compare import plan, results, run_series

        lists = [[value for value in text.split(",") if value] for text in (methods, seeds)]
        if wrong := [seed for seed in lists[1] if not seed.isdecimal()]:
            raise ValueError(f"--seeds {seeds}: {wrong[0]!r} is not a whole number")
        runs = plan(config, lists[0], [int(seed) for seed in lists[1]], out, vary or (), overrides or (), nproc)
        rows = results(runs, out) if dry_run else run_series(runs, out)
    status = {row["run"]: row["status"] for row in rows}
    unfinished = [run for run in runs if status.get(run.name, "failed") == "failed"]
    diverged = list(status.values()).count("diverged")
    if dry_run:
        for run in runs:
            echo(f"{status.get(run.name, 'not run')}: {run.name}")
            if run in unfinished:
                echo(f"  {shlex.join(run.command)}")
        echo(f"{len(unfinished)} of {len(runs)} runs to do")
    else:
        files = [str(path) for path in (out / "table.md", out / "curves.png") if path.exists()]
        lost = f", {diverged} of them diverged" if diverged else ""
        echo(f"{len(runs) - len(unfinished)} of {len(runs)} runs finished{lost}, see {' and '.join(files)}")
        if unfinished:
            raise Exit(1)


@app.command()
def export(
    checkpoint: Annotated[str, Argument(help="A Composer checkpoint, whole or sharded, or a save_folder.")],
    out: Annotated[str, Argument(callback=_local, help="A new folder.")],
    format: Annotated[
        str,
        Option(
            help="hf (Arcee, or Llama for a GLU, in safetensors), gguf (for llama.cpp, Ollama, LM Studio) or mpt (for "
            "foundry's mpt_causal_lm)."
        ),
    ] = "hf",
    dtype: Annotated[
        str, Option(help="float32, bfloat16 or float16 (short: f32, bf16, f16); with gguf also q8_0.")
    ] = "float32",
) -> None:
    """Convert a checkpoint to a plain model: merge the gates and all other additions into the weights."""
    with one_line_errors(), _few_remarks():
        from llmfoundry_wesar.export.files import export

        clients = export(checkpoint, out, format, dtype)  # type: ignore[arg-type]
    echo(f"{out}: written. Other programs with this model:\n\n{clients}" if clients else f"{out}: written.")


@app.command()
def reparameterize(
    model: Annotated[
        str, Argument(help="A folder that export wrote, or one with an Arcee, Llama or MPT model in safetensors.")
    ],
    out: Annotated[
        str, Argument(callback=_local, help="A new file, for the trainer's load_path with load_weights_only=true.")
    ],
    method: Annotated[str, Option(help="The variables.method to continue with.")] = "wesar",
) -> None:
    """Turn a plain model into a gated one that computes the same function, and print its `model` section."""
    with one_line_errors(), _few_remarks():
        from omegaconf import OmegaConf

        from llmfoundry_wesar.export.files import reparameterize

        section = reparameterize(model, out, method)
    echo(OmegaConf.to_yaml({"model": section}), nl=False)


@app.command()
def evaluate(
    model: Annotated[str, Argument(help="A folder that export wrote, or a checkpoint.")],
    tasks: Annotated[
        str,
        Option(help="paper (Tables 5 and 8), or names from wikitext,lambada,boolq,cb,copa,multirc,record,rte,wic,wsc."),
    ] = "paper",
    data: Annotated[str | None, Option(help="A folder with local copies of the data. [default: from the Hub]")] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Score only this number of examples of each task, the first ones.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Sequences in a batch.")] = 8,
    device: Annotated[str | None, Option(help="A torch device. [default: the first GPU, or the CPU]")] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path | None, Option(callback=_local, help="Also write the scores to this file, as JSON.")] = None,
) -> None:
    """Compute the scores of the paper's Tables 5 and 8 by lm-evaluation-harness."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in a log; tqdm reads this when it is imported
    with one_line_errors(), _few_remarks():
        from llmfoundry_wesar.evaluate import evaluate
        from llmfoundry_wesar.export.folders import check_new
        from llmfoundry_wesar.runs.scalars import replacing

        if out is not None:
            check_new(out)  # fail now, not after hours of scoring
            out.parent.mkdir(parents=True, exist_ok=True)
        evaluation = evaluate(model, tasks, data, limit, batch_size, device, dtype)
        echo(str(evaluation))
        if out is not None:
            with replacing(out) as partial:
                partial.write_text(json.dumps(evaluation.to_dict(), indent=2))
