"""Studies of what sharing KV heads saves and what it costs; each is a module of its own."""
