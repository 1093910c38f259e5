"""Hugging Face checkpoint folders: config.json (`config`), tensor names (`names`), safetensors (`files`), folders (`folder`)."""
