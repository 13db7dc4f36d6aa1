"""Float weights become stored matrices of few bits."""
