"""Writing GGUF: a model's tensors streamed into files that llama.cpp loads."""
