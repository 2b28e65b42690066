"""The real model: SmolLM2-135M-Instruct, converted from the GGUF that a package carries."""
