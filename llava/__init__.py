"""The LLaVA-1.5 stack on stock transformers: it knows nothing of tasks, streams or forgetting."""

import logging

# bitsandbytes misses a kernel for quantised models on a CPU whenever it is imported, and nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
