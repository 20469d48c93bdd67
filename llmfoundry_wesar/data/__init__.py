"""Turn text into a tokenizer and token shards, and read the evaluation sets."""
