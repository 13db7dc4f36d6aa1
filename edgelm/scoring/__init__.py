"""Logits become numbers: scores, choices, perplexity, embeddings, and the comparison of two models."""
