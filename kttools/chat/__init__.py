"""Chat: a conversation over one KV cache, and the terminal it is typed into."""
