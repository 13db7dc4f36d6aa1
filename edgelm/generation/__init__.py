"""A prompt becomes text and chunks of text, with statistics."""
