"""SFT, GRPO, and what surrounds them: prompts, adapters, monitoring, export."""
