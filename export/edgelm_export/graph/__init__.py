"""Stored matrices become the lean ONNX graph."""
