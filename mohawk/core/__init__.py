"""What knows nothing of models: files and folders, processes, signals, devices, the terminal."""
