"""From text to shards and back, read with foundry's own loader and not with our own reading of the format."""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from llmfoundry.data.data import ConcatTokensDataset
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.utils.builders import build_tokenizer
from tokenizers import processors
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llmfoundry_wesar.cli import app
from llmfoundry_wesar.data import corpus as corpus_module
from llmfoundry_wesar.data import shards as data_module
from llmfoundry_wesar.data.shards import EOS, prepare
from llmfoundry_wesar.inspection import load_config

WORDS = ["the", "matrix", "W", "is", "αW", "and", "漢字", "stays", "whole.\n\t", "def", "f(x):", "return", "x"]
LENGTH = 32
OPTIONS = {"sequence_length": LENGTH, "vocab_size": 300, "val_fraction": 0.2}


def make_texts(count=200):
    rng = random.Random(0)
    texts = [f"{number} {' '.join(rng.choices(WORDS, k=rng.randrange(5, 60)))}" for number in range(count)]
    texts[7] += f" {EOS} is spelt out here"
    return texts


TEXTS = make_texts()


@pytest.fixture
def source(tmp_path):
    """Write a .jsonl file of TEXTS."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def small_bounds(monkeypatch):
    """Set small bounds, so that a short text has many batches and overflows the shuffle buffer, as large texts do."""
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 3_000)
    monkeypatch.setattr(corpus_module, "SHUFFLE_BYTES", 10_000)


def loader(out, split, tokenizer):
    """Load the batches of a split, one sequence each, as a training run does."""
    dataset = {"local": str(out), "split": split, "shuffle": False, "max_seq_len": LENGTH}
    config = {"name": "text", "dataset": dataset, "drop_last": False, "num_workers": 0, "pin_memory": False}
    config |= {"prefetch_factor": None, "persistent_workers": False}
    return build_dataloader(config, tokenizer, device_batch_size=1).dataloader


def load(out, split):
    """Read the sequences of a split: (sequences, sequence_length)."""
    tokenizer = build_tokenizer(str(out / "tokenizer"), {"model_max_length": LENGTH})
    tokenizer.pad_token = tokenizer.eos_token
    return np.concatenate([batch["input_ids"].numpy() for batch in loader(out, split, tokenizer)]), tokenizer


def documents(out, split):
    """Cut the tokens of a split at every EOS. Return the texts of whole documents and the text after the last EOS."""
    sequences, tokenizer = load(out, split)
    assert sequences.shape[1] == LENGTH
    tokens = sequences.reshape(-1)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    pieces = np.split(tokens, ends + 1)
    return [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]], tokenizer.decode(pieces[-1])


def tree(folder):
    """Return the bytes of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_comes_back_once_through_foundrys_loader(tmp_path, source, small_bounds):
    """A document that contains the EOS's text comes back too. Only a tail shorter than a sequence may be missing."""
    counts = prepare(tmp_path / "out", [source], **OPTIONS)
    seen, tails = Counter(), []
    for split in ("train", "val"):
        whole, tail = documents(tmp_path / "out", split)
        seen.update(whole)
        tails.append(tail)
    assert set(seen.values()) == {1} and set(seen) <= set(TEXTS)
    missing = [text for text in TEXTS if text not in seen]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    length = sum(len(tokenizer(text, split_special_tokens=True).input_ids) + 1 for text in TEXTS)
    dropped = length - sum(counts.values()) * LENGTH
    assert 0 <= dropped < 2 * LENGTH
    # The tail of each split is the start of a document that was cut, perhaps within a character.
    assert all(any(text.startswith(tail.rstrip("\ufffd")) for text in missing) for tail in tails)


def test_sequences_are_those_of_foundrys_concat_tokens(tmp_path, source, small_bounds):
    """Without shuffling and val every sequence is equal. The text that contains the EOS is left out, see above."""
    texts = [text for text in TEXTS if EOS not in text]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(tmp_path / "out", [source], shuffle=False, **OPTIONS | {"val_fraction": 0})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    rows = [{"text": text} for text in texts]
    stock = ConcatTokensDataset(rows, tokenizer, LENGTH, bos_text="", eos_text=EOS, no_wrap=False)
    np.testing.assert_array_equal(load(tmp_path / "out", "train")[0], [row["tokens"] for row in stock])
    assert not (tmp_path / "out/val").exists()


