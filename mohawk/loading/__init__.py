"""Models from folders and hubs, adapters on them, and what they are."""
