"""Other people's layouts of hybrids: Bamba's and those of released checkpoints."""
