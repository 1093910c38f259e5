"""Level 9: the HTTP server. OpenAI's API over one engine thread; everything else is asyncio."""
