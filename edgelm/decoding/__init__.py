"""Logits become token ids: options, processors, sampling, searches, loop. It knows neither text nor ONNX Runtime."""
