"""Token ids become logits. The only room that imports ONNX Runtime."""