def test_a_set_to_evaluate_on_has_every_document_in_val(tmp_path, source):
    """With `val_fraction` 1, val equals to the byte what would be the train split. The tokenizer is the given one."""
    prepare(tmp_path / "train", [source], shuffle=False, **OPTIONS | {"val_fraction": 0})
    given = {"tokenizer": str(tmp_path / "train/tokenizer"), "sequence_length": LENGTH}
    counts = prepare(tmp_path / "out", [source], shuffle=False, val_fraction=1, **given)
    assert list(counts) == ["val"] and not (tmp_path / "out/train").exists()
    assert tree(tmp_path / "out/val") == tree(tmp_path / "train/train")
    assert load(tmp_path / "out", "val")[1].get_vocab() == load(tmp_path / "train", "train")[1].get_vocab()
    assert prepare(tmp_path / "out", [source], shuffle=False, val_fraction=1, **given) == counts


def test_the_tokenizer_is_trained_on_the_first_part_of_train(tmp_path, source, monkeypatch):
    """No document of val is used, nor any after the one at which TOKENIZER_BYTES are reached."""
    read = []
    train = ByteLevelBPETokenizer.train_from_iterator

    def spy(self, texts, *args, **options):
        read.extend(texts)
        train(self, read, *args, **options)

    monkeypatch.setattr(ByteLevelBPETokenizer, "train_from_iterator", spy)
    monkeypatch.setattr(data_module, "TOKENIZER_BYTES", 5_000)
    prepare(tmp_path / "out", [source], shuffle=False, **OPTIONS)
    assert read == documents(tmp_path / "out", "train")[0][: len(read)]
    assert sum(len(text.encode()) for text in read[:-1]) < 5_000 <= sum(len(text.encode()) for text in read)


def test_max_tokens_is_exact_and_val_comes_on_top(tmp_path, source, small_bounds):
    """1,000 tokens are 31.25 sequences: 32 are written, the first 32 of the run without a limit."""
    everything = prepare(tmp_path / "all", [source], **OPTIONS)
    counts = prepare(tmp_path / "out", [source], max_tokens=1000, **OPTIONS)
    assert counts["train"] == 32 < everything["train"]
    assert 0 < counts["val"] < everything["val"]
    np.testing.assert_array_equal(load(tmp_path / "out", "train")[0], load(tmp_path / "all", "train")[0][:32])


