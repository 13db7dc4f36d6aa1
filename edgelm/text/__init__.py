"""Text becomes token ids and token ids become text: the tokenizer, streams of whole characters, stop strings."""
