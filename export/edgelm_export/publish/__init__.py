"""A finished bundle becomes a folder: the model card, the prefix, the atomic rename."""
