"""Corpora, tokenizers, the batch order, and the batches of a training step."""
