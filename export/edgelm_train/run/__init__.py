"""One training run: its data, its loop, its measurements, its folder and its report."""
