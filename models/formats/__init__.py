"""Other people's layouts of hybrids: Bamba's, Granite 4's, Qwen3.5's, and those of released checkpoints."""