def test_hugging_face_data_sets_are_streamed(tmp_path, source, small_bounds):
    """`datasets` loads a local folder with the same code as one on the Hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(4):
        lines = [json.dumps({"content": text, "id": part}) + "\n" for text in TEXTS[part::4]]
        (folder / f"part{part}.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"row 1: the key 'text' is missing; the keys are 'content', 'id'; "):
        prepare(tmp_path / "out", [f"hf:{folder}"], **OPTIONS)
    counts = prepare(tmp_path / "out", [f"hf:{folder}"], text_key="content", **OPTIONS)
    assert counts == prepare(tmp_path / "again", [f"hf:{folder}"], text_key="content", **OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    seen = documents(tmp_path / "out", "train")[0] + documents(tmp_path / "out", "val")[0]
    assert len(set(seen)) == len(seen) > len(TEXTS) - 6 and set(seen) <= set(TEXTS)
    assert prepare(tmp_path / "few", [f"hf:{folder}"], text_key="content", max_tokens=640, **OPTIONS)["train"] == 20


def test_skipped_rows_are_told(tmp_path, source, capsys):
    source.write_text(source.read_text() + '{"text": null}\n{"text": ""}\n{"text": null}\n')
    prepare(tmp_path / "out", [source], **OPTIONS)
    told = capsys.readouterr().err
    assert f"skipped 2 null documents, first in {source}, line 201\n" in told
    assert f"skipped 1 empty document, first in {source}, line 202\n" in told


def test_a_full_disk_in_the_tokenizer_phase_is_one_error(tmp_path, source):
    """No file may grow above a limit, which has the effect of a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"out/.partial/tokenizer: the tokenizer cannot be written: "):
            prepare(tmp_path / "out", [source], **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


def test_a_damaged_manifest_is_named(tmp_path, source):
    prepare(tmp_path / "out", [source], **OPTIONS)
    for text in ("", "[]", "{}"):
        (tmp_path / "out/manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"out/manifest.json is not what data has written; give another folder"):
            prepare(tmp_path / "out", [source], **OPTIONS)


def test_vocabulary_is_exact_and_holds_every_byte(tmp_path, source):
    prepare(tmp_path / "out", [source], **OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1 == 300
    strange = bytes(range(128)).decode() + "ÿ\u2028😀"
    assert tokenizer.decode(tokenizer(strange).input_ids) == strange
    (tmp_path / "mine").mkdir()
    for folder in ("large", "mine"):
        with pytest.raises(ValueError, match="vocab_size: 30000 is too large: the text gives"):
            prepare(tmp_path / folder, [source], **OPTIONS | {"vocab_size": 30000})
    assert not (tmp_path / "large").exists()
    assert list((tmp_path / "mine").iterdir()) == []


def test_given_tokenizer_keeps_its_own_special_tokens(tmp_path, source):
    """Some tokenizers, as Llama's and T5's, add BOS and EOS themselves: no second EOS is added, and the BOS stays."""
    prepare(tmp_path / "first", [source], **OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first/tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    pairs = [("<s>", tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)]
    framed = processors.TemplateProcessing(single=f"<s> $A {EOS}", special_tokens=pairs)
    tokenizer.backend_tokenizer.post_processor = framed
    tokenizer.save_pretrained(tmp_path / "framed")
    options = {key: value for key, value in OPTIONS.items() if key != "vocab_size"}
    prepare(tmp_path / "out", [source], tokenizer=str(tmp_path / "framed"), **options)
    whole, _ = documents(tmp_path / "out", "train")
    assert len(whole) > 100 and {text.removeprefix("<s>") for text in whole} <= set(TEXTS)
    assert all(text.startswith("<s>") for text in whole)

    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="endless has no EOS"):
        prepare(tmp_path / "out2", [source], tokenizer=str(tmp_path / "endless"), **options)
    (tmp_path / "endless/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer .*endless cannot be loaded: "):
        prepare(tmp_path / "out2", [source], tokenizer=str(tmp_path / "endless"), **options)
    with pytest.raises(ValueError, match="vocab_size: 300 does not apply"):
        prepare(tmp_path / "out2", [source], tokenizer=str(tmp_path / "framed"), **OPTIONS)
    assert not (tmp_path / "out2").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path, source, monkeypatch):
    """Its code is not run, even on a terminal where the user answers yes."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    maps = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (own / "tokenizer_config.json").write_text(json.dumps(maps))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match="own needs code of its own, which is not run; use one that needs none"):
        prepare(tmp_path / "out", [source], tokenizer=str(own))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_an_eos_that_is_padding_too_is_warned_of(tmp_path, source, capsys):
    """Foundry's loader gives padding no target unless the key that the warning names is set."""
    prepare(tmp_path / "first", [source], **OPTIONS)
    assert "warning" not in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first/tokenizer", pad_token=EOS)
    tokenizer.save_pretrained(tmp_path / "given")
    prepare(tmp_path / "out", [source], tokenizer=str(tmp_path / "given"), sequence_length=LENGTH, val_fraction=0)
    assert "is its EOS, <|endoftext|>, " in (said := capsys.readouterr().err)
    assert "set tokenizer.kwargs.pad_token: null" in said
    for kwargs, learned in (({}, False), ({"pad_token": None}, True)):
        tokenizer = build_tokenizer(str(tmp_path / "out/tokenizer"), {"model_max_length": LENGTH, **kwargs})
        labels = np.concatenate([batch["labels"].numpy() for batch in loader(tmp_path / "out", "train", tokenizer)])
        assert (tokenizer.eos_token_id in labels) == learned


@pytest.mark.parametrize("crash", range(4))
def test_a_crash_before_any_commit_leaves_only_finished_parts(tmp_path, source, monkeypatch, crash):
    """One rename each commits the manifest, the tokenizer, train and val.

    Each of them fails once, then the run completes.
    """
    prepare(tmp_path / "whole", [source], **OPTIONS)
    expected = tree(tmp_path / "whole")
    renames = 0

    rename = Path.rename

    def failing(self, target):
        nonlocal renames
        renames += 1
        if renames == crash + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", [source], **OPTIONS)
    left = tree(tmp_path / "out")
    assert {name.split("/")[0] for name in left} == set(["manifest.json", "tokenizer", "train", "val"][:crash])
    assert all(expected[name] == data for name, data in left.items())
    written = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in left}
    prepare(tmp_path / "out", [source], **OPTIONS)
    assert tree(tmp_path / "out") == expected
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in written.items())


