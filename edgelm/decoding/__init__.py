"""Logits become token ids: options, processors, sampling, searches, the loop. It knows neither text nor ONNX Runtime."""
