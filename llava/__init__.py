"""The LLaVA-1.5 stack on stock transformers: it knows nothing of tasks, streams or forgetting."""
