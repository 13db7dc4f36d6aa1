"""Fuzzing: readers of untrusted files get mutated inputs. ``python -m tests.fuzz --help`` runs long ones."""
