"""Continual instruction tuning: streams, parameter pools, methods. Knows nothing of prompts, images or scoring."""
