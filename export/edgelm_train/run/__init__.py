"""One training run: the loop, what happens beside it, its folder and its report."""