def test_killed_while_it_writes_and_started_again(tmp_path, source):
    """SIGKILL at the fifth sequence leaves no split. The second run writes identical bytes."""
    program = """if True:
        import json, os, signal, sys
        from llmfoundry_wesar.data import shards as data
        write, calls = data.MDSWriter.write, []
        def killed(self, sample):
            calls.append(write(self, sample))
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        data.MDSWriter.write = killed
        data.prepare(sys.argv[1], [sys.argv[2]], **json.loads(sys.argv[3]))
    """
    arguments = [str(tmp_path / "out"), str(source), json.dumps(OPTIONS)]
    process = subprocess.run([sys.executable, "-c", program, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".partial", "manifest.json", "tokenizer"}
    prepare(tmp_path / "out", [source], **OPTIONS)
    prepare(tmp_path / "whole", [source], **OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_finished_run_is_left_alone_and_says_so(tmp_path, source, capsys):
    counts = prepare(tmp_path / "out", [source], **OPTIONS)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert prepare(tmp_path / "out", [source], **OPTIONS) == counts
    assert "is complete: nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize(
    "key, value", [("sequence_length", 16), ("vocab_size", 301), ("val_fraction", 0.1), ("seed", 1), ("max_tokens", 99)]
)
def test_other_arguments_on_the_same_folder_are_refused_by_name(tmp_path, source, key, value):
    prepare(tmp_path / "out", [source], **OPTIONS)
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"out was prepared with {key}: \S+, not {value};"):
        prepare(tmp_path / "out", [source], **OPTIONS | {key: value})
    assert tree(tmp_path / "out") == before


def test_changed_text_is_refused_by_its_file(tmp_path, source):
    prepare(tmp_path / "out", [source], **OPTIONS)
    source.write_text(source.read_text() + '{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"prepared with bytes of \S+text.jsonl: "):
        prepare(tmp_path / "out", [source], **OPTIONS)


def test_folder_that_holds_something_else_is_refused(tmp_path, source):
    with pytest.raises(FileExistsError, match="holds something else"):
        prepare(tmp_path, ["stdlib"], **OPTIONS)
    with pytest.raises(FileExistsError, match="holds something else"):
        prepare(source, ["stdlib"], **OPTIONS)
    assert set(tree(tmp_path)) == {"text.jsonl"}


def test_output_inside_the_source_folder_is_not_read_back(tmp_path, source, capsys):
    """Otherwise the tokenizer's merges.txt would count as text, and as a change of the sources."""
    prepare(tmp_path / "out", [tmp_path], **OPTIONS)
    prepare(tmp_path / "out", [tmp_path], **OPTIONS)
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 257}, "vocab_size: 257 is too small"),
        ({"sequence_length": 0}, "sequence_length: 0 must"),
        ({"max_tokens": 0}, "max_tokens: 0 must"),
        ({"val_fraction": 1.5}, r"val_fraction: 1.5 must be in \[0, 1\]"),
        ({"val_fraction": 1}, "val_fraction: 1 leaves no text to train a tokenizer on; give the model's"),
        (
            {"val_fraction": 1, "tokenizer": "gpt2", "vocab_size": None, "max_tokens": 5},
            "max_tokens: 5 limits the train split, but val_fraction: 1 writes none; drop it",
        ),
        ({"sequence_length": 100_000}, "the train split has .* too few for one sequence of 100000 tokens"),
        ({"val_fraction": 1e-9}, "the val split has 0 bytes of text, too few"),
        ({"text_key": "body"}, "text.jsonl, line 1: the key 'body' is missing; the keys are 'text'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, source, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", [source], **OPTIONS | options)
    with pytest.raises(ValueError, match="no sources"):
        prepare(tmp_path / "out", [], **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_split_with_fewer_tokens_than_a_sequence_is_not_written(tmp_path, source):
    """There are enough bytes, so only tokenizing shows it: a token has about 1.5 bytes here."""
    size = sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(ValueError, match=rf"train split has fewer tokens than one sequence, {size}"):
        prepare(tmp_path / "out", [source], **OPTIONS | {"sequence_length": size, "val_fraction": 0})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "tokenizer"}


