"""Read-only queries of a host: facts, GPUs, jobs, logs."""
