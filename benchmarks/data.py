"""Measure the speed of `llmfoundry-wesar data`, from text to token shards, by the processor time of all its threads."""

import json
import resource
import sysconfig
import tempfile
from pathlib import Path

from benchmarks.record import Recorder
from benchmarks.sizes import load
from llmfoundry_wesar.data.shards import prepare

_BYTES, _PAPER = 8_000_000, 30e9  # bytes of text to measure with; tokens of the paper


def _seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def run(recorder: Recorder, size: str, compiled: bool, seconds: float) -> None:
    """Measure one size's sequence length and vocabulary, on the source of the standard library."""
    if compiled:
        return
    config = load(size, "wesar")
    with tempfile.TemporaryDirectory() as folder:
        text, left = Path(folder, "text.jsonl"), _BYTES
        with text.open("w") as file:
            for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
                document = source.read_text(errors="ignore")[:left]
                file.write(json.dumps({"text": document}) + "\n")
                left -= len(document)
        options = {"sequence_length": config["max_seq_len"], "vocab_size": max(500, config["model"]["vocab_size"])}
        prepare(Path(folder, "first"), [str(text)], val_fraction=0, **options)  # trains the tokenizer
        start = _seconds()
        options = {"sequence_length": config["max_seq_len"], "tokenizer": str(Path(folder, "first", "tokenizer"))}
        splits = prepare(Path(folder, "second"), [str(text)], val_fraction=0, **options)
        elapsed = _seconds() - start
    tokens = sum(splits.values()) * config["max_seq_len"]
    recorder.about(dtype="int32", shape=f"{_BYTES - left} bytes, S={config['max_seq_len']}", compiled=False)
    recorder.add([tokens / elapsed], variant="data", unit="tokens/s a core")
    recorder.add([(_BYTES - left) / elapsed], variant="data", unit="bytes/s a core")
    recorder.add([_PAPER / tokens * elapsed / 3600], variant="data", unit="core hours for 30B tokens", note="derived")
