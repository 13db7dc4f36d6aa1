"""Numbers become pictures: a self-contained page, an SVG, and the files that the page and the playground share."""
