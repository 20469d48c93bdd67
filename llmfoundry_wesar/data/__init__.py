"""Text to tokens: documents, a tokenizer and shards, and the evaluation sets."""