def test_progress_is_shown_on_a_terminal_and_in_the_log_of_a_long_run(tmp_path, source, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for kind, seconds, expected in ((Terminal, 60, True), (io.StringIO, 60, False), (io.StringIO, 0, True)):
        monkeypatch.setattr(sys, "stderr", kind())
        monkeypatch.setattr(corpus_module, "LOG_SECONDS", seconds)
        prepare(tmp_path / f"{kind.__name__}-{seconds}", [source], **OPTIONS)
        shown = sys.stderr.getvalue()
        assert [f"{bar}: 100%" in shown for bar in ("checking files", "tokenizer", "shards")] == [expected] * 3


def test_a_disk_that_is_too_small_is_refused_first(tmp_path, source, monkeypatch):
    """4 bytes a token: 30B tokens and a split of 20% beside them need 150 GB, unless the source has less text."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, 10))
    size = sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(ValueError, match=f"out: the tokens need about {size / 1e9:.3g} GB, but 1e-08 GB are free"):
        prepare(tmp_path / "out", [source], **OPTIONS | {"max_tokens": 30 * 10**9})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="need about 150 GB"):
        data_module._check_space(tmp_path / "out/in", 30 * 10**9, 0.2, {})


def test_stdlib_gives_the_same_bytes_twice_and_through_the_command(tmp_path, monkeypatch):
    """Timing of threads and the folder have no effect. The text is Python source."""
    monkeypatch.setattr(data_module, "TOKENIZER_BYTES", 500_000)  # of 10 MB, for speed
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 500_000)
    options = {"vocab_size": 300, "sequence_length": LENGTH, "max_tokens": 20_000, "val_fraction": 0.3}
    counts = prepare(tmp_path / "one", ["stdlib"], **options)
    assert counts["train"] == 625
    flags = ["--source", "stdlib", "--vocab-size", "300", "--sequence-length", str(LENGTH)]
    flags += ["--max-tokens", "20K", "--val-fraction", "0.3"]
    result = CliRunner().invoke(app, ["data", str(tmp_path / "two"), *flags])
    assert "two/train: 625 sequences of 32, 20,000 tokens" in result.output
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    tokens, tokenizer = load(tmp_path / "one", "train")
    assert tokenizer.decode(tokens.reshape(-1)).count("\n    ") > 100


def test_training_refuses_text_of_another_length_or_tokenizer(tmp_path, source):
    """Shorter sequences than `max_seq_len` are refused, longer ones are cut; the tokenizers' vocabularies are equal."""
    prepare(tmp_path / "one", [source], **OPTIONS)
    prepare(tmp_path / "two", [source], **OPTIONS | {"vocab_size": 290})
    data = {name: f"variables.data={tmp_path / name}" for name in ("one", "two")}
    for length in (LENGTH, LENGTH // 2):
        load_config("yamls/quickstart.yaml", [data["one"], f"max_seq_len={length}"], check_data=True)
    message = (
        rf"train_loader: .*one has sequences of {LENGTH} tokens, but max_seq_len is {LENGTH + 1}; .*--sequence-len"
    )
    with pytest.raises(ValueError, match=message):
        load_config("yamls/quickstart.yaml", [data["one"], f"max_seq_len={LENGTH + 1}"], check_data=True)
    mixed = [data["one"], f"max_seq_len={LENGTH}", f"eval_loader.dataset.local={tmp_path / 'two'}"]
    with pytest.raises(
        ValueError, match=r"eval_loader: .*two was prepared with another tokenizer than .*one/tokenizer;"
    ):
        load_config("yamls/quickstart.yaml", mixed, check_data=True)
    # The same vocabulary in other words is no error: transformers rewrites a tokenizer.json that it saves.
    prepare(
        tmp_path / "again", [source], **OPTIONS | {"vocab_size": None, "tokenizer": str(tmp_path / "one/tokenizer")}
    )
    rewritten = tmp_path / "again/tokenizer/tokenizer.json"
    rewritten.write_text(json.dumps(json.loads(rewritten.read_text())))
    mixed[-1] = f"eval_loader.dataset.local={tmp_path / 'again'}"
    load_config("yamls/quickstart.yaml", mixed, check_data=True)
    # Neither is a manifest of another program, or a length that is no number, which others refuse.
    (tmp_path / "two/manifest.json").write_text("[]")
    mixed[1:] = ["max_seq_len=abc", f"eval_loader.dataset.local={tmp_path / 'two'}"]
    load_config("yamls/quickstart.yaml", mixed, check_data=True)


def test_command_prints_one_line_for_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    result = CliRunner().invoke(app, ["data", str(tmp_path / "out"), "--source", str(tmp_path)])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert result.output.strip().count("\n") == 0
    assert "a.txt is not UTF-8: byte 0xff at offset 0" in result.output
