"""Logits become token ids: options, processors, sampling, searches, the loop.

This room knows neither text nor ONNX Runtime.
"""
