"""Where a checkpoint comes from and what is done to it before it is exported."""
