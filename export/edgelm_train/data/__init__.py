"""From text files and files of records to token ids in batches."""
