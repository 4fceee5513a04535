"""Hugging Face folders, safetensors and GGUF files: one table of names per family."""
