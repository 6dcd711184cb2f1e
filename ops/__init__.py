"""How hosts are operated: status, doctor, GPU, logs, jobs, lifecycle and settings."""
