"""Level 3: where a model runs. One device mesh, FSDP2 sharding."""
