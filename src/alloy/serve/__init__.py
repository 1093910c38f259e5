"""Level 9: the HTTP server. OpenAI's API in asyncio; the engine is in a process of its own."""
