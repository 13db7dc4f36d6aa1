"""What is trained: sizes, students, losses, adapters, prefixes."""
