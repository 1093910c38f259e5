"""Level 5: generation with a cache, used by chat, evaluation, rollouts and the server alike."""
