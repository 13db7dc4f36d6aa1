"""edgelm beside its peers: OpenVINO GenAI, llama.cpp, onnxruntime-genai, CTranslate2, optimum and transformers."""
