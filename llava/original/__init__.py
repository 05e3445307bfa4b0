"""The layout of the original LLaVA code, and transformers' folders of it: read, written, turned into each other."""
