"""Text, chats and records, as rows of tokens."""
