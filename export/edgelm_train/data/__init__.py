"""Text files and records become token ids in batches."""
