"""Hugging Face checkpoint folders: config.json (`config`), tensor names (`names`), safetensors (`files`), weights (`folder`)."""
