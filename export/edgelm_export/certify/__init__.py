"""Measures what a bundle lost against its source, judges it, and writes it down."""
