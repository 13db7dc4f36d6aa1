"""The models that are trained: their sizes, students of a teacher, adapters and prefixes."""
